"""The decode step as one device program: draw, append, stop test and forward, recorded and replayed on CUDA."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from ..cache.feed import Feed
from ..forward.programs.capture import Mailbox, recorder_for
from ..forward.programs.programs import Programs
from ..pipeline.forms.context import Failures
from ..pipeline.pipeline import Context
from .batch import IDLE, Batch, Step

log = logging.getLogger("handloom")
KEPT = 24  # recorded steps that a batch keeps; the one unused longest goes first


@dataclass
class Program:
    """A recorded step: the graph, whether it draws too, and the pipeline's tensors that it then reads."""

    graph: Any
    whole: bool
    live: list = field(default_factory=list)
    best: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def leaves(self) -> list[torch.Tensor]:
        """The pipeline's tensors, in a fixed order."""
        return [leaf for leaf in _flatten(self.live) if torch.is_tensor(leaf)]


class GraphBatch(Batch):
    """A Batch whose step never asks the host anything; the host looks at it one step late.

    Every tensor keeps its address. EOS, stop ids and lengths end a row on the device; stop strings, criteria and
    time are seen late, and the step drawn meanwhile is dropped. Without CUDA the same program runs unrecorded.
    """

    shrinks = False

    def __init__(self, engine, size: int, width: int):
        super().__init__(engine, size, width)
        device = self.positions.device
        self.recorder = recorder_for(device)
        self.mail = Mailbox(device, turns=3)
        self.programs = (
            None if self.recorder is None else Programs(self.recorder, self.pool, KEPT, "the decode step")
        )
        self.failures = Failures()
        self._current: tuple | None = None  # blocks, key and program of the last step, until a row changes
        self._chosen: tuple[torch.Tensor, torch.Tensor] | None = None

    # -- what the host does

    def place(self, requests):
        """See `Batch.place`."""
        self._current = None if requests else self._current
        return super().place(requests)

    def clear(self, slot) -> None:
        """See `Batch.clear`."""
        self._current = None
        super().clear(slot)

    @property
    def lag(self) -> int:
        """A step behind; not where the last one is to be recorded, which its results do not wait for."""
        return 0 if self.programs is not None and self.programs.due else 1

    @torch.no_grad()
    def draw(self) -> Step:
        """Start one whole step, forward pass included; its results are on their way when this returns."""
        key, program = self._find()
        best = self._best_buffers() if program is None else program.best
        if program is None:
            self._run(key, best)
        else:
            if not program.whole:
                self._sample(best)
            program.graph.replay()
            self.failures = Failures() if program.whole else self.failures
        self.lengths += self.occupied
        sent, ready = self.mail.send(self.results, *(best or ()))
        return Step(list(self.requests), sent[0], tuple(sent[1:]) or None, ready, self.failures)

    @torch.no_grad()
    def record(self) -> None:
        """Record the steps that ran unrecorded."""
        if self.programs is not None:
            self.programs.catch_up()

    def feed(self) -> None:
        """Nothing: `draw` has fed the tokens already."""

    # -- the device program

    def context(self) -> Context:
        """As in `Batch`, with the whole history: its width may not change between replays."""
        context = super().context()
        context.tokens = self.history
        return context

    def _sample(self, best) -> None:
        """Draw a token for every slot; memory is updated where it lies."""
        context = self.context()
        drawn = self.sampler.sample(self.logits, context)
        advanced = self.sampler.accept(drawn.tokens, context, every_row=True)
        self.failures = context.failures
        for old, new in zip(self.sampler.active(), advanced.active(), strict=True):
            _overwrite(old, new)
        for column, part in enumerate((drawn.tokens, drawn.raw_logprobs, context.spoiled(drawn.logprobs))):
            self.results[:, column].copy_(part)
        self.tokens.copy_(drawn.tokens)
        if best is not None:
            top = self.logits.log_softmax(-1).topk(best[0].shape[1])
            best[0].copy_(top.indices)
            best[1].copy_(top.values)

    def _advance(self) -> None:
        """Append the tokens, run the model over all slots, and move the rows that go on."""
        self.history.scatter_(1, self.positions, self.tokens[:, None])
        self.logits.copy_(self.model.forward(self._feed(), self.cache).logits[:, -1])
        stopped = (self.tokens[:, None] == self.stops).any(1, keepdim=True)
        stopped |= self.positions + 1 >= self.limits
        self.active.masked_fill_(stopped, 0)
        self.positions.add_(self.active)

    def _feed(self) -> Feed:
        # A recorded step may hold nothing that the host knows today: no tables, no lengths.
        known = self.recorder is None and self.positions.device.type == "cpu"
        rows = [IDLE if row is None or not row.table.blocks else row.table.blocks for row in self.rows]
        lengths = [
            min(n + 1, len(blocks) * self.block)
            for n, blocks in zip(self.lengths.tolist(), rows, strict=True)
        ]
        return Feed(
            ids=self.tokens[:, None],
            positions=self.positions,
            cells=self.cells.gather(1, self.positions),
            tables=rows if known else (),
            lengths=lengths if known else (),
            block_table=self.table[:, : self._blocks()],
            cell_counts=self.positions[:, 0] + 1,
        )

    def _blocks(self) -> int:
        """Width of the block table that the step reads: all of it, or a power of two where cells are gathered."""
        if self.model.path == "attention":
            return self.table.shape[1]
        needed = int(self.lengths.max()) // self.block + 1
        return min(self.table.shape[1], 1 << (needed - 1).bit_length())

    # -- recorded steps

    def _find(self) -> tuple[tuple | None, Program | None]:
        """The recorded step for what sits in the slots now, its tensors up to date, and its key; or None."""
        if self.programs is None:
            return None, None
        if self.programs.moved():
            self._current = None
        if self._current is not None and self._current[0] == self._blocks():
            return self._current[1:]
        live = self._live() if self._whole() else []
        key = self._key(live)
        program = self.programs.find(key)
        if program is not None:
            self._adopt(program, live)
            self._current = self._blocks(), key, program
        return key, program

    def _run(self, key, best) -> None:
        """A step that is not recorded, or not yet."""
        if not self._whole():
            self._sample(best)
        step = self._step(best)
        if self.programs is None:
            step()
        else:
            self.programs.run(key, step, lambda: self._record(key, best))

    def _step(self, best):
        """What a recording of the step holds now."""
        whole = self._whole()

        def step():
            if whole:
                self._sample(best)
            self._advance()

        return step

    def _record(self, key, best) -> Program | None:
        """The recorded step, unless the rows have changed and with them what it would hold."""
        live = self._live() if self._whole() else []
        if self._key(live) != key:
            return None
        return Program(self.recorder.record(self._step(best)), self._whole(), live, best)

    def _whole(self) -> bool:
        """Whether the pipeline is device work alone; a Python processor splits the step at its place."""
        return all(
            member.processor.kind != "opaque" and (member.memory is None or isinstance(member.memory, dict))
            for member in self.sampler.active()
        )

    def _live(self) -> list:
        """Everything of the pipeline that a step reads, in a fixed order."""
        members = self.sampler.active()
        values = [(m.processor.name, m.ready(self.sampler.site), m.memory) for m in members]
        plan = None if all(self.sampler.greedy) else self.sampler.plan()
        return [values, plan, self.sampler.greedy_rows()]

    def _key(self, live) -> tuple:
        shape = (
            self._whole(),
            self._blocks(),
            tuple(self.stops.shape),
            self._top_count(),
            self.cache is None,
        )
        return (*shape, *(_describe(leaf) for leaf in _flatten(live)))

    def _best_buffers(self):
        count = self._top_count()
        if count is None:
            return None
        if self._chosen is None or self._chosen[0].shape[1] != count:
            ids = torch.zeros(self.size, count, dtype=torch.long, device=self.logits.device)
            self._chosen = ids, torch.zeros(self.size, count, device=self.logits.device)
        return self._chosen

    def _adopt(self, program: Program, live) -> None:
        """Bring the tensors that a recorded step reads up to date, and make them the pipeline's own."""
        if not live:
            return
        fresh = [leaf for leaf in _flatten(live) if torch.is_tensor(leaf)]
        for mine, new in zip(program.leaves, fresh, strict=True):
            if mine is not new:
                mine.copy_(new)
        values, plan, greedy = program.live
        for member, (_, packed, memory) in zip(self.sampler.active(), values, strict=True):
            member.values, member.memory = packed, memory
        self.sampler._plan, self.sampler._greedy_tensor = plan, greedy


def _overwrite(old, new) -> None:
    """Put a member's new memory into the tensors that hold the old one."""
    if old.memory is None or old.memory is new.memory:
        return
    if not isinstance(old.memory, dict):
        old.memory = new.memory
        return
    for name, tensor in old.memory.items():
        tensor.copy_(new.memory[name])


def _flatten(value) -> list:
    """The tensors and constants inside nested containers, in a fixed order."""
    if isinstance(value, SimpleNamespace):
        value = vars(value)
    if isinstance(value, dict):
        return [leaf for name in sorted(value) for leaf in (name, *_flatten(value[name]))]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _flatten(item)]
    if hasattr(value, "__dataclass_fields__"):
        return _flatten(vars(value))
    return [value]


def _describe(leaf):
    """What must not change for a step to be replayed: shape and dtype of a tensor, a constant itself."""
    if torch.is_tensor(leaf):
        return tuple(leaf.shape), leaf.dtype
    return leaf if leaf is None or isinstance(leaf, str | int | float | bool) else id(leaf)
