"""Timings of single kernels at the shapes that the aims are about; `python -m benchmarks.kernels` has the rest."""

import functools
from collections.abc import Iterator

import torch

from benchmarks.gpu.scale import Scale
from benchmarks.kernels import attention as kernels_attention
from benchmarks.kernels import nf4 as kernels_nf4
from benchmarks.kernels import sampling as kernels_sampling
from benchmarks.kernels import timing as kernels_timing
from benchmarks.kernels import varlen as kernels_varlen
from handloom.kernels.layer.gated import gated
from handloom.kernels.linear.few_rows import few_rows_linear

# Rows, new tokens of each, cells of each: packed prompts, a later chunk of a long one, decoding.
VARLEN = (
    (8, 256, 256),
    (64, 32, 32),
    (1, 2048, 2048),
    (1, 2048, 10240),
    (1, 1, 2048),
    (1, 1, 32768),
    (64, 1, 2048),
)


def sampling_timings(scale: Scale) -> Iterator[dict]:
    """Every setting that an aim is about, typical and flat rows, warm: device time of a call in a replayed graph."""
    batches = (1, 8, 64, 256) if scale.on_cuda else (1,)
    vocab, kind = (151936, "bf16") if scale.on_cuda else (512, "fp32")
    cells = [
        (mode, "typical", batch)
        for mode in ("k+p+min-p", "everything", "p", "temperature")
        for batch in batches
    ]
    cells += [(mode, "flat", batch) for mode in ("p", "k+p+min-p") for batch in batches]
    for mode, rows, batch in cells:
        yield from kernels_sampling.measure(
            mode, rows, batch, vocab, kind, scale.device, ["handloom"], 9,
            caches=("warm",), budget=1.0, alone=scale.alone,
        )  # fmt: skip
    yield from seed_timings(scale)


def sampling_peers(scale: Scale) -> Iterator[dict]:
    """The same calls beside what others make of them: transformers, and whoever is installed."""
    batches = (1, 8, 64, 256) if scale.on_cuda else (1,)
    vocab, kind = (151936, "bf16") if scale.on_cuda else (512, "fp32")
    for mode in ("k+p+min-p", "p", "temperature"):
        for batch in batches:
            yield from kernels_sampling.measure(
                mode, "typical", batch, vocab, kind, scale.device,
                ["handloom", "transformers", "flashinfer", "vllm"], 9,
                caches=("warm", "cold") if mode == "k+p+min-p" else ("warm",), budget=2.0, alone=scale.alone,
            )  # fmt: skip


def seed_timings(scale: Scale) -> Iterator[dict]:
    """One call with a seed of its own for every row, and with one seed for all."""
    from handloom.kernels.sampling.sample import sample

    rows, vocab = (64, 128256) if scale.on_cuda else (2, 512)
    logits = torch.randn(rows, vocab, device=scale.device).to(scale.dtype)
    count = torch.arange(rows, device=scale.device)
    keys = {"handloom": count, "one seed": torch.zeros_like(count)}

    def build(seeds, inputs):
        return lambda: sample(inputs, seeds=seeds, positions=count)

    builders = {name: functools.partial(build, seeds) for name, seeds in keys.items()}
    about = {"benchmark": "kernels/seeds", "batch": rows, "vocab": vocab}
    yield from kernels_timing.measure(
        builders,
        logits,
        logits.nbytes,
        device=scale.device,
        caches=("warm",),
        repeats=15,
        budget=3.0,
        about=about,
        alone=scale.alone,
    )


def attention_timings(scale: Scale) -> Iterator[dict]:
    """Decode attention of one layer at the shapes of Llama 1B and 8B."""
    heads = ("32/8x128", "32/8x64") if scale.on_cuda else ("4/2x16",)
    grid = ((1, 2048), (1, 32768), (64, 2048)) if scale.on_cuda else ((1, 40),)
    for text in heads:
        for batch, context in grid:
            yield from kernels_attention.measure(
                kernels_attention.parse_heads(text), "ragged" if batch > 1 else "even", batch, context,
                "bf16" if scale.on_cuda else "fp32", scale.device, list(kernels_attention.SIDES), 9,
                caches=("cold",), budget=2.0, alone=scale.alone,
            )  # fmt: skip


def varlen_timings(scale: Scale) -> Iterator[dict]:
    """Attention of packed prompts and of decoding over paged cells: our kernels beside torch's `varlen_attn`."""
    if reason := kernels_varlen.missing(scale.device):
        yield {"benchmark": "kernels/varlen", "side": "varlen_attn", "skipped": reason}
        return
    from torch.nn.attention.varlen import varlen_attn

    heads = kernels_attention.parse_heads("32/8x128")
    for rows, queries, context in VARLEN:
        yield from kernels_varlen.measure(
            heads, rows, queries, context, "bf16", scale.device, varlen_attn,
            caches=("cold",), repeats=9, budget=2.0, alone=scale.alone,
        )  # fmt: skip


PRODUCTS = {  # outputs side by side, inputs, gate
    "8B qkv": ((4096, 1024, 1024), 4096, None),
    "8B o": ((4096,), 4096, None),
    "8B gate and up": ((14336, 14336), 4096, "silu"),
    "8B down": ((4096,), 14336, None),
    "8B output": ((128256,), 4096, None),
    "1B qkv": ((2048, 512, 512), 2048, None),
    "1B gate and up": ((8192, 8192), 2048, "silu"),
    "1B down": ((2048,), 8192, None),
}


def few_row_timings(scale: Scale) -> Iterator[dict]:
    """Products of few rows: our kernel over weights side by side, and what plain layers and our gate launch."""
    products = (
        PRODUCTS if scale.on_cuda else {"tiny": ((32, 16, 16), 64, None), "gate": ((48, 48), 64, "silu")}
    )
    for name, (sizes, inputs, gate) in products.items():
        for batch in (1, 2, 4, 8) if scale.on_cuda else (1, 3):
            weights = [
                torch.randn(n, inputs, device=scale.device).to(scale.dtype) / inputs**0.5 for n in sizes
            ]
            x = torch.randn(batch, inputs, device=scale.device).to(scale.dtype)
            about = {"benchmark": "kernels/few_rows", "layer": name, "batch": batch}
            builders = {
                "handloom": functools.partial(_few_rows, gate),
                "plain": functools.partial(_plain_products, gate),
            }
            yield from kernels_timing.measure(
                builders, (x, weights), sum(w.nbytes for w in weights), device=scale.device, caches=("cold",),
                repeats=9, budget=2.0, about=about, alone=scale.alone,
            )  # fmt: skip


def _few_rows(gate, given):
    x, weights = given
    return lambda: few_rows_linear(x, weights, gate=gate)


def _plain_products(gate, given):
    x, weights = given

    def run():
        parts = [torch.nn.functional.linear(x, weight) for weight in weights]
        return gated(*parts, gate) if gate else parts

    return run


def nf4_timings(scale: Scale) -> Iterator[dict]:
    """Single layers: our kernel of 4 bits, ours of 8, bitsandbytes' of 4, dense."""
    layers = ("8B gate_proj", "8B down_proj") if scale.on_cuda else ("64x128",)
    for name in layers:
        for batch in scale.quantised:
            yield from kernels_nf4.measure(
                name, kernels_nf4.parse_layer(name), batch, "bf16" if scale.on_cuda else "fp32", scale.device,
                ["handloom", "handloom int8", "bitsandbytes", "dense"], 9, caches=("cold",), budget=2.0,
                alone=scale.alone,
            )  # fmt: skip
