"""Our attention over paged cells beside torch's `varlen_attn`, which reads them from torch 2.13 on."""

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from benchmarks.kernels import attention as kernels_attention
from benchmarks.kernels import timing as kernels_timing
from benchmarks.kernels.attention import BLOCK, DTYPES, Cells, Heads
from benchmarks.kernels.timing import Run
from handloom.kernels.attention.packed import paged_attention_packed

PAGES = (BLOCK, 256)  # cells of a page: as our pool has them, and as FlashAttention 2 asks for
COLUMNS = {
    "case": "case",
    "shape": "heads",
    "side": "side",
    "p50": "p50 us",
    "ratio": "/ ours",
    "skipped": "",
}


@dataclass(frozen=True)
class Packed:
    """New tokens of some rows, packed, over their paged cells; every row has as many of both.

    Attributes:
        q: [T, Hq, D]. keys, values: [N_blocks, page, Hk, D]. table: int32 [R, M]. starts: int32 [R + 1].
        lengths: int32 [R], cells of each row. queries, context: of a row.
    """

    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    table: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    queries: int
    context: int

    def paged(self, page: int) -> "Packed":
        """The same cells in pages of another size, in another order."""
        rows, width = len(self.table), -(-self.context // page)
        table = torch.arange(rows * width, dtype=torch.int32, device=self.q.device).flip(0).view(rows, width)
        keys, values = (self._repaged(cells, table.long(), page) for cells in (self.keys, self.values))
        return replace(self, keys=keys, values=values, table=table)

    def _repaged(self, cells: torch.Tensor, table: torch.Tensor, page: int) -> torch.Tensor:
        dense = cells[self.table.long()].flatten(1, 2)[:, : self.context]
        whole = dense.new_zeros(len(dense), table.shape[1] * page, *dense.shape[2:])
        whole[:, : self.context] = dense
        pool = whole.new_empty(table.numel(), page, *dense.shape[2:])
        pool[table.flatten()] = whole.view(table.numel(), page, *dense.shape[2:])
        return pool


def packed_of(heads: Heads, rows: int, queries: int, context: int, dtype: torch.dtype, device: str) -> Packed:
    """Random cells of `rows` rows of `context` cells, the newest `queries` of each asked for."""
    cells = kernels_attention.cells_of(heads, "even", rows, context, dtype, device)
    q = torch.randn(rows * queries, heads.query, heads.size, device=device).to(dtype)
    starts = torch.arange(rows + 1, dtype=torch.int32, device=device) * queries
    return Packed(q, cells.keys, cells.values, cells.table, starts, cells.lengths, queries, context)


def missing(device: str) -> str | None:
    """Why torch's `varlen_attn` cannot read paged cells here, or None."""
    if device != "cuda":
        return f"varlen_attn runs on CUDA alone, not on {device}"
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no varlen_attn"
    if "block_table" not in inspect.signature(varlen_attn).parameters:
        return f"varlen_attn of torch {torch.__version__} takes no block_table"
    return None


def ours(given: Packed) -> Run:
    """Our kernel for one query a row, or for packed ones."""
    if given.queries == 1:
        cells = Cells(given.q[:, None], given.keys, given.values, given.table, given.lengths)
        run = kernels_attention.ours(cells)
        return lambda: run()[:, 0]
    where = given.q, given.keys, given.values, given.table, given.starts, given.lengths
    return lambda: paged_attention_packed(*where)


def theirs(attend: Callable, page: int, given: Packed) -> Run:
    """torch's, over pages of another size."""
    own = given if page == given.keys.shape[1] else given.paged(page)
    options = {"window_size": (-1, 0), "enable_gqa": True, "seqused_k": own.lengths, "block_table": own.table}
    where = own.q, own.keys, own.values, own.starts, None, own.queries, own.context
    return lambda: attend(*where, **options)


def measure(
    heads: Heads, rows: int, queries: int, context: int, dtype: str, device: str, attend: Callable, **how
) -> Iterator[dict]:
    """The rows of one case, one a side; a side that refuses it says why in `skipped`.

    Args:
        attend: `varlen_attn`. how: more of `kernels_timing.measure`.
    """
    given = packed_of(heads, rows, queries, context, DTYPES[dtype], device)
    about = {"benchmark": "kernels/varlen", "shape": str(heads), "batch": rows, "queries": queries}
    about |= {"case": f"{rows} x {queries} of {context}", "context": context, "dtype": dtype}
    sides = {"handloom": ours}
    for page in PAGES:
        name, build = f"varlen_attn, pages of {page}", functools.partial(theirs, attend, page)
        try:
            build(given)()
        except (RuntimeError, ValueError, TypeError) as error:
            yield about | {"side": name, "skipped": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        sides[name] = build
    size = 2 * given.keys[0, 0].numel() * given.keys.element_size() * rows * context + 2 * given.q.nbytes
    yield from kernels_timing.measure(sides, given, size, device=device, about=about, **how)
