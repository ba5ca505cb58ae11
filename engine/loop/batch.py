"""The slots of the decode loop: static device tensors, one row per running request."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ..cache.feed import Feed
from ..cache.paged import PagedCache
from ..cache.pool import TRASH, ZERO
from ..cache.sequence import Row
from ..cache.transfer import upload
from ..errors import HandloomError, PoolExhausted
from ..forward.programs.capture import Letter
from ..pipeline.forms.context import Failures
from ..pipeline.pipeline import Context
from .request import Request

IDLE = (TRASH,)
AHEAD = 4  # blocks that a row is given at a time, as far as it may need them
FULL = 1 << 62
# Tensors with one entry per slot, which move with their rows when the batch shrinks.
_PER_SLOT = ("logits", "tokens", "stops", "history", "cells", "table")


@dataclass
class Step:
    """One drawn step on its way to the host.

    Args:
        requests: who sat in each slot.
        results: `[S, 3 + 2 n]` token, raw and processed log-probability of each slot, ids and log-probabilities of
            the n most probable ones.
        letter: brings them, where they are on their way.
        failures: why a processor left a slot without a token.
    """

    requests: list[Request | None]
    results: torch.Tensor
    letter: Letter | None = None
    failures: Failures = field(default_factory=Failures)

    def read(self) -> list[list[float]]:
        """The results, once they have arrived."""
        return self.results.tolist() if self.letter is None else self.letter.read()[0]


class Batch:
    """`S` slots that requests move through; every tensor keeps its shape while rows come and go.

    Args:
        engine: model, pool, vocabulary size, pipeline and EOS ids are taken from it.
        size: number of slots.
        width: tokens that any request may take in all, prompt included.

    `positions [S, 1]` is the index of the token now to be drawn: the history's length before the draw, and the
    position that token is fed at after it. Idle slots stay at 0 and write to the trash block.
    """

    shrinks = True  # with few rows left it goes on in fewer slots

    def __init__(self, engine, size: int, width: int):
        self.model, self.pool, self.size = engine.runner, engine.pool, size
        self.block, self.eos = self.pool.block_size, engine.eos_token_ids
        device = self.model.device

        def ints(*shape, fill=0, dtype=torch.long):
            return torch.full(shape, fill, dtype=dtype, device=device)

        blocks = -(-width // self.block) + 1
        self.logits = torch.zeros(size, engine.vocab_size, device=device)
        self.tokens, self.stops = ints(size), ints(size, 8, fill=-1)
        # One tensor, so that a new row's numbers arrive together; each of its rows begins at a multiple of 16 bytes.
        self.numbers = ints(6, size + size % 2)[:, :size]
        self.positions, self.active, self.limits = (row[:, None] for row in self.numbers[:3])
        self.prompt_lengths, self.seeds, self.streams = self.numbers[3:]
        self.history = ints(size, width + 1, fill=-1)
        self.cells = ints(size, blocks * self.block, fill=TRASH * self.block)  # position -> cell in the pool
        self.table = ints(size, blocks, fill=ZERO, dtype=torch.int32)
        self._within = torch.arange(self.block, device=device)
        self.requests: list[Request | None] = [None] * size
        self.rows: list[Row | None] = [None] * size
        self.lengths = np.zeros(size, np.int64)
        self.ends = np.zeros(size, np.int64)  # cells that each row has blocks for; FULL once it needs no more
        self.occupied = np.zeros(size, bool)  # slots that hold a request
        self.claims: list = [None] * size
        self._running: list[int] | None = []  # None: to be looked up
        self._spare = 0  # steps in which no row comes to the end of its blocks
        self._left: list[int] = []  # slots whose tensors still hold a row that has gone
        self.cache: PagedCache | None = None
        self.sampler = engine.pipeline.bind(
            [], [], device=device, vocab_size=engine.vocab_size, eos_token_ids=self.eos, capacity=size
        )

    @property
    def running(self) -> list[int]:
        """Slots that hold a request; the list is not to be changed."""
        if self._running is None:
            self._running = np.flatnonzero(self.occupied).tolist()
        return self._running

    # -- rows come and go

    @torch.no_grad()
    def place(self, requests: list[Request]) -> list[tuple[Request, str]]:
        """Put prefilled requests into free slots; their blocks are shared until they write.

        Everything that the device is told goes there in one transfer.

        Returns:
            Those that could not be placed, and why; the slots are as they were.
        """
        self._running, self._spare = None, 0
        free, placed, failed = [i for i, r in enumerate(self.requests) if r is None], [], []
        for request in requests:
            ready = request.prefilled
            if ready.claim:
                self.pool.unclaim(ready.claim)
                ready.claim = None
            try:
                row = self._own_tail(ready.row, ready.row.length) if self.model.paged else ready.row
                self.sampler.fill(free[0], request.params, request.prompt.ids, request.seed, request.sample)
            except (HandloomError, torch.OutOfMemoryError) as error:
                ready.taken()
                failed.append((request, str(error)))
                continue
            slot = free.pop(0)
            self.requests[slot], self.lengths[slot], self.occupied[slot] = request, row.length, True
            self._seat(slot, row)
            if self.model.paged:
                more = request.blocks(self.block) - len(row.table)
                self.claims[slot] = self.pool.claim(row.table.blocks[-1] + 1, more)
            placed.append((slot, request))
        self._settle({slot for slot, _ in placed})
        if placed:
            self._arrive(placed)
        for _, request in placed:
            request.prefilled.taken()
        return failed

    def _arrive(self, placed: list[tuple[int, Request]]) -> None:
        """Fill the slots' tensors."""
        ready = [request.prefilled for _, request in placed]
        slots, stops = [slot for slot, _ in placed], [self._stop_ids(request) for _, request in placed]
        self._widen_stops(max(map(len, stops)))
        lengths = [self.rows[slot].length for slot in slots]
        most = self.history.shape[1] - 1
        numbers = [
            (length, 1, min(request.room, most), length, request.seed, request.sample)
            for length, (_, request) in zip(lengths, placed, strict=True)
        ]
        ids = _rectangle([request.prompt.ids for _, request in placed], -1)
        held = [self.rows[s].table.blocks if self.model.paged else () for s in slots]
        cells = _rectangle(held, TRASH)[..., None] * self.block + np.arange(self.block)
        stops = _rectangle(stops, -1, self.stops.shape[1])
        parts = np.array(slots), np.array(numbers).T, stops, ids, _rectangle(held, ZERO), cells
        where, numbers, stops, ids, blocks, cells = _together(parts, self.history.device)
        self.numbers.index_copy_(1, where, numbers)
        self.stops.index_copy_(0, where, stops)
        self.history[:, : ids.shape[1]].index_copy_(0, where, ids)
        self.logits.index_copy_(0, where, torch.stack([r.logits for r in ready]).to(self.logits.device))
        if self.model.paged:
            self.table[:, : blocks.shape[1]].index_copy_(0, where, blocks.int())
            self.cells[:, : blocks.shape[1] * self.block].index_copy_(0, where, cells.flatten(1))
        for slot, prefilled in zip(slots, ready, strict=True):
            if prefilled.states:
                self._insert(slot, prefilled.states)

    def _stop_ids(self, request: Request) -> list[int]:
        """What ends the row on the device, where the host looks late."""
        params = request.params
        return sorted({*params.stop_token_ids, *params.ends(self.eos)})

    def _widen_stops(self, count: int) -> None:
        if count > self.stops.shape[1]:
            wider = self.stops.new_full((self.size, 2 * count), -1)
            wider[:, : self.stops.shape[1]] = self.stops
            self.stops = wider

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Take a finished request out; its blocks go back, full ones stay known as a prefix."""
        row, request, self._running = self.rows[slot], self.requests[slot], None
        if self.model.shares_prefixes and request.prompt.embeddings is None and request.error is None:
            fed = min(int(self.lengths[slot]), len(request.prompt) + len(request.stopper.token_ids) - 1)
            self.pool.register(row.table, (request.prompt.ids + request.stopper.token_ids)[: max(fed, 0)])
        if self.claims[slot]:
            self.pool.unclaim(self.claims[slot])
        self.requests[slot] = self.rows[slot] = self.claims[slot] = None
        self.lengths[slot], self.occupied[slot] = 0, False
        self.sampler.clear(slot)
        self._left.append(slot)

    @torch.no_grad()
    def _settle(self, taken=frozenset()) -> None:
        """Empty the tensors of slots whose rows have gone: nothing may write to blocks that others hold by now.

        Args:
            taken: slots that are written to at once, as far as what a row brings fills them.
        """
        if not self._left:
            return
        left, self._left = self._left, []
        where = upload(left, self.history.device)
        for tensor, empty in ((self.history, -1), (self.table, ZERO), (self.cells, TRASH * self.block)):
            tensor.index_fill_(0, where, empty)
        if not taken.issuperset(left):
            self.numbers[:3].index_fill_(1, where, 0)
            self.stops.index_fill_(0, where, -1)
            self.logits.index_fill_(0, where, 0)

    def prepare(self) -> list[tuple[int, str]]:
        """Make room for the token that each slot draws next; the slots for which there is no block, and why."""
        if self._left:
            self._settle()
        if not self.model.paged:
            return []
        self._spare -= 1
        return self._grow() if self._spare < 0 else []

    @torch.no_grad()
    def _grow(self) -> list[tuple[int, str]]:
        """New blocks for the slots that are at the end of theirs."""
        exhausted, grown = [], []
        for slot in np.flatnonzero(self.occupied & (self.lengths >= self.ends)).tolist():
            row, first = self.rows[slot], len(self.rows[slot].table)
            try:
                self._seat(slot, self._further(row, self._needed(slot) - first))
            except PoolExhausted as error:
                exhausted.append((slot, str(error)))  # what it leaves may be enough for the others
                break
            grown += [(slot, first + i, b) for i, b in enumerate(self.rows[slot].table.blocks[first:])]
        if grown:
            self._map(np.array(grown).T)
        self.pool.clean()
        if self.running and not exhausted:
            self._spare = int((self.ends - self.lengths)[self.occupied].min()) - 1
        return exhausted

    def _further(self, row: Row, needed: int) -> Row:
        """The row with some more blocks; with one, where the pool has no more."""
        cells = len(row.table) * self.block
        try:
            table = self.pool.writable(row.table, cells, min(AHEAD, needed) * self.block)
        except PoolExhausted:
            table = self.pool.writable(row.table, cells, self.block)
        return replace(row, table=table)

    def _seat(self, slot: int, row: Row) -> None:
        """Let a slot have a row, or the same row with more blocks."""
        self.rows[slot] = row
        if self.model.paged:
            full = len(row.table) >= self._needed(slot)
            self.ends[slot] = FULL if full else len(row.table) * self.block

    def _needed(self, slot: int) -> int:
        """Blocks that a slot's row may come to need."""
        return min(self.requests[slot].blocks(self.block), -(-(self.history.shape[1] - 1) // self.block))

    def _own_tail(self, row: Row, length: int) -> Row:
        """The row with the block of cell `length` to itself, up to the block's end."""
        return replace(row, table=self.pool.writable(row.table, length, self.block - length % self.block))

    def _map(self, entries: np.ndarray) -> None:
        """Tell the device of blocks: `[3, n]` slot, place in its table, block."""
        slots, places, blocks = upload(np.ascontiguousarray(entries), self.cells.device)
        self.table.index_put_((slots, places), blocks.int())
        cells = self.cells.view(self.size, -1, self.block)
        cells.index_put_((slots, places), blocks[:, None] * self.block + self._within)

    def _insert(self, slot: int, states) -> None:
        if self.cache is None:
            self.cache = PagedCache(self.model.plan, self.pool, self.model.path)
            empty = tuple(s.new_zeros(self.size, *s.shape[1:]) for s in states)
            self.cache.load_states(empty, self.model.layout)
        for mine, state in zip(self.cache.states(), states, strict=True):
            mine[slot] = state[0]

    # -- one step

    def context(self) -> Context:
        """What the pipeline may read in this step."""
        return Context(
            tokens=lambda: self.history[:, : int(self.lengths.max())],
            lengths=self.positions[:, 0],
            prompt_lengths=self.prompt_lengths,
            seeds=self.seeds,
            streams=self.streams,
            params=self.sampler.params,
            forgiving=True,
            exclusive=True,
        )

    @torch.no_grad()
    def draw(self) -> Step:
        """One token for every slot, remembered in `tokens`."""
        context = self.context()
        drawn = self.sampler.sample(self.logits, context, self._top_count())
        self.tokens = drawn.tokens
        self.sampler = self.sampler.accept(drawn.tokens, context, every_row=True)
        columns = drawn.tokens, drawn.raw_logprobs, context.spoiled(drawn.logprobs)
        results = torch.stack(columns, 1)
        if drawn.top:
            results = torch.cat([results, *drawn.top], 1)
        return Step(list(self.requests), results, failures=context.failures)

    def _top_count(self) -> int:
        """How many of the most probable tokens some request wants to see."""
        wanted = [r.params.logprobs for r in self.requests if r is not None]
        return min(max((n for n in wanted if n is not None), default=0), self.logits.shape[-1])

    @torch.no_grad()
    def feed(self) -> None:
        """One forward pass over all slots: append `tokens` and compute the logits behind them."""
        self.history.scatter_(1, self.positions, self.tokens[:, None])
        if self.model.path == "solo":
            self._feed_alone()
        else:
            for slot in self.running:
                if self.lengths[slot] == self.model.restart:
                    self._restart(slot)
            self.logits = self.model.forward(self._feed(), self.cache).logits[:, -1]
        self.lengths += self.occupied
        self.positions.add_(self.active)

    def _feed(self) -> Feed:
        tables = [IDLE if row is None or not row.table.blocks else row.table.blocks for row in self.rows]
        return Feed(
            ids=self.tokens[:, None],
            positions=self.positions,
            cells=self.cells.gather(1, self.positions),
            tables=tables,
            lengths=(self.lengths + 1).tolist(),
        )

    def _feed_alone(self) -> None:
        logits = self.logits.clone()
        for slot in self.running:
            (self.rows[slot],), out = self.model.extend([self.rows[slot]], [[int(self.tokens[slot])]])
            logits[slot] = out.logits[0, -1]
        self.logits = logits

    def _restart(self, slot: int) -> None:
        """Compute the whole row again where the model changes all its rotations; the feed repeats its last cell."""
        request = self.requests[slot]
        row, _ = self.model.prefill(request.prompt.ids + request.stopper.token_ids)
        self._seat(slot, row)
        self.pool.filled[row.table.blocks[-1]] = self.block
        self._map(np.array([(slot, i, block) for i, block in enumerate(row.table.blocks)]).T)

    def record(self) -> None:
        """Nothing: its steps run as they are."""

    def resized(self, engine, size: int, width: int = 0) -> Batch:
        """The running requests in a batch of `size` slots, as wide as this one or as `width`."""
        self._settle()
        keep = self.running
        index = (keep + [i for i in range(self.size) if i not in keep])[:size]
        other = type(self)(engine, size, max(width, self.history.shape[1] - 1))
        other.stops = self.stops.new_full((size, self.stops.shape[1]), -1)
        where, n = torch.tensor(index, device=self.logits.device), len(index)
        for name in _PER_SLOT:
            part = getattr(self, name).index_select(0, where)
            getattr(other, name)[tuple(slice(length) for length in part.shape)] = part
        other.numbers[:, :n] = self.numbers.index_select(1, where)
        for name in ("lengths", "ends", "occupied"):
            getattr(other, name)[:n] = getattr(self, name)[index]
        other._running = None
        for name in ("requests", "rows", "claims"):
            getattr(other, name)[:n] = [getattr(self, name)[i] for i in index]
        padded = index + [index[0]] * (size - n)  # what is new is a copy of some row, and emptied
        other.sampler = self.sampler.select(padded)
        for slot in range(n, size):
            other.sampler.clear(slot)
        if self.cache is not None:
            other.cache = PagedCache(self.model.plan, self.pool, self.model.path)
            where = torch.tensor(padded, device=self.logits.device)
            states = tuple(s.index_select(0, where) for s in self.cache.states())
            other.cache.load_states(states, self.model.layout)
        return other


def _rectangle(rows, fill: int, width: int = 0) -> np.ndarray:
    """Lists of different length as one array `[n, width or the longest]`."""
    full = np.full((len(rows), max(width, 1, *map(len, rows))), fill, np.int64)
    for mine, row in zip(full, rows, strict=True):
        mine[: len(row)] = row
    return full


def _together(parts, device) -> list[torch.Tensor]:
    """Arrays of the host on a device, in one transfer."""
    flat = upload(np.concatenate([part.ravel() for part in parts]), device)
    split = flat.split([part.size for part in parts])
    return [piece.view(part.shape) for piece, part in zip(split, parts, strict=True)]
