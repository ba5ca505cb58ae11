"""Counting what a decode step costs outside the model's forward: tensor operations, Python calls, time."""

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# A view by its schema, but it makes a tensor of Python or NumPy data.
NOT_A_VIEW = {"aten.lift_fresh.default"}


class ForwardGate:
    """Knows whether the model's forward is running, and how much processor time it has taken in all."""

    def __init__(self):
        self.inside = False
        self.calls = 0
        self.seconds = 0.0
        self._entered = 0.0

    @contextlib.contextmanager
    def on(self, model: torch.nn.Module) -> Iterator["ForwardGate"]:
        """Watch `model` inside the block."""
        before = model.register_forward_pre_hook(self._enter, prepend=True)
        after = model.register_forward_hook(self._leave, always_call=True)
        try:
            yield self
        finally:
            before.remove()
            after.remove()

    def _enter(self, *_) -> None:
        self.inside, self.calls = True, self.calls + 1
        self._entered = time.process_time()

    def _leave(self, *_) -> None:
        self.seconds += time.process_time() - self._entered
        self.inside = False


class _Operations(TorchDispatchMode):
    def __init__(self, gate: ForwardGate):
        super().__init__()
        self.gate, self.counts = gate, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not self.gate.inside and (not function.is_view or str(function) in NOT_A_VIEW):
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def operations(model: torch.nn.Module, run: Callable[[], object]) -> Counter:
    """Tensor operations by name that `run` makes outside the model's forward; views are not counted."""
    gate = ForwardGate()
    with gate.on(model), _Operations(gate) as mode:
        run()
    return mode.counts


def python_calls(model: torch.nn.Module, run: Callable[[], object]) -> int:
    """Calls of Python functions that `run` makes outside the model's forward."""
    gate, count = ForwardGate(), 0

    def profile(frame, event, argument):
        nonlocal count
        if event == "call" and not gate.inside:
            count += 1

    with gate.on(model):
        sys.setprofile(profile)
        try:
            run()
        finally:
            sys.setprofile(None)
    return count


def seconds_outside(model: torch.nn.Module, run: Callable[[], object]) -> float:
    """Seconds of processor time that `run` takes outside the model's forward."""
    gate = ForwardGate()
    with gate.on(model):
        start = time.process_time()
        run()
        whole = time.process_time() - start
    return whole - gate.seconds
