"""Device work that is recorded once and replayed, and results that reach the host late: CUDA graphs, pinned memory."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class CudaRecorder:
    """Records programs as CUDA graphs.

    Warm-up and capture share one stream, so that libraries set up one workspace, and all graphs share one memory
    pool: nothing that a graph allocates is read after its replay.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, program: Callable[[], None]) -> None:
        """Run a program on the capture's stream, so that kernels are compiled before anything is recorded."""
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            program()
        here.wait_stream(self.stream)

    def record(self, *programs: Callable[[], None]) -> list[torch.cuda.CUDAGraph]:
        """The graphs of programs that follow each other, which are not run.

        Raises:
            RuntimeError: it does something that a graph cannot hold.
        """
        graphs = [torch.cuda.CUDAGraph() for _ in programs]
        # What other threads do (the watchdog of collectives, a user's own copies) must not spoil the capture.
        mode = "thread_local"
        try:
            for graph, program in zip(graphs, programs, strict=True):
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode=mode):
                    program()
        except RuntimeError:
            self.pool = torch.cuda.graph_pool_handle()  # the allocator may hold the old one for still in use
            raise
        return graphs

    def settle(self) -> None:
        """Wait until nothing that was recorded runs, so that it may be thrown away."""
        torch.cuda.synchronize(self.device)


def recorder_for(device: torch.device) -> CudaRecorder | None:
    """What records steps on a device; None where steps run as they are."""
    return CudaRecorder(device) if device.type == "cuda" else None


class Letter(NamedTuple):
    """What a device has sent to the host.

    tensors: on the host; they hold it once it has arrived. event: after which it has; None where it is there already.
    """

    tensors: list[torch.Tensor]
    event: torch.cuda.Event | None

    def read(self) -> list[list]:
        """The numbers of every tensor, once they have arrived."""
        if self.event is not None:
            self.event.synchronize()
        return [tensor.tolist() for tensor in self.tensors]


@dataclass
class _Turn:
    """One set of host buffers, and the event after the last copy into them."""

    buffers: dict[tuple, torch.Tensor] = field(default_factory=dict)
    event: torch.cuda.Event | None = None
    sent: tuple[torch.Tensor, ...] = ()  # the last time
    arrived: list[torch.Tensor] = field(default_factory=list)


class Mailbox:
    """Brings tensors to the host without waiting for them, in pinned buffers that are used in turn.

    Args:
        device: where the tensors are.
        turns: sendings that may be under way or unread at once; the one before them is overwritten.
    """

    def __init__(self, device: torch.device, turns: int):
        self.pinned = device.type == "cuda"
        self._turns = [_Turn() for _ in range(turns)]
        self._next = 0

    def send(self, *tensors: torch.Tensor) -> Letter:
        """Copies of `tensors` on their way to the host."""
        turn = self._turns[self._next]
        self._next = (self._next + 1) % len(self._turns)
        if len(tensors) != len(turn.sent) or not all(map(operator.is_, tensors, turn.sent)):
            turn.sent, turn.arrived = tensors, [self._buffer(turn, i, each) for i, each in enumerate(tensors)]
        for here, there in zip(turn.arrived, tensors, strict=True):
            here.copy_(there, non_blocking=True)
        if self.pinned:
            turn.event = turn.event or torch.cuda.Event()
            turn.event.record()
        return Letter(turn.arrived, turn.event)

    def _buffer(self, turn: _Turn, place: int, tensor: torch.Tensor) -> torch.Tensor:
        key = (place, tensor.shape, tensor.dtype)
        if key not in turn.buffers:
            turn.buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.pinned)
        return turn.buffers[key]
