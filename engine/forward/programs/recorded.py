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
    """A pass of one shape: its numbers on the device, what replays it, and its hidden states.

    ahead: (begins, blocks) of the rows that the numbers are already those of, where a step was made ready.
    """

    numbers: torch.Tensor
    graph: Any = None
    hidden: tuple[torch.Tensor, ...] | None = None
    ahead: tuple[list, list] | None = None


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
        self._lines: dict[tuple, Lines] = {}  # of steps, by their key
        self.mail = Mailbox(self.device, turns=1)

    def packed(self, model, tokens, begins, tables) -> torch.Tensor:
        """Logits `[R, V]` after each row's last token; arguments as for `Feed.packed`."""
        count, rows = sum(map(len, tokens)), len(tokens)
        shape = bucket(count, 8), bucket(rows, 1, 1), bucket(max(map(len, tables)), 1, 32)
        numbers, _ = packed_numbers(tokens, begins, tables, model.pool.block_size, shape)

        self._pass(
            model, ("packed", *shape), lambda: numbers, lambda there: Feed.unpacked(there, *shape), shape[1],
            {"last_only": True}, worth=1 if count <= SMALL else 2,
        )  # fmt: skip
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
        key = ("grid", *shape, tree, hidden)
        if width == 1 and not tree:
            found = self._step(model, key, tokens, begins, tables, ids)
        else:
            numbers, _ = grid_numbers(tokens, begins, tables, model.pool.block_size, shape, parents)
            found = self._pass(
                model, key, lambda: numbers, lambda there: Feed.grid(there, *shape, tree=tree),
                shape[0] * shape[1], {"hidden": hidden},
            )  # fmt: skip
        logits = self._logits[: shape[0] * shape[1]].view(*shape[:2], -1)[:rows, :width].clone()
        layers = None if found.hidden is None else tuple(h[:rows, :width].clone() for h in found.hidden)
        if ids is not None:
            self._make_ready(model, found, key, begins, tables)
        if self.programs.due:
            self.programs.catch_up()
        return Output(logits, layers)

    def _step(self, model, key, tokens, begins, tables, ids) -> Recorded:
        """A pass over one token a row."""
        _, rows, _, blocks, _, hidden = key
        if key not in self._lines:
            self._lines[key] = Lines(rows, blocks, model.pool.block_size)

        def numbers():
            return self._lines[key].fill([row[0] for row in tokens], begins, tables)

        def feed(there):
            return Feed.grid(there, rows, 1, blocks)

        ready = begins, [table.blocks for table in tables]
        return self._pass(model, key, numbers, feed, rows, {"hidden": hidden}, ids=ids, ready=ready)

    def _make_ready(self, model, found: Recorded, key, begins, tables) -> None:
        """Send the numbers of the next step while this one runs, where its rows need no other blocks."""
        begins = [begin + 1 for begin in begins]
        if all(begin % model.pool.block_size for begin in begins):
            send(self._lines[key].fill(0, begins, tables), found.numbers)
            found.ahead = begins, [table.blocks for table in tables]

    def _pass(
        self, model, key, numbers, feed: Callable[[torch.Tensor], Feed], rows: int, options, *, worth=1, ids=None,
        ready=None,
    ) -> Recorded:  # fmt: skip
        """Run a pass, its `rows` of logits to `_logits`; its hidden states are overwritten by the next pass.

        Args:
            numbers: makes what the pass needs to know, unless the device has it: `ready`, as in `Recorded.ahead`.
        """
        self._make_room(rows)
        model.pool.clean()
        found = self.programs.find(key)
        fresh = found
        if ready is None or found is None or found.ahead != ready:
            given = numbers()
            fresh = found or Recorded(torch.empty(len(given), dtype=torch.long, device=self.device))
            send(given, fresh.numbers)
        fresh.ahead = None
        if ids is not None:
            torch.clamp(ids, 0, self._logits.shape[1] - 1, out=fresh.numbers[: len(ids)])
        if found is not None:
            found.graph.replay()
            return found

        def program():
            fresh.hidden = model.forward(feed(fresh.numbers), into=self._logits[:rows], **options).hidden

        def make():
            (fresh.graph,) = self.programs.recorder.record(program)
            return fresh

        self.programs.run(key, program, make, worth)
        return fresh

    def _make_room(self, rows: int) -> None:
        if rows > len(self._logits):
            self.programs.forget()  # they write to the old place
            self._logits = self._logits.new_empty(bucket(rows, 1, 1), self._logits.shape[1])
