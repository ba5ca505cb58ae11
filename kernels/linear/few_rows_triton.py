"""Triton kernels of products of few rows with dense weights; importing this file needs triton.

One row is a product with a vector: a program keeps the sums of BLOCK_N outputs spread over its threads and adds them
up once, at the end. Weights are read once and stay out of the way of x, which all programs share. More rows go through
`tl.dot`, the outputs along its long axis, so that eight rows fill a tile of the tensor cores.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import dispatch
from ..launching import beside, on_its_device, store
from ..layer.gated_triton import activate


@triton.jit
def _vector_kernel(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, scales_ptr, residual_ptr, out_ptr, n0, n1, n2, scale,
    INPUTS: tl.constexpr, WEIGHTS: tl.constexpr, GATE: tl.constexpr, BIAS0: tl.constexpr, BIAS1: tl.constexpr,
    BIAS2: tl.constexpr, SCALES: tl.constexpr, RESIDUAL: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of one row."""
    tile = tl.program_id(0)
    w_ptr, first, count, column = _place(tile, w0_ptr, w1_ptr, w2_ptr, n0, n1, n2, WEIGHTS, GATE, BLOCK_N)
    n = first + tl.arange(0, BLOCK_N)
    inside = n < count
    k = tl.arange(0, BLOCK_K)
    w_at = w_ptr + n.to(tl.int64)[:, None] * INPUTS + k[None, :]
    up_at = w_at
    if GATE != "":
        up_at = w1_ptr + n.to(tl.int64)[:, None] * INPUTS + k[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    # The next tile of weights is always on its way; the first one before the launch before this one has ended.
    ahead = inside[:, None] & (k < INPUTS)[None, :]
    w = tl.load(w_at, mask=ahead, other=0, eviction_policy="evict_first")
    w_up = w
    if GATE != "":
        w_up = tl.load(up_at, mask=ahead, other=0, eviction_policy="evict_first")
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for start in tl.range(0, INPUTS, BLOCK_K, num_stages=STAGES):
        valid = start + k < INPUTS
        x = tl.load(x_ptr + start + k, mask=valid, other=0.0, eviction_policy="evict_last").to(tl.float32)
        now, now_up = w, w_up
        ahead = inside[:, None] & (start + BLOCK_K + k < INPUTS)[None, :]
        w = tl.load(w_at + start + BLOCK_K, mask=ahead, other=0, eviction_policy="evict_first")
        if GATE != "":
            w_up = tl.load(up_at + start + BLOCK_K, mask=ahead, other=0, eviction_policy="evict_first")
            up += now_up.to(tl.float32) * x[None, :]
        total += now.to(tl.float32) * x[None, :]
    out = tl.sum(total, 1)
    if SCALES:
        out *= tl.load(scales_ptr + n, mask=inside, other=0.0)
    out += _bias(
        tile, n, inside, b0_ptr, b1_ptr, b2_ptr, n0, n1, n2, WEIGHTS, GATE, BIAS0, BIAS1, BIAS2, BLOCK_N
    )
    if GATE != "":
        factor = tl.sum(up, 1)
        if BIAS1:
            factor += tl.load(b1_ptr + n, mask=inside, other=0.0).to(tl.float32)
        out = activate(out, GATE) * factor
    if SCALE:
        out = out * scale
    if RESIDUAL:
        out += tl.load(residual_ptr + column + n, mask=inside, other=0.0).to(tl.float32)
    store(out_ptr + column + n, out, inside, UPCAST)


@triton.jit
def _rows_kernel(
    x_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, scales_ptr, residual_ptr, out_ptr,
    n0, n1, n2, rows, x_row, residual_row, out_row, scale,
    INPUTS: tl.constexpr, WEIGHTS: tl.constexpr, GATE: tl.constexpr, BIAS0: tl.constexpr, BIAS1: tl.constexpr,
    BIAS2: tl.constexpr, SCALES: tl.constexpr, RESIDUAL: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of up to ROWS rows."""
    tile = tl.program_id(0)
    w_ptr, first, count, column = _place(tile, w0_ptr, w1_ptr, w2_ptr, n0, n1, n2, WEIGHTS, GATE, BLOCK_N)
    n = first + tl.arange(0, BLOCK_N)
    row = tl.arange(0, ROWS)
    inside, real = n < count, row < rows
    k = tl.arange(0, BLOCK_K)
    w_at = w_ptr + n.to(tl.int64)[:, None] * INPUTS + k[None, :]
    up_at = w_at
    if GATE != "":
        up_at = w1_ptr + n.to(tl.int64)[:, None] * INPUTS + k[None, :]
    x_at = x_ptr + row[None, :] * x_row + k[:, None]
    total = tl.zeros([BLOCK_N, ROWS], tl.float32)
    up = tl.zeros([BLOCK_N, ROWS], tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for start in tl.range(0, INPUTS, BLOCK_K, num_stages=STAGES):
        valid = start + k < INPUTS
        x = tl.load(x_at + start, mask=valid[:, None] & real[None, :], other=0.0)
        mask = inside[:, None] & valid[None, :]
        w = tl.load(w_at + start, mask=mask, other=0, eviction_policy="evict_first")
        if UPCAST:
            x, w = x.to(tl.float32), w.to(tl.float32)
        elif SCALES:
            w = w.to(x.dtype)
        total = tl.dot(w, x, total, input_precision="ieee")
        if GATE != "":
            w = tl.load(up_at + start, mask=mask, other=0, eviction_policy="evict_first")
            if UPCAST:
                w = w.to(tl.float32)
            up = tl.dot(w, x, up, input_precision="ieee")
    bias = _bias(
        tile, n, inside, b0_ptr, b1_ptr, b2_ptr, n0, n1, n2, WEIGHTS, GATE, BIAS0, BIAS1, BIAS2, BLOCK_N
    )
    if SCALES:
        total *= tl.load(scales_ptr + n, mask=inside, other=0.0)[:, None]
    out = total + bias[:, None]
    if GATE != "":
        if BIAS1:
            up += tl.load(b1_ptr + n, mask=inside, other=0.0).to(tl.float32)[:, None]
        out = activate(out, GATE) * up
    if SCALE:
        out = out * scale
    kept = inside[:, None] & real[None, :]
    if RESIDUAL:
        at = row.to(tl.int64)[None, :] * residual_row + (column + n)[:, None]
        out += tl.load(residual_ptr + at, mask=kept, other=0.0).to(tl.float32)
    store(out_ptr + row.to(tl.int64)[None, :] * out_row + (column + n)[:, None], out, kept, UPCAST)


@triton.jit
def _place(
    tile, w0_ptr, w1_ptr, w2_ptr, n0, n1, n2, WEIGHTS: tl.constexpr, GATE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The weight that a tile of outputs belongs to, its first row there, that weight's rows, and its first column."""
    w_ptr, first, count, column = w0_ptr, tile * BLOCK_N, n0, 0
    if GATE == "" and WEIGHTS > 1:
        start = tl.cdiv(n0, BLOCK_N)
        later = tile >= start
        w_ptr = tl.where(later, w1_ptr, w_ptr)
        first = tl.where(later, (tile - start) * BLOCK_N, first)
        count, column = tl.where(later, n1, count), tl.where(later, n0, column)
        if WEIGHTS > 2:
            start += tl.cdiv(n1, BLOCK_N)
            last = tile >= start
            w_ptr = tl.where(last, w2_ptr, w_ptr)
            first = tl.where(last, (tile - start) * BLOCK_N, first)
            count, column = tl.where(last, n2, count), tl.where(last, n0 + n1, column)
    return w_ptr, first, count, column


@triton.jit
def _bias(
    tile, n, inside, b0_ptr, b1_ptr, b2_ptr, n0, n1, n2, WEIGHTS: tl.constexpr, GATE: tl.constexpr,
    BIAS0: tl.constexpr, BIAS1: tl.constexpr, BIAS2: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Bias of a tile's outputs, float32; of a gate its own alone."""
    bias = tl.zeros([BLOCK_N], tl.float32)
    second = tl.cdiv(n0, BLOCK_N)
    third = second + tl.cdiv(n1, BLOCK_N)
    if BIAS0:
        mine = inside
        if GATE == "":
            mine = n < tl.where(tile < second, n0, 0)
        bias += tl.load(b0_ptr + n, mask=mine, other=0.0).to(tl.float32)
    if GATE == "" and WEIGHTS > 1:
        if BIAS1:
            mine = n < tl.where(tile < second, 0, tl.where(tile < third, n1, 0))
            bias += tl.load(b1_ptr + n, mask=mine, other=0.0).to(tl.float32)
        if BIAS2:
            mine = n < tl.where(tile < third, 0, n2)
            bias += tl.load(b2_ptr + n, mask=mine, other=0.0).to(tl.float32)
    return bias


@dataclass(frozen=True)
class Config:
    """Tile sizes of one launch: outputs and inputs a tile, warps, and tiles in flight (of several rows)."""

    block_n: int
    block_k: int
    num_warps: int
    stages: int = 1


def config_for(rows, weights, outputs, inputs, gate, narrow=False):
    """The tile sizes for a shape; the launch and the offline compile both take them from here.

    Args:
        rows: of x. weights: how many. outputs: of the first one. inputs: K. gate: its name, or None.
        narrow: whether the weight is of bytes, of which twice as many are on their way.
    """
    if narrow:
        return Config(2, 2048, 4) if rows == 1 else Config(32, 128, 4, 6)
    if rows == 1:
        if gate:
            return Config(4, 1024, 4 if inputs >= 4096 else 8)
        if weights > 1:
            return Config(2, 2048, 8) if inputs >= 4096 else Config(4, 512, 4)
        return Config(2, 1024, 4)
    if gate or outputs > 1 << 15:
        return Config(64, 128, 4, 4)
    return Config(32, 128, 4, 5) if weights > 1 else Config(16, 256, 2, 4)


@on_its_device
def launch(x, weights, biases, scales, gate, scale, residual, out, config=None):
    """Run a kernel for x [R, K], 1 <= R <= 16, into `out`; arguments as in `few_rows.few_rows_linear`, all settled."""
    rows, inputs = x.shape
    sizes = [w.shape[0] for w in weights] + [0] * (3 - len(weights))
    padding = (None,) * (3 - len(weights))
    config = config or config_for(rows, len(weights), sizes[0], inputs, gate, scales is not None)
    columns = weights[:1] if gate else weights
    grid = (sum(triton.cdiv(w.shape[0], config.block_n) for w in columns),)
    constants = {
        "INPUTS": inputs,
        "WEIGHTS": len(weights),
        "GATE": gate or "",
        **{f"BIAS{i}": b is not None for i, b in enumerate((*biases, *padding))},
        "SCALES": scales is not None,
        "RESIDUAL": residual is not None,
        "SCALE": scale != 1.0,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "STAGES": config.stages,
        "UPCAST": dispatch.interpreting() and x.dtype == torch.bfloat16,
    }
    overlap, options = beside(x.device)
    constants |= overlap
    options = {"num_warps": config.num_warps, **options}
    parts = (*weights, *padding, *biases, *padding, scales)
    if rows == 1:
        _vector_kernel[grid](x, *parts, residual, out, *sizes, scale, **constants, **options)
        return out
    _rows_kernel[grid](
        x, *parts, residual, out, *sizes, rows, x.stride(0), 0 if residual is None else residual.stride(0),
        out.stride(0), scale, ROWS=8 if rows <= 8 else 16, **constants, **options,
    )  # fmt: skip
    return out
