"""Sampling: logits in, one seeded token a row out; edits, truncation rules, log-probabilities on the way."""

import traceback

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
    adaptive=None,
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
        adaptive: float32 [4, B] or None; temperatures that follow the entropy of the edited logits instead, by
            `rules.dynamic_temperature` or `rules.entropy_temperature`; a column of zeros is none.
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
        adaptive=adaptive,
        rules=(*(make(value) for value, make in short if value is not None), *rules),
        edits=edits,
        bitmask=bitmask,
        pointwise=pointwise,
        logprobs=logprobs,
        n_top=n_top,
    )
    check(call)
    while dispatch.select("sample", logits.device, kernels, _unfused(call)) == "triton":
        from .fused import sample_fused

        try:
            with torch.cuda.device_of(logits):  # Triton launches on the current device
                _build(call)
                return sample_fused(call, out=out)
        except Exception as error:
            if not _refuse(call, error):  # once for each device function, which is not tried again
                raise
    drawn = (sample_cpu if logits.device.type == "cpu" else sample_reference)(call)
    return drawn if out is None else drawn._replace(tokens=out.copy_(drawn.tokens))


_built = set()  # calls whose kernels were compiled side by side
_refused = {}  # device functions that do not compile: why


def _build(call):
    """Compile what the first call of its kind launches, side by side; without rules there are two kernels only."""
    logits, rules, points = call.logits, call.rules, call.pointwise
    named = tuple(part.device for part in (*rules, *points)), frozenset(rule.kind for rule in rules)
    adaptive = call.adaptive is not None
    about = logits.device, logits.dtype, logits.shape[1], call.n_top, adaptive, named
    if about in _built or not (len(logits) and rules) or dispatch.interpreting():
        return
    from .fused import warm_up

    one = [rule._replace(parameter=rule.parameter[:1], second=None if rule.second is None else rule.second[:1])
           for rule in rules]  # fmt: skip
    own = [point._replace(parameter=point.parameter[:1]) for point in points]
    settings = {"n_top": call.n_top, "pointwise": own, "adaptive": adaptive}
    warm_up(logits.device, logits.shape[1], logits.dtype, rules=one, **settings)
    _built.add(about)


def _owners(call):
    """(what it is called, its device function) of every rule and edit that needs one."""
    for rule in call.rules:
        if rule.kind == "value":
            yield f"rule {getattr(rule.threshold, '__name__', rule.threshold)!r}", rule.device
    for point in call.pointwise:
        owner = getattr(point.edit, "__self__", None)
        yield (
            f"edit {getattr(owner or point.edit, 'name' if owner else '__name__', point.edit)!r}",
            point.device,
        )


def _unfused(call):
    """Why these rules and edits have no fused kernel, or None."""
    for name, device in _owners(call):
        if device is None:
            return f"{name} has no device function"
        if device in _refused:
            return f"the device function of {name} does not compile: {_refused[device]}"
    return None


def _refuse(call, error):
    """Whether an error comes from device functions of the call, which are then not asked again."""
    chain = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    if not any(type(one).__name__ in ("CompilationError", "InterpreterError") for one in chain):
        return False
    given = {device for _, device in _owners(call) if not isinstance(device, str)}
    codes = {(frame.f_code.co_filename, frame.f_code.co_name) for one in chain
             for frame, _ in traceback.walk_tb(one.__traceback__)}  # fmt: skip
    sources = {getattr(one, "src", None) for one in chain}
    named = {device for device in given if _place(device) in codes or getattr(device, "src", 0) in sources}
    reason = " ".join(f"{type(chain[-1]).__name__}: {chain[-1]}".split())
    _refused.update(dict.fromkeys(named or given, reason))
    return bool(given)


def _place(function):
    code = function.fn.__code__
    return code.co_filename, code.co_name


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
    if call.adaptive is not None and tuple(call.adaptive.shape) != (4, len(logits)):
        raise ValueError(f"adaptive of shape {tuple(call.adaptive.shape)}: expected (4, {len(logits)})")
    if not 0 <= n_top <= logits.shape[1]:
        raise ValueError(f"n_top={n_top}: expected 0 to the vocabulary size {logits.shape[1]}")
    if not isinstance(logits, torch.Tensor) or not logits.is_floating_point():
        raise ValueError(f"logits of dtype {logits.dtype}: expected float32, bfloat16 or float16")


__all__ = ["Drawn", "sample", "sample_reference"]
