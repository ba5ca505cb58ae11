"""Adaptive weighted rejection sampling (AWRS, arXiv 2504.05410): constraints that are checked token by token."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ...errors import ParameterError
from ...kernels.noise.philox import gumbel
from ...loop.generation import Generation
from .smc import Proposal, smc


def weighted_rejection(
    engine, prompts, params=None, *, allowed: Callable[[list[int], int], bool], n=16, checks=1, **options
) -> list[Generation]:
    """n weighted samples a prompt of p, given that every token is allowed; see `smc`.

    Tokens are drawn without replacement until one is allowed, so that only few are checked; its weight is an unbiased
    estimate of the allowed mass, made of these draws and `checks` more (Des Raj's, one of the unbiased ones). A token
    costs one pass of at most n rows for each prompt.

    Args:
        prompts, params, options: as for `smc`.
        allowed: (output ids, token) -> whether the token may come next.
        n: particles a prompt. checks: draws beyond the first allowed one, >= 0; 0 leaves the weight biased low, at
            the allowed token's own probability.
    """
    if checks < 1:
        raise ParameterError(f"weighted rejection takes checks >= 1, got {checks}")
    return smc(engine, prompts, params, n=n, proposal=rejecting(allowed, checks), **options)


def rejecting(allowed: Callable[[list[int], int], bool], checks: int) -> Proposal:
    """Proposal and weights of `weighted_rejection`."""

    def propose(logprobs, texts, keys):
        ids = torch.arange(logprobs.shape[1], device=logprobs.device)
        order = (logprobs + gumbel(keys.seeds, keys.positions, keys.streams, ids)).argsort(
            -1, descending=True
        )
        chosen, weights = [], []
        for text, ranked, law in zip(texts, order.tolist(), logprobs.exp().tolist(), strict=True):
            token, weight = first_allowed(ranked, law, lambda v, text=text: allowed(text, v), checks)
            chosen.append(token)
            weights.append(weight)
        return torch.tensor(chosen, device=order.device), torch.tensor(weights, device=order.device).log()

    return propose


def first_allowed(ranked: list[int], law: list[float], allowed: Callable[[int], bool], checks: int):
    """The first allowed token of draws without replacement, and an unbiased estimate of the allowed mass.

    Behind seen tokens, the draw i estimates it by (allowed mass seen) + (mass unseen) [i is allowed]; each estimate's
    mean is right whatever came before, so it may begin behind the first allowed token.
    """
    good = seen = 0.0
    chosen, estimates = -1, []
    for token in ranked:
        if law[token] == 0:
            break
        fine = allowed(token)
        if chosen >= 0:
            estimates.append(good + fine * (1 - seen))
        elif fine:
            chosen = token
        good, seen = good + fine * law[token], seen + law[token]
        if len(estimates) == checks:
            break
    if chosen < 0:
        return -1, 0.0
    return chosen, math.fsum(estimates) / len(estimates) if estimates else good
