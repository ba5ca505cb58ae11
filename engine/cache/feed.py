"""What one forward pass is fed: tokens, their positions, and where their keys and values go."""

from __future__ import annotations

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

    @property
    def width(self) -> int:
        """New tokens per row, Q."""
        return self.positions.shape[1]

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
    def build(cls, tokens, starts, tables, block_size: int, device, embeddings=None) -> Feed:
        """A Feed for ragged rows.

        Args:
            tokens: one list of token ids per row (ignored, except for its length, where `embeddings` are given).
            starts: cells already valid in each row.
            tables: Table of each row, with room for the new tokens.
            block_size: cells per block.
            device: where the tensors go.
            embeddings: `[B, Q, D]` in place of ids.
        """
        counts = [len(row) for row in tokens]
        width = max(counts)
        ids, positions, cells = [], [], []
        for row, start, table in zip(tokens, starts, tables, strict=True):
            pad = width - len(row)
            span = range(start, start + len(row))
            ids.append(list(row) + [0] * pad)
            positions.append([*span, *[0] * pad])
            blocks = table.blocks if len(table) else (TRASH,) * (1 + (start + width) // block_size)
            cells.append([blocks[p // block_size] * block_size + p % block_size for p in span])
            cells[-1] += [TRASH * block_size] * pad
        return cls(
            ids=None if embeddings is not None else upload(ids, device),
            positions=upload(positions, device),
            cells=upload(cells, device),
            tables=[table.blocks for table in tables],
            lengths=[start + n for start, n in zip(starts, counts, strict=True)],
            counts=None if min(counts) == width else counts,
            embeddings=embeddings,
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
        sizes = tokens, tokens, tokens, rows + 1, rows, rows, rows * blocks
        parts = numbers.split([_even(n) for n in sizes])
        ids, positions, cells, starts, lengths, last, table = (
            p[:n] for p, n in zip(parts, sizes, strict=True)
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
    counts = np.array([len(row) for row in tokens])
    offsets = np.concatenate(([0], counts.cumsum()))
    wide, rows, real = max(len(table) for table in tables), len(tokens), int(offsets[-1])
    total, room, width = shape = shape or (real, rows, wide)
    sizes = total, total, total, room + 1, room, room, room * width
    places = np.cumsum([0, *(_even(n) for n in sizes)])
    numbers = np.zeros(places[-1], np.int64)
    ids, positions, cells, starts, lengths, last, table = (
        numbers[at : at + n] for at, n in zip(places, sizes, strict=False)
    )
    begins = np.asarray(begins)
    ids[:real] = np.concatenate([np.asarray(row, np.int64) for row in tokens])
    positions[:real] = np.arange(real) + np.repeat(begins - offsets[:-1], counts)
    starts[: rows + 1], starts[rows + 1 :] = offsets, real
    lengths[:rows], last[:rows] = begins + counts, offsets[1:] - 1
    table = table.reshape(room, width)
    table[:] = ZERO
    for row, known in zip(table, tables, strict=False):
        row[: len(known)] = known.blocks
    where = positions[:real]
    blocks = table[np.repeat(np.arange(rows), counts), where // block_size]
    cells[:real], cells[real:] = blocks * block_size + where % block_size, TRASH * block_size
    return numbers, shape


def _even(count: int) -> int:
    """Room for `count` numbers of 8 bytes such that what follows begins at a multiple of 16, as kernels like it."""
    return count + count % 2
