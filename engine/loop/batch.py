"""The slots of the decode loop: static device tensors, one row per running request."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from ..cache.feed import Feed
from ..cache.paged import PagedCache
from ..cache.pool import TRASH, ZERO
from ..cache.sequence import Row
from ..cache.transfer import upload
from ..pipeline.pipeline import Context
from .request import Request

IDLE = (TRASH,)
# Tensors with one entry per slot, which move with their rows when the batch shrinks.
_PER_SLOT = (
    "logits", "tokens", "results", "positions", "active", "limits", "stops",
    "prompt_lengths", "seeds", "streams", "history", "cells", "table",
)  # fmt: skip


@dataclass
class Step:
    """One drawn step on its way to the host.

    Args:
        requests: who sat in each slot.
        results: `[S, 3]` token, raw and processed log-probability of each slot.
        best: ids and log-probabilities `[S, n]` of the most probable tokens, or None.
        ready: set when `results` has arrived, None where it is there already.
        failures: why a processor left a slot without a token.
    """

    requests: list[Request | None]
    results: torch.Tensor
    best: tuple[torch.Tensor, torch.Tensor] | None = None
    ready: torch.cuda.Event | None = None
    failures: dict[int, str] = field(default_factory=dict)

    def read(self) -> list[list[float]]:
        """The results, once they have arrived."""
        if self.ready is not None:
            self.ready.synchronize()
        return self.results.tolist()

    def most_probable(self) -> list | None:
        """(ids, log-probabilities) of each slot, most probable first."""
        return None if self.best is None else list(zip(*(t.tolist() for t in self.best), strict=True))


class Batch:
    """`S` slots that requests move through; every tensor keeps its shape while rows come and go.

    Args:
        engine: model, pool, vocabulary size, pipeline and EOS ids are taken from it.
        size: number of slots.
        width: tokens that any request may take in all, prompt included.

    `positions [S, 1]` is the index of the token now to be drawn: the history's length before the draw, and the
    position that token is fed at after it. Idle slots stay at 0 and write to the trash block.
    """

    lag = 0  # steps that the host may look back: it sees each one before the next begins

    def __init__(self, engine, size: int, width: int):
        self.model, self.pool, self.size = engine.runner, engine.pool, size
        self.block, self.eos = self.pool.block_size, engine.eos_token_ids
        device = self.model.device

        def ints(*shape, fill=0, dtype=torch.long):
            return torch.full(shape, fill, dtype=dtype, device=device)

        blocks = -(-width // self.block) + 1
        self.logits = torch.zeros(size, engine.vocab_size, device=device)
        self.results = torch.zeros(size, 3, dtype=torch.double, device=device)
        self.tokens, self.positions, self.active = ints(size), ints(size, 1), ints(size, 1)
        self.limits, self.stops = ints(size, 1), ints(size, 8, fill=-1)
        self.prompt_lengths, self.seeds, self.streams = ints(size), ints(size), ints(size)
        self.history = ints(size, width + 1, fill=-1)
        self.cells = ints(size, blocks * self.block, fill=TRASH * self.block)  # position -> cell in the pool
        self.table = ints(size, blocks, fill=ZERO, dtype=torch.int32)
        self.requests: list[Request | None] = [None] * size
        self.rows: list[Row | None] = [None] * size
        self.lengths = [0] * size
        self.claims: list = [None] * size
        self.cache: PagedCache | None = None
        self.sampler = engine.pipeline.bind(
            [], [], device=device, vocab_size=engine.vocab_size, eos_token_ids=self.eos, capacity=size
        )

    @property
    def running(self) -> list[int]:
        """Slots that hold a request."""
        return [i for i, request in enumerate(self.requests) if request is not None]

    def free(self) -> int | None:
        """A slot without a request, or None."""
        return next((i for i, request in enumerate(self.requests) if request is None), None)

    # -- rows come and go

    @torch.no_grad()
    def place(self, slot: int, request: Request) -> None:
        """Put a prefilled request into a slot; its blocks are shared until it writes.

        Raises:
            PoolExhausted: there is no block for its first new token; the slot is as it was.
        """
        ready = request.prefilled
        row, length = ready.row, ready.row.length
        if self.model.paged:
            row = self._own_tail(row, length)
            self._map(slot, row.table, 0)
            self.claims[slot] = self.pool.claim(row.table.blocks[0], request.blocks(self.block))
        self.sampler.fill(slot, request.params, request.prompt.ids, request.seed, request.sample)
        self.requests[slot], self.rows[slot], self.lengths[slot] = request, row, length
        self.logits[slot] = ready.logits
        self.positions[slot], self.active[slot] = length, 1
        self.prompt_lengths[slot] = length
        self.seeds[slot], self.streams[slot] = request.seed, request.sample
        self.history[slot, :length] = upload(request.prompt.ids, self.history.device)
        self._set_stops(slot, request)
        if ready.states:
            self._insert(slot, ready.states)
        ready.taken()

    def _set_stops(self, slot: int, request: Request) -> None:
        """What ends the row on the device, where the host looks late."""
        params = request.params
        ids = sorted({*params.stop_token_ids, *params.ends(self.eos)})
        if len(ids) > self.stops.shape[1]:
            wider = self.stops.new_full((self.size, 2 * len(ids)), -1)
            wider[:, : self.stops.shape[1]] = self.stops
            self.stops = wider
        self.stops[slot] = -1
        self.stops[slot, : len(ids)] = upload(ids, self.stops.device)
        self.limits[slot] = min(request.room, self.history.shape[1] - 1)

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Take a finished request out; its blocks go back, full ones stay known as a prefix."""
        row, request = self.rows[slot], self.requests[slot]
        if self.model.shares_prefixes and request.prompt.embeddings is None and request.error is None:
            fed = min(self.lengths[slot], len(request.prompt) + len(request.stopper.token_ids) - 1)
            self.pool.register(row.table, (request.prompt.ids + request.stopper.token_ids)[: max(fed, 0)])
        if self.claims[slot]:
            self.pool.unclaim(self.claims[slot])
        self.requests[slot] = self.rows[slot] = self.claims[slot] = None
        self.lengths[slot] = 0
        self.sampler.clear(slot)
        self.positions[slot], self.active[slot], self.stops[slot] = 0, 0, -1
        self.cells[slot], self.table[slot] = TRASH * self.block, ZERO
        self.history[slot] = -1
        self.logits[slot] = 0

    def prepare(self, slot: int) -> None:
        """Make room for the token that the slot draws next.

        Raises:
            PoolExhausted: there is no block for it; the slot is as it was.
        """
        length, row = self.lengths[slot], self.rows[slot]
        if self.model.paged and len(row.table) * self.block <= length < self.requests[slot].room:
            with torch.no_grad():  # not around every call: it takes longer than the test
                self.rows[slot] = row = self._own_tail(row, length)
                self._map(slot, row.table, length // self.block)

    def _own_tail(self, row: Row, length: int) -> Row:
        """The row with the block of cell `length` to itself, up to the block's end."""
        return replace(row, table=self.pool.writable(row.table, length, self.block - length % self.block))

    def _map(self, slot: int, table, first: int) -> None:
        device, new = self.cells.device, table.blocks[first:]
        if len(new) == 1:  # the step's own case: scalars reach a device without waiting for it
            cells = torch.arange(new[0] * self.block, (new[0] + 1) * self.block, device=device)
            self.table[slot, first] = new[0]
        else:
            blocks = upload(new, device)
            cells = (blocks[:, None] * self.block + torch.arange(self.block, device=device)).flatten()
            self.table[slot, first : len(table)] = blocks
        self.cells[slot, first * self.block : len(table) * self.block] = cells

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
            exclusive=True,
        )

    @torch.no_grad()
    def draw(self) -> Step:
        """One token for every slot, remembered in `tokens`."""
        context = self.context()
        drawn = self.sampler.sample(self.logits, context)
        self.tokens = drawn.tokens
        self.sampler = self.sampler.accept(drawn.tokens, context, every_row=True)
        results = torch.stack((drawn.tokens, drawn.raw_logprobs, drawn.logprobs), 1)
        failures = context.cache.get("failures", {})
        return Step(list(self.requests), results, self._most_probable(), failures=failures)

    def _top_count(self) -> int | None:
        """How many of the most probable tokens some request wants to see, or None."""
        wanted = [r.params.logprobs for r in self.requests if r is not None and r.params.logprobs is not None]
        return min(max(*wanted, 1), self.logits.shape[-1]) if wanted else None

    def _most_probable(self):
        count = self._top_count()
        if count is None:
            return None
        best = self.logits.log_softmax(-1).topk(count)
        return best.indices, best.values

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

    def _restart(self, slot: int) -> None:
        """Compute the whole row again where the model changes all its rotations; the feed repeats its last cell."""
        request = self.requests[slot]
        row, _ = self.model.prefill(request.prompt.ids + request.stopper.token_ids)
        self.rows[slot] = row
        self.pool.filled[row.table.blocks[-1]] = self.block
        self._map(slot, row.table, 0)

    def resized(self, engine, size: int) -> Batch:
        """The running requests in a batch of `size` slots."""
        keep = self.running
        index = (keep + [i for i in range(self.size) if i not in keep])[:size]
        other = type(self)(engine, size, self.history.shape[1] - 1)
        where = torch.tensor(index, device=self.logits.device)
        for name in _PER_SLOT:
            setattr(other, name, getattr(self, name).index_select(0, where))
        for name in ("requests", "rows", "lengths", "claims"):
            setattr(other, name, [getattr(self, name)[i] for i in index])
        other.sampler = self.sampler.select(index)
        if self.cache is not None:
            other.cache = PagedCache(self.model.plan, self.pool, self.model.path)
            states = tuple(s.index_select(0, where) for s in self.cache.states())
            other.cache.load_states(states, self.model.layout)
        return other
