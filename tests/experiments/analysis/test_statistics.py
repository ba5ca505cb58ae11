"""Intervals cover as they promise; tests and unbiased estimators agree with enumeration."""

import itertools
import math

import numpy as np
import pytest

from handloom.experiments.analysis.statistics import (
    majority_at_k,
    mcnemar,
    mean_interval,
    paired_difference,
    pass_at_k,
    share_interval,
)


@pytest.mark.slow
def test_intervals_cover_as_they_promise():
    """2,000 experiments with a known difference; 95 % intervals cover 93 to 97 %.

    The share of 2,000 at a true 95 % is outside 93.5 to 96.5 % with probability 0.002; the seed is fixed.
    """
    rng, truth, covered = np.random.default_rng(5), 0.3, 0
    for trial in range(2000):
        prompts = rng.normal(size=25)  # what is hard about a prompt is shared by both sides
        first = {str(i): list(p + 0.5 * rng.normal(size=4)) for i, p in enumerate(prompts)}
        second = {
            str(i): list(p + truth + 0.5 * rng.standard_exponential(4) - 0.5) for i, p in enumerate(prompts)
        }
        found = paired_difference(first, second, seed=trial)
        covered += found.low <= truth <= found.high
    assert 0.93 <= covered / 2000 <= 0.97


def test_shared_noise_narrows_a_paired_interval():
    rng = np.random.default_rng(0)
    common = {str(i): [v] for i, v in enumerate(rng.normal(size=40))}
    shifted = {u: [v[0] + 0.1 + 0.05 * rng.normal()] for u, v in common.items()}
    alone = {str(i): [v] for i, v in enumerate(rng.normal(size=40) + 0.1)}
    paired, independent = paired_difference(common, shifted), paired_difference(common, alone)
    assert (paired.high - paired.low) * 2 < independent.high - independent.low
    assert paired.low > 0 > independent.low


def test_a_side_compared_with_itself_is_exactly_zero():
    side = {"a": [1.25, 3.0], "b": [0.1]}
    found = paired_difference(side, side)
    assert (found.value, found.low, found.high, found.n) == (0.0, 0.0, 0.0, 2)


def test_few_differences_among_zeros_do_not_blow_an_interval_up():
    values = [0.0] * 14 + [-0.001, -1.0]
    found = mean_interval(values)
    error = np.std(values, ddof=1) / math.sqrt(16)
    assert found.low < found.value - 2 * error
    assert found.high > found.value + error
    assert found.high - found.low < 10 * error


def test_what_cannot_be_estimated_says_so():
    assert math.isnan(mean_interval([2.0]).low)
    assert str(mean_interval([2.0])) == "2 (n=1)"
    with pytest.raises(ValueError, match="share no prompt"):
        paired_difference({"a": [1.0]}, {"b": [1.0]})
    with pytest.raises(ValueError, match="finite numbers, got nan"):
        mean_interval([1.0, math.nan])
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


def test_mcnemar_is_the_exact_binomial_test():
    from scipy.stats import binomtest

    rng = np.random.default_rng(3)
    for _ in range(20):
        a, b = rng.random(30) < 0.5, rng.random(30) < 0.7
        discordant, fewer = int((a != b).sum()), int(min((a & ~b).sum(), (b & ~a).sum()))
        expected = binomtest(fewer, discordant, 0.5).pvalue if discordant else 1.0
        assert mcnemar(a.tolist(), b.tolist()) == pytest.approx(expected)
    with pytest.raises(ValueError, match="equal lengths, got 1 and 2"):
        mcnemar([True], [True, False])


def test_shares_have_wilson_intervals():
    from scipy.stats import binomtest

    for right, n in ((0, 10), (3, 10), (80, 80)):
        wanted = binomtest(right, n).proportion_ci(method="wilson")
        found = share_interval(right, n)
        assert (found.low, found.high) == (pytest.approx(wanted.low, abs=1e-9), pytest.approx(wanted.high))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_choices_with_a_success(k):
    outcomes = [True, False, False, True, False]
    choices = list(itertools.combinations(outcomes, k))
    assert pass_at_k(5, 2, k) == pytest.approx(sum(map(any, choices)) / len(choices))
    with pytest.raises(ValueError, match=r"pass@6 needs 1 <= k <= n.*n=5"):
        pass_at_k(5, 2, 6)


@pytest.mark.parametrize("answers", ["aabbc", "abcde", "aaaab", "bbbcc", "aab--", "-----", "aabbcc-d"])
def test_majority_at_k_is_the_share_of_choices_that_the_target_wins(answers):
    given = [None if letter == "-" else letter for letter in answers]
    for k in range(1, len(given) + 1):
        won = []
        for choice in itertools.combinations(given, k):
            votes = {a: choice.count(a) for a in choice if a is not None}
            best = [a for a, n in votes.items() if n == max(votes.values())]
            won.append(("a" in best) / len(best) if best else 0.0)
        assert majority_at_k(given, "a", k) == pytest.approx(np.mean(won)), k
