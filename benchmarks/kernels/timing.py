"""How kernels are timed: sides in turn within a budget, on warm or cold caches, one call inside a replayed graph."""

import copy
import functools
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.kernels.traffic import traffic
from benchmarks.support.bandwidth import read_bandwidth
from benchmarks.support.common import in_turn, median_ratio

Run = Callable[[], object]
Build = Callable[
    [object], Run | None
]  # inputs -> a call on them; None where a side is not installed or has no such mode
OURS = "handloom"
CALLS, LONG_CALL = 5, 0.05  # calls in a row of one measurement; a call of so many seconds is measured alone
GRAPH_BYTES, GRAPH_CALLS = (
    3e8,
    64,
)  # cold calls in a graph each read another copy, together more than any L2 holds
DEFAULT_CACHE = 2**25  # bytes of the last cache where the system does not tell
CACHES = ("warm", "cold")
EAGER = " (eager)"  # what the name of a side ends with that no graph could hold


@dataclass(frozen=True)
class Call:
    """A call whose costs are known.

    Args:
        exact: what `exact` shall say of it; {} where nothing can be counted.
    """

    run: Run
    exact: dict

    def __call__(self):
        return self.run()


class CpuTimer:
    """Processor seconds of one call, median of a few: other processes do not count.

    Args:
        run: the call. evict: what empties the caches before each, or None for calls in a row.
    """

    def __init__(self, run: Run, evict: Run | None = None):
        self.run, self.evict = run, evict

    def __call__(self, _turn: int) -> float:
        taken = []
        while len(taken) < (1 if self.evict else CALLS) and (not taken or taken[0] < LONG_CALL):
            if self.evict:
                self.evict()
            started = time.process_time()
            self.run()
            taken.append(time.process_time() - started)
        return float(np.median(taken))


def evictor() -> Run:
    """A call after which the processor's caches hold nothing of ours: it writes twice the largest of them."""
    buffer = torch.zeros(2 * cache_bytes() // 4)
    return lambda: buffer.add_(1)


def cache_bytes() -> int:
    """Bytes of the first processor's largest cache."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [
        path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(
        (int(text[:-1]) * units[text[-1]] for text in sizes if text[-1:] in units), default=DEFAULT_CACHE
    )


def graph_timer(build: Build, inputs, size: int, cold: bool) -> Callable[[int], float]:
    """Seconds of one call inside a replayed CUDA graph.

    Args:
        size: bytes that one call reads.
    """
    copies = max(2, int(GRAPH_BYTES // max(size, 1)))
    calls = min(copies, GRAPH_CALLS) if cold else 16
    runs = [build(copy.deepcopy(inputs)) for _ in range(calls)] if cold else [build(inputs)] * calls
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


def eager_timer(run: Run) -> Callable[[int], float]:
    """Wall seconds of one call on CUDA, launches included."""

    def measure(_turn):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - started

    return measure


def timers(builders: dict[str, Build], inputs, size: int, device: str, cold: bool) -> dict:
    """Side -> its timing. A side that cannot be captured in a graph is timed eagerly and says so by its name."""
    found, evict = {}, evictor() if cold and device == "cpu" else None
    for side, build in builders.items():
        run = build(inputs)
        if run is None:
            continue
        if device == "cpu":
            found[side] = CpuTimer(run, evict)
            continue
        try:
            found[side] = graph_timer(build, inputs, size, cold)
        except RuntimeError:
            torch.cuda.synchronize()
            found[side + EAGER] = eager_timer(run)
    return found


def rounds(sides: dict, repeats: int, budget: float, clock=time.perf_counter) -> dict[str, list[float]]:
    """Measurements of sides that take turns, after a round that does not count.

    Args:
        sides: each must have run before.
        repeats: most rounds that count. budget: seconds for all rounds, 0 for no limit. Where one round takes
            more than half of it, that round is the measurement.
    """
    started = clock()
    first = in_turn(sides, 1, warmup=0)
    one = clock() - started
    if budget:
        repeats = min(repeats, int((budget - one) / max(one, 1e-9)))
    return in_turn(sides, repeats, warmup=0) if repeats > 0 else first


def measure(
    builders: dict[str, Build],
    inputs,
    size: int,
    *,
    device,
    caches,
    repeats,
    budget,
    about,
    alone=nullcontext,
):
    """Yield a row a side and cache: quantiles in microseconds, our lead, and what can be counted exactly.

    Args:
        builders: side -> its `Build`. inputs: what they take; one call has to read `size` bytes of it.
        about: fields of every row. alone: what keeps others off the device while the sides take turns.
    """
    if device == "cpu":  # built once; on CUDA cold calls need inputs of their own
        built = {side: build(inputs) for side, build in builders.items()}
        builders = {side: lambda _, run=run: run for side, run in built.items()}
    counted = {side: exact(build, inputs, size, device) for side, build in builders.items()}
    for cache in caches:
        sides = timers(builders, inputs, size, device, cache == "cold")
        with alone():
            measured = rounds(sides, repeats, budget)
            ceiling = bandwidth(device) if cache == "cold" else None
        ours = measured.get(OURS, measured.get(OURS + EAGER))
        for side, values in measured.items():
            row = {**about, "side": side, "cache": cache, "device": device, "repeats": len(values)}
            row["clock"] = "process" if device == "cpu" else "gpu"
            quantiles = np.quantile(values, [0.2, 0.5, 0.8]) * 1e6
            row |= dict(zip(("p20", "p50", "p80"), quantiles.round(2).tolist(), strict=True))
            if ours is not None and values is not ours:
                row["ratio"] = round(median_ratio(values, ours), 2)
            if cache == "cold":
                row["bandwidth_share"] = round(size / ceiling / max(row["p50"] / 1e6, 1e-9), 3)
            yield row | counted[side.removesuffix(EAGER)]


@functools.cache
def bandwidth(device: str) -> float:
    """Bytes a second that the device reads, measured once a run."""
    return read_bandwidth(device)


def exact(build: Build, inputs, size: int, device: str) -> dict:
    """What one call of a side does, counted: launches on CUDA, tensor operations, bytes of their operands, passes.

    Operands are counted once an operation: a lower bound of what an operation of several passes (a sort) moves.
    Empty where the work is done outside of torch. The side has run once after this.
    """
    run = build(inputs)
    if run is None:
        return {}
    if isinstance(run, Call):
        run()  # what a side does at its first call alone (bitsandbytes packs its weight) is not timed
    found = dict(run.exact) if isinstance(run, Call) else traffic(run)
    if "bytes_read" in found:
        found["passes"] = round(found["bytes_read"] / size, 1)
    if device != "cpu":
        from benchmarks.decode.counting import device_calls

        found["launches"] = device_calls(run)["launches"]
    return found


def shortage(size: int, device: str) -> str | None:
    """Why so many bytes are too much for the device's free memory, or None."""
    import psutil

    free = psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info()[0]
    return None if size < 0.8 * free else f"needs about {size / 2**30:.0f} GiB of {free / 2**30:.0f} free"
