"""The slots of the decode loop: static device tensors, one row per running request."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from ..cache.feed import Feed
from ..cache.paged import PagedCache
from ..cache.pool import TRASH, ZERO, Table
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
_PER_SLOT = ("logits", "tokens", "history", "table")


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

        self.logits = torch.zeros(size, engine.vocab_size, device=device)
        self.tokens = torch.zeros(size, dtype=torch.long, device=device)
        # One tensor, so that what a new row brings is told in one transfer and one launch; what kernels read begins at
        # a multiple of 16 bytes.
        lane, blocks = size + size % 2, 4 * -(-(width + self.block) // (4 * self.block))
        parts = 6 * lane, size * blocks // 2, size * (width + 1)
        self.words = torch.zeros(sum(parts), dtype=torch.long, device=device)
        numbers, table, history = self.words.split(parts)
        self.numbers = numbers.view(6, lane)[:, :size]
        self.positions, self.active, self.limits = (row[:, None] for row in self.numbers[:3])
        self.prompt_lengths, self.seeds, self.streams = self.numbers[3:]
        self.table = table.view(torch.int32).view(size, blocks).fill_(ZERO)
        self.table[:, 0] = TRASH  # where idle slots write
        self.history = history.view(size, width + 1).fill_(-1)
        self._column, self._places = np.arange(6) * lane, np.cumsum(parts)  # where each part's numbers lie
        self._held = self.table.cpu().numpy().copy()  # the table, on the host
        self.requests: list[Request | None] = [None] * size
        self.rows: list[Row | None] = [None] * size
        self.lengths = np.zeros(size, np.int64)
        self.ends = np.zeros(size, np.int64)  # cells that each row has blocks for; FULL once it needs no more
        self.occupied = np.zeros(size, bool)  # slots that hold a request
        self.claims: list = [None] * size
        self._running: list[int] | None = []  # None: to be looked up
        self._spare = 0  # steps in which no row comes to the end of its blocks
        # Slots whose tensors still hold a row that has gone, and how many tokens and blocks it has left there.
        self._left: dict[int, tuple[int, int]] = {}
        self.cache: PagedCache | None = None
        self.sampler = engine.pipeline.bind(
            [], [], device=device, vocab_size=engine.vocab_size, eos_token_ids=self.eos, capacity=size
        )

    @property
    def running(self) -> list[int]:
        """Slots that hold a request; the list is not to be changed."""
        if self._running is None:
            self._running = self.occupied.nonzero()[0].tolist()
        return self._running

    # -- rows come and go

    def place(self, requests: list[Request]) -> list[tuple[Request, str]]:
        """Put prefilled requests into free slots; their blocks are shared until they write.

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
                row = self._own_tail(ready.row) if self.model.paged else ready.row
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
        if placed:
            self._arrive(placed)
        for _, request in placed:
            request.prefilled.taken()
        return failed

    def _arrive(self, placed: list[tuple[int, Request]]) -> None:
        """Fill the slots' tensors."""
        self._tell([told for slot, request in placed for told in self._row(slot, request)] + self._emptied())
        ready = [request.prefilled for _, request in placed]
        torch._foreach_copy_([self.logits[slot] for slot, _ in placed], [each.logits for each in ready])
        for (slot, _), prefilled in zip(placed, ready, strict=True):
            if prefilled.states:
                self._insert(slot, prefilled.states)

    def _row(self, slot: int, request: Request) -> list[tuple]:
        """Where the numbers of a new row lie in `words`, and which they are."""
        length, ids = self.rows[slot].length, request.prompt.ids
        room = min(request.room, self.history.shape[1] - 1)
        tokens, blocks = self._left.pop(slot, (0, 0))
        blocks = max(blocks, len(self.rows[slot].table) if self.model.paged else 0)
        return [
            (self._column + slot, (length, 1, room, length, request.seed, request.sample)),
            self._tokens(slot, ids + [-1] * (tokens - len(ids))),
            self._blocks_of(slot, 0, blocks),
        ]

    def _emptied(self) -> list[tuple]:
        """The same for all slots whose rows have gone and left them empty."""
        told = []
        for slot, (tokens, blocks) in self._left.items():
            told += (self._column[:3] + slot, (0, 0, 0)), self._tokens(slot, [-1] * tokens)
            told.append(self._blocks_of(slot, 0, blocks))
            self.sampler.clear(slot)
        self._left.clear()
        return told

    def _tokens(self, slot: int, ids: list[int]) -> tuple:
        """Where the beginning of a slot's history lies in `words`, and what it is."""
        start = int(self._places[1]) + slot * self.history.shape[1]
        return np.arange(start, start + len(ids)), ids

    def _blocks_of(self, slot: int, first: int, end: int) -> tuple:
        """Where a part of a slot's table lies in `words`, and what it is: two blocks a number."""
        pairs = self._held.view(np.int64)
        first, end, start = first // 2, -(-end // 2), int(self._places[0]) + slot * pairs.shape[1]
        return np.arange(start + first, start + end), pairs[slot, first:end]

    def _tell(self, told: list[tuple]) -> None:
        """Write numbers of the host to `words`, (where, which) each, in one transfer."""
        where, which = zip(*told, strict=True)
        both = np.empty((2, sum(map(len, where))), np.int64)
        np.concatenate(where, out=both[0])
        np.concatenate(which, out=both[1], casting="unsafe")
        there = upload(both, self.words.device)
        self.words.index_copy_(0, there[0], there[1])

    def clear(self, slot: int) -> None:
        """Take a finished request out; its blocks go back, full ones stay known as a prefix."""
        row, request, self._running = self.rows[slot], self.requests[slot], None
        length = int(self.lengths[slot])
        if self.model.shares_prefixes and request.prompt.embeddings is None and request.error is None:
            fed = min(length, len(request.prompt) + len(request.stopper.token_ids) - 1)
            self.pool.register(row.table, (request.prompt.ids + request.stopper.token_ids)[: max(fed, 0)])
        if self.claims[slot]:
            self.pool.unclaim(self.claims[slot])
        # The step that is under way may append one more token.
        self._left[slot] = (
            min(length + 2, self.history.shape[1]),
            len(row.table) if self.model.paged else 0,
        )
        self._held[slot], self._held[slot, 0] = ZERO, TRASH
        self.requests[slot] = self.rows[slot] = self.claims[slot] = None
        self.lengths[slot], self.occupied[slot] = 0, False
        if self.sampler.chains[slot] is self.sampler.pipeline:
            self.sampler.params[slot] = (
                None  # a row that asks for the same may follow; if none does, `_emptied` clears
            )
        else:
            self.sampler.clear(slot)

    def _settle(self) -> None:
        """Empty the tensors of slots whose rows have gone: nothing may write to blocks that others hold by now."""
        if self._left:
            self._tell(self._emptied())

    def prepare(self) -> list[tuple[int, str]]:
        """Make room for the token that each slot draws next; the slots for which there is no block, and why."""
        self._settle()
        if not self.model.paged:
            return []
        self._spare -= 1
        return self._grow() if self._spare < 0 else []

    def _grow(self) -> list[tuple[int, str]]:
        """New blocks for the slots that are at the end of theirs."""
        exhausted, grown = [], []
        for slot in (self.occupied & (self.lengths >= self.ends)).nonzero()[0].tolist():
            row, first = self.rows[slot], len(self.rows[slot].table)
            try:
                self._seat(slot, replace(row, table=self._further(row.table, self._needed(slot) - first)))
            except PoolExhausted as error:
                exhausted.append((slot, str(error)))  # what it leaves may be enough for the others
                break
            grown.append(self._blocks_of(slot, first, len(self.rows[slot].table)))
        if grown:
            self._tell(grown)
        self.pool.clean()
        if self.running and not exhausted:
            self._spare = int((self.ends - self.lengths)[self.occupied].min()) - 1
        return exhausted

    def _further(self, table: Table, needed: int) -> Table:
        """A table with some more blocks; with one, where the pool has no more."""
        try:
            return self.pool.further(table, min(AHEAD, needed))
        except PoolExhausted:
            return self.pool.further(table, 1)

    def _seat(self, slot: int, row: Row) -> None:
        """Let a slot have a row, or the same row with more blocks."""
        self.rows[slot] = row
        if self.model.paged:
            self._held[slot, : len(row.table)] = row.table.blocks
            full = len(row.table) >= self._needed(slot)
            self.ends[slot] = FULL if full else len(row.table) * self.block

    def _needed(self, slot: int) -> int:
        """Blocks that a slot's row may come to need."""
        return min(self.requests[slot].blocks(self.block), -(-(self.history.shape[1] - 1) // self.block))

    def _own_tail(self, row: Row) -> Row:
        """The row with the block of its next cell to itself, up to the block's end."""
        rest = self.block - row.length % self.block
        table = self.pool.writable(row.table, row.length, rest)
        return row if table is row.table else replace(row, table=table)

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
            cells=upload(self._next_cells(), self.positions.device)[:, None],
            tables=tables,
            lengths=(self.lengths + 1).tolist(),
        )

    def _next_cells(self) -> np.ndarray:
        """`[S]` flat number of the cell that each slot's next token is written to."""
        block, place = np.divmod(self.lengths, self.block)
        return self._held[np.arange(self.size), block] * np.int64(self.block) + place

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
        self._tell([self._blocks_of(slot, 0, len(row.table))])

    def record(self) -> None:
        """Nothing: its steps run as they are."""

    def resized(self, engine, size: int, width: int = 0) -> Batch:
        """The running requests in a batch of `size` slots, as wide as this one or as `width`."""
        self._settle()
        keep = self.running
        index = (keep + [i for i in range(self.size) if i not in keep])[:size]
        other = type(self)(engine, size, max(width, self.history.shape[1] - 1))
        where, n = torch.tensor(index, device=self.logits.device), len(index)
        for name in _PER_SLOT:
            part = getattr(self, name).index_select(0, where)
            getattr(other, name)[tuple(slice(length) for length in part.shape)] = part
        other.numbers[:, :n] = self.numbers.index_select(1, where)
        for name in ("lengths", "ends", "occupied"):
            getattr(other, name)[:n] = getattr(self, name)[index]
        other._held[:n, : self._held.shape[1]] = self._held[index, : other._held.shape[1]]
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
