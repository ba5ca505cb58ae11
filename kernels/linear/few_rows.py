"""Products of few rows with dense weights: torch reference, and the choice between it and the Triton kernel.

One launch reads every weight once and where it lies: several weights side by side (the projections to queries, keys
and values), or a gate and its factor whose activated product is all that is kept. Bias, scale and residual are added on
the way. A norm of the input is not: every program would repeat it, which costs more than a launch of its own.
"""

import torch
from torch.nn import functional

from .. import dispatch
from ..layer.gated import ACTIVATIONS

MOST_ROWS = 16


def few_rows_linear(
    x, weights, biases=None, *, scales=None, gate=None, scale=1.0, residual=None, kernels=None, config=None,
    out=None,
):  # fmt: skip
    """Products of x with one to three weights, each read in place; the order of summation is fixed.

    A row's bits depend on the number of rows and the sizes, never on what the other rows hold.

    Args:
        x: [R, K] float16, bfloat16 or float32; R <= 16 for the Triton kernel.
        weights: one to three tensors [N_i, K] in x's dtype with contiguous rows.
        biases: a tensor [N_i] or None for each weight, or None for none at all.
        scales: float32 [N] of a single weight of int8, whose outputs they multiply (no gate); else None.
        gate: name in ACTIVATIONS; of two weights of one shape, act(x w0' + b0) * (x w1' + b1) is returned.
        scale, residual: the result is residual + scale * product, residual [R, N] or None.
        kernels: "auto", "triton", "torch" or None (see `dispatch`).
        config: tile sizes, see `few_rows_triton.Config`; None takes those for the shape.
        out: [R, N] with contiguous rows, written instead of a new tensor; may be `residual`.

    Returns:
        [R, N_0 + N_1 + ...], or [R, N_0] with a gate.

    Raises:
        ValueError: shapes that do not fit. dispatch.KernelUnavailable: kernels="triton" cannot run here.
    """
    biases = (None,) * len(weights) if biases is None else biases
    _check(x, weights, biases, scales, gate)
    reason = uncovered(x, weights, biases, scales)
    if dispatch.select("few_rows_linear", x.device, kernels, reason) == "torch":
        result = few_rows_linear_reference(
            x, weights, biases, scales=scales, gate=gate, scale=scale, residual=residual
        )
        return result if out is None else out.copy_(result)
    from . import few_rows_triton

    columns = weights[0].shape[0] if gate else sum(w.shape[0] for w in weights)
    out = x.new_empty(len(x), columns) if out is None else out
    x, residual = (t if t is None or t.stride(1) == 1 else t.contiguous() for t in (x, residual))
    if len(x):
        few_rows_triton.launch(x, weights, biases, scales, gate, scale, residual, out, config)
    return out


def few_rows_linear_reference(x, weights, biases=None, *, scales=None, gate=None, scale=1.0, residual=None):
    """Defines `few_rows_linear`, whose arguments it shares: sums in float32, rounded once at the end."""
    biases = (None,) * len(weights) if biases is None else biases
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.to(wide)
    if scales is not None:
        weights = [weights[0].to(wide) * scales.to(wide)[:, None]]
    terms = zip(weights, biases, strict=True)
    parts = [functional.linear(rows, w.to(wide), None if b is None else b.to(wide)) for w, b in terms]
    result = ACTIVATIONS[gate](parts[0]) * parts[1] if gate else torch.cat(parts, -1)
    result = result * scale
    return (result if residual is None else residual.to(wide) + result).to(x.dtype)


def _check(x, weights, biases, scales, gate):
    if not 1 <= len(weights) <= 3 or len(biases) != len(weights):
        raise ValueError(
            f"{len(weights)} weights with {len(biases)} biases: one to three, a bias or None each"
        )
    for weight in weights:
        if x.dim() != 2 or weight.dim() != 2 or weight.shape[1] != x.shape[1]:
            raise ValueError(
                f"x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit: [R, K] and [N, K]"
            )
    narrow = [w.dtype for w in weights if w.dtype == torch.int8]
    if (scales is not None) != bool(narrow) or (narrow and (gate or len(weights) > 1)):
        raise ValueError(
            f"weights of {[w.dtype for w in weights]}: scales go with one weight of int8, without a gate"
        )
    if narrow and (scales.shape != weights[0].shape[:1] or scales.dtype != torch.float32):
        raise ValueError(
            f"scales {scales.dtype} {tuple(scales.shape)}: float32 [{len(weights[0])}] is needed"
        )
    if gate is None:
        return
    if gate not in ACTIVATIONS:
        raise ValueError(f"gate={gate!r} is not one of {', '.join(ACTIVATIONS)}")
    if len(weights) != 2 or weights[0].shape != weights[1].shape:
        raise ValueError(f"a gate takes two weights of one shape, not {[tuple(w.shape) for w in weights]}")


def uncovered(x, weights, biases=(), scales=None):
    """What keeps the Triton kernel from this product, in words; None where nothing does."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"activations of {x.dtype}"
    read = [(weight, x.dtype if scales is None else torch.int8) for weight in weights]
    vectors = [(bias, x.dtype) for bias in biases if bias is not None]
    vectors += [] if scales is None else [(scales, torch.float32)]
    for tensor, dtype in read + vectors:
        if tensor.dtype != dtype or tensor.device != x.device:
            return f"x is {x.dtype} on {x.device}, a weight {tensor.dtype} on {tensor.device}"
    for weight in weights:
        if weight.stride() != (weight.shape[1], 1):
            return f"a weight with strides {weight.stride()} (rows one after another are needed)"
    if not all(vector.is_contiguous() for vector, _ in vectors):
        return "a bias or scales with gaps between their numbers"
    if len(x) > MOST_ROWS:
        return f"{len(x)} rows (at most {MOST_ROWS})"
    return None
