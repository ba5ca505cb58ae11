"""What one forward pass is fed: tokens, their positions, and where their keys and values go."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .pool import TRASH, ZERO
from .transfer import upload


@dataclass
class Feed:
    """One forward pass over `B` rows of at most `Q` new tokens each, left-aligned; or over packed rows.

    Packed rows stand one after another in a single row of `T` tokens, which is all that the model sees: `ids`,
    `positions` and `cells` are `[1, T]`, while tables and lengths belong to the `R` rows of `offsets`.

    Args:
        ids: `[B, Q]` int64 token ids, or None when `embeddings` are given.
        positions: `[B, Q]` int64 absolute positions, 0 for surplus tokens.
        cells: `[B, Q]` int64 flat cell index each token is written to; surplus tokens go to the trash block.
        tables: block ids of each row, on the host.
        lengths: cells of each row that are valid after this pass, the new ones included, on the host.
        counts: real tokens of each row, or None when every row has `Q`.
        embeddings: `[B, Q, D]` input embeddings instead of ids.
        block_table: `[B, M]` int32 on the device; built from `tables` on first use.
        cell_counts: `[B]` int64 on the device, as `lengths`; built from it on first use.
        flat: `cells` in one dimension; made on first use.
        real: `[B]` int64 on the device, as `counts`; made on first use.
        offsets: of packed rows, on the host: row r has tokens `offsets[r]` to `offsets[r + 1] - 1`.
        starts: `[R + 1]` int64 on the device, as `offsets`.
        last: `[R]` int64 on the device, the last token of each packed row.
        tree: `[B, Q, Q]` bool, which new tokens each one sees (itself and its ancestors); None: all before it.
    """

    ids: torch.Tensor | None
    positions: torch.Tensor
    cells: torch.Tensor
    tables: Sequence[Sequence[int]]
    lengths: Sequence[int]
    counts: Sequence[int] | None = None
    embeddings: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    cell_counts: torch.Tensor | None = None
    flat: torch.Tensor | None = None
    real: torch.Tensor | None = None
    offsets: Sequence[int] | None = None
    starts: torch.Tensor | None = None
    last: torch.Tensor | None = None
    tree: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """New tokens per row, Q."""
        return self.positions.shape[1]

    def reach(self, block_size: int) -> int:
        """Positions that there are blocks for, on the host: those of all real tokens are below."""
        known = self.block_table is None
        blocks = max(map(len, self.tables), default=1) if known else self.block_table.shape[1]
        return blocks * block_size

    def blocks(self) -> torch.Tensor:
        """`[B, M]` int32 block table on the device, padded with the zero block."""
        if self.block_table is None:
            width = max(1, max((len(t) for t in self.tables), default=1))
            padded = [list(t) + [ZERO] * (width - len(t)) for t in self.tables]
            self.block_table = upload(padded, self.positions.device, torch.int32)
        return self.block_table

    def flat_cells(self) -> torch.Tensor:
        """`[B * Q]` int64 cells that the new tokens are written to, the same for every layer."""
        if self.flat is None:
            self.flat = self.cells.reshape(-1)
        return self.flat

    def valid(self) -> torch.Tensor:
        """`[B]` int64 valid cells of each row, on the device."""
        if self.cell_counts is None:
            self.cell_counts = upload(self.lengths, self.positions.device)
        return self.cell_counts

    def fresh(self) -> torch.Tensor | None:
        """`[B]` int64 real new tokens of each row, on the device; None when every row has `Q`."""
        if self.real is None and self.counts is not None:
            self.real = upload(self.counts, self.positions.device)
        return self.real

    def rows(self) -> list[Feed]:
        """The same tokens as one Feed per row, without surplus."""
        single = []
        for i, (table, length) in enumerate(zip(self.tables, self.lengths, strict=True)):
            take = (slice(i, i + 1), slice(0, self.width if self.counts is None else self.counts[i]))
            single.append(
                Feed(
                    ids=None if self.ids is None else self.ids[take],
                    positions=self.positions[take],
                    cells=self.cells[take],
                    tables=[table],
                    lengths=[length],
                    embeddings=None if self.embeddings is None else self.embeddings[take],
                )
            )
        return single

    @classmethod
    def build(cls, tokens, starts, tables, block_size: int, device, embeddings=None, parents=None) -> Feed:
        """A Feed for ragged rows, whose numbers reach the device in one transfer.

        Args:
            tokens: one list of token ids per row (ignored, except for its length, where `embeddings` are given).
            starts: cells already valid in each row.
            tables: Table of each row, with room for the new tokens.
            block_size: cells per block.
            device: where the tensors go.
            embeddings: `[B, Q, D]` in place of ids.
            parents: for each row the place of every token's parent among them, -1 for none: a tree of drafts.
        """
        numbers, shape = grid_numbers(tokens, starts, tables, block_size, parents=parents)
        feed = cls.grid(upload(numbers, device), *shape, tree=parents is not None)
        counts = [len(row) for row in tokens]
        feed.tables = [table.blocks for table in tables]
        feed.lengths = [start + n for start, n in zip(starts, counts, strict=True)]
        feed.counts = None if min(counts) == shape[1] else counts
        feed.real = None if feed.counts is None else feed.real
        if embeddings is not None:
            feed.ids, feed.embeddings = None, embeddings
        return feed

    @classmethod
    def grid(cls, numbers: torch.Tensor, rows: int, width: int, blocks: int, *, tree: bool = False) -> Feed:
        """The Feed whose tensors lie in `numbers`, as `grid_numbers` has laid them out; the host knows nothing."""
        ids, positions, cells, lengths, real, table, *seen = _parts(
            numbers, _grid_sizes(rows, width, blocks, tree)
        )
        return cls(
            ids=ids.view(rows, width),
            positions=positions.view(rows, width),
            cells=cells.view(rows, width),
            tables=(),
            lengths=(),
            block_table=table.view(rows, blocks),
            cell_counts=lengths,
            flat=cells,
            real=real if width > 1 else None,
            tree=seen[0].view(rows, width, width) > 0 if tree else None,
        )

    @classmethod
    def packed(cls, tokens, begins, tables, block_size: int, device) -> Feed:
        """A Feed of packed rows, whose numbers reach the device in one transfer.

        Args:
            tokens: one list of token ids per row, none empty.
            begins: cells already valid in each row.
            tables: Table of each row, with room for the new tokens.
            block_size: cells per block.
            device: where the tensors go.
        """
        numbers, shape = packed_numbers(tokens, begins, tables, block_size)
        feed = cls.unpacked(upload(numbers, device), *shape)
        feed.tables = [table.blocks for table in tables]
        feed.lengths = [begin + len(row) for begin, row in zip(begins, tokens, strict=True)]
        feed.offsets = [0, *np.cumsum([len(row) for row in tokens]).tolist()]
        return feed

    @classmethod
    def unpacked(cls, numbers: torch.Tensor, tokens: int, rows: int, blocks: int) -> Feed:
        """The Feed whose tensors lie in `numbers`, as `packed_numbers` has laid them out; the host knows nothing."""
        ids, positions, cells, starts, lengths, last, table = _parts(
            numbers, _packed_sizes(tokens, rows, blocks)
        )
        return cls(
            ids=ids[None],
            positions=positions[None],
            cells=cells[None],
            tables=(),
            lengths=(),
            block_table=table.view(rows, blocks),
            cell_counts=lengths,
            flat=cells,
            starts=starts,
            last=last,
        )


def packed_numbers(tokens, begins, tables, block_size: int, shape=None) -> tuple[np.ndarray, tuple]:
    """What a packed pass needs to know, in one array.

    Args:
        tokens, begins, tables, block_size: as for `Feed.packed`.
        shape: (tokens, rows, blocks) to fill up to; surplus tokens go to the trash block, surplus rows have none.

    Returns:
        int64 `[n]`: ids, positions, cells `[T]`, starts `[R + 1]`, lengths, last tokens `[R]`, table `[R * M]`, each
        at an even place; and (T, R, M).
    """
    counts, begins = np.array([*map(len, tokens)]), np.array(begins)
    rows, ends = len(counts), counts.cumsum()
    real = int(ends[-1])
    _, room, width = shape = shape or (real, rows, max(map(len, tables)))
    numbers, (ids, positions, cells, starts, lengths, last, table) = _empty(_packed_sizes(*shape))
    ids[:real] = [*itertools.chain.from_iterable(tokens)]
    starts[1 : rows + 1], starts[rows + 1 :] = ends, real
    lengths[:rows], last[:rows] = begins + counts, ends - 1
    table = table.reshape(room, width)
    table.fill(ZERO)
    for row, known in zip(table, tables, strict=False):
        row[: len(known)] = known.blocks
    owner = np.arange(rows).repeat(counts)
    where = np.add(np.arange(real), (begins + counts - ends)[owner], out=positions[:real])
    block, place = np.divmod(where, block_size)
    cells.fill(TRASH * block_size)
    cells[:real] = table[owner, block] * block_size + place
    return numbers, shape


def grid_numbers(
    tokens, begins, tables, block_size: int, shape=None, parents=None
) -> tuple[np.ndarray, tuple]:
    """What a pass over rows of some tokens each needs to know, in one array.

    Args:
        tokens, begins, tables, block_size, parents: as for `Feed.build`.
        shape: (rows, tokens a row, blocks) to fill up to; what is surplus goes to the trash block.

    Returns:
        int64 `[n]`: ids, positions, cells `[B, Q]`, lengths, counts `[B]`, table `[B, M]`, and with `parents` the tree
        `[B, Q, Q]`, each at an even place; and (B, Q, M).
    """
    counts, begins = np.array([len(row) for row in tokens]), np.asarray(begins)
    real = len(tokens)
    rows, width, blocks = shape = shape or (real, int(counts.max()), max(1, *map(len, tables)))
    numbers, parts = _empty(_grid_sizes(*shape, parents is not None))
    ids, positions, cells = (part.reshape(rows, width) for part in parts[:3])
    lengths, given, table = parts[3], parts[4], parts[5].reshape(rows, blocks)
    lengths[:], given[:], table[:] = 1, 1, ZERO
    lengths[:real], given[:real] = begins + counts, counts
    for i, (known, row) in enumerate(zip(tables, tokens, strict=True)):
        table[i, : len(known)], ids[i, : len(row)] = known.blocks, row
    fresh = np.arange(width) < counts[:, None]
    where = begins[:, None] + np.arange(width)
    held = np.take_along_axis(table[:real], np.minimum(where // block_size, blocks - 1), 1)
    cells[:] = TRASH * block_size
    cells[:real] = np.where(
        fresh & (held != ZERO), held * block_size + where % block_size, TRASH * block_size
    )
    if parents is not None:
        tree = parts[6].reshape(rows, width, width)
        tree[:] = np.eye(width, dtype=np.int64)
        for mine, above in zip(tree, parents, strict=False):
            for place, parent in enumerate(above):
                if parent >= 0:
                    mine[place] |= mine[parent]
        where = begins[:, None] + tree[:real].sum(-1) - 1
    positions[:real] = np.where(fresh, where, 0)
    return numbers, shape


class Lines:
    """`grid_numbers` of rows that get one token each, step after step: what stays is not written again.

    Args:
        rows, blocks: as in the shape of `grid_numbers`.
        block_size: cells per block.
    """

    def __init__(self, rows: int, blocks: int, block_size: int):
        self.block_size, self._held = block_size, []
        self.numbers, parts = _empty(_grid_sizes(rows, 1, blocks, False))
        self.ids, self.positions, self.cells, self.lengths, counts, table = parts
        self.table, self._each = table.reshape(rows, blocks), np.arange(rows)
        counts[:] = 1

    def fill(self, ids, begins, tables) -> np.ndarray:
        """The numbers; arguments as there, but for ids `[B]`. The array is written to at the next call."""
        held, rows = [table.blocks for table in tables], len(begins)
        if held != self._held:
            self.table[:], self.positions[:], self.lengths[:] = ZERO, 0, 1
            self.cells[:] = TRASH * self.block_size
            for row, blocks in zip(self.table, held, strict=False):
                row[: len(blocks)] = blocks
            self._held = held
        where = np.array(begins)
        block, place = np.divmod(where, self.block_size)
        self.ids[:rows], self.positions[:rows], self.lengths[:rows] = ids, where, where + 1
        self.cells[:rows] = self.table[self._each[:rows], block] * self.block_size + place
        return self.numbers


def _packed_sizes(tokens: int, rows: int, blocks: int) -> tuple[int, ...]:
    return tokens, tokens, tokens, rows + 1, rows, rows, rows * blocks


def _grid_sizes(rows: int, width: int, blocks: int, tree: bool) -> tuple[int, ...]:
    cells = rows * width
    return (cells, cells, cells, rows, rows, rows * blocks) + ((cells * width,) if tree else ())


@functools.lru_cache(16)
def _places(sizes: tuple[int, ...]) -> list[int]:
    """Where each part begins: at a multiple of 16 bytes, as kernels like it."""
    return [0, *itertools.accumulate(size + size % 2 for size in sizes)]


def _parts(numbers, sizes) -> list:
    return [numbers[at : at + size] for at, size in zip(_places(sizes), sizes, strict=False)]


def _empty(sizes) -> tuple[np.ndarray, list[np.ndarray]]:
    numbers = np.zeros(_places(sizes)[-1], np.int64)
    return numbers, _parts(numbers, sizes)
