"""Detection: how much of a mark a text holds, and how probable that is without one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import ParameterError


@dataclass(frozen=True)
class Detection:
    """What a detector found.

    score: hits, or a sum of scores. count: places that were looked at. z: deviations above what unmarked text has.
    p_value: probability of at least this score in unmarked text, for a key that has nothing to do with it.
    """

    score: float
    count: int
    z: float
    p_value: float


def of_hits(hits: int, count: int, rate: float) -> Detection:
    """A Detection from independent hits of a known rate: exact binomial tail."""
    deviation = math.sqrt(count * rate * (1 - rate))
    z = (hits - count * rate) / deviation if count else 0.0
    return Detection(hits, count, z, binomial_tail(hits, count, rate))


def binomial_tail(hits: int, count: int, rate: float) -> float:
    """P(X >= hits) of X ~ Binomial(count, rate)."""
    if hits <= 0:
        return 1.0
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        + k * math.log(rate) + (count - k) * math.log1p(-rate)
        for k in range(hits, count + 1)
    ]  # fmt: skip
    top = max(logs, default=-math.inf)
    return min(1.0, math.exp(top) * math.fsum(math.exp(x - top) for x in logs)) if logs else 0.0


def hypergeometric_tail(hits: int, count: int, green: int, total: int) -> float:
    """P(X >= hits) when `count` of `total` tokens are drawn without replacement, `green` of them green."""
    ways = sum(
        math.comb(green, k) * math.comb(total - green, count - k)
        for k in range(max(hits, 0), min(count, green) + 1)
    )
    return ways / math.comb(total, count)


def windows(tokens: Sequence[int], width: int) -> list[tuple[int, ...]]:
    """The distinct runs of `width` tokens, in order of their first occurrence."""
    ids = [int(token) for token in getattr(tokens, "token_ids", tokens)]
    if width < 1:
        raise ParameterError(f"a window has at least one token, got {width}")
    return list(dict.fromkeys(tuple(ids[i : i + width]) for i in range(len(ids) - width + 1)))
