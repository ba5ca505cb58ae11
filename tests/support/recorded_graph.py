"""A CUDA graph without CUDA: tensor operations recorded with the tensors they touch, and run again on the same ones.

A replay sees what a graph sees: addresses and the constants of the recording, never a Python value of today. Reading
a value on the host while recording raises, as it does in a capture; recording leaves no trace; and memory that the
recording allocated is poisoned before every replay, as another graph of the same pool may have used it.
"""

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from handloom.forward.programs import recorded
from handloom.forward.programs.compiling import CompiledStep
from handloom.loop import graph

# Operations that wait for the device on CUDA, or copy from the host's memory.
FORBIDDEN = {
    "aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal", "aten::nonzero",
    "aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
    "aten::lift_fresh", "aten::repeat_interleave.Tensor",
}  # fmt: skip
ON_HOST = ("tolist", "numpy", "__array__")
HOST = {name: getattr(torch.Tensor, name) for name in ON_HOST}


def refuse(what: str):
    raise RuntimeError(f"operation not permitted when stream is capturing: {what}")


def tensors_of(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):  # as most results are
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return []
    return [tensor for item in value for tensor in tensors_of(item)]


def place(tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Recording(TorchDispatchMode):
    """What ran inside the block; `replay` runs it again."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.made = {}  # storages that the recording allocated
        self.before = {}  # storages that it found, as they were before it wrote to them
        self.replays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name + (f".{func._schema.overload_name}" if func._schema.overload_name else "")
        if func._schema.name in FORBIDDEN or name in FORBIDDEN:
            refuse(name)
        self._keep(func, args, kwargs)
        out = func(*args, **kwargs)
        self._note(functools.partial(func, *args, **kwargs), out, (args, kwargs))
        return out

    def launch(self, executor, args, kwargs):
        """A Triton kernel in the interpreter: its arguments are pointers and constants, as in a graph."""
        given = tensors_of((args, kwargs))
        with torch.utils._python_dispatch._disable_current_modes():
            for tensor in given:
                self._save(tensor)
            executor(*args, **kwargs)
        self._note(lambda: executor(*args, **kwargs), None, given)

    def whole(self, call, given):
        """Something that no operation of which can be seen: it runs as one, on the tensors that it was given."""
        with torch.utils._python_dispatch._disable_current_modes():
            out = call()
        self._note(call, out, given)
        return out

    def _note(self, call, out, given):
        made = tensors_of(out)
        fresh = {place(tensor): tensor for tensor in made if place(tensor) not in self.before}
        for at in fresh.keys() - {place(tensor) for tensor in tensors_of(given)} if fresh else ():
            self.made[at] = fresh[at]
        self.calls.append((call, [(tensor, place(tensor)) for tensor in made], given))

    def _keep(self, func, args, kwargs):
        for spec, value in [*zip(func._schema.arguments, args, strict=False)] + [
            (s, kwargs[s.name]) for s in func._schema.arguments if s.name in kwargs
        ]:
            if spec.alias_info is not None and spec.alias_info.is_write:
                for tensor in tensors_of(value):
                    self._save(tensor)

    def _save(self, tensor):
        if place(tensor) not in self.made and place(tensor) not in self.before:
            self.before[place(tensor)] = (tensor.untyped_storage(), tensor.untyped_storage().clone())

    def undo(self):
        """Put back what the recording changed: a capture does not run."""
        for storage, saved in self.before.values():
            storage.copy_(saved)
        self._poison()

    def _poison(self):
        for tensor in self.made.values():
            tensor.untyped_storage().fill_(0xFF)

    @torch.no_grad()
    def replay(self):
        """Run every operation again, results to where the recording had them."""
        self._poison()
        self.replays += 1
        for call, out, _ in self.calls:
            for (old, at), new in zip(out, tensors_of(call()), strict=True):
                if place(new) != at:
                    old.copy_(new)


class Recorder:
    """Takes the place of `capture.CudaRecorder`."""

    def __init__(self):
        self.recordings, self.warm_ups = [], 0

    def warm_up(self, program):
        self.warm_ups += 1
        program()

    def record(self, *programs):
        """Recordings of programs that follow each other; they count as one."""
        self.recordings.append([self._record(program) for program in programs])
        return self.recordings[-1]

    def _record(self, program):
        recording = Recording()
        try:
            with pytest.MonkeyPatch.context() as patch, recording:
                for name in ON_HOST:
                    patch.setattr(torch.Tensor, name, lambda *a, name=name, **k: refuse(f"Tensor.{name}"))
                record_launches(patch, recording)
                record_compiled(patch, recording)
                program()
        finally:
            recording.undo()
        return recording

    def settle(self):
        """Nothing runs on its own here."""

    @property
    def replays(self) -> int:
        """Replays of all recordings."""
        return sum(parts[-1].replays for parts in self.recordings)


def record_launches(patch, recording):
    """Launches of interpreted Triton kernels go to the recording."""
    import triton.runtime.interpreter as interpreter

    original = interpreter.GridExecutor.__call__

    def call(executor, *args, **kwargs):
        def run(*args, **kwargs):
            with pytest.MonkeyPatch.context() as host:
                for name, method in HOST.items():
                    host.setattr(torch.Tensor, name, method)
                original(executor, *args, **kwargs)

        recording.launch(run, args, kwargs)

    patch.setattr(interpreter.GridExecutor, "__call__", call)


def record_compiled(patch, recording):
    """A compiled forward goes to the recording in one piece, aimed at the tensors of the recording."""
    original = CompiledStep._run

    def run(step, feed):
        model = step._model()

        def call():
            held = model._feed, model._step, model.cache.feed
            model._feed, model._step = feed, None
            model.cache.bind(feed)
            try:
                return original(step, feed)
            finally:
                model._feed, model._step, _ = held
                model.cache.bind(held[2])

        return recording.whole(call, (feed.ids, feed.positions))

    patch.setattr(CompiledStep, "_run", run)


def install(monkeypatch) -> list[Recorder]:
    """Record and replay steps and passes on the CPU, by the code that does so on CUDA; the recorders of batches."""
    from handloom.kernels.sampling import reference as sample_reference
    from handloom.kernels.sampling import sample

    made = []

    def recorder_for(device):
        made.append(Recorder())
        return made[-1]

    monkeypatch.setattr(graph, "recorder_for", recorder_for)
    monkeypatch.setattr(recorded, "recorder_for", lambda device: Recorder())
    # On CUDA without Triton's kernels this is what runs; the CPU's own sampler works on NumPy arrays.
    monkeypatch.setattr(sample, "sample_cpu", sample_reference.sample_reference)
    return made
