"""Best of n: several samples of each prompt, which is prefilled once; the one that scores highest is kept."""

from __future__ import annotations

from collections.abc import Callable

from ...errors import ParameterError
from ...loop.generation import Generation
from ...params.sampling_params import SamplingParams


def best_of_n(
    engine,
    prompts,
    params=None,
    *,
    n: int = 8,
    reward: Callable[[str], float] | None = None,
    score: Callable[[Generation], float] | None = None,
    **overrides,
) -> list[Generation]:
    """The best of n samples of each prompt, which is prefilled once; a token costs one pass of n rows for each.

    Args:
        prompts, params, overrides: as for `Engine.generate`, with temperature > 0.
        n: samples a prompt, >= 1, each on its own noise stream.
        reward: text -> float, the higher the better.
        score: Generation -> float, where text is not enough. Default: the cumulative log-probability.

    Returns:
        One Generation for each prompt, in order; the earliest sample on ties. Samples that failed are only
        chosen if all did.
    """
    if reward is not None and score is not None:
        raise ParameterError("best_of_n takes reward (of the text) or score (of the Generation), not both")
    listed = params if isinstance(params, (list, tuple)) else [params or SamplingParams()]
    if any(each.replace(**overrides).greedy for each in listed):
        raise ParameterError("best_of_n needs temperature > 0: greedy samples are all alike")
    if reward is not None:
        score = lambda generation: reward(generation.text)  # noqa: E731
    elif score is None:
        score = lambda generation: generation.cumulative_logprob  # noqa: E731
    samples = engine.generate(prompts, params, n=n, **overrides)
    best = {}
    for sample in [samples] if isinstance(samples, Generation) else samples:
        value = float("-inf") if sample.finish_reason == "error" else score(sample)
        if sample.request not in best or value > best[sample.request][0]:
            best[sample.request] = value, sample
    return [best[request][1] for request in sorted(best)]
