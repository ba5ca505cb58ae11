"""Triton kernel of attention for packed new tokens; importing this file needs triton.

One program attends a tile of one row's queries, with the query heads of one group, over all cells that the tile
sees. Which row and tile it is, it works out from `starts` on the device: nothing is read on the host.
"""

import torch
import triton
import triton.language as tl

from .. import dispatch
from ..launching import beside, on_its_device, store
from .attention_triton import LOG2E, Variant


@triton.jit(do_not_specialize=["tokens", "rows", "table_stride"])
def _packed_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, table_ptr, starts_ptr, lengths_ptr, sinks_ptr, scale, softcap, tokens, rows,
    kv_heads, table_stride, q_token, q_head, k_block, k_cell, k_head, v_block, v_cell, v_head,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, UPCAST: tl.constexpr, PDL: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, first_query, begin, count = _place(starts_ptr, tl.program_id(0), tokens, rows, ROWS, BLOCK_Q)
    if first_query >= count:
        return
    kv_head, part = tl.program_id(1) % kv_heads, tl.program_id(1) // kv_heads
    length = tl.load(lengths_ptr + row, mask=row < rows, other=0).to(tl.int32)
    base = length - count
    m = tl.arange(0, BLOCK_M)
    query, member = first_query + m // HEADS, part * HEADS + m % HEADS
    real = (query < tl.minimum(count, first_query + BLOCK_Q)) & (member < GROUP)
    head = kv_head * GROUP + member
    place = base + query

    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    at = (begin + query).to(tl.int64)
    q_at = at * q_token + head * q_head
    q = tl.load(q_ptr + q_at[:, None] + d[None, :], mask=real[:, None] & (d < DIM)[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    k_ptr += kv_head * k_head
    v_ptr += kv_head * v_head
    table_ptr += row.to(tl.int64) * table_stride
    last = tl.minimum(base + first_query + BLOCK_Q, length)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(base + first_query - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    else:  # cells that all queries of the tile see, without a mask
        whole = tl.maximum(tl.minimum(base + first_query + 1, last), 0) // BLOCK_N * BLOCK_N
        for start in range(0, whole, BLOCK_N):
            peak, total, acc = _fold(
                q, peak, total, acc, k_ptr, v_ptr, table_ptr, start, last, place, d, dv, scale, softcap,
                k_block, k_cell, v_block, v_cell, DIM, DIM_V, BLOCK_SIZE, 0, SOFTCAP, UPCAST, False, BLOCK_N,
            )  # fmt: skip
        first = whole
    for start in range(first, last, BLOCK_N):
        peak, total, acc = _fold(
            q, peak, total, acc, k_ptr, v_ptr, table_ptr, start, last, place, d, dv, scale, softcap,
            k_block, k_cell, v_block, v_cell, DIM, DIM_V, BLOCK_SIZE, WINDOW, SOFTCAP, UPCAST, True, BLOCK_N,
        )  # fmt: skip
    if SINKS:
        sink = tl.load(sinks_ptr + head, mask=real, other=0.0).to(tl.float32) * LOG2E
        sink = tl.where(row < rows, sink, float("-inf"))
        raised = tl.maximum(peak, sink)
        raised = tl.where(raised == float("-inf"), 0.0, raised)
        fade = tl.exp2(peak - raised)
        total, acc = total * fade + tl.exp2(sink - raised), acc * fade[:, None]
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    to = (at * (kv_heads * GROUP) + head)[:, None] * DIM_V + dv[None, :]
    store(out_ptr + to, acc, real[:, None] & (dv < DIM_V)[None, :], UPCAST)


@triton.jit
def _place(starts_ptr, tile, tokens, rows, ROWS: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Row of a tile, its first query in the row, the row's first token and its number of queries.

    Row r owns the tiles from starts[r] // BLOCK_Q + r on, enough for its queries, some of them empty; the tokens that
    belong to no row are one row more.
    """
    r = tl.arange(0, ROWS)
    begins = tl.load(starts_ptr + r, mask=r <= rows, other=0).to(tl.int32)
    row = tl.sum(((r <= rows) & (begins // BLOCK_Q + r <= tile)).to(tl.int32), 0) - 1
    begin = tl.load(starts_ptr + row).to(tl.int32)
    end = tl.load(starts_ptr + row + 1, mask=row < rows, other=tokens).to(tl.int32)
    return row, (tile - begin // BLOCK_Q - row) * BLOCK_Q, begin, end - begin


@triton.jit
def _fold(
    q, peak, total, acc, k_ptr, v_ptr, table_ptr, start, last, place, d, dv, scale, softcap,
    k_block, k_cell, v_block, v_cell, DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Take the cells start .. start + BLOCK_N - 1 into the running softmax; masked, those that a query sees."""
    n = start + tl.arange(0, BLOCK_N)
    valid = n < last
    block = tl.load(table_ptr + n // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    k_at = block * k_block + (n % BLOCK_SIZE) * k_cell
    k = tl.load(k_ptr + k_at[:, None] + d[None, :], mask=valid[:, None] & (d < DIM)[None, :], other=0.0)
    if UPCAST:
        k = k.to(tl.float32)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if SOFTCAP:
        scores = softcap * (1.0 - 2.0 / (tl.exp(scores * (2.0 / softcap)) + 1.0))
    scores = scores * LOG2E
    if MASKED:
        seen = valid[None, :] & (n[None, :] <= place[:, None])
        if WINDOW > 0:
            seen = seen & (n[None, :] > place[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    raised = tl.maximum(peak, tl.max(scores, 1))
    finite = raised
    if MASKED:
        finite = tl.where(raised == float("-inf"), 0.0, raised)
    weights = tl.exp2(scores - finite[:, None])
    fade = tl.exp2(peak - finite)
    v_at = block * v_block + (n % BLOCK_SIZE) * v_cell
    v = tl.load(v_ptr + v_at[:, None] + dv[None, :], mask=valid[:, None] & (dv < DIM_V)[None, :], other=0.0)
    if UPCAST:
        v = v.to(tl.float32)
    total = total * fade + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return raised, total, acc


def variant(
    dtype, *, rows, group, dim, dim_v, block_size, window=0, softcap=False, sinks=False, upcast=False
):
    """Tile sizes for one shape, see `attention_triton.variant`; rows: of the block table."""
    block_d, block_v = (max(16, triton.next_power_of_2(n)) for n in (dim, dim_v))
    wide, single = max(block_d, block_v) > 128, dtype == torch.float32
    if single:
        block_m, block_n, num_warps, num_stages = 32, 16, 8, 2 if wide else 1
    elif wide:
        block_m, block_n, num_warps, num_stages = 64, 32, 8, 2
    elif group == 1 and block_d <= 64:  # 128 queries of one head spill on sm_100
        block_m, block_n, num_warps, num_stages = 64, 64, 4, 3
    else:
        block_m, block_n, num_warps, num_stages = 128, 64, 8, 3
    heads = min(group, block_m)
    shape = {"GROUP": group, "HEADS": heads, "DIM": dim, "DIM_V": dim_v, "BLOCK_SIZE": block_size}
    options = {"WINDOW": window, "SOFTCAP": softcap, "SINKS": sinks, "UPCAST": upcast}
    tiles = {"BLOCK_Q": block_m // heads, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": block_d}
    tiles |= {"ROWS": triton.next_power_of_2(rows + 1), "BLOCK_V": block_v}
    return Variant({**shape, **options, **tiles}, num_warps, num_stages)


@on_its_device
def launch(q, keys, values, block_table, starts, lengths, out, *, scale, sliding_window, softcap, sinks):
    """Run the kernel into `out`; arguments as in `packed.paged_attention_packed`, all settled."""
    tokens, heads, dim = q.shape
    rows, kv_heads, dim_v = len(lengths), keys.shape[2], values.shape[-1]
    chosen = variant(
        q.dtype, rows=rows, group=heads // kv_heads, dim=dim, dim_v=dim_v, block_size=keys.shape[1],
        window=sliding_window or 0, softcap=softcap is not None, sinks=sinks is not None,
        upcast=dispatch.interpreting() and q.dtype == torch.bfloat16,
    )  # fmt: skip
    sizes, (overlap, options) = chosen.constexprs, beside(q.device)
    grid = (tokens // sizes["BLOCK_Q"] + rows + 1, kv_heads * triton.cdiv(sizes["GROUP"], sizes["HEADS"]))
    _packed_kernel[grid](
        q, keys, values, out, block_table, starts, lengths, sinks, scale, softcap or 1.0, tokens, rows,
        kv_heads, block_table.stride(0), *q.stride()[:2], *keys.stride()[:3], *values.stride()[:3], **sizes, **overlap,
        num_warps=chosen.num_warps, num_stages=chosen.num_stages, **options,
    )  # fmt: skip
    return out
