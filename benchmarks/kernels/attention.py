"""Decode attention of one layer that is compared: paged caches, and a builder a side."""

import re
from dataclasses import dataclass

import torch
import typer
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.kernels import timing as kernels_timing
from benchmarks.kernels.timing import CACHES, Call, Run
from handloom.kernels.attention.attention import attention_workspace, default_splits, paged_attention
from handloom.kernels.attention.attention_cpu import CellPlan, paged_attention_cpu

BLOCK = 16  # cells of a block
ROWS = ("even", "ragged")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
DEFAULT_HEADS = {"cpu": ("9/3x64", "32/8x64", "32/8x128"), "cuda": ("32/8x64", "32/8x128", "32/32x128")}
# K/V in memory at once: blocks, dense, gathered, what SDPA may repeat; on CUDA cold calls of all sides have their own.
COPIES = {"cpu": 4, "cuda": 12}
COLUMNS = {
    "shape": "heads", "rows": "rows", "batch": "B", "context": "context", "dtype": "dtype", "cache": "cache",
    "side": "side", "p50": "p50 us", "ratio": "/ ours", "bandwidth_share": "of bandwidth", "launches": "launches",
    "operations": "operations", "passes": "passes", "bytes_read": "read", "skipped": "",
}  # fmt: skip


@dataclass(frozen=True)
class Heads:
    """Query heads, key heads, and the size of each."""

    query: int
    key: int
    size: int

    def __str__(self):
        return f"{self.query}/{self.key}x{self.size}"


def parse_heads(text: str) -> Heads:
    """ "32/8x128" -> Heads(32, 8, 128).

    Raises:
        typer.BadParameter: it has another form, or the query heads do not share the key heads evenly.
    """
    match = re.fullmatch(r"(\d+)/(\d+)x(\d+)", text)
    numbers = [int(part) for part in match.groups()] if match else [0]
    if not all(numbers) or numbers[0] % numbers[1]:
        raise typer.BadParameter(
            f"--heads {text}: expected QUERY/KEYxSIZE like 32/8x128, QUERY a multiple of KEY"
        )
    return Heads(*numbers)


@dataclass(frozen=True)
class Cells:
    """One layer's paged cache, and the queries of one step.

    Attributes:
        q: [B, 1, Hq, D]. keys, values: [N_blocks, BLOCK, Hk, D]. table: int32 [B, M]; blocks beyond a row's length
        repeat its last. lengths: int32 [B].
    """

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor

    @property
    def needed(self) -> int:
        """Bytes that any attention has to read: queries, and keys and values of every row."""
        cell = self.keys[0, 0].numel() * self.keys.element_size()
        return self.q.numel() * self.q.element_size() + 2 * cell * int(self.lengths.sum())

    def gathered(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as [B, Hk, M * BLOCK, D], not contiguous."""
        table, rows = self.table.long(), len(self.table)
        return tuple(
            pool[table].view(rows, -1, *pool.shape[2:]).transpose(1, 2) for pool in (self.keys, self.values)
        )

    def mask(self) -> torch.Tensor | None:
        """Which gathered cells are a row's, bool [B, 1, 1, M * BLOCK]; None where all are."""
        width = self.table.shape[1] * BLOCK
        seen = torch.arange(width, device=self.table.device) < self.lengths[:, None]
        return None if seen.all() else seen[:, None, None]


def cells_of(heads: Heads, kind: str, batch: int, context: int, dtype: torch.dtype, device: str) -> Cells:
    """Random cells: rows of `context` in consecutive blocks, or of a quarter to all of it in scattered ones."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.full((batch,), context)
    if kind == "ragged":
        lengths = torch.randint(max(1, context // 4), context + 1, (batch,), generator=g)
        lengths[0] = context
    blocks = -(-lengths // BLOCK)
    order = torch.arange(int(blocks.sum()))
    if kind == "ragged":
        order = order[torch.randperm(len(order), generator=g)]
    parts = order.split(blocks.tolist())
    table = torch.stack(
        [torch.cat([part, part[-1:].expand(int(blocks.max()) - len(part))]) for part in parts]
    )
    shape = (len(order), BLOCK, heads.key, heads.size)
    made = torch.Generator(device).manual_seed(0)
    keys, values = (torch.randn(shape, generator=made, device=device, dtype=dtype) for _ in range(2))
    q = torch.randn(batch, 1, heads.query, heads.size, generator=made, device=device, dtype=dtype)
    return Cells(q, keys, values, table.to(device, torch.int32), lengths.to(device, torch.int32))


def ours(cells: Cells) -> Run:
    """Our attention where the cells lie; on a CPU with the step's plan, which all layers share, made before."""
    if cells.q.device.type == "cuda":
        return triton(cells)
    blocks = (-(-cells.lengths // BLOCK)).tolist()
    tables = [tuple(row[:n]) for row, n in zip(cells.table.tolist(), blocks, strict=True)]
    plan = CellPlan(tables, cells.lengths.tolist(), BLOCK, alone=False)
    return lambda: paged_attention_cpu(cells.q, cells.keys, cells.values, plan=plan)


def triton(cells: Cells) -> Run:
    """The Triton kernels, with their scratch memory and result made before."""
    batch, _, heads, size = cells.q.shape
    splits = default_splits(batch, cells.keys.shape[2], cells.table.shape[1] * BLOCK, cells.q.device, size)
    workspace = attention_workspace(batch, 1, heads, size, splits, cells.q.device)
    out = torch.empty_like(cells.q)
    parts = (
        batch * heads * splits * (size + 1) * 4 if splits > 1 else 0
    )  # written, then read by the second launch
    small = cells.table.numel() * 4 + cells.lengths.numel() * 4
    exact = {
        "bytes_read": cells.needed + small + parts,
        "bytes_written": out.numel() * out.element_size() + parts,
    }

    def run():
        where = cells.q, cells.keys, cells.values, cells.table, cells.lengths
        return paged_attention(*where, kernels="triton", splits=splits, workspace=workspace, out=out)

    return Call(run, exact)


def _attend(q, keys, values, mask):
    """torch's attention of one query a row, [B, 1, Hq, D] -> [B, 1, Hq, D]; keys, values [B, Hk, L, D]."""
    grouped = q.shape[2] != keys.shape[1]
    out = scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=grouped)
    return out.transpose(1, 2)


def gathered(cells: Cells) -> Run:
    """torch's attention over cells that are gathered from their blocks in every call."""
    mask = cells.mask()
    return lambda: _attend(cells.q, *cells.gathered(), mask)


def dense(cells: Cells) -> Run:
    """torch's attention over a dense cache that was filled before: what a static cache has; nothing is gathered."""
    keys, values = (part.contiguous() for part in cells.gathered())
    mask = cells.mask()
    return lambda: _attend(cells.q, keys, values, mask)


def flash_attention(cells: Cells) -> Run | None:
    """flash-attn's decode kernel over a dense cache, where it is installed; it has no float32 and no CPU."""
    if cells.q.device.type != "cuda" or cells.q.dtype == torch.float32:
        return None
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return None
    keys, values = (part.transpose(1, 2).contiguous() for part in cells.gathered())
    return lambda: flash_attn_with_kvcache(cells.q, keys, values, cache_seqlens=cells.lengths)


def flashinfer(cells: Cells) -> Run | None:
    """FlashInfer's paged decode kernel on our blocks, where it is installed; its plan is made before."""
    if cells.q.device.type != "cuda" or cells.q.dtype == torch.float32:
        return None
    try:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper
    except ImportError:
        return None
    device = cells.q.device
    blocks = -(-cells.lengths // BLOCK)
    starts = torch.nn.functional.pad(blocks.cumsum(0), (1, 0)).int()
    ids = torch.cat([row[:n] for row, n in zip(cells.table, blocks.tolist(), strict=True)])
    wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.zeros(2**27, dtype=torch.uint8, device=device), "NHD")
    heads, size, kv_heads = *cells.q.shape[2:], cells.keys.shape[2]
    last = (cells.lengths - (blocks - 1) * BLOCK).int()
    wrapper.plan(starts, ids, last, heads, kv_heads, size, BLOCK, q_data_type=cells.q.dtype)
    return lambda: wrapper.run(cells.q[:, 0], (cells.keys, cells.values))


SIDES = {
    "handloom": ours,
    "gathered": gathered,
    "dense": dense,
    "flash-attn": flash_attention,
    "flashinfer": flashinfer,
}


def measure(heads, kind, batch, context, dtype, device, sides, repeats, caches=CACHES, budget=0.0, **how):
    """Yield the rows of one setting, one a side and cache; sides take turns.

    Args:
        heads: `Heads`. kind, dtype, sides: of `ROWS`, `DTYPES`, `SIDES`. repeats, budget: see `kernels_timing.rounds`.
        how: more of `kernels_timing.measure`.
    """
    about = {"benchmark": "kernels/attention", "shape": str(heads), "rows": kind, "batch": batch}
    about |= {"context": context, "dtype": dtype}
    element = torch.empty(0, dtype=DTYPES[dtype]).element_size()
    reason = kernels_timing.shortage(
        COPIES[device] * 2 * batch * context * heads.key * heads.size * element, device
    )
    if reason:
        yield from (
            {**about, "side": side, "device": device, "cache": caches[0], "skipped": reason} for side in sides
        )
        return
    cells = cells_of(heads, kind, batch, context, DTYPES[dtype], device)
    yield from kernels_timing.measure(
        {side: SIDES[side] for side in sides}, cells, cells.needed,
        device=device, caches=caches, repeats=repeats, budget=budget, about=about, **how,
    )  # fmt: skip
