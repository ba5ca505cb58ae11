"""Triton kernels of products with 4-bit weights; importing this file needs triton.

The two codes of a byte are never interleaved: the even inputs meet the high halves and the odd inputs the low
halves. The table of 16 values fits one cache line, so a look-up costs one access a warp.
"""

import triton
import triton.language as tl

from .. import dispatch

GEMV_ROWS = 2  # up to so many rows each is a product with a vector; with more, tiles go through tl.dot


@triton.jit
def _gemv_kernel(
    x_ptr, packed_ptr, code_ptr, absmax_ptr, bias_ptr, out_ptr, nested_code_ptr, nested_absmax_ptr, offset_ptr,
    outputs, x_row,
    INPUTS: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BIAS: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """One row of x with BLOCK_N outputs; a step reads GROUPS scales and their weights."""
    row = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < outputs
    HALF: tl.constexpr = BLOCKSIZE // 2
    PER_ROW: tl.constexpr = INPUTS // BLOCKSIZE
    byte = tl.arange(0, GROUPS * HALF)
    total = tl.zeros([BLOCK_N], tl.float32)
    for group in range(0, PER_ROW, GROUPS):
        at = group * HALF + byte
        valid = at < INPUTS // 2
        even = tl.load(x_ptr + row * x_row + 2 * at, mask=valid, other=0.0).to(tl.float32)
        odd = tl.load(x_ptr + row * x_row + 2 * at + 1, mask=valid, other=0.0).to(tl.float32)
        where = n.to(tl.int64)[:, None] * (INPUTS // 2) + at[None, :]
        both = tl.load(packed_ptr + where, mask=inside[:, None] & valid[None, :], other=0).to(tl.int32)
        high, low = tl.load(code_ptr + (both >> 4)), tl.load(code_ptr + (both & 15))
        parts = tl.sum(tl.reshape(high * even[None, :] + low * odd[None, :], (BLOCK_N, GROUPS, HALF)), 2)
        block = group + tl.arange(0, GROUPS)
        index = n.to(tl.int64)[:, None] * PER_ROW + block[None, :]
        kept = inside[:, None] & (block < PER_ROW)[None, :]
        scale = _scales(absmax_ptr, nested_code_ptr, nested_absmax_ptr, offset_ptr, index, kept, NESTED)
        total += tl.sum(parts * scale, 1)
    if BIAS:
        total += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    _store(out_ptr + row.to(tl.int64) * outputs + n, total, inside, UPCAST)


@triton.jit
def _gemm_kernel(
    x_ptr, packed_ptr, code_ptr, absmax_ptr, bias_ptr, out_ptr, nested_code_ptr, nested_absmax_ptr, offset_ptr,
    rows, outputs, x_row,
    INPUTS: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BIAS: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of x with BLOCK_N outputs; a step reads one scale an output and its weights."""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    HALF: tl.constexpr = BLOCKSIZE // 2
    PER_ROW: tl.constexpr = INPUTS // BLOCKSIZE
    byte = tl.arange(0, HALF)
    real, inside = m < rows, n < outputs
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(PER_ROW):
        at = block * HALF + byte
        x_at = m.to(tl.int64)[:, None] * x_row + 2 * at[None, :]
        even = tl.load(x_ptr + x_at, mask=real[:, None], other=0.0)
        odd = tl.load(x_ptr + x_at + 1, mask=real[:, None], other=0.0)
        if UPCAST:
            even, odd = even.to(tl.float32), odd.to(tl.float32)
        where = n.to(tl.int64)[None, :] * (INPUTS // 2) + at[:, None]
        both = tl.load(packed_ptr + where, mask=inside[None, :], other=0).to(tl.int32)
        high = tl.load(code_ptr + (both >> 4)).to(even.dtype)
        low = tl.load(code_ptr + (both & 15)).to(even.dtype)
        part = tl.dot(even, high, input_precision="ieee")
        part = tl.dot(odd, low, part, input_precision="ieee")
        index = n.to(tl.int64) * PER_ROW + block
        scale = _scales(absmax_ptr, nested_code_ptr, nested_absmax_ptr, offset_ptr, index, inside, NESTED)
        total += part * scale[None, :]
    if BIAS:
        total += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    to = m.to(tl.int64)[:, None] * outputs + n[None, :]
    _store(out_ptr + to, total, real[:, None] & inside[None, :], UPCAST)


@triton.jit
def _scales(absmax_ptr, nested_code_ptr, nested_absmax_ptr, offset_ptr, index, mask, NESTED: tl.constexpr):
    """Scales of the blocks `index` as float32; NESTED: blocks that share an outer scale, 0 for plain floats."""
    scale = tl.load(absmax_ptr + index, mask=mask, other=0)
    if NESTED > 0:
        outer = tl.load(nested_absmax_ptr + index // NESTED, mask=mask, other=0.0)
        scale = tl.load(nested_code_ptr + scale.to(tl.int32), mask=mask, other=0.0) * outer + tl.load(
            offset_ptr
        )
    return scale


@triton.jit
def _store(ptr, value, mask, UPCAST: tl.constexpr):
    """Store float32 values in the pointer's dtype; the interpreter (UPCAST) would truncate to bfloat16."""
    if UPCAST and ptr.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(ptr, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


def sizes(rows, blocksize):
    """Tile sizes by name for so many rows of x; the launch and the offline compile both take them from here."""
    if rows <= GEMV_ROWS:
        return {"BLOCK_N": 8, "GROUPS": max(1, 1024 // blocksize)}
    return {"BLOCK_M": 16 if rows <= 16 else 32, "BLOCK_N": 64}


def launch(x, weight, bias, out):
    """Run the kernel for x [R, K], R >= 1, into `out` [R, N]; see `nf4.four_bit_linear`."""
    rows, (outputs, inputs), nested = len(x), weight.shape, weight.nested
    tile = sizes(rows, weight.blocksize)
    outer = (None, None, None) if nested is None else (nested.code, nested.absmax, nested.offset)
    pointers = (x, weight.packed, weight.code, weight.absmax, bias, out, *outer)
    constants = {
        "INPUTS": inputs,
        "BLOCKSIZE": weight.blocksize,
        "NESTED": nested.blocksize if nested else 0,
        "BIAS": bias is not None,
        "UPCAST": dispatch.interpreting(),
    }
    columns = triton.cdiv(outputs, tile["BLOCK_N"])
    if rows <= GEMV_ROWS:
        _gemv_kernel[(columns, rows)](*pointers, outputs, x.stride(0), **constants, **tile, num_warps=4)
    else:
        grid = (columns, triton.cdiv(rows, tile["BLOCK_M"]))
        _gemm_kernel[grid](
            *pointers, rows, outputs, x.stride(0), **constants, **tile, num_warps=4, num_stages=3
        )
    return out
