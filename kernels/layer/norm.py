"""Norms with the residual added on the way: torch reference, and the choice between it and the Triton kernel."""

from dataclasses import dataclass

import torch

from .. import dispatch

WIDEST = 16384


@dataclass(frozen=True)
class Norm:
    """(x - center) * rsqrt(mean((x - center) ** 2) + eps) * (offset + weight) + bias over the last axis, in float32.

    Attributes:
        weight: [K], or None for ones. eps: > 0. offset: 0, or 1 for weights around zero (Gemma).
        bias: [K] or None. centered: the mean is subtracted (arXiv 1607.06450), or not (arXiv 1910.07467).
    """

    weight: torch.Tensor | None
    eps: float
    offset: float = 0.0
    bias: torch.Tensor | None = None
    centered: bool = False

    def __call__(self, x):
        """x [..., K] normed, float32 (or 64), not rounded."""
        rows = x if x.dtype == torch.float64 else x.float()
        if self.centered:
            rows = rows - rows.mean(-1, keepdim=True)
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + self.eps)
        if self.weight is not None:
            rows = rows * (self.weight.to(rows.dtype) + self.offset)
        return rows if self.bias is None else rows + self.bias.to(rows.dtype)


def add_norm(x, norm, *, residual=None, scale=1.0, post=None, kernels=None):
    """One step along the residual stream: what a sublayer gave is added, and normed for the next one.

    Args:
        x: [R, K] with contiguous rows, float16, bfloat16 or float32; K <= 16384 for the Triton kernel.
        norm: Norm of the sum, or None where only the sum is wanted.
        residual: [R, K] that `scale` times x is added to; None: x is the sum.
        post: Norm that x goes through before it is added (Gemma 2, OLMo 2).
        kernels: "auto", "triton", "torch" or None (see `dispatch`).

    Returns:
        (sum, normed sum), [R, K] each in x's dtype; the sum is x itself where nothing is added, the other None
        without a norm. The sum is normed before it is rounded.

    Raises:
        ValueError: shapes that do not fit. dispatch.KernelUnavailable: kernels="triton" cannot run here.
    """
    if x.dim() != 2 or (residual is not None and residual.shape != x.shape):
        raise ValueError(
            f"x {tuple(x.shape)} and residual {residual if residual is None else tuple(residual.shape)}: [R, K] each"
        )
    if residual is None and (post is not None or norm is None):
        raise ValueError("without a residual there is a norm, and nothing before it")
    if dispatch.select("add_norm", x.device, kernels, uncovered(x, norm, residual, post)) == "torch":
        return add_norm_reference(x, norm, residual=residual, scale=scale, post=post)
    from . import norm_triton

    return norm_triton.launch(x, norm, residual, scale, post)


def add_norm_reference(x, norm, *, residual=None, scale=1.0, post=None):
    """Defines `add_norm`, whose arguments it shares."""
    if residual is None:
        return x, norm(x).to(x.dtype)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    summed = residual.to(wide) + scale * (x.to(wide) if post is None else post(x))
    return summed.to(x.dtype), None if norm is None else norm(summed).to(x.dtype)


def uncovered(x, norm, residual=None, post=None):
    """What keeps the Triton kernel from this call, in words; None where nothing does."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"activations of {x.dtype}"
    if x.shape[1] > WIDEST:
        return f"rows of {x.shape[1]} (at most {WIDEST})"
    for tensor in (x, residual):
        if tensor is not None and tensor.stride(1) != 1:
            return "rows that are not contiguous"
    return None
