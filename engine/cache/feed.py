"""What one forward pass is fed: tokens, their positions, and where their keys and values go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .pool import TRASH, ZERO
from .transfer import upload


@dataclass
class Feed:
    """One forward pass over `B` rows of at most `Q` new tokens each, left-aligned.

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
