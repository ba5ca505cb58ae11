"""The slots of the decode loop: static device tensors, one row per running request."""

from __future__ import annotations

from dataclasses import replace

import torch

from .cache import PagedCache
from .feed import Feed
from .kv import TRASH
from .pipeline import Context
from .request import Request
from .rows import Drawn
from .sequence import Row

IDLE = (TRASH,)
_VECTORS = ("logits", "tokens", "positions", "active", "prompt_lengths", "seeds", "streams")

class Batch:
    """`S` slots that requests move through; every tensor keeps its shape while rows come and go.

    Args:
        engine: model, pool, vocabulary size, pipeline and EOS ids are taken from it.
        size: number of slots.
        width: tokens that any request may take in all, prompt included.

    `positions [S, 1]` is the index of the token now to be drawn: the history's length before the draw, and the
    position that token is fed at after it. Idle slots stay at 0 and write to the trash block.
    """

    def __init__(self, engine, size: int, width: int):
        self.model, self.pool, self.size = engine.runner, engine.pool, size
        self.block = self.pool.block_size
        device = self.model.device

        def ints(*shape):
            return torch.zeros(*shape, dtype=torch.long, device=device)

        self.logits = torch.zeros(size, engine.vocab_size, device=device)
        self.tokens, self.positions, self.active = ints(size), ints(size, 1), ints(size, 1)
        self.prompt_lengths, self.seeds, self.streams = ints(size), ints(size), ints(size)
        self.history = ints(size, width + 1).fill_(-1)
        self.cells = ints(size, -(-width // self.block) * self.block + 1)  # position -> cell in the pool
        self.cells.fill_(TRASH * self.block)
        self.requests: list[Request | None] = [None] * size
        self.rows: list = [None] * size
        self.lengths = [0] * size
        self.claims: list = [None] * size
        self.cache: PagedCache | None = None
        self.sampler = engine.pipeline.bind(
            [], [], device=device, vocab_size=engine.vocab_size,
            eos_token_ids=engine.eos_token_ids, capacity=size,
        )  # fmt: skip

    @property
    def running(self) -> list[int]:
        """Slots that hold a request."""
        return [i for i, request in enumerate(self.requests) if request is not None]

    def free(self) -> int | None:
        """A slot without a request, or None."""
        return next((i for i, request in enumerate(self.requests) if request is None), None)

    # -- rows come and go

    def place(self, slot: int, request: Request) -> None:
        """Put a prefilled request into a slot; its blocks are shared until it writes."""
        ready = request.prefilled
        row, length = ready.row, ready.row.length
        if self.model.paged:
            row = self._own_tail(row, length)
            self._map(slot, row.table, 0)
            self.claims[slot] = self.pool.claim(row.table.blocks[0], -(-request.room // self.block))
        self.sampler.fill(slot, request.params, request.prompt.ids, request.seed, request.sample)
        self.requests[slot], self.rows[slot], self.lengths[slot] = request, row, length
        self.logits[slot] = ready.logits
        self.positions[slot], self.active[slot] = length, 1
        self.prompt_lengths[slot] = length
        self.seeds[slot], self.streams[slot] = request.seed, request.sample
        self.history[slot, :length] = torch.tensor(request.prompt.ids, device=self.history.device)
        if ready.states:
            self._insert(slot, ready.states)
        ready.taken()

    def clear(self, slot: int) -> None:
        """Take a finished request out; its blocks go back, full ones stay known as a prefix."""
        row, request = self.rows[slot], self.requests[slot]
        if self.model.shares_prefixes and request.prompt.embeddings is None and request.error is None:
            written = (request.prompt.ids + request.stopper.token_ids)[: self.lengths[slot]]
            self.pool.register(row.table, written)
        if self.claims[slot]:
            self.pool.unclaim(self.claims[slot])
        self.requests[slot] = self.rows[slot] = self.claims[slot] = None
        self.lengths[slot] = 0
        self.sampler.clear(slot)
        self.positions[slot], self.active[slot] = 0, 0
        self.cells[slot, 0] = TRASH * self.block
        self.history[slot] = -1
        self.logits[slot] = 0

    def prepare(self, slot: int) -> None:
        """Make room for the token that the slot is about to be fed.

        Raises:
            PoolExhausted: there is no block for it; the slot is as it was.
        """
        length, row = self.lengths[slot], self.rows[slot]
        if length == self.model.restart:
            request = self.requests[slot]
            whole = request.prompt.ids + request.stopper.token_ids
            row, _ = self.model.prefill(whole[: length + 1])
            self.rows[slot] = row
            self.pool.filled[row.table.blocks[-1]] = self.block
            self._map(slot, row.table, 0)
        elif self.model.paged and length % self.block == 0:
            self.rows[slot] = row = self._own_tail(row, length)
            self._map(slot, row.table, length // self.block)

    def _own_tail(self, row: Row, length: int) -> Row:
        """The row with the block of cell `length` to itself, up to the block's end."""
        return replace(row, table=self.pool.writable(row.table, length, self.block - length % self.block))

    def _map(self, slot: int, table, first: int) -> None:
        span = torch.arange(self.block, device=self.cells.device)
        starts = torch.tensor(table.blocks[first:], device=self.cells.device)[:, None] * self.block
        end = len(table) * self.block
        self.cells[slot, first * self.block : end] = (starts + span).flatten()

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
            tokens=lambda: self.history[:, : max(self.lengths)],
            lengths=self.positions[:, 0],
            prompt_lengths=self.prompt_lengths,
            seeds=self.seeds,
            streams=self.streams,
            params=self.sampler.params,
        )

    def draw(self) -> tuple[Drawn, list | None]:
        """One token for every slot, remembered in `tokens`, and the most probable ones where asked for."""
        context = self.context()
        drawn = self.sampler.sample(self.logits, context)
        self.tokens = drawn.tokens
        self.sampler = self.sampler.accept(drawn.tokens, context)
        wanted = [r.params.logprobs for r in self.requests if r is not None and r.params.logprobs is not None]
        if not wanted:
            return drawn, None
        best = self.logits.log_softmax(-1).topk(min(max(*wanted, 1), self.logits.shape[-1]))
        return drawn, list(zip(best.indices.tolist(), best.values.tolist(), strict=True))

    def feed(self) -> None:
        """One forward pass over all slots: append `tokens` and compute the logits behind them."""
        self.history.scatter_(1, self.positions, self.tokens[:, None])
        if self.model.path == "solo":
            self._feed_alone()
        else:
            self.logits = self.model.forward(self._feed(), self.cache).logits[:, -1]
        for slot in self.running:
            self.lengths[slot] += 1
        self.positions.add_(self.active)

    def _feed(self) -> Feed:
        tables = [IDLE if row is None or not row.table.blocks else row.table.blocks for row in self.rows]
        return Feed(
            ids=self.tokens[:, None],
            positions=self.positions,
            cells=self.cells.gather(1, self.positions),
            tables=tables,
            lengths=[n + 1 for n in self.lengths],
        )

    def _feed_alone(self) -> None:
        logits = self.logits.clone()
        for slot in self.running:
            (self.rows[slot],), out = self.model.extend([self.rows[slot]], [[int(self.tokens[slot])]])
            logits[slot] = out.logits[0, -1]
        self.logits = logits

    def resized(self, engine, size: int) -> Batch:
        """The running requests in a batch of `size` slots."""
        keep = self.running
        index = (keep + [i for i in range(self.size) if i not in keep])[:size]
        other = Batch(engine, size, self.history.shape[1] - 1)
        where = torch.tensor(index, device=self.logits.device)
        for name in (*_VECTORS, "history", "cells"):
            setattr(other, name, getattr(self, name).index_select(0, where))
        for name in ("requests", "rows", "lengths", "claims"):
            setattr(other, name, [getattr(self, name)[i] for i in index])
        other.sampler = self.sampler.select(index)
        if self.cache is not None:
            other.cache = PagedCache(self.model.plan, self.pool, self.model.path)
            states = tuple(s.index_select(0, where) for s in self.cache.states())
            other.cache.load_states(states, self.model.layout)
        return other
