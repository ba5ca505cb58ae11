"""Sampling against the transformers chain and plain torch, both sides in one run; see --help."""

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from transformers.generation import logits_process as hf

if not __package__:  # run as a file: this folder must not be where `import kernels` looks
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks.common import RESULTS, in_turn, median_ratio, record, show
from handloom.kernels import rules
from handloom.kernels.draw import draw
from handloom.kernels.sample import sample
from handloom.kernels.sample_reference import apply_edits

MODES = ("greedy", "temperature", "k", "p", "min-p", "k+p+min-p", "everything")
ROWS = ("typical", "flat", "ties")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEMPERATURE, TOP_K, TOP_P, MIN_P, PENALTY, HISTORY = 0.8, 50, 0.95, 0.05, 1.2, 256
COLUMNS = {
    "mode": "mode",
    "rows": "rows",
    "batch": "B",
    "vocab": "V",
    "dtype": "dtype",
    "side": "side",
    "cache": "cache",
    "p20": "p20 us",
    "p50": "p50 us",
    "p80": "p80 us",
    "ratio": "theirs / ours",
    "launches": "launches",
    "passes": "passes",
    "bytes_read": "bytes",
    "floor_share": "x floor",
}
BANDWIDTH = 4.3e12  # bytes a second that an H200 reads; the floor is one read of the logits


def logits_of(kind, batch, vocab, dtype, device, seed=0):
    """Rows of one kind: a power law, almost equal values, or whole numbers with many ties."""
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(batch, vocab, generator=g)
    if kind == "typical":
        normal = -1.2 * torch.log(
            torch.stack([torch.randperm(vocab, generator=g) + 1.0 for _ in range(batch)])
        )
    else:
        normal = normal * 1e-3 if kind == "flat" else (normal * 2).round()
    return normal.to(device, dtype)


def history_edits(batch, vocab, device):
    """(history [B, HISTORY], SparseEdits of a repetition penalty on it)."""
    history = torch.randint(0, vocab, (batch, HISTORY), generator=torch.Generator().manual_seed(1))
    start = torch.zeros(batch, dtype=torch.int64)
    ids, seen, counts = rules.count_tokens(history, (start, start), (start + HISTORY, start))
    one = torch.ones(batch)
    edits = rules.SparseEdits(
        *(ids, torch.zeros(ids.shape), seen, counts, PENALTY * one, 0 * one, 0 * one),
        rules.touched_bits(ids, vocab),
    )
    return history.to(device), rules.SparseEdits(*(part.to(device) for part in edits))


def ours(mode, logits) -> Callable[[], object]:
    """Our call for a mode; on CUDA with its buffers kept, as a decode loop keeps them."""
    batch, vocab = logits.shape
    device = logits.device

    def value(number):
        return torch.full((batch,), float(number), device=device)

    zero = torch.zeros(batch, dtype=torch.int64, device=device)
    settings = {"seeds": zero + 7, "positions": zero + 11, "streams": zero}
    settings["temperature"] = value(0.0 if mode == "greedy" else TEMPERATURE)
    all_rules = (rules.top_k(value(TOP_K)), rules.top_p(value(TOP_P)), rules.min_p(value(MIN_P)))
    several = mode in ("k+p+min-p", "everything")
    settings["rules"] = (
        all_rules
        if several
        else {"k": all_rules[:1], "p": all_rules[1:2], "min-p": all_rules[2:]}.get(mode, ())
    )
    if mode == "everything":
        settings |= {"edits": history_edits(batch, vocab, device)[1], "logprobs": True}
        settings["bitmask"] = rules.pack_mask(torch.arange(vocab, device=device).expand(batch, -1) % 97 != 0)
    if device.type == "cuda":
        from handloom.kernels.sample_fused import Plan, sample_fused

        plan = Plan(
            logits, rules=settings["rules"], edits=settings.get("edits"), logprobs=mode == "everything"
        )
        settings["rules"] = plan.rules
        return lambda: sample_fused(logits, plan=plan, **settings)
    return lambda: sample(logits, **settings)


def transformers_chain(mode, logits) -> Callable[[], object]:
    """What `generate` does with these settings: float32 copy, processors, softmax, multinomial."""
    batch, vocab = logits.shape
    if mode == "greedy":
        return lambda: logits.float().argmax(dim=-1)
    several = mode in ("k+p+min-p", "everything")
    chain = [hf.TemperatureLogitsWarper(TEMPERATURE)]
    chain += [hf.TopKLogitsWarper(TOP_K)] if mode == "k" or several else []
    chain += [hf.TopPLogitsWarper(TOP_P)] if mode == "p" or several else []
    chain += [hf.MinPLogitsWarper(MIN_P)] if mode == "min-p" or several else []
    ids = torch.zeros(batch, 1, dtype=torch.int64, device=logits.device)
    if mode == "everything":
        ids = history_edits(batch, vocab, logits.device)[0]
        banned = list(range(0, vocab, 97))
        chain = [
            hf.RepetitionPenaltyLogitsProcessor(PENALTY),
            hf.SuppressTokensLogitsProcessor(banned),
            *chain,
        ]

    def run():
        scores = logits.to(torch.float32, copy=True)
        for processor in chain:
            scores = processor(ids, scores)
        tokens = torch.multinomial(torch.softmax(scores, dim=-1), 1)
        if mode != "everything":
            return tokens
        return tokens, torch.log_softmax(logits.float(), -1).gather(1, tokens), torch.log_softmax(scores, -1)

    return run


def plain_torch(mode, logits) -> Callable[[], object]:
    """Our rules as whole-row torch operations and the seeded draw: what runs where nothing is fused."""
    from handloom.kernels.sample_reference import truncate

    batch = logits.shape[0]
    zero = torch.zeros(batch, dtype=torch.int64, device=logits.device)
    value = torch.ones(batch, device=logits.device)
    all_rules = (rules.top_k(value * TOP_K), rules.top_p(value * TOP_P), rules.min_p(value * MIN_P))
    chosen = {"k": all_rules[:1], "p": all_rules[1:2], "min-p": all_rules[2:]}.get(mode, ())
    chosen = all_rules if mode in ("k+p+min-p", "everything") else chosen
    edits = history_edits(*logits.shape, logits.device)[1] if mode == "everything" else None

    def run():
        edited = apply_edits(logits, edits=edits)
        if mode == "greedy":
            return edited.argmax(dim=-1)
        return draw(truncate(edited / TEMPERATURE, chosen), zero, zero, kernels="torch")

    return run


def flashinfer_chain(mode, logits) -> Callable[[], object] | None:
    """FlashInfer's sampler where it is installed and has the mode."""
    try:
        from flashinfer import sampling
    except ImportError:
        return None
    if mode == "k+p+min-p":
        return None  # no single call has all three
    scaled = {"k": (TOP_K, 1.0), "p": (logits.shape[1], TOP_P)}.get(mode)
    if mode == "temperature":
        return lambda: sampling.sampling_from_logits(logits.float() / TEMPERATURE)
    if scaled is None:
        return None
    return lambda: sampling.top_k_top_p_sampling_from_logits(logits.float() / TEMPERATURE, *scaled)


SIDES = {
    "handloom": ours,
    "transformers": transformers_chain,
    "torch": plain_torch,
    "flashinfer": flashinfer_chain,
}


def costs(mode, batch, vocab, dtype):
    """Exact counts of our fused path: launches, passes over the logits, bytes of logits and group statistics."""
    element = torch.tensor([], dtype=dtype).element_size()
    planes = 10 if mode == "everything" else 3
    statistics = batch * (vocab // 128) * 4 * planes * 2
    return {"launches": 2, "passes": 1, "bytes_read": batch * vocab * element + statistics}


def seconds_on_cpu(run, calls=5):
    """Median processor seconds of calls in a row: other processes do not count, and caches hold our own data."""
    taken = []
    for _ in range(calls):
        started = time.thread_time()
        run()
        taken.append(time.thread_time() - started)
    return statistics.median(taken)


def graph_timer(build, mode, logits, cold):
    """Seconds of one call inside a replayed CUDA graph; cold calls each read another copy, more than the L2 holds."""
    copies = max(2, int(3e8 // max(logits.numel() * logits.element_size(), 1))) if cold else 1
    calls = min(copies, 64) if cold else 16
    runs = [build(mode, logits.clone() if cold else logits) for _ in range(calls if cold else 1)] * (
        1 if cold else calls
    )
    for run in runs[:2]:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()

    def measure(_turn):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(runs)

    return measure


def timers(mode, logits, sides, cold):
    """Side -> timing function. A side that cannot be captured in a graph is timed eagerly and says so by name."""
    found = {}
    for side in sides:
        if logits.device.type == "cpu":
            run = SIDES[side](mode, logits)
            if run is not None:
                found[side] = lambda _turn, run=run: seconds_on_cpu(run)
            continue
        try:
            found[side] = graph_timer(SIDES[side], mode, logits, cold)
        except (RuntimeError, TypeError):
            torch.cuda.synchronize()
            run = SIDES[side](mode, logits)
            if run is not None:
                found[f"{side} (eager)"] = lambda _turn, run=run: eager_seconds(run)
    return found


def eager_seconds(run):
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(mode, kind, batch, vocab, dtype, device, sides, repeats):
    """Yield one row a side of one setting; sides take turns, so that a slow minute falls on all of them."""
    logits = logits_of(kind, batch, vocab, DTYPES[dtype], device)
    for cold in (False,) if device == "cpu" else (False, True):
        measured = in_turn(timers(mode, logits, sides, cold), repeats)
        floor = logits.numel() * logits.element_size() / BANDWIDTH
        for side, values in measured.items():
            quantiles = np.quantile(values, [0.2, 0.5, 0.8]) * 1e6
            row = {"mode": mode, "rows": kind, "batch": batch, "vocab": vocab, "dtype": dtype, "side": side}
            row |= {"cache": "cold" if cold else "warm", "device": device, "repeats": repeats}
            row["clock"] = "thread" if device == "cpu" else "gpu"
            row |= dict(zip(("p20", "p50", "p80"), quantiles.round(2).tolist(), strict=True))
            if side != "handloom":
                row["ratio"] = round(median_ratio(values, measured["handloom"]), 2)
            elif device != "cpu":
                row |= costs(mode, batch, vocab, DTYPES[dtype])
                row["floor_share"] = round(row["p50"] / (floor * 1e6), 2)
            yield row


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    batch: Annotated[list[int] | None, typer.Option(help="default 1 8, on CUDA 1 8 64 256")] = None,
    vocab: Annotated[list[int] | None, typer.Option(help="default 49152 151936, on CUDA four sizes")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32 or bf16; default fp32, on CUDA both")] = None,
    mode: Annotated[list[str] | None, typer.Option(help=", ".join(MODES))] = None,
    rows: Annotated[list[str] | None, typer.Option(help=", ".join(ROWS))] = None,
    side: Annotated[list[str] | None, typer.Option(help=", ".join(SIDES))] = None,
    repeats: Annotated[int, typer.Option(min=3, help="rounds in which the sides take turns")] = 15,
    output: Annotated[Path, typer.Option(help="rows are appended here")] = RESULTS / "kernels.jsonl",
) -> None:
    """Time sampling: handloom, the transformers chain, plain torch, FlashInfer if it is installed; one thread."""
    torch.set_num_threads(1)
    cuda = device != "cpu"
    sides = ["handloom", *(name for name in (side or SIDES) if name != "handloom")]
    settings = itertools.product(
        batch or ([1, 8, 64, 256] if cuda else [1, 8]),
        vocab or ([32000, 128256, 151936, 262144] if cuda else [49152, 151936]),
        dtype or (["bf16", "fp32"] if cuda else ["fp32"]),
        mode or MODES,
        rows or ROWS,
    )
    for size, width, kind_of_number, one_mode, kind in settings:
        found = measure(one_mode, kind, size, width, kind_of_number, device, sides, repeats)
        show("", COLUMNS, record(list(found), output))


if __name__ == "__main__":
    typer.run(main)
