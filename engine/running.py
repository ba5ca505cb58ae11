"""Running: a model ready to run: in a twin that follows it, over a block pool, with slots, and one thing at a time."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from .cache.pool import BlockPool
from .errors import CapabilityError, HandloomError, ParameterError
from .forward.capabilities import Capabilities
from .forward.head import Head
from .forward.programs.compiling import compile_step
from .forward.programs.recorded import record_passes
from .forward.twin.fingerprint import Changes
from .forward.twin.following import Following
from .loading import limits
from .loop.batch import Batch
from .loop.generation import Event
from .loop.graph import GraphBatch
from .loop.intake import Arrivals
from .loop.loop import run
from .loop.request import Request

PASS = {"cuda": 4096}  # prompt tokens of a pass; a pass of so many fills the device
WIDTH = 2048  # tokens that every slot has room for from the start, where passes are recorded


def current(device: torch.device) -> AbstractContextManager:
    """In the block a CUDA device is the current one: kernels, streams and events belong to it, whichever was before.

    And what is kept there may be written to later, outside of `torch.inference_mode` too.
    """
    place = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    return _writable_later(place) if torch.is_inference_mode_enabled() else place


@contextmanager
def _writable_later(place: AbstractContextManager) -> Iterator[None]:
    with place, torch.inference_mode(False), torch.no_grad():
        yield


class Turns:
    """One thing at a time in an engine and over its pool, on its device: another thread waits until it is through."""

    def __init__(self):
        self._lock = threading.Lock()
        self.device = torch.device("cpu")
        self._place: AbstractContextManager = nullcontext()
        self._running: int | None = None

    @property
    def mine(self) -> bool:
        """Whether it is this thread's turn."""
        return self._running == threading.get_ident()

    def __call__(self, what: str, owner) -> Turns:
        """A turn for `what`, in words, of the engine `owner`, which prints itself where it would wait for itself."""
        if self.mine:
            raise HandloomError(
                f"{what} was called from inside a run of the same {owner}, by a processor, a criterion or a hook, and "
                "would wait for itself; give it an engine of its own: Engine(engine.model, engine.tokenizer)"
            )
        return self

    def __enter__(self) -> None:
        self._lock.acquire()
        try:
            self._place = current(self.device)
            self._place.__enter__()
            self._running = threading.get_ident()
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *raised) -> None:
        self._running = None
        try:
            self._place.__exit__(*raised)
        finally:
            self._lock.release()


class Running:
    """The part of an Engine that runs its model; for the arguments see `Engine`."""

    runner: Any
    pool: BlockPool
    capabilities: Capabilities
    vocab_size: int
    slots: int
    graphs: bool

    def __init__(
        self,
        model,
        *,
        slots: int,
        fixed_slots: bool,
        max_length: int | None,
        block_size: int,
        max_blocks: int | None,
        prefill_chunk: int | None,
        prefix_cache: bool,
        graph: bool | None,
        fuse: bool | None,
        compile: bool,
        self_check: bool,
        layout: str,
        quantization: str | None,
    ):
        if prefill_chunk is None:
            prefill_chunk = PASS.get(model.get_input_embeddings().weight.device.type, 512)
        whole = {"slots": slots, "block_size": block_size, "prefill_chunk": prefill_chunk}
        whole |= {} if max_blocks is None else {"max_blocks": max_blocks}
        for name, value in whole.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ParameterError(f"{name}={value!r} must be a whole number of at least 1")
        # A shared prefix was computed in another shape than the prompt alone: equal, but not to the last bit.
        share = prefix_cache and not fixed_slots
        self.model = model
        self.prefill_chunk, self._asked_slots, self._graph = prefill_chunk, slots, graph
        self.fixed_slots, self.compile = fixed_slots, compile
        self.max_length = limits.longest(model, max_length)
        self._turns = Turns()
        with current(model.get_input_embeddings().weight.device):
            self._following = Following(
                model,
                {"block_size": block_size, "max_blocks": max_blocks, "prefix_cache": share},
                prefill_chunk=prefill_chunk,
                self_check=self_check,
                fuse=fuse,
                layout=layout,
                quantization=quantization,
            )
            self._adapt()
            if self.graphs:
                self.pool.reserve(self.slots * -(-min(WIDTH, self.max_length) // block_size))
        self.pool.owner = repr(self)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self.runner.device

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        return self.model.dtype

    # -- the model as it is

    def _adapt(self) -> None:
        """Take over how the model runs, which is another way after its modules have changed."""
        way = self._following
        self.runner, self.pool, self.vocab_size = way.runner, way.pool, way.vocab_size
        self.capabilities = self.runner.capabilities()
        able = self.capabilities.graph
        if self._graph and not able:
            raise CapabilityError(f"graph=True: {able.reason}")
        self.graphs = bool(able) and self.device.type == "cuda" if self._graph is None else self._graph
        self.slots = self._asked_slots if self.capabilities.ragged else 1
        self.runner.alone, self.pool.turns = self.fixed_slots, self._turns
        self._turns.device = self.device
        self._forget_programs()

    def _forget_programs(self) -> None:
        """Drop what was recorded or compiled from the model as it was."""
        self._batches: dict[tuple[int, int], GraphBatch] = {}
        self._head: Head | None = None
        if self.graphs:
            record_passes(self.runner, self.slots, self.vocab_size)
        if self.compile:
            compile_step(self.runner, {self.bucket(rows) for rows in range(1, self.slots + 1)})

    def _look(self) -> None:
        """See before a run or a State begins whether the model has changed, and follow it."""
        self._heed(self._following.look(self.model))

    def _heed(self, changes: Changes) -> None:
        if changes.modules:
            self._adapt()
            self.pool.owner = repr(self)
        elif changes.hooks or changes.moved or changes.attributes:
            self._forget_programs()

    def model_changed(self) -> None:
        """Say that the model is not what it was, where the engine cannot see it.

        Before a run or a State begins the engine itself looks for replaced modules and adapters, assigned or edited
        parameters and buffers, hooks that came or went, and attributes of modules. It does not see an edit through
        `.data` that leaves 64 evenly spread elements of a tensor alone, or what a processor's own model does. While
        hooks are registered, nothing computed outlives its run. States made before go on from what they hold.
        """
        with self._turn("model_changed"):
            self._heed(self._following.look(self.model, told=True))

    # -- one thing at a time

    def _turn(self, what: str) -> AbstractContextManager[None]:
        """One thing at a time, on the model's device: another thread waits until it is through."""
        return self._turns(what, self)

    def _in_turns(self, requests: list[Request] | Arrivals) -> Generator[Event, None, None]:
        """The events of a run that others may go between."""
        events = None
        try:
            while True:
                with self._turn("stream"):
                    if events is None:
                        self._look()
                        events = run(self, requests)
                    event = next(events, None)
                if event is None:
                    return
                yield event
        finally:
            if events is not None:
                # It may be collected in the middle of another call.
                with nullcontext() if self._turns.mine else self._turn("stream"):
                    events.close()

    # -- slots

    def bucket(self, rows: int) -> int:
        """Slots to decode `rows` running requests with."""
        if self.fixed_slots or rows >= self.slots:
            return self.slots
        if self.device.type == "cpu" and not self.compile:
            return max(1, rows)  # nothing is captured or compiled, so any shape will do
        return min(self.slots, 1 << max(0, rows - 1).bit_length())

    def batch(self, requests: int, width: int) -> Batch:
        """Slots for a run of `requests` requests of at most `width` tokens each."""
        size = self.bucket(requests)
        if not self.graphs or self.runner.hooked:
            return Batch(self, size, width)
        asked, width = width, min(max(WIDTH, 1 << (width - 1).bit_length()), self.max_length)
        # Where cells move, everything is recorded again.
        self.pool.reserve(*(size * -(-room // self.pool.block_size) for room in (asked, width)))
        kept = self._batches.pop((size, width), None)
        return GraphBatch(self, size, width) if kept is None else kept

    def give_back(self, batch: Batch) -> None:
        """Keep an empty batch with what it has captured for the next run."""
        if isinstance(batch, GraphBatch):
            self._batches[batch.size, batch.history.shape[1] - 1] = batch
