"""The memory of keys and values: cells of all layers with one shape, in pages that cost nothing until written."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import torch


@dataclass
class Store:
    """Keys and values of all layers with one shape: `keys [L, N, block, Hk, D]`, `values [L, N, block, Hv, Dv]`."""

    layers: tuple[int, ...]
    keys: torch.Tensor
    values: torch.Tensor

    def resized(self, capacity: int, used: int) -> Store:
        """The first `used` blocks in tensors of `capacity` blocks."""
        grown = []
        for old in (self.keys, self.values):
            new = zeros((old.shape[0], capacity, *old.shape[2:]), old.dtype, old.device)
            new[:, :used] = old[:, :used]
            grown.append(new)
        return Store(self.layers, *grown)

    def clear(self, blocks: list[int]) -> None:
        """Zero blocks, given in order; neighbours at once."""
        start = 0
        for at, block in enumerate(blocks, 1):
            if at == len(blocks) or blocks[at] != block + 1:
                for part in (self.keys, self.values):
                    part.narrow(1, blocks[start], at - start).zero_()
                start = at


def zeros(shape, dtype, device) -> torch.Tensor:
    """Zeros whose pages, on a CPU, cost no memory until they are written; `torch.zeros` writes them all."""
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size == 0:
        return torch.zeros(shape, dtype=dtype, device=device)
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        pages.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page would round every layer up to 2 MiB
    return torch.frombuffer(pages, dtype=dtype).view(shape)
