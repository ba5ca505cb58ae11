"""Intervals and tests for paired comparisons: every figure that is reported has one of them beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

RESAMPLES = 4000
# A resample's standard error counts as at least this share of the sample's own: where most differences are zero and two
# are not, a resample without the two would put an end of the interval at any distance.
SPREAD = 0.2


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Args:
        value: the estimate. low, high: ends of the interval; NaN where `n` is too small for one.
        n: independent observations. level: confidence in (0, 1).
    """

    value: float
    low: float
    high: float
    n: int
    level: float = 0.95

    def __str__(self) -> str:
        if math.isnan(self.low):
            return f"{self.value:.4g} (n={self.n})"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}] (n={self.n})"

    def times(self, factor: float) -> Interval:
        """The estimate and its interval, multiplied by a number > 0."""
        return replace(self, value=self.value * factor, low=self.low * factor, high=self.high * factor)


def share_interval(successes: int, n: int, level: float = 0.95) -> Interval:
    """A share of independent outcomes with Wilson's interval (1927).

    Args:
        successes: 0..n. n: outcomes, at least 1. level: confidence in (0, 1).
    """
    share, z = successes / n, NormalDist().inv_cdf((1 + level) / 2)
    centre, width = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((centre + side) / (1 + z * z / n) for side in (-width, width))
    return Interval(share, low, high, n, level)


def mean_interval(values: Sequence[float], level: float = 0.95, seed: int = 0) -> Interval:
    """The mean of independent observations with a studentised bootstrap interval.

    Resampled means are divided by their own standard errors, which covers as promised from about ten observations on
    where the plain percentile interval is too narrow (Efron and Tibshirani 1993, chapter 12).

    Args:
        values: one number an independent unit (a prompt), at least one. level: confidence in (0, 1).
        seed: of the resampling.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not len(sample):
        raise ValueError(f"expected at least one number, got shape {sample.shape}")
    if not np.isfinite(sample).all():
        raise ValueError(f"expected finite numbers, got {sample[~np.isfinite(sample)][0]}")
    n, mean = len(sample), float(sample.mean())
    if n < 2:
        return Interval(mean, math.nan, math.nan, n, level)
    error = float(sample.std(ddof=1)) / math.sqrt(n)
    if error <= 1e-15 * max(1.0, abs(mean)):
        return Interval(mean, mean, mean, n, level)
    drawn = sample[np.random.default_rng(seed).integers(0, n, (RESAMPLES, n))]  # [R, n]
    errors = np.maximum(drawn.std(axis=1, ddof=1) / math.sqrt(n), SPREAD * error)
    pivots = (drawn.mean(axis=1) - mean) / errors
    low, high = np.quantile(pivots, ((1 - level) / 2, (1 + level) / 2))
    return Interval(mean, mean - float(high) * error, mean - float(low) * error, n, level)


def paired_difference(
    first: Mapping[str, Sequence[float]],
    second: Mapping[str, Sequence[float]],
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean of `second - first` over the units that both have, each unit being the mean of its observations.

    Args:
        first, second: unit (a prompt) -> observations (its samples); units that one of them lacks are left out.

    Raises:
        ValueError: they share no unit.
    """
    shared = [unit for unit in first if len(first[unit]) and len(second.get(unit, ()))]
    if not shared:
        raise ValueError("nothing to compare: the two sides share no prompt")
    return mean_interval([float(np.mean(second[u]) - np.mean(first[u])) for u in shared], level, seed)


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> float:
    """Two-sided exact p-value that two paired sequences of outcomes succeed equally often (McNemar 1947).

    Args:
        first, second: outcomes of the same units in the same order.
    """
    if len(first) != len(second):
        raise ValueError(f"paired outcomes need equal lengths, got {len(first)} and {len(second)}")
    only_first = sum(a and not b for a, b in zip(first, second, strict=True))
    only_second = sum(b and not a for a, b in zip(first, second, strict=True))
    return sign_test(only_first, only_second)


def sign_test(ups: int, downs: int) -> float:
    """Two-sided exact p-value that two outcomes are equally probable, from how often each was seen."""
    n, fewer = ups + downs, min(ups, downs)
    tail = sum(math.comb(n, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**n)


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased probability that one of `k` samples is correct, from `correct` of `n` (arXiv 2107.03374).

    Args:
        n: samples that were drawn. correct: of them, 0..n. k: 1..n.
    """
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@{k} needs 1 <= k <= n and 0 <= correct <= n, got n={n}, correct={correct}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_at_k(answers: Sequence, target, k: int) -> float:
    """Probability that the most frequent of `k` samples' answers is `target`, over all choices of k of n; exact.

    Ties are won in proportion. An answer of None counts as no vote.

    Args:
        answers: one a sample, hashable. target: the right one. k: 1..n.
    """
    n = len(answers)
    if not 1 <= k <= n:
        raise ValueError(f"majority@{k} needs 1 <= k <= {n} samples")
    counts: dict = {}
    for answer in answers:
        counts[answer] = counts.get(answer, 0) + 1
    right, silent = counts.pop(target, 0), counts.pop(None, 0)
    return _majority(right, silent, list(counts.values()), k) / math.comb(n, k)


def _majority(right: int, silent: int, others: list[int], k: int) -> float:
    """Number of k-subsets that the target wins; a tie of t answers counts 1 / t."""
    won = 0.0
    for votes in range(1, min(right, k) + 1):
        # ways[tied][used]: choices among the other answers with at most `votes` each, `tied` of them with as many.
        ways = {(0, 0): 1}
        for count in others:
            following: dict[tuple[int, int], int] = {}
            for (tied, used), number in ways.items():
                for taken in range(min(count, votes, k - votes - used) + 1):
                    key = tied + (taken == votes), used + taken
                    following[key] = following.get(key, 0) + number * math.comb(count, taken)
            ways = following
        for (tied, used), number in ways.items():
            rest = k - votes - used
            if 0 <= rest <= silent:
                won += math.comb(right, votes) * number * math.comb(silent, rest) / (1 + tied)
    return won
