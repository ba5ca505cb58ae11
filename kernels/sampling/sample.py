"""Sampling: logits in, one seeded token a row out; edits, truncation rules, log-probabilities on the way."""

import torch

from .. import dispatch
from .cpu import sample_cpu
from .reference import sample_reference
from .rules import Call, Drawn
from .rules import min_p as min_p_rule
from .rules import top_k as top_k_rule
from .rules import top_p as top_p_rule


def sample(
    logits,
    *,
    seeds,
    positions,
    streams=None,
    temperature=None,
    top_k=None,
    top_p=None,
    min_p=None,
    rules=(),
    edits=None,
    bitmask=None,
    pointwise=(),
    logprobs=False,
    n_top=0,
    out=None,
    kernels=None,
):
    """Edit, scale, truncate and draw one token a row; a row's result depends on nothing outside the row.

    Order: edits (bias, bans, penalties), bitmask, pointwise, temperature, top_k, top_p, min_p, then `rules`;
    a rule in any other place is given through `rules` alone. Every row has its own parameters, and each off
    value changes nothing.

    Args:
        logits: [B, V] float32, bfloat16 or float16; never written to.
        seeds, positions: int64 [B], key of the noise, see `philox.gumbel`.
        streams: int64 [B] or None (0).
        temperature: float32 [B] or None (1); 0 is greedy: highest edited logit, lowest id on ties, no
            truncation.
        top_k: int [B] or None; <= 0 or >= V is off. Ties of the k-th are kept; `rules.top_k` with
            ties="lowest" keeps exactly k.
        top_p: float [B] or None; >= 1 is off. Mass is of what top_k left; ties at the boundary are kept.
        min_p: float [B] or None; <= 0 is off.
        rules: further `rules.Rule`s, in order.
        edits: `rules.SparseEdits`, `rules.Replaced` or None.
        bitmask: int32 [B, ceil(V / 32)] or None; a clear bit excludes the token (`rules.pack_mask`).
        pointwise: `rules.Pointwise` edits, in order.
        logprobs: fill the log-probabilities, entropy, kept count and rank of `Drawn`. "chosen" asks for
            `logprob` alone, which is what a decode step needs and cheaper on the CPU; other fields may then
            be None.
        n_top: number of highest raw log-probabilities to return, 0 to V; the Triton kernels find up to
            `sample_fused.TOP_MOST` of them on the way, more take a torch operation after the two launches.
        out: int64 [B] or None; the Triton kernels write the tokens there and allocate nothing else they can
            reuse.
        kernels: "auto", "triton", "torch" or None (see `dispatch`).

    Returns:
        Drawn. A row with a NaN, or with nothing above -inf, has token -1 and disturbs no other row. Tokens at
        +inf share the whole probability.

    Raises:
        ValueError: a shape or n_top is wrong. dispatch.KernelUnavailable: kernels="triton" cannot run here.
    """
    short = ((top_k, top_k_rule), (top_p, top_p_rule), (min_p, min_p_rule))
    call = Call(
        logits,
        seeds=seeds,
        positions=positions,
        streams=streams,
        temperature=temperature,
        rules=(*(make(value) for value, make in short if value is not None), *rules),
        edits=edits,
        bitmask=bitmask,
        pointwise=pointwise,
        logprobs=logprobs,
        n_top=n_top,
    )
    check(call)
    if dispatch.select("sample", logits.device, kernels, _unfused(call)) == "triton":
        from .fused import sample_fused

        return sample_fused(call, out=out)
    drawn = (sample_cpu if logits.device.type == "cpu" else sample_reference)(call)
    return drawn if out is None else drawn._replace(tokens=out.copy_(drawn.tokens))


def _unfused(call):
    """Why these rules and edits have no fused kernel, or None."""
    for rule in call.rules:
        if rule.kind == "value" and rule.device is None:
            return f"rule {getattr(rule.threshold, '__name__', rule.threshold)!r} has no device function"
    for point in call.pointwise:
        if point.device is None:
            return f"edit {getattr(point.edit, '__name__', point.edit)!r} has no device function"
    return None


def check(call):
    """Raise ValueError, naming value and expectation, unless shapes fit together."""
    logits, n_top = call.logits, call.n_top
    if logits.dim() != 2:
        raise ValueError(f"logits of shape {tuple(logits.shape)}: expected [rows, vocabulary]")
    for name in ("seeds", "positions", "streams", "temperature"):
        value = getattr(call, name)
        if value is not None and tuple(value.shape) != (len(logits),):
            raise ValueError(
                f"{name} of shape {tuple(value.shape)}: expected ({len(logits)},), one value a row"
            )
    if not 0 <= n_top <= logits.shape[1]:
        raise ValueError(f"n_top={n_top}: expected 0 to the vocabulary size {logits.shape[1]}")
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        raise ValueError(f"logits of dtype {logits.dtype}: expected float32, bfloat16 or float16")


__all__ = ["Drawn", "sample", "sample_reference"]
