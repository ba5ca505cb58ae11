"""The engine's part of the GPU check: recorded steps against eager ones, waits for the device, speed at real shapes.

Every function takes a `Scale`; `DRY` is small enough for a CPU, so that tests run every line of what CUDA runs.
"""

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.decode import speed
from benchmarks.decode.rivals import COMPILED, side
from benchmarks.decode.sides import Sampling, twin
from benchmarks.decode.speed import Case, Subject
from benchmarks.support.bandwidth import read_bandwidth
from benchmarks.support.shapes import build, config_of, sizes
from handloom import Engine, SamplingParams

PROMPTS = [[3, 5, 7, 9, 11], [1] * 17, [4], [2, 3] * 20, [9, 8, 7, 6, 5, 4, 3, 2, 1], [5] * 23]
EVERYTHING = {
    "temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1,
    "presence_penalty": 0.1, "frequency_penalty": 0.1, "seed": 1, "logprobs": 1,
}  # fmt: skip
# One set of rules with other values for every row: each set is a kernel of its own, which takes seconds to compile.
ALIKE = [
    SamplingParams(max_new_tokens=12),
    SamplingParams(max_new_tokens=7, n=2, **EVERYTHING),
    SamplingParams(max_new_tokens=15, **EVERYTHING | {"temperature": 0.0, "logprobs": 2}),
    SamplingParams(max_new_tokens=9, **EVERYTHING | {"top_k": 20, "seed": 4}),
    SamplingParams(max_new_tokens=11, **EVERYTHING | {"temperature": 1.2, "frequency_penalty": 0.5}),
    SamplingParams(max_new_tokens=40, stop_token_ids=tuple(range(40)), **EVERYTHING | {"seed": 6}),
]
MIXED = [
    SamplingParams(temperature=1.0, top_k=20, top_p=0.9, max_new_tokens=7, seed=2),
    SamplingParams(temperature=1.2, mirostat=2, max_new_tokens=11, seed=5),
    SamplingParams(temperature=1.0, dry_multiplier=0.8, max_new_tokens=9, seed=7),
]
CHAIN = Sampling(temperature=0.8, top_k=50, top_p=0.95)


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Args:
        small, large: shapes, see `shapes.SHAPES`. architectures: of the tests, whose recorded steps are compared.
        prompt, new: tokens of a prompt and its answer. few: of an answer of a slow side.
        contexts: lengths before the answer. rows: of a large batch; requests: ragged ones that share it.
        quantised: batches at which 4 bits are compared.
    """

    device: str
    small: str
    large: str
    dtype: torch.dtype
    architectures: tuple[str, ...]
    prompt: int = 128
    new: int = 96
    few: int = 24
    contexts: tuple[int, ...] = (256, 2048, 8192, 32768)
    rows: int = 64
    requests: int = 192
    quantised: tuple[int, ...] = (1, 4, 16, 64)

    @property
    def on_cuda(self) -> bool:
        """Whether there is a device to wait for."""
        return self.device == "cuda"


FULL = Scale(
    "cuda", "Llama-3.2-1B", "Llama-3.1-8B", torch.bfloat16,
    ("llama", "gemma2", "gpt_oss", "mixtral", "bloom", "deepseek_v3", "jamba"),
)  # fmt: skip
DRY = Scale(
    "cpu", "tiny", "tiny", torch.float32, ("llama",),
    prompt=8, new=6, few=3, contexts=(16,), rows=2, requests=4, quantised=(1, 3),
)  # fmt: skip


# -- checks: each yields one text a failure


def recorded_steps(scale: Scale) -> Iterator[str | None]:
    """Tokens of recorded steps equal those of eager steps on the same device, over architectures."""
    from architectures import ARCHITECTURES

    for name in scale.architectures:
        model = ARCHITECTURES[name]().to(scale.device)
        if type(model)._can_set_experts_implementation():
            model.set_experts_implementation("batched_mm")  # the default reads sizes on the host in float32
        yield from same_tokens(name, model, PROMPTS, ALIKE)


def recorded_rules(scale: Scale) -> Iterator[str | None]:
    """The same for rules with memory, and rows whose rules differ."""
    from architectures import ARCHITECTURES

    yield from same_tokens("llama", ARCHITECTURES["llama"]().to(scale.device), PROMPTS[:3], MIXED)


def same_tokens(name: str, model, prompts, params) -> Iterator[str | None]:
    """Differences between eager and recorded steps; None where a turn shows none."""
    eager = Engine(model, slots=3, graph=False).generate(prompts, params, progress=False)
    yield None
    engine = Engine(model, slots=3, graph=True)
    for turn in range(2):
        for want, have in zip(eager, engine.generate(prompts, params, progress=False), strict=True):
            if (want.token_ids, want.finish_reason) != (have.token_ids, have.finish_reason):
                where = f"{name}, turn {turn}, request {have.request}"
                yield f"{where}: {want.token_ids} {want.finish_reason} != {have.token_ids} {have.finish_reason}"
        yield None
    for batch in engine._batches.values():
        yield from (f"{name}: a step was not recorded: {reason}" for reason in batch.refused.values())
    engine.pool.check()


def compiled_steps(scale: Scale) -> Iterator[str]:
    """A compiled and recorded step draws what the eager one draws, in float32, and is compiled once a batch size."""
    from architectures import ARCHITECTURES

    model = ARCHITECTURES["llama"]().to(scale.device)
    want = Engine(model, slots=2, graph=False).generate(PROMPTS, ALIKE, progress=False)
    engine = Engine(model, slots=2, graph=scale.on_cuda, compile=True)
    if engine.runner.compiled is None:
        yield "the step was not compiled"
        return
    for turn in range(2):
        for a, b in zip(want, engine.generate(PROMPTS, ALIKE, progress=False), strict=True):
            if a.token_ids != b.token_ids:
                yield f"turn {turn}, request {b.request}: {a.token_ids} != {b.token_ids}"
    if engine.runner.compiled.refused:
        yield engine.runner.compiled.refused


@contextmanager
def waits_are(mode: str, on_cuda: bool):
    """What torch does where the host waits for the device: nothing on a CPU."""
    if not on_cuda:
        yield
        return
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def silent_steps(scale: Scale) -> Iterator[str]:
    """No host sync in the decode loop: the steps between two admissions run with syncs made errors."""
    engine = Engine(build(scale.small, scale.dtype, scale.device), slots=4, graph=True)
    rows, steps = PROMPTS[:4], 3 * scale.few
    for _ in range(2):  # the second time blocks are reused, which have to be cleared
        events = engine.stream(rows, max_new_tokens=16 + steps, ignore_eos=True, **EVERYTHING)
        for _ in range(4 * 12):  # admission, warm-up and recording
            next(events)
        try:
            with waits_are("error", scale.on_cuda):
                for _ in range(4 * steps):
                    next(events)
        except RuntimeError as error:
            yield f"the decode loop waits for the device: {error}"
        finally:
            events.close()


def waits_of_replacement(scale: Scale) -> Iterator[dict]:
    """How often the host waits for the device in a run in which every slot is taken over twice: a figure, no check."""
    engine = Engine(build(scale.small, scale.dtype, scale.device), slots=4, graph=True)
    prompts = [[*p, n] for n in range(2) for p in PROMPTS]

    def run():
        engine.generate(
            prompts, max_new_tokens=scale.few, ignore_eos=True, progress=False, temperature=1.0, seed=0
        )

    run()
    with warnings.catch_warnings(record=True) as heard, waits_are("warn", scale.on_cuda):
        warnings.simplefilter("always")
        run()
    waits = sum("synchroniz" in str(w.message).lower() for w in heard)
    yield {"figure": "waits an admission", "value": waits / len(prompts), "requests": len(prompts)}


# -- timings: each yields rows


@contextmanager
def subject(scale: Scale, name: str):
    """A model with random weights, on the device while the block runs."""
    model = build(name, scale.dtype, scale.device)
    try:
        yield Subject(name, model, sizes(config_of(name), scale.dtype))
    finally:
        del model
        gc.collect()
        if scale.on_cuda:
            torch.cuda.empty_cache()


def row_of(
    about: Subject, case: Case, name: str, repeats: int = 1, sampling=None, counted: bool = False
) -> dict:
    """One side on one case; what it cannot do says why in `skipped`."""
    row = {
        "benchmark": "decode/ragged" if case.requests else "decode/speed",
        "case": case.name,
        **about.about(),
    }
    row |= {"batch": case.batch, "context": case.context, "new_tokens": case.new, "side": name}
    row |= {} if sampling is None else {"mode": "sampling"}
    started, made = time.monotonic(), None
    try:
        made = side(name, about.model, case.batch, case.context + case.new)
        made.timeline(case.workload(about, -1), sampling)
        row["first_run_s"] = time.monotonic() - started
        lines = [made.timeline(case.workload(about, turn), sampling) for turn in range(1, repeats + 1)]
        row |= speed.summary(lines)
        row |= speed.share(row["tpot_p50_ms"], about.sized, case, bandwidth(about.model.device.type))
        row |= speed.calls(about, case, made) if counted else {}
    except speed.FAILURES as error:
        row["skipped"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300]
    finally:
        if made is not None:
            made.close()
        if name in COMPILED:
            torch.compiler.reset()
    return row


_measured: dict[str, float] = {}


def bandwidth(device: str) -> float:
    """Bytes a second that the device reads, measured once a run."""
    if device not in _measured:
        _measured[device] = read_bandwidth(device)
    return _measured[device]


def gaps(engine: Engine, prompts, new: int, **params) -> float:
    """Median time between two tokens of a request, in milliseconds."""
    moments: dict[int, list[float]] = {}
    for event in engine.stream(prompts, max_new_tokens=new, ignore_eos=True, **params):
        if event.finish == "error":
            raise RuntimeError(event.generation.error)
        moments.setdefault(event.request, []).append(time.perf_counter())
    return 1e3 * float(np.median(np.concatenate([np.diff(m) for m in moments.values()])))


def overhead(scale: Scale, about: Subject, batch: int) -> dict:
    """What everything switched on adds to the greedy step of one engine, in turns."""
    engine = Engine(twin(about.model), slots=batch)
    prompts = [[(7 * i + 13 * b) % 500 + 3 for i in range(scale.prompt)] for b in range(batch)]
    times: dict[str, list[float]] = {"greedy": [], "everything": []}
    for turn in range(4):
        for mode, params in (("greedy", {}), ("everything", EVERYTHING)):
            taken = gaps(engine, prompts, scale.new, **params)
            if turn:  # the first round records the steps
                times[mode].append(taken)
    added = statistics.median(b / a - 1 for a, b in zip(times["greedy"], times["everything"], strict=True))
    return {
        "figure": f"everything on, {about.name}, batch {batch}", "model": about.name, "batch": batch,
        "greedy_ms": min(times["greedy"]), "everything_ms": min(times["everything"]), "value": added,
    }  # fmt: skip


def steps(scale: Scale, name: str) -> Iterator[dict]:
    """One row: this engine, compiled and not, the hand-written loop, `generate` in both its forms; then sampling."""
    with subject(scale, name) as about:
        short, slow = Case(1, scale.prompt, scale.new), Case(1, scale.prompt, scale.few)
        yield row_of(about, short, "handloom", repeats=2, counted=name == scale.small)
        yield overhead(scale, about, 1)
        yield row_of(about, slow, "generate")
        yield row_of(about, slow, "loop")
        yield row_of(about, short, "handloom compile", repeats=2)
        yield row_of(about, short, "generate static+compile", repeats=2)
        yield row_of(about, short, "handloom", sampling=CHAIN)
        yield row_of(about, slow, "generate", sampling=CHAIN)


def small_steps(scale: Scale) -> Iterator[dict]:
    """The small model."""
    yield from steps(scale, scale.small)


def large_steps(scale: Scale) -> Iterator[dict]:
    """The large model."""
    yield from steps(scale, scale.large)


def many_rows(scale: Scale) -> Iterator[dict]:
    """A large batch, and ragged requests that replace each other in it, against continuous batching."""
    with subject(scale, scale.small) as about:
        yield overhead(scale, about, scale.rows)
        ragged = Case(scale.rows, 4 * scale.prompt, scale.new, requests=scale.requests)
        for name in ("handloom", "generate_batch"):
            yield row_of(about, ragged, name)
        yield row_of(about, Case(scale.rows, scale.prompt, scale.few), "generate")


def contexts(scale: Scale) -> Iterator[dict]:
    """Time per token over the length of the context."""
    with subject(scale, scale.large) as about:
        for context in scale.contexts:
            yield row_of(about, Case(1, context, scale.few), "handloom")


def four_bits(scale: Scale) -> Iterator[dict]:
    """Steps of the small model in its own dtype, in bitsandbytes' nf4, and in nf4 with our product."""
    variants: dict[str, Callable] = {"dense": lambda m: m, "nf4": quantised, "nf4-triton": with_our_products}
    for name, change in variants.items():
        with subject(scale, scale.small) as about:
            engine_of = change(about.model)
            for batch in scale.quantised:
                engine = Engine(engine_of, slots=batch)
                prompts = [[(7 * i + b) % 500 + 3 for i in range(scale.prompt)] for b in range(batch)]
                gaps(engine, prompts, scale.few)
                yield {
                    "figure": f"{name}, batch {batch}", "model": about.name, "batch": batch, "weights": name,
                    "value": gaps(engine, prompts, scale.few), "recorded": sum(
                        len(b.programs) for b in engine._batches.values()),
                }  # fmt: skip


def quantised(model):
    """The model's linear layers but the output in bitsandbytes' nf4."""
    import bitsandbytes

    for name, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and layer is not model.get_output_embeddings():
            shape = layer.in_features, layer.out_features
            made = bitsandbytes.nn.Linear4bit(
                *shape, bias=False, compute_dtype=layer.weight.dtype, quant_type="nf4"
            )
            made.load_state_dict({"weight": layer.weight.cpu()})
            model.set_submodule(name, made.to(layer.weight.device).eval())
    model.is_quantized = True
    return model


def with_our_products(model):
    """The same with our product."""
    from handloom.loading.fourbit import own_products

    own_products(quantised(model))
    return model
