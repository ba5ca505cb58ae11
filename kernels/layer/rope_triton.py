"""Triton kernels that look angles up, turn queries and keys and write the cells; importing this file needs triton."""

import torch
import triton
import triton.language as tl

from .. import dispatch
from ..launching import beside, on_its_device, store


@triton.jit
def _rotate_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, out_ptr, keys_ptr, values_ptr, cells_ptr, q_weight_ptr, k_weight_ptr,
    q_heads, k_heads, v_heads, q_token, q_head, k_token, k_head, v_token, v_head, cos_token, sin_token,
    keys_cell, keys_head, values_cell, values_head, q_eps, k_eps,
    DIM: tl.constexpr, DIM_V: tl.constexpr, ROTATED: tl.constexpr, ONCE: tl.constexpr, INTERLEAVED: tl.constexpr,
    Q_NORM: tl.constexpr, K_NORM: tl.constexpr, Q_OFFSET: tl.constexpr, K_OFFSET: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
    PDL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one token: of its queries, its keys, or its values. *_NORM: 0 none, 1 plain, 2 weighted."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    of_k, of_v = tl.cdiv(q_heads, BLOCK_H), tl.cdiv(q_heads, BLOCK_H) + tl.cdiv(k_heads, BLOCK_H)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if part < of_k:
        head = part * BLOCK_H + tl.arange(0, BLOCK_H)
        to = out_ptr + token * q_heads * DIM + head[:, None] * DIM
        _turn(
            q_ptr + token * q_token + head[:, None] * q_head, to, (head < q_heads)[:, None],
            cos_ptr + token * cos_token, sin_ptr + token * sin_token, q_weight_ptr, q_eps,
            DIM, ROTATED, ONCE, INTERLEAVED, Q_NORM, Q_OFFSET, BLOCK_P, BLOCK_R, UPCAST,
        )  # fmt: skip
    else:
        cell = tl.load(cells_ptr + token).to(tl.int64)
        if part < of_v:
            head = (part - of_k) * BLOCK_H + tl.arange(0, BLOCK_H)
            to = keys_ptr + cell * keys_cell + head[:, None] * keys_head
            _turn(
                k_ptr + token * k_token + head[:, None] * k_head, to, (head < k_heads)[:, None],
                cos_ptr + token * cos_token, sin_ptr + token * sin_token, k_weight_ptr, k_eps,
                DIM, ROTATED, ONCE, INTERLEAVED, K_NORM, K_OFFSET, BLOCK_P, BLOCK_R, UPCAST,
            )  # fmt: skip
        else:
            head = (part - of_v) * BLOCK_H + tl.arange(0, BLOCK_H)
            d = tl.arange(0, BLOCK_V)
            inside = (head < v_heads)[:, None] & (d < DIM_V)[None, :]
            v = tl.load(v_ptr + token * v_token + head[:, None] * v_head + d[None, :], mask=inside, other=0.0)
            tl.store(
                values_ptr + cell * values_cell + head[:, None] * values_head + d[None, :], v, mask=inside
            )


@triton.jit
def _turn(
    from_ptr, to_ptr, real, cos_ptr, sin_ptr, weight_ptr, eps,
    DIM: tl.constexpr, ROTATED: tl.constexpr, ONCE: tl.constexpr, INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr, OFFSET: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Heads [BLOCK_H, DIM] normed and rotated; dimensions beyond ROTATED are normed alone."""
    HALF: tl.constexpr = ROTATED // 2
    REST: tl.constexpr = DIM - ROTATED
    i = tl.arange(0, BLOCK_P)
    pair = i < HALF
    first = i
    second = i + HALF
    if INTERLEAVED:
        first = 2 * i
        second = 2 * i + 1
    kept = real & pair[None, :]
    a = tl.load(from_ptr + first[None, :], mask=kept, other=0.0).to(tl.float32)
    b = tl.load(from_ptr + second[None, :], mask=kept, other=0.0).to(tl.float32)
    r = tl.arange(0, BLOCK_R)
    behind = real & (r < REST)[None, :]
    rest = a
    if REST > 0:
        rest = tl.load(from_ptr + ROTATED + r[None, :], mask=behind, other=0.0).to(tl.float32)
    if NORM > 0:
        square = tl.sum(a * a + b * b, 1)
        if REST > 0:
            square += tl.sum(rest * rest, 1)
        root = tl.rsqrt(square / DIM + eps)[:, None]
        a, b, rest = a * root, b * root, rest * root
        if NORM > 1:
            a *= (tl.load(weight_ptr + first, mask=pair, other=0.0).to(tl.float32) + OFFSET)[None, :]
            b *= (tl.load(weight_ptr + second, mask=pair, other=0.0).to(tl.float32) + OFFSET)[None, :]
            if REST > 0:
                weight = tl.load(weight_ptr + ROTATED + r, mask=r < REST, other=0.0).to(tl.float32)
                rest *= (weight + OFFSET)[None, :]
    if ROTATED > 0:
        at_a, at_b = first, second
        if ONCE:
            at_a, at_b = i, i
        cos_a = tl.load(cos_ptr + at_a, mask=pair, other=0.0).to(tl.float32)[None, :]
        sin_a = tl.load(sin_ptr + at_a, mask=pair, other=0.0).to(tl.float32)[None, :]
        cos_b = tl.load(cos_ptr + at_b, mask=pair, other=0.0).to(tl.float32)[None, :]
        sin_b = tl.load(sin_ptr + at_b, mask=pair, other=0.0).to(tl.float32)[None, :]
        store(to_ptr + first[None, :], a * cos_a - b * sin_a, kept, UPCAST)
        store(to_ptr + second[None, :], b * cos_b + a * sin_b, kept, UPCAST)
    if REST > 0:
        store(to_ptr + ROTATED + r[None, :], rest, behind, UPCAST)


def tiles(tokens, heads, dim, rotated, dim_v):
    """Tile sizes and warps by name; the launch and the offline compile both take them from here."""
    blocks = {
        "BLOCK_H": 1 if tokens <= 16 else min(8, triton.next_power_of_2(heads)),
        "BLOCK_P": triton.next_power_of_2(max(1, rotated // 2)),
        "BLOCK_R": triton.next_power_of_2(max(1, dim - rotated)),
        "BLOCK_V": triton.next_power_of_2(dim_v),
    }
    return blocks, 1 if tokens <= 16 else 4


@on_its_device
def launch(q, k, v, cos, sin, keys, values, cells, *, q_norm, k_norm, rotated, interleaved):
    """Run the kernel; arguments and result as of `rope.rotate_and_write`, all settled."""
    tokens, q_heads, dim = q.shape
    k_heads, v_heads, dim_v = k.shape[1], v.shape[1], v.shape[2]
    out = q.new_empty(q.shape)
    if not tokens:
        return out
    blocks, warps = tiles(tokens, k_heads, dim, rotated, dim_v)
    parts = sum(triton.cdiv(heads, blocks["BLOCK_H"]) for heads in (q_heads, k_heads, v_heads))
    turns = (q, q) if cos is None else (cos, sin)  # a pointer is needed where nothing is read, too
    overlap, options = beside(q.device)
    kinds = [0 if n is None else 1 if n.weight is None else 2 for n in (q_norm, k_norm)]
    _rotate_kernel[(tokens, parts)](
        q, k, v, *turns, out, keys, values, cells,
        None if q_norm is None else q_norm.weight, None if k_norm is None else k_norm.weight,
        q_heads, k_heads, v_heads, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        0 if cos is None else cos.stride(0), 0 if sin is None else sin.stride(0), *keys.stride()[:2],
        *values.stride()[:2], 0.0 if q_norm is None else q_norm.eps, 0.0 if k_norm is None else k_norm.eps,
        DIM=dim, DIM_V=dim_v, ROTATED=rotated, ONCE=cos is not None and cos.shape[-1] != rotated,
        INTERLEAVED=interleaved, Q_NORM=kinds[0], K_NORM=kinds[1],
        Q_OFFSET=0.0 if q_norm is None else q_norm.offset, K_OFFSET=0.0 if k_norm is None else k_norm.offset,
        **blocks, **overlap, UPCAST=dispatch.interpreting() and q.dtype == torch.bfloat16, num_warps=warps, **options,
    )  # fmt: skip
    return out


@triton.jit
def _look_up_kernel(
    table_ptr, positions_ptr, out_ptr, last, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """SIZE numbers of one token's position, or of the nearest that the table has."""
    token = tl.program_id(0).to(tl.int64)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.minimum(tl.maximum(tl.load(positions_ptr + token), 0), last)
    i = tl.arange(0, BLOCK)
    turns = tl.load(table_ptr + row * SIZE + i, mask=i < SIZE)
    tl.store(out_ptr + token * SIZE + i, turns, mask=i < SIZE)


@on_its_device
def launch_look_up(table, positions):
    """Run the kernel; arguments and result as of `rope.look_up`, all settled."""
    rows, _, width = table.shape
    out = table.new_empty(*positions.shape, 2, width)
    overlap, options = beside(table.device)
    if positions.numel():
        _look_up_kernel[(positions.numel(),)](
            table, positions.contiguous(), out, rows - 1,
            SIZE=2 * width, BLOCK=triton.next_power_of_2(2 * width), **overlap, num_warps=1, **options,
        )  # fmt: skip
    return out.unbind(-2)
