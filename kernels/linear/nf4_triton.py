"""Triton kernels of products with 4-bit weights; importing this file needs triton.

One row of activations is multiplied on the ordinary units, more rows with `tl.dot`. Either way the inputs may be
shared out among programs, whose parts a second kernel adds in a fixed order, so a row's bits depend on nothing but
the weight's shape and whether it is alone.
"""

import torch
import triton
import triton.language as tl

from .. import dispatch
from ..launching import beside, on_its_device, store
from .nf4_codes import eighths, floats, planes, values


@triton.jit
def _vector_kernel(
    x_ptr, words_ptr, code_ptr, planes_ptr, absmax_ptr, bias_ptr, out_ptr, parts_ptr, nested_code_ptr,
    nested_absmax_ptr, offset_ptr, outputs,
    INPUTS: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BIAS: tl.constexpr, UPCAST: tl.constexpr,
    PDL: tl.constexpr, PERMUTE: tl.constexpr, SPLITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """One row with STEPS times BLOCK_N outputs over WIDTH words of inputs, which stay in registers."""
    split = tl.program_id(1)
    WORDS: tl.constexpr = INPUTS // 8
    PER_ROW: tl.constexpr = INPUTS // BLOCKSIZE
    word = split * WIDTH + tl.arange(0, WIDTH)
    block = (split * WIDTH + tl.arange(0, WIDTH // 4) * 4) * 8 // BLOCKSIZE
    n = tl.program_id(0) * (BLOCK_N * STEPS) + tl.arange(0, BLOCK_N)
    words = tl.load(
        words_ptr + n.to(tl.int64)[:, None] * WORDS + word[None, :],
        mask=(n < outputs)[:, None] & (word < WORDS)[None, :], other=0,
    )  # fmt: skip
    if PDL:  # the first words are on their way before the launch before this one has ended
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    h0, h1, h2, h3, l0, l1, l2, l3 = planes(planes_ptr, PERMUTE, 1)
    k = split * WIDTH * 8 + tl.arange(0, WIDTH * 8)
    x0, x1, x2, x3, x4, x5, x6, x7 = eighths(x_ptr, k, k < INPUTS, WIDTH)
    for _ in range(STEPS):
        after = n + BLOCK_N
        coming = tl.load(
            words_ptr + after.to(tl.int64)[:, None] * WORDS + word[None, :],
            mask=(after < outputs)[:, None] & (word < WORDS)[None, :], other=0,
        )  # fmt: skip
        at = n.to(tl.int64)[:, None] * PER_ROW + block[None, :]
        kept = (n < outputs)[:, None] & (block < PER_ROW)[None, :]
        scale = _scales(absmax_ptr, nested_code_ptr, nested_absmax_ptr, offset_ptr, at, kept, NESTED)
        w0, w1, w2, w3, w4, w5, w6, w7 = floats(words, code_ptr, h0, h1, h2, h3, l0, l1, l2, l3, PERMUTE)
        part = w0 * x0[None, :] + w1 * x1[None, :]
        part += w2 * x2[None, :]
        part += w3 * x3[None, :]
        part += w4 * x4[None, :]
        part += w5 * x5[None, :]
        part += w6 * x6[None, :]
        part += w7 * x7[None, :]
        part = tl.sum(tl.reshape(part, (BLOCK_N, WIDTH // 4, 4)), 2)
        total = tl.sum(part * scale, 1)
        if SPLITS == 1:
            if BIAS:
                total += tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)
            store(out_ptr + n, total, n < outputs, UPCAST)
        else:
            tl.store(parts_ptr + split.to(tl.int64) * outputs + n, total, mask=n < outputs)
        n, words = after, coming


@triton.jit(do_not_specialize=["rows"])
def _tile_kernel(
    x_ptr, words_ptr, code_ptr, planes_ptr, absmax_ptr, bias_ptr, out_ptr, parts_ptr, nested_code_ptr,
    nested_absmax_ptr, offset_ptr, rows, outputs, x_row,
    INPUTS: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BIAS: tl.constexpr, UPCAST: tl.constexpr,
    PDL: tl.constexpr, PERMUTE: tl.constexpr, HALF: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows with BLOCK_N outputs over a share of the inputs; a step takes one block of weights an output."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(1)
    inside, real = n < outputs, m < rows
    WORDS: tl.constexpr = BLOCKSIZE // 8
    PER_ROW: tl.constexpr = INPUTS // BLOCKSIZE
    SHARE: tl.constexpr = (PER_ROW + SPLITS - 1) // SPLITS
    DTYPE: tl.constexpr = tl.float32 if UPCAST else x_ptr.dtype.element_ty
    w_at = n.to(tl.int64)[:, None] * (INPUTS // 8) + tl.arange(0, WORDS)[None, :]
    x_at = m.to(tl.int64)[:, None] * x_row + tl.arange(0, BLOCKSIZE)[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    h0, h1, h2, h3, l0, l1, l2, l3 = planes(planes_ptr, PERMUTE, HALF)
    for block in range(split * SHARE, tl.minimum(split * SHARE + SHARE, PER_ROW)):
        words = tl.load(words_ptr + w_at + block * WORDS, mask=inside[:, None], other=0)
        x = tl.load(x_ptr + x_at + block * BLOCKSIZE, mask=real[:, None], other=0.0).to(DTYPE)
        at = n.to(tl.int64) * PER_ROW + block
        scale = _scales(absmax_ptr, nested_code_ptr, nested_absmax_ptr, offset_ptr, at, inside, NESTED)
        w = values(words, code_ptr, h0, h1, h2, h3, l0, l1, l2, l3, DTYPE, PERMUTE)
        total += tl.dot(w, tl.trans(x), input_precision="ieee") * scale[:, None]
    to = m.to(tl.int64)[None, :] * outputs + n[:, None]
    write = real[None, :] & inside[:, None]
    if SPLITS == 1:
        if BIAS:
            total += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)[:, None]
        store(out_ptr + to, total, write, UPCAST)
    else:
        tl.store(parts_ptr + split.to(tl.int64) * rows * outputs + to, total, mask=write)


@triton.jit(do_not_specialize=["rows"])
def _add_kernel(
    parts_ptr, bias_ptr, out_ptr, rows, outputs, SPLITS: tl.constexpr, BIAS: tl.constexpr, UPCAST: tl.constexpr,
    PDL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the shares of BLOCK_N outputs of one row, in order."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < outputs
    total = tl.zeros([BLOCK_N], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts_ptr + (split * rows + row) * outputs + n, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    store(out_ptr + row * outputs + n, total, inside, UPCAST)


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


def vector_sizes(outputs, inputs):
    """Sizes by name and warps of the kernel for one row; it shares out inputs only where they are too many at once."""
    words = inputs // 8
    width = next((w for w in (512, 256, 128) if words % w == 0), min(512, triton.next_power_of_2(words)))
    return {"SPLITS": triton.cdiv(words, width), "WIDTH": width, "BLOCK_N": 4, "STEPS": 4}, max(
        1, width // 128
    )


def tile_sizes(rows, outputs, inputs, blocksize):
    """Sizes by name and warps of the kernel for more rows; splits depend on the weight alone."""
    tiles = triton.cdiv(outputs, 64)
    splits = min(8, max(1, 1024 // tiles), max(1, inputs // blocksize // 4))
    sizes = {"SPLITS": 1 << (splits.bit_length() - 1), "BLOCK_M": 16 if rows <= 16 else 32, "BLOCK_N": 64}
    return sizes, 4


@on_its_device
def launch(x, weight, bias, out):
    """Run the kernels for x [R, K], R >= 1, into `out` [R, N]; see `nf4.four_bit_linear`."""
    rows, (outputs, inputs), nested = len(x), weight.shape, weight.nested
    permute = x.dtype != torch.float32 and torch.version.hip is None and not dispatch.interpreting()
    alone = rows == 1
    sizes, warps = (
        vector_sizes(outputs, inputs) if alone else tile_sizes(rows, outputs, inputs, weight.blocksize)
    )
    overlap, options = beside(x.device)
    splits, shared = sizes["SPLITS"], {"BIAS": bias is not None, "UPCAST": dispatch.interpreting(), **overlap}
    parts = x.new_empty(splits * rows * outputs if splits > 1 else 0, dtype=torch.float32)
    outer = (None, None, None) if nested is None else (nested.code, nested.absmax, nested.offset)
    found = weight.planes if weight.planes is not None or not permute else weight.code_planes()
    words = weight.packed.view(-1).view(torch.int32)
    tensors = (x, words, weight.code, found, weight.absmax, bias, out, parts, *outer)
    layout = {"INPUTS": inputs, "BLOCKSIZE": weight.blocksize, "NESTED": nested.blocksize if nested else 0}
    layout |= {"PERMUTE": permute, "num_warps": warps, **options}
    if alone:
        grid = (triton.cdiv(outputs, sizes["BLOCK_N"] * sizes["STEPS"]), splits)
        _vector_kernel[grid](*tensors, outputs, **layout, **shared, **sizes)
    else:
        grid = (triton.cdiv(outputs, sizes["BLOCK_N"]), splits, triton.cdiv(rows, sizes["BLOCK_M"]))
        sizes["HALF"] = int(x.dtype == torch.float16)
        _tile_kernel[grid](*tensors, rows, outputs, x.stride(0), **layout, **shared, **sizes, num_stages=3)
    if splits > 1:
        _add_kernel[(triton.cdiv(outputs, 512), rows)](
            parts, bias, out, rows, outputs, SPLITS=splits, BLOCK_N=512, **shared, num_warps=4, **options
        )
    return out
