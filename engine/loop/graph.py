"""The decode step as one device program: draw, append, stop test and forward, recorded and replayed on CUDA."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ..cache.feed import Feed
from ..cache.transfer import send, upload
from ..forward.programs.capture import Letter, Mailbox, recorder_for
from ..forward.programs.programs import Programs
from ..kernels.append import append
from ..pipeline.forms.context import Failures
from ..pipeline.pipeline import Context
from .batch import IDLE, Batch, Step

log = logging.getLogger("handloom")
KEPT = 24  # recorded steps that a batch keeps; the one unused longest goes first


@dataclass
class Program:
    """A recorded step: graphs of the draw, where it is device work alone, and of the forward pass.

    live: the pipeline's tensors that the draw reads. results: what it tells the host.
    """

    sample: Any
    forward: Any
    results: torch.Tensor
    live: list = field(default_factory=list)

    @functools.cached_property
    def leaves(self) -> list:
        """What `live` holds, in a fixed order."""
        return _flatten(self.live)


class GraphBatch(Batch):
    """A Batch whose step never asks the host anything: it goes on while the host looks at what was drawn.

    Every tensor keeps its address. EOS, stop ids and lengths end a row on the device; where the host ends one, by stop
    strings, criteria or time, its forward pass is under way and dropped. Without CUDA the same program runs unrecorded.
    """

    shrinks = False

    def __init__(self, engine, size: int, width: int):
        super().__init__(engine, size, width)
        device = self.positions.device
        self.recorder = recorder_for(device)
        self.mail = Mailbox(device, turns=2)
        self.programs = (
            None if self.recorder is None else Programs(self.recorder, self.pool, KEPT, "the decode step")
        )
        self.failures = Failures()
        # Position and cell of the tokens that are fed, and how many cells their rows then have.
        self.fed = torch.zeros(3, size + size % 2, dtype=torch.long, device=device)[:, :size]
        self._ends = np.full(
            (size, 8), -1
        )  # on the host what `stops` is on the device: ids that end a slot's row
        self.stops = upload(self._ends.copy(), device)
        self._current: tuple | None = None  # blocks, key and program of the last step, until a row changes
        self._before: tuple | None = None  # what decided on it, key and program
        self._told: dict[int, torch.Tensor] = {}  # results, by their width
        self._sent: Letter | None = None

    # -- what the host does

    def _arrive(self, placed) -> None:
        """See `Batch`; and what ends the rows on the device, where the host looks late."""
        self._current = None
        super()._arrive(placed)
        ends = [sorted({*r.params.stop_token_ids, *r.params.ends(self.eos)}) for _, r in placed]
        if (most := max(map(len, ends))) > self.stops.shape[1]:
            self._ends = np.pad(self._ends, ((0, 0), (0, 2 * most - self.stops.shape[1])), constant_values=-1)
            self.stops = upload(self._ends.copy(), self.stops.device)
        slots, told = [slot for slot, _ in placed], np.full((len(placed), self.stops.shape[1]), -1)
        for mine, ids in zip(told, ends, strict=True):
            mine[: len(ids)] = ids
        if told.tobytes() != self._ends[slots].tobytes():
            self._ends[slots] = told
            send(self._ends, self.stops)

    def clear(self, slot) -> None:
        """See `Batch.clear`."""
        self._current = None
        super().clear(slot)

    def draw(self) -> Step:
        """Draw and start the forward pass behind; the results are on their way before the pass begins."""
        if self.programs is not None and self.programs.moved():
            self._current = self._before = None
        if self._current is not None and self._current[0] == self._blocks():
            _, key, program = self._current
        else:
            key, program = self._find()
        if program is None:
            self._run(key)
        else:
            if program.sample is None:
                self._sample()
            else:
                self.failures = Failures()
                program.sample.replay()
            self._sent = self.mail.send(program.results)
            program.forward.replay()
        self.lengths += self.occupied
        return Step(list(self.requests), self._sent.tensors[0], self._sent, self.failures)

    def record(self) -> None:
        """Record the steps that ran unrecorded."""
        if self.programs is not None and self.programs.due:
            self.programs.catch_up()

    def feed(self) -> None:
        """Nothing: `draw` has fed the tokens already."""

    # -- the device program

    def context(self) -> Context:
        """As in `Batch`, with the whole history: its width may not change between replays."""
        context = super().context()
        context.tokens = self.history
        return context

    @torch.no_grad()
    def _sample(self) -> None:
        """Draw a token for every slot and append it; memory is updated where it lies."""
        context = self.context()
        drawn = self.sampler.sample(self.logits, context, self._top_count())
        advanced = self.sampler.accept(drawn.tokens, context, every_row=True)
        self.failures = context.failures
        for old, new in zip(self.sampler.active(), advanced.active(), strict=True):
            _overwrite(old, new)
        append(
            drawn.tokens, (drawn.raw_logprobs, context.spoiled(drawn.logprobs)), drawn.top,
            results=self._results(), ids=self.tokens, fed=self.fed, history=self.history, table=self.table,
            block_size=self.block, positions=self.positions, active=self.active, limits=self.limits, stops=self.stops,
        )  # fmt: skip

    def _advance(self) -> None:
        """Run the model over all slots."""
        self.model.forward(self._feed(), self.cache, into=self.logits)

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
            positions=self.fed[0][:, None],
            cells=self.fed[1][:, None],
            tables=rows if known else (),
            lengths=lengths if known else (),
            block_table=self.table[:, : self._blocks()],
            cell_counts=self.fed[2],
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
        about = self._blocks(), self.stops.shape, self._top_count(), self.cache is None, self.sampler.changes
        if self._before is None or self._before[0] != about:
            leaves = _flatten(self._live()) if self._whole() else []
            key = self._key(leaves)
            program = self.programs.find(key) or self.programs.again(key, lambda: self._record(key))
            if program is None:
                return key, None
            self._adopt(program, leaves)
            self._before = about, key, program
        _, key, program = self._before
        self._current = about[0], key, program
        return key, program

    @torch.no_grad()
    def _run(self, key) -> None:
        """A step that is not recorded, or not yet."""
        if not self._whole():
            self._sample()
        if self.programs is None:
            self._step()
        else:
            self.programs.run(key, self._step, lambda: self._record(key))

    def _results(self) -> torch.Tensor:
        """What the host is told: `[S, 3 + 2 n]`, as in `Step`."""
        width = 3 + 2 * self._top_count()
        if width not in self._told:
            self._told[width] = torch.zeros(self.size, width, dtype=torch.double, device=self.logits.device)
        return self._told[width]

    def _step(self) -> None:
        """The whole step."""
        if self._whole():
            self._sample()
        self._sent = self.mail.send(self._results())
        self._advance()

    def _record(self, key) -> Program | None:
        """The recorded step, unless the rows have changed and with them what it would hold."""
        whole = self._whole()
        live = self._live() if whole else []
        if self._key(_flatten(live)) != key:
            return None
        results = self._results()  # made here, not in the memory of graphs
        graphs = self.recorder.record(*([self._sample] if whole else []), self._advance)
        return Program(graphs[0] if whole else None, graphs[-1], results, live)

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
        return [values, self.sampler.plan(), self.sampler.greedy_rows()]

    def _key(self, leaves: list) -> tuple:
        shape = (
            self._whole(),
            self._blocks(),
            tuple(self.stops.shape),
            self._top_count(),
            self.cache is None,
        )
        return (*shape, *map(_describe, leaves))

    def _adopt(self, program: Program, leaves: list) -> None:
        """Bring the tensors that a recorded step reads up to date, and make them the pipeline's own."""
        if not leaves:
            return
        for mine, new in zip(program.leaves, leaves, strict=True):
            if mine is not new and torch.is_tensor(mine):
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
