"""The law of the drawn tokens, from a million draws a setting, all with fixed seeds.

Draws are those of `draw_reference`, with noise made four tokens a Philox call, of rows that the rules have truncated
once; `draw_reference` must give the same tokens on the first thousand, the CPU path on the first few thousand.
Chi-square statistics are turned into normal ones (Wilson and Hilferty); a family of N tests fails falsely with
probability below N * 2e-10 at LIMIT.
"""

import math

import numpy as np
import pytest
import torch
from sampling_rows import generator

from handloom.kernels.noise import philox
from handloom.kernels.sampling import rules
from handloom.kernels.sampling.draw import draw_reference
from handloom.kernels.sampling.reference import scale, truncate
from handloom.kernels.sampling.sample import sample

LIMIT = 6.25  # standard deviations; one-sided tail of the normal law 2.1e-10
DRAWS = 1_000_000
PART = 1000
COMPARED = 4000  # draws that the CPU path repeats


def pooled(counts, expected, least=20.0):
    """Cells (count, expectation) with rare outcomes joined until each expects `least`."""
    cells, count, mass = [], 0.0, 0.0
    for index in np.argsort(expected):
        count, mass = count + counts[index], mass + expected[index]
        if mass >= least:
            cells.append((count, mass))
            count = mass = 0.0
    cells[-1] = (cells[-1][0] + count, cells[-1][1] + mass)
    return np.array(cells)


def surprise(counts, law):
    """How far counts [N] are from a law [N], in standard deviations of the chi-square statistic's normal form."""
    counts, law = np.asarray(counts, float).ravel(), np.asarray(law, float).ravel()
    if counts[law == 0].any():
        return math.inf
    cells = pooled(counts[law > 0], law[law > 0] * counts.sum())
    freedom = len(cells) - 1
    statistic = ((cells[:, 0] - cells[:, 1]) ** 2 / cells[:, 1]).sum()
    spread = 2 / (9 * freedom)
    return ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def law_of(left):
    return torch.softmax(left.double(), dim=-1).numpy()


def drawn_tokens(left, seed, count, stream=0, start=0):
    """Tokens of `count` consecutive positions of one seed, from one row of truncated logits [V], V a multiple of 4."""
    row, found = left.numpy() - left.numpy().max(), []
    most = (
        2.0**32 * np.exp(row.astype(np.float64) - philox.GUMBEL_MIN) * 1.001 + 300
    )  # words with which a token can win
    for first in range(start, start + count, PART):
        positions = np.arange(first, min(first + PART, start + count))
        keys = np.full_like(positions, seed), positions, np.full_like(positions, stream)
        found.append(winners(row, words_of_all(*keys, len(row)), most))
        if first == start:
            expected = draw_reference(left.expand(len(positions), -1), *map(torch.from_numpy, keys))
            assert (found[0] == expected.numpy()).all()
    return np.concatenate(found)


def one(value):
    return torch.tensor([float(value)])


def normal(vocab, seed):
    return torch.randn(vocab, generator=generator(seed))


# name: (row, temperature, k, p, min-p)
SETTINGS = {
    "plain": (normal(40, 1) * 2, 1.0, 0, 1.0, 0.0),
    "flat": (torch.zeros(40), 1.0, 0, 1.0, 0.0),
    "peaked": (normal(40, 2) * 2, 0.4, 0, 1.0, 0.0),
    "zipf": (-1.2 * torch.arange(1, 61).float().log(), 1.0, 0, 1.0, 0.0),
    "bfloat16, hot": ((normal(40, 3) * 3).bfloat16().float(), 1.7, 20, 1.0, 0.0),
    "everything": (normal(60, 4) * 2, 1.3, 40, 0.9, 0.02),
}


def truncated(name):
    """The row that the rules of a setting leave, and its rules."""
    row, temperature, k, p, min_p = SETTINGS[name]
    chain = (rules.top_k(one(k)), rules.top_p(one(p)), rules.min_p(one(min_p)))
    return truncate(scale(row[None], one(temperature)), chain)[0], chain


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_million_draws_follow_the_law(name):
    """False alarm 2.1e-10 a setting, below 1.3e-9 over all six."""
    left, chain = truncated(name)
    tokens = drawn_tokens(left, seed=77, count=DRAWS)
    assert surprise(np.bincount(tokens, minlength=len(left)), law_of(left)) < LIMIT
    row, temperature = SETTINGS[name][:2]
    drawn = sample(
        row.expand(COMPARED, -1),
        seeds=torch.full((COMPARED,), 77),
        positions=torch.arange(COMPARED),
        temperature=one(temperature).expand(COMPARED),
        rules=tuple(rule._replace(parameter=rule.parameter.expand(COMPARED)) for rule in chain),
        kernels="torch",
    )
    assert (drawn.tokens.numpy() == tokens[:COMPARED]).all()


def test_the_chi_square_test_sees_two_percent():
    """A law wrong by 2 % of its probabilities must fail at a million draws, or the tests above prove nothing."""
    law = law_of(truncated("plain")[0])
    wrong = law * np.where(np.arange(len(law)) % 2, 1.02, 0.98)
    counts = np.round(wrong / wrong.sum() * DRAWS)
    assert surprise(counts, law) > LIMIT
    assert surprise(np.round(law * DRAWS), law) < 0


@pytest.mark.slow
def test_log_probabilities_of_drawn_tokens_have_their_distribution():
    """Kolmogorov-Smirnov over 50,000 draws from 512 tokens; for a discrete law the critical value 3.2 / sqrt(n)
    is passed with probability below 2 exp(-2 * 3.2^2) = 2.6e-9.
    """
    count, left = 50_000, normal(512, 5) * 2.5
    law = law_of(left)
    tokens = drawn_tokens(left, seed=3, count=count)
    order = np.argsort(law, kind="stable")
    place = np.empty(len(law), int)
    place[order] = np.arange(len(law))
    empirical = np.cumsum(np.bincount(place[tokens], minlength=len(law))) / count
    assert np.abs(empirical - np.cumsum(law[order])).max() < 3.2 / math.sqrt(count)


def winners(row, words, most):
    """Tokens [B] that win with words [B, V]: noise is made of words that can win, where the row keeps a token."""
    if most.mean() > 2.0**31:
        return (row + philox.gumbel_from_words_numpy(words)).argmax(axis=1)
    values = np.full(words.shape, -np.inf, np.float32)
    able = (words < most) & (row > -np.inf)
    values[able] = np.broadcast_to(row, words.shape)[able] + philox.gumbel_from_words_numpy(words[able])
    return values.argmax(axis=1)


def words_of_all(seeds, positions, streams, vocab):
    """Philox words [B, V] of the first V tokens, V a multiple of 4: four tokens a Philox call."""
    counters = np.arange(vocab // 4, dtype=np.uint64)[None]
    even, odd = philox.philox_lanes_numpy(seeds, positions, streams, counters)
    words = np.stack([even[0], odd[0], even[1], odd[1]], axis=-1).reshape(len(seeds), vocab)
    return words.astype(np.uint32)


# Independence: pairs of tokens have the product law


def pair_surprise(first, second, law):
    """Surprise of pairs of tokens under the product of their law with itself."""
    vocab = len(law)
    counts = np.bincount(first * vocab + second, minlength=vocab * vocab)
    return surprise(counts, np.outer(law, law))


@pytest.fixture(scope="module")
def stream_of_tokens():
    left = normal(12, 6)
    return left, drawn_tokens(left, seed=11, count=DRAWS)


@pytest.mark.slow
@pytest.mark.parametrize("lag", [1, 2, 4, 16, 4096])
def test_positions_are_independent(stream_of_tokens, lag):
    """Disjoint pairs (t, t + lag) of a million positions; false alarm 2.1e-10 each."""
    left, tokens = stream_of_tokens
    blocks = tokens[: len(tokens) // (2 * lag) * 2 * lag].reshape(-1, 2, lag)
    assert pair_surprise(blocks[:, 0].ravel(), blocks[:, 1].ravel(), law_of(left)) < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "stream"), [(12, 0), (11 + 2**32, 0), (11 ^ 2**62, 0), (11, 1), (11, 2**31)]
)
def test_seeds_and_streams_are_independent(stream_of_tokens, seed, stream):
    """Neighbouring seeds, seeds that differ in one high bit, and streams, at 300,000 equal positions; 2.1e-10 each."""
    left, tokens = stream_of_tokens
    count = 300_000
    others = drawn_tokens(left, seed, count, stream)
    assert pair_surprise(tokens[:count], others, law_of(left)) < LIMIT


@pytest.mark.slow
def test_rows_of_a_batch_are_independent():
    """Rows of consecutive seeds at one position, as in a batch: pairs of neighbours of 300,000 rows; 2.1e-10."""
    left, count = normal(12, 6), 300_000
    found = []
    for start in range(0, count, PART):
        seeds = torch.arange(start, start + PART)
        found.append(draw_reference(left.expand(PART, -1), seeds, torch.full_like(seeds, 40)))
    pairs = torch.cat(found).numpy().reshape(-1, 2)
    law = law_of(left)
    assert pair_surprise(pairs[:, 0], pairs[:, 1], law) < LIMIT
    assert surprise(np.bincount(pairs.ravel(), minlength=len(law)), law) < LIMIT


def test_the_pair_test_sees_a_dependence():
    """If one pair in 50 repeated its first token, the pair test would fail."""
    left = normal(12, 6)
    law = law_of(left)
    pairs = np.outer(law, law) * 0.98 + np.diag(law) * 0.02
    counts = np.round(pairs * DRAWS / 2)
    first, second = np.divmod(np.repeat(np.arange(144), counts.ravel().astype(int)), 12)
    assert pair_surprise(first, second, law) > LIMIT


# Rare tokens


def coarse_gumbel(words):
    """The naive noise: -log(-log u) with u of 24 bits, u = 0 avoided; its largest value is 16.6.

    Mirrored, so that it wins with the same words as ours.
    """
    uniform = 1.0 - ((words >> np.uint32(8)).astype(np.float64) + 1) * 2.0**-24
    return -np.log(-np.log(np.maximum(uniform, 2.0**-24)))


def chance(noise, probability):
    """How often a token of this probability wins against one that has all the rest, over all pairs of words.

    The other's noise takes 2**16 words in even steps; against each of them the token wins with the words below some
    limit, as noise falls with its word, and bisection over all 2**32 finds it.
    """
    logit = np.float32(math.log(probability / (1 - probability)))
    rival = noise((np.arange(2**16, dtype=np.uint32) << np.uint32(16)) + np.uint32(2**15))
    least, most = np.zeros(2**16, np.uint64), np.full(2**16, 2**32, np.uint64)
    while (least < most).any():
        word = (least + most) >> np.uint64(1)
        wins = (word < 2**32) & (logit + noise(word.astype(np.uint32)) > rival)
        least, most = np.where(wins & (least < most), word + np.uint64(1), least), np.where(wins, most, word)
    return least.mean() / 2.0**32


def test_rare_tokens_keep_their_probability_and_coarse_noise_would_not():
    """Over every word, not a sample: to 1e-4 of itself down to 1.8e-8, to 1 % at 1e-9, where some four words win.

    Noise from 24 bits has no values beyond 16.6: at 1.8e-8 it loses seven of eight wins, and must fail.
    """
    ours = philox.gumbel_from_words_numpy
    for probability, margin in ((1e-3, 1e-4), (1e-5, 1e-4), (1e-6, 1e-4), (1.8e-8, 1e-4), (1e-9, 1e-2)):
        assert abs(chance(ours, probability) / probability - 1) < margin, probability
    assert chance(coarse_gumbel, 1.8e-8) < 0.15 * 1.8e-8
    assert abs(chance(coarse_gumbel, 1e-5) / 1e-5 - 1) < 0.01  # the control differs in the tail alone


RARE = np.repeat([1e-5, 1e-6], 4)  # probabilities of tokens 4 to 11; token 0 has the rest
RARE_DRAWS = 10_000_000  # 8e7 pairs of a draw and a rare token


def rare_hits():
    """Wins of each rare token among the draws.

    A rare token can win only against noise of at least GUMBEL_MIN, thus only with a small word; all 8e7 words
    are made, and draws in which none is small go to token 0 without a look at the logarithms.
    """
    row = torch.full((4 + len(RARE),), -torch.inf)
    row[0] = 0.0
    row[4:] = torch.from_numpy(np.log(RARE / (1 - RARE.sum())))
    limits = 2.0**32 * np.exp(row[4:].numpy() - philox.GUMBEL_MIN) * 1.001 + 300
    lanes = limits.astype(np.uint64).reshape(-1, 4).T
    counters = np.arange(1, 1 + len(RARE) // 4, dtype=np.uint64)[None]
    size, close = 5000, []
    seeds, streams = np.full(size, 2026), np.zeros(size, np.int64)
    for start in range(0, RARE_DRAWS, size):
        positions = np.arange(start, start + size)
        even, odd = philox.philox_lanes_numpy(seeds, positions, streams, counters)
        small = (even[0] < lanes[0]) | (odd[0] < lanes[1]) | (even[1] < lanes[2]) | (odd[1] < lanes[3])
        close.append(positions[small.any(axis=1)])
    hits = np.zeros(len(row))
    for positions in torch.from_numpy(np.concatenate(close)).split(5000):
        tokens = draw_reference(row.expand(len(positions), -1), torch.full_like(positions, 2026), positions)
        hits += np.bincount(tokens.numpy(), minlength=len(row))
    return hits[4:]


@pytest.mark.slow
def test_rare_tokens_are_drawn_as_often_as_they_should():
    """4e7 trials at 1e-5 (400 hits expected) and at 1e-6 (40).

    Limits: 6 standard deviations (false alarm 2e-9), and 10 ... 80 hits, which Poisson(40) misses with 1e-8.
    """
    hits = rare_hits()
    assert abs(hits[RARE == 1e-5].sum() - 400) < 6 * math.sqrt(400)
    assert 10 < hits[RARE == 1e-6].sum() < 80
