"""A model's passes over prompts and States, recorded by shape: host numbers go to one buffer, the rest is a replay."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...cache.feed import Feed, Lines, grid_numbers, packed_numbers
from ...cache.transfer import send
from ..passes import Output
from .capture import Letter, Mailbox, recorder_for
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


@dataclass
class Ready:
    """A step that waits for nothing but its tokens.

    found, key: its pass. ids: `[B]`, where the tokens go. ahead: as there. cells: (block, place) that it writes to.
    state: whose step it is, see `expect`.
    """

    found: Recorded
    key: tuple
    ids: torch.Tensor
    ahead: tuple[list, list]
    cells: list[tuple[int, int]]
    state: weakref.ref | None = None


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
        self._ready: Ready | None = None

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
        out = self._output(found, key, rows, width)
        if ids is not None:
            self._make_ready(found, key, begins, tables)
        if self.programs.due:
            self.programs.catch_up()
        return out

    def _output(self, found: Recorded, key, rows: int, width: int) -> Output:
        """What a pass has computed, in memory of its own."""
        logits = self._logits[: key[1] * key[2]].view(key[1], key[2], -1)[:rows, :width].clone()
        layers = None if found.hidden is None else tuple(h[:rows, :width].clone() for h in found.hidden)
        return Output(logits, layers)

    # -- the next step of a State, made ready while this one runs

    def expect(self, state, most: int) -> None:
        """The step that was made ready is that of `state`, whose rows may have `most` tokens."""
        if self._ready is not None and max(self._ready.ahead[0]) < most:
            self._ready.state = weakref.ref(state)

    def again(self, state, tokens: torch.Tensor, hidden: bool) -> tuple[list, Letter, Output] | None:
        """The step of a State that was made ready, or None.

        The device waits for what precedes the launch, so it is as little as can be; all else is done beside the pass.

        Args:
            tokens: `[B]` on the device.

        Returns:
            The rows' tables, the tokens on their way to the host, and the Output.
        """
        ready, self._ready = self._ready, None
        if (
            ready is None
            or ready.state is None
            or ready.state() is not state
            or ready.key[-1] != hidden
            or ready.ids.shape != tokens.shape
            or ready.found.ahead is not ready.ahead
            or self.programs.find(ready.key) is not ready.found
            or not self.programs.pool.go_on(ready.cells)
        ):
            return None
        self.programs.pool.clean()
        ready.ids.copy_(tokens)
        letter = self.mail.send(tokens)
        ready.found.graph.replay()
        ready.found.ahead = None
        tables = [row.table for row in state.rows]
        out = self._output(ready.found, ready.key, len(tables), 1)
        self._make_ready(ready.found, ready.key, ready.ahead[0], tables)
        return tables, letter, out

    def _make_ready(self, found: Recorded, key, begins, tables) -> None:
        """Send the numbers of the next step while this one runs, where its rows need no other blocks."""
        size, begins = self.programs.pool.block_size, [begin + 1 for begin in begins]
        self._ready = None
        if all(begin % size for begin in begins):
            send(self._lines[key].fill(0, begins, tables), found.numbers)
            found.ahead = begins, [table.blocks for table in tables]
            cells = [
                (blocks[begin // size], begin % size) for begin, blocks in zip(*found.ahead, strict=True)
            ]
            self._ready = Ready(found, key, found.numbers[: len(begins)], found.ahead, cells)

    # -- passes

    def _step(self, model, key, tokens, begins, tables, ids) -> Recorded:
        """A pass over one token a row."""
        _, rows, _, blocks, _, hidden = key
        if key not in self._lines:
            self._lines[key] = Lines(rows, blocks, model.pool.block_size)

        def numbers():
            return self._lines[key].fill([row[0] for row in tokens], begins, tables)

        def feed(there):
            # What comes from the device was not looked at yet.
            there[:rows].clamp_(0, self._logits.shape[1] - 1)
            return Feed.grid(there, rows, 1, blocks)

        ready = begins, [table.blocks for table in tables]
        return self._pass(model, key, numbers, feed, rows, {"hidden": hidden}, ids=ids, ready=ready)

    def _pass(
        self, model, key, numbers, feed: Callable[[torch.Tensor], Feed], rows: int, options, *, worth=1, ids=None,
        ready=None,
    ) -> Recorded:  # fmt: skip
        """Run a pass, its `rows` of logits to `_logits`; its hidden states are overwritten by the next pass.

        Args:
            numbers: makes what the pass needs to know, unless the device has all but the ids: `ready`, as in
                `Recorded.ahead`.
        """
        self._make_room(rows)
        model.pool.clean()
        found = self.programs.find(key)
        fresh = found
        if ids is None or found is None or found.ahead != ready:
            given = numbers()
            fresh = found or Recorded(torch.empty(len(given), dtype=torch.long, device=self.device))
            send(given, fresh.numbers)
        fresh.ahead = None
        if ids is not None:
            fresh.numbers[: ids.shape[0]].copy_(ids)

        def program():
            fresh.hidden = model.forward(feed(fresh.numbers), into=self._logits[:rows], **options).hidden

        def make():
            (fresh.graph,) = self.programs.recorder.record(program)
            return fresh

        if found or self.programs.again(key, make):
            fresh.graph.replay()
        else:
            self.programs.run(key, program, make, worth)
        return fresh

    def _make_room(self, rows: int) -> None:
        if rows > len(self._logits):
            self.programs.forget()  # they write to the old place
            self._logits = self._logits.new_empty(bucket(rows, 1, 1), self._logits.shape[1])
