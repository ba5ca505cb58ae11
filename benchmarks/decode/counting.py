"""Counting what a decode step costs outside the model's forward: tensor operations, Python calls, time.

And on CUDA what the host asks of the device: launches, and waits.
"""

import contextlib
import functools
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# A view by its schema, but it makes a tensor of Python or NumPy data.
NOT_A_VIEW = {"aten.lift_fresh.default"}
# Calls of the CUDA runtime and driver, by what they are to the host.
LAUNCHES = {
    "cudaLaunchKernel", "cudaLaunchKernelExC", "cudaLaunchCooperativeKernel", "cuLaunchKernel", "cuLaunchKernelEx",
    "cudaGraphLaunch", "cuGraphLaunch",
}  # fmt: skip
SYNCS = {
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cuStreamSynchronize",
    "cuCtxSynchronize",
    "cudaMemcpy",
}
WAITS = {"cudaEventSynchronize", "cuEventSynchronize"}


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


@contextlib.contextmanager
def fed(model: torch.nn.Module) -> Iterator[list[int]]:
    """Tokens of each forward pass of a transformers model and of its twins inside the block, padding included.

    It wraps the class, as an engine would drop what it keeps for a model that is hooked.
    """
    counts, kind = [], type(model)
    original = kind.forward

    @functools.wraps(original)
    def counted(module, *args, **kwargs):
        if module._parameters is model._parameters:
            given = kwargs.get("input_ids", args[0] if args else None)
            counts.append((kwargs["inputs_embeds"][..., 0] if given is None else given).numel())
        return original(module, *args, **kwargs)

    kind.forward = counted
    try:
        yield counts
    finally:
        kind.forward = original


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


def device_calls(run: Callable[[], object]) -> Counter:
    """Launches, syncs and waits of `run` on CUDA, in all threads; see `sort_calls`."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
    return sort_calls(event.name for event in profile.events())


def sort_calls(names: Iterable[str]) -> Counter:
    """How many of these calls are launches (kernels and graphs), syncs (the host waits until the device has done
    everything) and waits (for one event, which may be long past)."""
    kinds = {name: kind for kind, these in _KINDS.items() for name in these}
    return Counter(kinds[name] for name in names if name in kinds)


_KINDS = {"launches": LAUNCHES, "syncs": SYNCS, "waits": WAITS}


def per_step(measure: Callable[[int], Counter], short: int, long: int) -> dict[str, float]:
    """What each further step adds, from two numbers of steps.

    Args:
        measure: from a number of steps to counts of a whole run; set-up and prompt cancel out.
    """
    few, many = measure(short), measure(long)
    return {name: (many[name] - few[name]) / (long - short) for name in few | many}


def step_and_call(model, run: Callable, steps: tuple[int, int], repeats: int) -> dict:
    """Cost of a step, from two answer lengths, and what is left of the shorter answer: the cost of a call."""
    short, long = steps
    apart = long - short

    def split(measure: Callable[[int], float]) -> tuple[float, float]:
        few, many = measure(short), measure(long)
        step = (many - few) / apart
        return step, few - short * step

    names = [operations(model, lambda n=n: run(steps=n)) for n in steps]
    each = {name: (count - names[0][name]) / apart for name, count in names[1].items()}
    step, call = split(lambda n: names[steps.index(n)].total())
    calls_step, calls_call = split(lambda n: python_calls(model, lambda: run(steps=n)))
    # Noise only ever adds time, so the smallest of several measurements is the truest.
    rounds = range(3 * repeats)
    us_step, us_call = split(
        lambda n: 1e6 * min(seconds_outside(model, lambda: run(steps=n)) for _ in rounds)
    )
    return {
        "operations_per_step": step,
        "operations_per_call": call,
        "python_calls_per_step": calls_step,
        "python_calls_per_call": calls_call,
        "us_per_step": us_step,
        "us_per_call": us_call,
        "operation_names": {name: n for name, n in sorted(each.items(), key=lambda item: -item[1]) if n},
    }
