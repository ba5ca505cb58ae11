"""Particles: weighted samples, their effective number, and which of them go on."""

from __future__ import annotations

import math
from collections.abc import Sequence


def normalised(log_weights: Sequence[float]) -> list[float]:
    """Weights that sum to 1; equal ones where all are 0 (-inf)."""
    top = max(log_weights)
    if top == -math.inf:
        return [1 / len(log_weights)] * len(log_weights)
    weights = [math.exp(w - top) for w in log_weights]
    total = math.fsum(weights)
    return [w / total for w in weights]


def log_mean(log_weights: Sequence[float]) -> float:
    """Logarithm of the mean weight; -inf where all are 0."""
    top = max(log_weights)
    if top == -math.inf:
        return -math.inf
    return top + math.log(math.fsum(math.exp(w - top) for w in log_weights) / len(log_weights))


def effective(log_weights: Sequence[float]) -> float:
    """Effective sample size, 1 / sum of squared weights: from 1 to their number."""
    return 1 / math.fsum(w * w for w in normalised(log_weights))


def systematic(weights: Sequence[float], u: float) -> list[int]:
    """Systematic resampling: how often each one comes differs from weight * number by less than 1.

    Args:
        weights: that sum to 1. u: uniform in [0, 1).

    Returns:
        As many indices, ascending.
    """
    count, picked, reached, index = len(weights), [], weights[0], 0
    for i in range(count):
        while (i + u) / count >= reached and index < count - 1:
            index += 1
            reached += weights[index]
        picked.append(index)
    return picked
