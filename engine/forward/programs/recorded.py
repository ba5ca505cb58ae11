"""A model's passes over prompts and States, recorded by shape: host numbers go to one buffer, the rest is a replay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...cache.feed import Feed, Lines, grid_numbers, packed_numbers
from ...cache.transfer import send
from ..passes import Output
from .capture import Mailbox, recorder_for
from .programs import Programs, bucket

KEPT = 64  # shapes; what their passes allocate is shared
SMALL = 1024  # tokens of a pass that is recorded at once; a larger one keeps the device busy while the host launches it


def record_passes(model, rows: int, vocab_size: int) -> None:
    """Let a model's passes over prompts and States be recorded where the device can.

    Args:
        model: an adapter whose step can be recorded.
        rows: rows of logits to make room for at first.
        vocab_size: of the logits.
    """
    recorder = recorder_for(model.device)
    if recorder is not None and model.paged and not model.recurrent:
        model.recorded = RecordedPasses(recorder, model.pool, rows, vocab_size)


@dataclass
class Recorded:
    """A pass of one shape: its numbers on the device, what replays it, and its hidden states."""

    numbers: torch.Tensor
    graph: Any = None
    hidden: tuple[torch.Tensor, ...] | None = None


class RecordedPasses:
    """Passes of an adapter that are padded to shapes that come again, and recorded.

    Surplus tokens go to the trash block, and surplus rows have none, so a shape serves every pass that fits in.

    Args:
        recorder: see `capture.recorder_for`.
        pool: the block pool that they read and write.
        rows: rows of logits to make room for at first.
        vocab_size: of the logits.
    """

    def __init__(self, recorder, pool, rows: int, vocab_size: int):
        self.programs = Programs(recorder, pool, KEPT, "a pass over prompts or a State")
        self.device = pool.stores[0].keys.device
        self._logits = torch.empty(rows, vocab_size, device=self.device)
        self._lines: dict[tuple, Lines] = {}
        self.mail = Mailbox(self.device, turns=1)

    def packed(self, model, tokens, begins, tables) -> torch.Tensor:
        """Logits `[R, V]` after each row's last token; arguments as for `Feed.packed`."""
        count, rows = sum(map(len, tokens)), len(tokens)
        shape = bucket(count, 8), bucket(rows, 1, 1), bucket(max(map(len, tables)), 1, 32)
        numbers, _ = packed_numbers(tokens, begins, tables, model.pool.block_size, shape)

        def feed(there):
            return Feed.unpacked(there, *shape)

        key = ("packed", *shape)
        self._pass(model, key, numbers, feed, shape[1], {"last_only": True}, worth=1 if count <= SMALL else 2)
        return self._logits[:rows].clone()

    def grid(self, model, tokens, begins, tables, *, parents=None, hidden=False, ids=None) -> Output:
        """Logits `[B, Q, V]` after each token, and hidden states; arguments as for `Feed.build`.

        It is recorded as soon as its first results are on their way.

        Args:
            ids: `[B]` tokens on the device, of which the host knows nothing yet: they are fed in place of `tokens`.
        """
        rows, width, tree = len(tokens), max(map(len, tokens)), parents is not None
        narrow = 32 if model.path == "attention" else 1  # elsewhere all cells of the table are gathered
        shape = bucket(rows, 1, 1), bucket(width, 1, 1), bucket(max(map(len, tables)), 1, narrow)
        if width == 1 and not tree:
            if shape not in self._lines:
                self._lines[shape] = Lines(shape[0], shape[2], model.pool.block_size)
            numbers = self._lines[shape].fill([row[0] for row in tokens], begins, tables)
        else:
            numbers, _ = grid_numbers(tokens, begins, tables, model.pool.block_size, shape, parents)

        def feed(there):
            return Feed.grid(there, *shape, tree=tree)

        key = ("grid", *shape, tree, hidden)
        layers = self._pass(model, key, numbers, feed, shape[0] * shape[1], {"hidden": hidden}, ids=ids)
        logits = self._logits[: shape[0] * shape[1]].view(*shape[:2], -1)[:rows, :width].clone()
        layers = None if layers is None else tuple(h[:rows, :width].clone() for h in layers)
        if self.programs.due:
            self.programs.catch_up()
        return Output(logits, layers)

    @torch.no_grad()
    def _pass(
        self, model, key, numbers, feed: Callable[[torch.Tensor], Feed], rows: int, options, worth=1, ids=None
    ):
        """Run a pass, its `rows` of logits to `_logits`; its hidden states, which the next pass overwrites."""
        self._make_room(rows)
        model.pool.clean()
        found = self.programs.find(key)
        fresh = found or Recorded(torch.empty(len(numbers), dtype=torch.long, device=self.device))
        send(numbers, fresh.numbers)
        if ids is not None:
            torch.clamp(ids, 0, self._logits.shape[1] - 1, out=fresh.numbers[: len(ids)])
        if found is not None:
            found.graph.replay()
            return found.hidden

        def program():
            fresh.hidden = model.forward(feed(fresh.numbers), into=self._logits[:rows], **options).hidden

        def make():
            (fresh.graph,) = self.programs.recorder.record(program)
            return fresh

        self.programs.run(key, program, make, worth)
        return fresh.hidden

    def _make_room(self, rows: int) -> None:
        if rows > len(self._logits):
            self.programs.forget()  # they write to the old place
            self._logits = self._logits.new_empty(bucket(rows, 1, 1), self._logits.shape[1])
