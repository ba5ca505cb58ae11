"""The block pool: paged, reference-counted, copy-on-write storage for keys and values."""

from __future__ import annotations

import weakref
from collections import OrderedDict, deque
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from ..errors import PoolExhausted
from .prefixes import Prefixes
from .storage import Store, zeros
from .transfer import upload

TRASH = 0  # idle rows and surplus tokens write here; nobody reads it
ZERO = 1  # tables are padded with it where a whole rectangle is gathered; nobody writes it
RESERVED = 2


class Table:
    """The block ids of one sequence: immutable, and the holder of one reference to each of its blocks.

    Two States that share a prefix share blocks; two that share every block share the Table itself.
    """

    __slots__ = ("__weakref__", "blocks", "pool")

    def __init__(self, pool: BlockPool, blocks: tuple[int, ...]):
        self.pool, self.blocks = pool, blocks
        pool.retain(self)

    def __del__(self):
        self.pool.dropped.append(self.blocks)  # by any thread, or by the garbage collector in mid-sentence

    def __len__(self) -> int:
        return len(self.blocks)


class BlockPool:
    """Fixed-size blocks of key/value cells, handed out to Tables and taken back when the last one goes.

    Args:
        block_size: cells (tokens) in a block, > 0.
        capacity: blocks to start with; the pool doubles when it runs out.
        max_blocks: upper bound for growth, None for none.
        scrub: zero a block before it is used. Needed where a whole rectangle of cells is read and masked
            afterwards: probability 0 times a stale NaN is NaN.
        prefix_cache: keep full prompt blocks after their last use, until the space is wanted.

    Blocks 0 and 1 are never handed out (see `TRASH` and `ZERO`).
    """

    def __init__(
        self,
        block_size: int = 16,
        capacity: int = 64,
        max_blocks: int | None = None,
        *,
        scrub: bool = False,
        prefix_cache: bool = True,
    ):
        self.block_size, self.max_blocks = block_size, max_blocks
        self.scrub, self.prefix_cache = scrub, prefix_cache
        self.capacity = RESERVED
        self.stores: list[Store] = []
        self._where: dict[int, tuple[int, int]] = {}
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # views of the stores, made once
        self.refs = [0] * RESERVED
        self.filled = [0] * RESERVED  # cells of each block that some sequence has written
        self._free = np.zeros(RESERVED, bool)
        self._free_count = self._free_low = 0  # all that are free, and those below the high water mark
        self._claimed = np.zeros(RESERVED, bool)
        self.dropped: deque[tuple[int, ...]] = deque()  # of Tables that are gone; given back when it matters
        self.owner = "an engine"  # in words, for whoever is given rows that are not its own
        # Gives a turn of its engine, for (what, owner), to what moves cells by itself.
        self.turns: Any = lambda what, owner: nullcontext()
        self._tables: weakref.WeakSet[Table] = weakref.WeakSet()
        self.prefixes = Prefixes(block_size)
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._dirty: list[int] = []  # handed out, and not yet scrubbed
        self.high_water = RESERVED
        self.copies = 0
        self.moves = 0  # how often the cells have moved
        if max_blocks is not None:
            capacity = min(capacity, max_blocks + RESERVED)
        self._resize(max(capacity, RESERVED + 1))

    # -- storage

    def add_store(self, layers, key_shape, value_shape, dtype, device) -> None:
        """Allocate cells for `layers` (model layer indices); a shape is (heads, head dim)."""
        lead = (len(layers), self.capacity, self.block_size)
        self.stores.append(
            Store(
                tuple(layers),
                zeros((*lead, *key_shape), dtype, device),
                zeros((*lead, *value_shape), dtype, device),
            )
        )
        for j, layer in enumerate(layers):
            self._where[layer] = (len(self.stores) - 1, j)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of one layer, `[N, block, heads, dim]` each: views, written in place."""
        if index not in self._layers:
            store, j = self._where[index]
            self._layers[index] = self.stores[store].keys[j], self.stores[store].values[j]
        return self._layers[index]

    @property
    def block_bytes(self) -> int:
        """Bytes that one block takes over all layers."""
        return sum(
            (s.keys[:, 0].numel() + s.values[:, 0].numel()) * s.keys.element_size() for s in self.stores
        )

    @property
    def in_use(self) -> int:
        """Blocks that some Table holds."""
        self.settle()
        return len(self.refs) - self.refs.count(0)

    @property
    def cached(self) -> int:
        """Blocks that nobody holds, kept for prompts that begin with the same tokens."""
        self.settle()
        return len(self._idle)

    def obtainable(self) -> float:
        """Blocks that could be handed out now; infinite for a pool that may grow without bound."""
        self.settle()
        if self.max_blocks is None:
            return float("inf")
        return self._free_count + len(self._idle) + self.max_blocks + RESERVED - self.capacity

    # -- references

    def table(self, blocks=()) -> Table:
        """A Table over `blocks`, holding one reference to each."""
        return Table(self, tuple(blocks))

    def retain(self, table: Table) -> None:
        """Count the references of a new Table."""
        self._tables.add(table)
        refs, idle = self.refs, self._idle
        for block in table.blocks:
            refs[block] += 1
            if idle:
                idle.pop(block, None)

    def settle(self) -> None:
        """Give back what gone Tables held; the last reference frees a block, or keeps it idle for its prefix."""
        while self.dropped:
            self._release(self.dropped.popleft())

    def _release(self, blocks: tuple[int, ...]) -> None:
        refs, known = self.refs, self.prefixes.keys
        for block in blocks:
            refs[block] -= 1
            if refs[block] == 0:
                if block in known:
                    self._idle[block] = None
                else:
                    self._put_back(block)

    # -- allocation

    def allocate(self, count: int, after: int | None = None, room: int = 0) -> tuple[int, ...]:
        """`count` free blocks, consecutive where possible, not yet referenced by any Table.

        Args:
            count: how many.
            after: continue behind this block if its neighbours are free.
            room: look for a free run of this length, so that the sequence can grow without gaps.

        Raises:
            PoolExhausted: the pool is full and may not grow; nothing was taken.
        """
        self.settle()
        if count == 0:
            return ()
        self._make_room(count)
        blocks = self._choose(count, after, max(room, count))
        for block in blocks:  # a few, mostly one
            self._free[block], self.filled[block] = False, 0
        used = [block for block in blocks if block < self.high_water]
        self._free_count -= len(blocks)
        self._free_low -= len(used)
        top = max(blocks) + 1
        if top > self.high_water:
            self._free_low += int(self._free[self.high_water : top].sum())
            self.high_water = top
        if self.scrub:
            self._dirty += used
        return tuple(blocks)

    def clean(self) -> None:
        """Zero the blocks that were handed out since the last time, before anything is written to them.

        Not those that `writable` gave to be filled at once.
        """
        if self._dirty:
            dirty = sorted(block for block in self._dirty if self.filled[block] < self.block_size)
            self._dirty = []
            for store in self.stores:
                store.clear(dirty)

    def reserve(self, count: int, most: int = 0) -> None:
        """Grow now, so that `count` blocks can be handed out without moving the pool in the middle of a run.

        As far as `max_blocks` and half of the device's free memory allow; beyond that the pool grows when it must. If
        it grows then so that `most` can be, where that is allowed.
        """
        self.settle()
        held = self.capacity - self._free_count - len(self._idle)
        if held + count <= self.capacity:
            return
        for wanted in (max(count, most), count):
            target = held + wanted
            if self.max_blocks is not None:
                target = min(target, self.max_blocks + RESERVED)
            if target > self.capacity and target * self.block_bytes <= self._spare() // 2:
                self._resize(target)
                return

    def _spare(self) -> int:
        """Bytes that are free where the cells lie; a CPU gives memory when it is written, so there is no limit."""
        device = self.stores[0].keys.device if self.stores else torch.device("cpu")
        return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 62

    def claim(self, start: int, count: int) -> tuple[int, int]:
        """Ask other sequences to stay out of `[start, start + count)` while there is space elsewhere."""
        end = min(start + count, self.capacity)
        self._claimed[start:end] = True
        return start, end

    def unclaim(self, span: tuple[int, int]) -> None:
        """Take back a claim."""
        self._claimed[span[0] : span[1]] = False

    def _make_room(self, count: int) -> None:
        # Idle prefixes go first: they never raise the amount of memory that was ever touched.
        while self._idle and self._free_low < count:
            self._forget(self._idle.popitem(last=False)[0])
        short = count - self._free_count
        if short <= 0:
            return
        target = max(2 * self.capacity, self.capacity + short)
        if self.max_blocks is not None:
            target = min(target, self.max_blocks + RESERVED)
        if target < self.capacity + short:
            raise PoolExhausted(
                f"{count} blocks of {self.block_size} tokens wanted, {self._free_count} free of "
                f"max_blocks={self.max_blocks}; use fewer slots, shorter requests, or drop States"
            )
        self._resize(target)

    def _choose(self, count: int, after: int | None, room: int):
        free = self._free
        if after is not None and after + count < self.capacity and free[after + 1]:
            behind = range(after + 1, after + 1 + count)
            if count == 1 or free[behind[0] : behind[-1] + 1].all():
                return behind
        unclaimed = (free > self._claimed).tobytes()
        for run in (room, count):
            if (start := unclaimed.find(b"\1" * run)) >= 0:
                return range(start, start + count)
        return np.flatnonzero(free)[:count].tolist()

    def _resize(self, capacity: int) -> None:
        extra = capacity - self.capacity
        self._free_count += extra
        self.refs += [0] * extra
        self.filled += [0] * extra
        self._free = np.concatenate((self._free, np.ones(extra, bool)))
        self._claimed = np.concatenate((self._claimed, np.zeros(extra, bool)))
        self.capacity, self.moves = capacity, self.moves + 1
        self._layers.clear()
        self.stores = [store.resized(capacity, self.high_water) for store in self.stores]

    # -- writing

    def further(self, table: Table, count: int) -> Table:
        """A Table with `count` more blocks, which are written to later."""
        return self.table(table.blocks + self.allocate(count, table.blocks[-1]))

    def writable(self, table: Table, length: int, count: int, room: int = 0) -> Table:
        """A Table in which cells `[length, length + count)` may be written without harm to any other sequence.

        Args:
            table: the sequence's blocks; may hold more than `length` cells (a rewound sequence).
            length: cells already written and still wanted.
            count: cells about to be written.
            room: blocks that the sequence may need in all, a hint for placing it.

        The block that holds cell `length` is copied if a sibling has already written there.
        """
        size = self.block_size
        whole, offset = divmod(length, size)
        blocks = table.blocks
        if count == 1 and offset and len(blocks) > whole and self.filled[blocks[whole]] == offset:
            self.filled[blocks[whole]] = offset + 1  # a step in a block that nobody has written to
            return table if len(blocks) == whole + 1 else self.table(blocks[: whole + 1])
        kept = blocks[: whole + (offset > 0)]
        copy = offset > 0 and self.filled[kept[-1]] > offset
        needed = -(-(length + count) // size)
        fresh = self.allocate(needed - len(kept) + copy, kept[-1] if kept and not copy else None, room)
        if copy:
            self.copy(kept[-1], fresh[0], offset)
            kept = kept[:-1]
        for i in range(whole, needed):
            block = kept[i] if i < len(kept) else fresh[i - len(kept)]
            self.filled[block] = min(size, length + count - i * size)
        return table if not fresh and len(kept) == len(blocks) else self.table(kept + fresh)

    def go_on(self, cells: list[tuple[int, int]]) -> bool:
        """Let a further cell, (block, place), of each block be written, unless a sibling has written to one."""
        filled = self.filled
        for block, place in cells:
            if filled[block] != place:
                return False
        for block, place in cells:
            filled[block] = place + 1
        return True

    def copy(self, source: int, target: int, count: int) -> None:
        """Copy the first `count` cells of a block in every layer; what a sibling wrote behind them stays its own."""
        self.copies += 1
        self.clean()
        for store in self.stores:
            store.keys[:, target, :count] = store.keys[:, source, :count]
            store.values[:, target, :count] = store.values[:, source, :count]

    def cell(self, table: Table, index: int) -> int:
        """The flat number of a sequence's cell."""
        block, place = divmod(index, self.block_size)
        return table.blocks[block] * self.block_size + place

    def move(self, sources, targets) -> None:
        """Copy single cells in every layer, all at once.

        Args:
            sources, targets: flat numbers of cells (block * block_size + place).
        """
        self.clean()
        for store in self.stores:
            where = upload([list(sources), list(targets)], store.keys.device)
            for cells in (store.keys, store.values):
                flat = cells.view(len(cells), -1, *cells.shape[3:])
                flat.index_copy_(1, where[1], flat.index_select(1, where[0]))

    # -- shared prefixes

    def match(self, tokens) -> tuple[int, ...]:
        """Blocks that already hold the longest known prefix of `tokens`, leaving at least one token to compute."""
        return self.prefixes.match(tokens)

    def register(self, table: Table, tokens) -> list[int]:
        """Make the full blocks of `tokens`, held by `table`, known to `match`; those that were not are returned."""
        return self.prefixes.add(table.blocks, tokens) if self.prefix_cache else []

    def unregister(self, blocks) -> None:
        """Forget prefixes that were registered too early: what their blocks hold was never computed."""
        for block in blocks:
            if block in self._idle:
                del self._idle[block]
                self._forget(block)
            elif block in self.prefixes:
                self.prefixes.remove(block)

    def clear_prefixes(self) -> None:
        """Forget every kept prefix that nobody uses."""
        self.settle()
        while self._idle:
            self._forget(self._idle.popitem()[0])

    def forget_prefixes(self) -> None:
        """Forget every prefix, those in use too: what they hold is of another model."""
        self.clear_prefixes()
        self.prefixes.clear()

    def _forget(self, block: int) -> None:
        self.prefixes.remove(block)
        self._put_back(block)

    def _put_back(self, block: int) -> None:
        self._free[block] = True
        self._free_count += 1
        self._free_low += 1

    # -- integrity

    def check(self) -> None:
        """Raise AssertionError unless counts, free blocks and kept prefixes agree with the Tables alive."""
        self.settle()
        refs, expected = np.array(self.refs), np.zeros(self.capacity, np.int64)
        for table in self._tables:
            assert len(set(table.blocks)) == len(table.blocks), f"block twice in one table: {table.blocks}"
            for block in table.blocks:
                expected[block] += 1
        wrong = np.flatnonzero(expected != refs)
        assert not len(wrong), f"blocks {wrong.tolist()}: counted {refs[wrong]}, held {expected[wrong]}"
        idle = np.zeros(self.capacity, bool)
        idle[list(self._idle)] = True
        state = (refs > 0).astype(int) + self._free + idle
        state[:RESERVED] += 1
        lost = np.flatnonzero(state != 1)
        assert not len(lost), f"blocks {lost.tolist()} are not exactly one of used, free, kept"
        low = self._free[: self.high_water].sum()
        assert (self._free_count, self._free_low) == (self._free.sum(), low), "free blocks are miscounted"
        self.prefixes.check()
        for store in self.stores:
            assert not store.keys[:, ZERO].any(), "the zero block was written"
