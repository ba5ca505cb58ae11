"""Adaptive contrastive search (arXiv 2407.18698): k and alpha follow the model's uncertainty."""

from __future__ import annotations

import math
from statistics import median

import torch
from torch import Tensor

from ...errors import ParameterError
from ...loop.generation import Generation
from ..kit.decode import decode
from .contrastive import Contrast

MOST, LEAST = 15, 5  # candidates of the paper


def adaptive_contrastive_search(
    engine, prompts, params=None, *, q=1.0, stream=False, **options
) -> list[Generation]:
    """Contrastive search with k_t = 10 sigmoid(d_t) + 5 and alpha_t = sigmoid(d'_t).

    d_t = q artanh((H_t - median of H before t) / ln V) with H_t the entropy of the pipeline's distribution; d'_t is
    the same for its k_t best tokens, renormalised, and ln k_t. At the first token both are 0. (The authors' code, which
    is this otherwise, rounds alpha_t to two decimals.) A token costs one pass of 15 rows for each prompt.

    Args:
        prompts, params, options: as for `decode`.
        q: the paper's temperature, > 0: how strongly they follow.

    Returns:
        One Generation for each prompt, with the `extra` "k" and "alpha" of every token.
    """
    if q <= 0:
        raise ParameterError(f"adaptive contrastive search takes q > 0, got {q}")
    seen: dict = {}  # request -> the entropies of its steps, of all tokens and of the best

    def settings(now, best: Tensor):
        vocabulary, counts, weights = math.log(now.logits.shape[1]), [], []
        for request, law, top in zip(now.live, now.logprobs, best, strict=True):
            whole, few = seen.setdefault(request, ([], []))
            k = min(max(round(10 * sigmoid(shift(entropy(law), whole, vocabulary, q)) + 5), LEAST), MOST)
            alpha = sigmoid(shift(entropy(top[:k].log_softmax(-1)), few, math.log(k), q))
            counts.append(k)
            weights.append(alpha)
            request.extra.setdefault("k", []).append(k)
            request.extra.setdefault("alpha", []).append(alpha)
        return torch.tensor(counts, device=best.device)[:, None], torch.tensor(weights, device=best.device)[
            :, None
        ]

    search = Contrast(MOST, settings)
    return decode(engine, prompts, params, step=search, hidden=True, stream=stream, **options)


def entropy(logprobs: Tensor) -> float:
    """Entropy in nats of log-probabilities `[V]`; excluded tokens count nothing."""
    return float(-(logprobs.exp() * logprobs.clamp(min=-1e4)).sum())


def shift(now: float, before: list[float], largest: float, q: float) -> float:
    """q artanh of how far an entropy is from the median of those before it; it joins them."""
    away = (now - median(before)) / largest if before else 0.0
    before.append(now)
    return q * math.atanh(min(max(away, -1 + 1e-6), 1 - 1e-6))


def sigmoid(x: float) -> float:
    """1 / (1 + e^-x)."""
    return 1 / (1 + math.exp(-x))
