"""Which products run in our kernel of few rows: those that were measured faster there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from ...kernels import dispatch
from ...kernels.layer.gated import gated
from ...kernels.linear.few_rows import few_rows_linear, uncovered

log = logging.getLogger("handloom")
BUCKETS = (1, 2, 4, 8, 16)  # rows that are measured; others count as the next larger one
ROTATE = 16  # layers whose weights a measurement goes through, so that none lies in a cache


@dataclass
class Products:
    """The choice for each shape of product.

    Args:
        timer: (calls of ours, calls of the plain way) -> seconds of each; None never takes ours.
        chosen: (bucket, sizes of the outputs, inputs, gate, dtype) -> whether ours is faster.
    """

    timer: Callable[[Sequence[Callable], Sequence[Callable]], tuple[float, float]] | None = None
    chosen: dict[tuple, bool] = field(default_factory=dict)

    def takes(self, rows: int, linears, gate: str | None = None) -> bool:
        """Whether so many rows go through our kernel; linears: plain layers side by side."""
        if rows > BUCKETS[-1] or not self.chosen:
            return False
        return self.chosen.get(_key(rows, linears, gate), False)

    def measure(self, groups) -> None:
        """Choose for every shape among `groups`: (plain linear layers side by side, gate or None) each."""
        if self.timer is None:
            return
        kinds: dict[tuple, list] = {}
        for linears, gate in groups:
            kinds.setdefault(_key(1, linears, gate)[1:], []).append(linears)
        for (sizes, inputs, gate, dtype), found in kinds.items():
            for rows in BUCKETS:
                times = self._times(found[:ROTATE], rows, inputs, gate)
                if times is not None:
                    self.chosen[rows, sizes, inputs, gate, dtype] = times[0] < times[1]
                    ours, plain = (1e6 * seconds for seconds in times)
                    log.info("%d x %d -> %s: ours %.1f us, plain %.1f us", rows, inputs, sizes, ours, plain)

    def _times(self, found, rows, inputs, gate):
        first = found[0][0].weight
        x = torch.ones(rows, inputs, dtype=first.dtype, device=first.device)
        if uncovered(x, [linear.weight for linear in found[0]]) is not None:
            return None
        ours = [lambda linears=linears: product(x, linears, gate) for linears in found]
        plain = [lambda linears=linears: _plain(x, linears, gate) for linears in found]
        try:
            return self.timer(ours, plain)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a device refuses, the plain product works
            reason = f"{type(error).__name__}: {error}".split("\n")[0][:160]
            log.warning("products of few rows, %d x %d: plain (%s)", rows, inputs, reason)
            return None


def product(x, linears, gate=None, **options):
    """`few_rows_linear` over plain linear layers, their weights and biases read where they lie."""
    biases = [linear.bias for linear in linears]
    biases = biases if any(bias is not None for bias in biases) else None
    return few_rows_linear(x, [linear.weight for linear in linears], biases, gate=gate, **options)


def _plain(x, linears, gate):
    parts = [functional.linear(x, linear.weight, linear.bias) for linear in linears]
    return gated(*parts, gate) if gate else parts


def _key(rows, linears, gate) -> tuple:
    bucket = next(size for size in BUCKETS if size >= rows)
    weight = linears[0].weight
    return bucket, tuple(linear.out_features for linear in linears), weight.shape[1], gate, weight.dtype


def default_products(device: torch.device) -> Products:
    """Measured on CUDA; elsewhere the plain products stay."""
    return Products(cuda_times if device.type == "cuda" and dispatch.requested() != "torch" else None)


def cuda_times(ours, plain, rounds: int = 3) -> tuple[float, float]:
    """Seconds a call of two lists of calls, each a CUDA graph that is replayed in turn; the shortest round counts."""
    graphs = [_recorded(calls) for calls in (ours, plain)]
    best = [float("inf")] * 2
    for _ in range(rounds):
        for side, graph in enumerate(graphs):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            best[side] = min(best[side], start.elapsed_time(end) * 1e-3)
    return best[0] / len(ours), best[1] / len(plain)


def _recorded(calls):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph
