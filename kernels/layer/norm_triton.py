"""Triton kernel of norms with the residual added; importing this file needs triton."""

import torch
import triton
import triton.language as tl

from .. import dispatch
from ..launching import beside, on_its_device, store


@triton.jit
def _normed(
    x, inside, weight_ptr, bias_ptr, k, eps, SIZE: tl.constexpr, KIND: tl.constexpr, OFFSET: tl.constexpr
):
    """A row through a norm. KIND: letters, c centered, w with a weight, b with a bias."""
    if KIND == "c" or KIND == "cw" or KIND == "cwb":
        x = tl.where(inside, x - tl.sum(x, 0) / SIZE, 0.0)
    x = x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    if KIND == "w" or KIND == "wb" or KIND == "cw" or KIND == "cwb":
        x = x * (tl.load(weight_ptr + k, mask=inside, other=0.0).to(tl.float32) + OFFSET)
    if KIND == "wb" or KIND == "cwb":
        x += tl.load(bias_ptr + k, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _add_norm_kernel(
    x_ptr, residual_ptr, sum_ptr, out_ptr, weight_ptr, bias_ptr, post_weight_ptr, post_bias_ptr,
    x_row, residual_row, eps, post_eps, scale,
    SIZE: tl.constexpr, RESIDUAL: tl.constexpr, SCALE: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
    POST: tl.constexpr, POST_OFFSET: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One row; NORM and POST: the kinds of the norms, "-" for none."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < SIZE
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * x_row + k, mask=inside, other=0.0).to(tl.float32)
    if POST != "-":
        x = _normed(x, inside, post_weight_ptr, post_bias_ptr, k, post_eps, SIZE, POST, POST_OFFSET)
    if RESIDUAL:
        if SCALE:
            x = x * scale
        x += tl.load(residual_ptr + row * residual_row + k, mask=inside, other=0.0).to(tl.float32)
        store(sum_ptr + row * SIZE + k, x, inside, UPCAST)
    if NORM != "-":
        x = _normed(x, inside, weight_ptr, bias_ptr, k, eps, SIZE, NORM, OFFSET)
        store(out_ptr + row * SIZE + k, x, inside, UPCAST)


def kind(norm):
    """A norm's kind for the kernel, see `_normed`; "-" for None."""
    if norm is None:
        return "-"
    if norm.bias is not None and norm.weight is None:
        raise ValueError("a norm with a bias and no weight")
    return "c" * norm.centered + "w" * (norm.weight is not None) + "b" * (norm.bias is not None)


def num_warps(size):
    """Warps of a program; the launch and the offline compile both take them from here."""
    return 4 if size <= 2048 else 8 if size <= 8192 else 16


@on_its_device
def launch(x, norm, residual, scale, post):
    """Run the kernel; arguments and results as of `norm.add_norm`, all settled."""
    rows, size = x.shape
    summed = x if residual is None else x.new_empty(rows, size)
    out = None if norm is None else x.new_empty(rows, size)
    if not rows:
        return summed, out
    overlap, options = beside(x.device)
    parts = [(n.weight, n.bias) if n is not None else (None, None) for n in (norm, post)]
    _add_norm_kernel[(rows,)](
        x, residual, None if residual is None else summed, out, *parts[0], *parts[1],
        x.stride(0), 0 if residual is None else residual.stride(0),
        0.0 if norm is None else norm.eps, 0.0 if post is None else post.eps, scale,
        SIZE=size, RESIDUAL=residual is not None, SCALE=scale != 1.0,
        NORM=kind(norm), OFFSET=0.0 if norm is None else norm.offset,
        POST=kind(post), POST_OFFSET=0.0 if post is None else post.offset,
        BLOCK=triton.next_power_of_2(size), **overlap, UPCAST=dispatch.interpreting() and x.dtype == torch.bfloat16,
        num_warps=num_warps(size), **options,
    )  # fmt: skip
    return summed, out
