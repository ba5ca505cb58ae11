"""Minimum Bayes risk decoding (arXiv 2005.10283, 2108.04718): the sample that agrees most with all samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from ...errors import ParameterError
from ...loop.generation import Generation


def bayes_risk(
    engine, prompts, params=None, *, n=16, utility: Callable[[Generation, Generation], float] | None = None, **overrides
) -> list[Generation]:  # fmt: skip
    """argmax over the samples h of the mean of utility(h, r) over the samples r, h itself included.

    A token costs one pass of n rows for each prompt, which is prefilled once; and there are n * n utilities.

    Args:
        prompts, params, overrides: as for `Engine.generate`, with temperature > 0.
        n: samples a prompt, >= 1.
        utility: (hypothesis, reference) -> the higher the better, such as BLEU or COMET of their texts; None: the F1
            of their tokens.

    Returns:
        One Generation for each prompt, the earliest sample on ties; `extra["utility"]`: its mean.
    """
    asked = engine.requests(prompts, params, n=n, **overrides)
    if any(request.params.greedy for request in asked) and n > 1:
        raise ParameterError("minimum Bayes risk needs temperature > 0: greedy samples are all alike")
    gain = token_f1 if utility is None else utility
    samples = engine.generate(prompts, params, n=n, **overrides)
    groups: dict[int, list[Generation]] = {}
    for sample in [samples] if isinstance(samples, Generation) else samples:
        groups.setdefault(sample.request, []).append(sample)
    results = []
    for group in groups.values():
        usable = [sample for sample in group if sample.finish_reason != "error"] or group
        for sample in usable:
            sample.extra["utility"] = sum(gain(sample, other) for other in usable) / len(usable)
        results.append(max(usable, key=lambda sample: sample.extra["utility"]))
    return results


def token_f1(one: Generation, other: Generation) -> float:
    """Harmonic mean of precision and recall of the tokens of two texts, in any order; 1 if both are empty."""
    common = (Counter(one.token_ids) & Counter(other.token_ids)).total()
    return 2 * common / (one.n_new + other.n_new) if one.n_new + other.n_new else 1.0
