"""Triton kernels of the paged decode attention; importing this file needs triton.

One program attends the queries of one (row, key/value head, tile of queries, split of the sequence) over that
split's cells. The queries of a row and the query heads of a group share one tile, so a cell is read once for
all of them. With more than one split a second kernel merges the parts (flash-decoding). Lengths, counts and
block ids are read on the device, so one captured launch serves every later step.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import dispatch
from ..launching import beside, on_its_device, store

LOG2E = tl.constexpr(1.4426950408889634)
AMD_STAGES = 2  # more of them need more registers or shared memory than there are


@triton.jit(do_not_specialize=["splits", "table_stride"])
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, parts_ptr, lse_ptr, table_ptr, lengths_ptr, counts_ptr, sinks_ptr,
    tree_ptr, depth_ptr, scale, softcap, kv_heads, splits, table_stride, q_row, q_query, q_head,
    k_block, k_cell, k_head, v_block, v_cell, v_head,
    QUERIES: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SPLIT: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, TREE: tl.constexpr, COUNTS: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, split = tl.program_id(0), tl.program_id(2)
    kv_head, tile = tl.program_id(1) % kv_heads, tl.program_id(1) // kv_heads
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query, head = m // GROUP, kv_head * GROUP + m % GROUP
    real = m < QUERIES * GROUP
    length = tl.load(lengths_ptr + row).to(tl.int32)
    base = length - QUERIES
    if COUNTS:
        base = length - tl.load(counts_ptr + row).to(tl.int32)
    depth = query
    if TREE and WINDOW > 0:
        depth = tl.load(depth_ptr + row * QUERIES + query, mask=real, other=0)
    first, last = _span(base, length, split, splits, WINDOW, BLOCK_N)

    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    q_at = row.to(tl.int64) * q_row + query * q_query + head * q_head
    q = tl.load(q_ptr + q_at[:, None] + d[None, :], mask=real[:, None] & (d < DIM)[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        valid = n < last
        block = tl.load(table_ptr + row * table_stride + n // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
        k_at = block * k_block + (n % BLOCK_SIZE) * k_cell + kv_head * k_head
        inside = valid[:, None] & (d < DIM)[None, :]
        k = tl.load(k_ptr + k_at[:, None] + d[None, :], mask=inside, other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (tl.exp(scores * (2.0 / softcap)) + 1.0))
        seen = _seen(n, query, depth, base, valid, real, tree_ptr, depth_ptr, row, QUERIES, WINDOW, TREE)
        scores = tl.where(seen, scores * LOG2E, float("-inf"))
        raised = tl.maximum(peak, tl.max(scores, 1))
        finite = tl.where(raised == float("-inf"), 0.0, raised)
        weights = tl.exp2(scores - finite[:, None])
        fade = tl.exp2(peak - finite)
        v_at = block * v_block + (n % BLOCK_SIZE) * v_cell + kv_head * v_head
        inside = valid[:, None] & (dv < DIM_V)[None, :]
        v = tl.load(v_ptr + v_at[:, None] + dv[None, :], mask=inside, other=0.0)
        if UPCAST:
            v = v.to(tl.float32)
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
        peak = raised

    at = (row.to(tl.int64) * QUERIES + query) * (kv_heads * GROUP) + head
    _finish(
        out_ptr, parts_ptr, lse_ptr, sinks_ptr, at, split, splits, head, dv, real, peak, total, acc,
        DIM_V, SPLIT, SINKS, UPCAST,
    )  # fmt: skip


@triton.jit
def _finish(
    out_ptr, parts_ptr, lse_ptr, sinks_ptr, at, split, splits, head, dv, real, peak, total, acc,
    DIM_V: tl.constexpr, SPLIT: tl.constexpr, SINKS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Write the tile: the result where the sequence is in one piece, else its part and log2 of its weight."""
    if SINKS and not SPLIT:
        sink = tl.load(sinks_ptr + head, mask=real, other=0.0).to(tl.float32) * LOG2E
        raised = tl.maximum(peak, sink)
        fade = tl.exp2(peak - raised)
        total, acc = total * fade + tl.exp2(sink - raised), acc * fade[:, None]
    divisor = tl.where(total == 0.0, 1.0, total)
    acc = acc / divisor[:, None]
    write = real[:, None] & (dv < DIM_V)[None, :]
    if not SPLIT:
        store(out_ptr + at[:, None] * DIM_V + dv[None, :], acc, write, UPCAST)
    else:
        lse = tl.where(total == 0.0, float("-inf"), peak + tl.log2(divisor))
        tl.store(lse_ptr + at * splits + split, lse, mask=real)
        tl.store(parts_ptr + (at * splits + split)[:, None] * DIM_V + dv[None, :], acc, mask=write)


@triton.jit
def _span(base, length, split, splits, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """First cell and end of one split's share of the cells that some query of the row can see."""
    oldest = 0
    if WINDOW > 0:
        oldest = tl.maximum(base - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    share = tl.cdiv(tl.cdiv(length - oldest, BLOCK_N), splits) * BLOCK_N
    first = oldest + split * share
    return first, tl.minimum(first + share, length)


@triton.jit
def _seen(
    n, query, depth, base, valid, real, tree_ptr, depth_ptr, row,
    QUERIES: tl.constexpr, WINDOW: tl.constexpr, TREE: tl.constexpr,
):  # fmt: skip
    """Mask [BLOCK_M, BLOCK_N] of the cells that each query sees."""
    fresh = n - base
    if TREE:
        inside = (n >= base) & (fresh < QUERIES) & valid
        at = (row * QUERIES + query)[:, None] * QUERIES + fresh[None, :]
        ancestor = tl.load(tree_ptr + at, mask=real[:, None] & inside[None, :], other=0)
        seen = valid[None, :] & ((n < base)[None, :] | (ancestor != 0))
        if WINDOW > 0:
            position = tl.load(depth_ptr + row * QUERIES + fresh, mask=inside, other=0)
            fresh = tl.where(n < base, fresh, position)
    else:
        seen = valid[None, :] & (fresh[None, :] <= query[:, None])
    if WINDOW > 0:
        seen = seen & (fresh[None, :] > depth[:, None] - WINDOW)
    return seen


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(
    parts_ptr, lse_ptr, sinks_ptr, out_ptr, heads, splits,
    DIM_V: tl.constexpr, SINKS: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one (row, query, head) by their weights 2 ** lse; a sink joins the denominator."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0).to(tl.int64)
    s, dv = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_V)
    lse = tl.load(lse_ptr + at * splits + s, mask=s < splits, other=float("-inf"))
    peak = tl.max(lse, 0)
    if SINKS:
        sink = tl.load(sinks_ptr + at % heads).to(tl.float32) * LOG2E
        peak = tl.maximum(peak, sink)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(lse - peak)
    total = tl.sum(weights, 0)
    if SINKS:
        total += tl.exp2(sink - peak)
    kept = (lse > float("-inf"))[:, None] & (dv < DIM_V)[None, :]
    parts = tl.load(parts_ptr + (at * splits + s)[:, None] * DIM_V + dv[None, :], mask=kept, other=0.0)
    acc = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    store(out_ptr + at * DIM_V + dv, acc, dv < DIM_V, UPCAST)


@dataclass(frozen=True)
class Variant:
    """One specialisation of the decode kernel: constexprs by name, and the warps and stages it runs with."""

    constexprs: dict
    num_warps: int
    num_stages: int


def variant(
    dtype, *, queries, group, dim, dim_v, block_size, split, window=0, softcap=False, sinks=False,
    tree=False, counts=False, upcast=False,
):  # fmt: skip
    """Tile sizes for one shape; the launch and the offline compile both take them from here.

    Args:
        dtype: torch dtype of the cache.
        queries: Q, fresh queries a row. group: query heads a key/value head. dim, dim_v: head sizes, 1..256.
        block_size: cells a block. split: whether a sequence has several programs. window: cells, 0 for none.
        upcast: compute in float32 whatever the dtype (the interpreter cannot compute in bfloat16).
    """
    block_d, block_v = (max(16, triton.next_power_of_2(n)) for n in (dim, dim_v))
    wide, single = max(block_d, block_v) > 128, dtype == torch.float32
    block_m = min(32 if wide or single else 64, max(16, triton.next_power_of_2(queries * group)))
    small = block_m == 16
    if single:
        block_n, num_warps = 32 if small and not wide else 16, 8
    elif wide:
        block_n, num_warps = 32, 4 if small else 8
    else:
        block_n, num_warps = (64, 4) if block_m < 64 else (32, 8)
    shape = {"QUERIES": queries, "GROUP": group, "DIM": dim, "DIM_V": dim_v, "BLOCK_SIZE": block_size}
    options = {"WINDOW": window, "SOFTCAP": softcap, "SINKS": sinks, "TREE": tree, "COUNTS": counts}
    tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d, "BLOCK_V": block_v}
    constexprs = {**shape, "SPLIT": split, **options, "UPCAST": upcast, **tiles}
    # Ids are fetched ahead of their cells: 5 stages keep two tiles of cells on their way, 3 stages one. Narrow float32
    # tiles would spill with as many.
    stages = (1 if wide and tree else 2 if block_n == 16 else 3) if single else 5
    if torch.version.hip is not None:
        stages = min(stages, AMD_STAGES)
    return Variant(constexprs, num_warps, num_stages=stages)


@on_its_device
def launch(
    q, keys, values, block_table, lengths, out, parts, lse, *, splits, counts, scale, sliding_window, softcap,
    sinks, tree,
):  # fmt: skip
    """Run the kernels into `out`; arguments as in `attention.paged_attention`, all settled.

    parts [B, Q, Hq, splits, Dv] and lse [B, Q, Hq, splits] float32: the splits' parts, unused for one split.
    """
    batch, queries, heads, dim = q.shape
    kv_heads, dim_v = keys.shape[2], values.shape[-1]
    depth = None
    if tree is not None:
        depth = (tree.sum(-1) - 1).to(torch.int32) if sliding_window is not None else None
        tree = tree.contiguous().view(torch.uint8)
    upcast = dispatch.interpreting() and q.dtype == torch.bfloat16
    chosen = variant(
        q.dtype, queries=queries, group=heads // kv_heads, dim=dim, dim_v=dim_v, block_size=keys.shape[1],
        split=splits > 1, window=sliding_window or 0, softcap=softcap is not None, sinks=sinks is not None,
        tree=tree is not None, counts=counts is not None, upcast=upcast,
    )  # fmt: skip
    tiles = triton.cdiv(queries * (heads // kv_heads), chosen.constexprs["BLOCK_M"])
    overlap, options = beside(q.device)
    _decode_kernel[(batch, kv_heads * tiles, splits)](
        q, keys, values, out, parts, lse, block_table, lengths, counts, sinks, tree, depth,
        scale, softcap or 1.0, kv_heads, splits, block_table.stride(0), *q.stride()[:3], *keys.stride()[:3],
        *values.stride()[:3], **chosen.constexprs, **overlap, num_warps=chosen.num_warps,
        num_stages=chosen.num_stages, **options,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(batch * queries * heads,)](
            parts, lse, sinks, out, heads, splits, DIM_V=dim_v, SINKS=sinks is not None, UPCAST=upcast,
            BLOCK_V=chosen.constexprs["BLOCK_V"], BLOCK_S=max(16, triton.next_power_of_2(splits)), **overlap,
            num_warps=4, **options,
        )  # fmt: skip
    return out
