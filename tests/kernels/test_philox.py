"""The noise: known words, one set of bits everywhere, the right distribution, tails included."""

import itertools
import math

import numpy as np
import torch

from handloom.kernels.noise import philox


def column(*values):
    return torch.tensor(values, dtype=torch.int64)


SEEDS = column(0, 1, 2**63 - 1, -5)
POSITIONS = column(0, 17, 2**31 + 3, 2**32 - 1)
STREAMS = column(0, 1, 2, 2**31)


def test_words_are_the_published_ones():
    """Known answers of Random123 for philox4x32-10: the zero counter and the counter and key of all ones."""
    zero = philox.philox_words_reference(column(0), column(0), column(0), torch.arange(4))
    assert zero[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = np.full((2, 1, 1), 0xFFFFFFFF, dtype=np.uint64)
    first, second = philox.philox_rounds_numpy(ones, ones, ones)
    words = [int(pair[half, 0, 0]) for half in range(2) for pair in (first, second)]
    assert words == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_numpy_has_the_bits_of_torch():
    ids = torch.cat([torch.arange(5000), column(151935, 2**31 - 1)])
    words = philox.philox_words_reference(SEEDS, POSITIONS, STREAMS, ids)
    fast = philox.philox_words_numpy(SEEDS.numpy(), POSITIONS.numpy(), STREAMS.numpy(), ids.numpy())
    assert (words.numpy() == fast).all()
    slow = philox.gumbel_reference(SEEDS, POSITIONS, STREAMS, ids)
    assert torch.equal(
        slow.view(torch.int32), philox.gumbel(SEEDS, POSITIONS, STREAMS, ids).view(torch.int32)
    )


def test_bits_are_equal_at_extreme_words():
    edges = [0, 1, 2, 3, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 129, 2**32 - 128, 2**32 - 1]
    sqrt_half = [int((1 - math.sqrt(0.5)) * 2**32) + step for step in range(-300, 300)]
    words = np.array(edges + sqrt_half, dtype=np.uint32)
    slow = philox.gumbel_from_words_reference(torch.from_numpy(words.astype(np.int64)))
    assert (slow.numpy().view(np.int32) == philox.gumbel_from_words_numpy(words).view(np.int32)).all()
    assert slow.isfinite().all()


def test_noise_is_accurate_and_within_its_bounds():
    words = np.concatenate([np.arange(4096), 2**32 - 1 - np.arange(4096), np.arange(0, 2**32, 2**18)])
    noise = philox.gumbel_from_words_numpy(words.astype(np.uint32))
    uniform = (words.astype(np.uint32) | 1).astype(np.float32).astype(np.float64) * 2.0**-32
    inside = uniform < 1
    exact = -np.log(-np.log1p(-uniform[inside]))
    assert np.abs(noise[inside] - exact).max() < 1e-6
    assert noise.min() >= philox.GUMBEL_MIN
    assert noise.max() <= philox.GUMBEL_MAX


def test_each_key_part_matters_and_nothing_else_does():
    ids = torch.arange(64)
    base = philox.gumbel(column(3), column(5), column(7), ids)
    for changed in ((4, 5, 7), (3, 6, 7), (3, 5, 8), (3 + 2**32, 5, 7)):
        other = philox.gumbel(*(column(value) for value in changed), ids)
        assert not (base == other).any(), changed
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(philox.gumbel(column(3), column(5), column(7), ids[order]), base[:, order])
    many = philox.gumbel(column(9, 3), column(1, 5), column(0, 7), ids)
    assert torch.equal(many[1], base[0])


def test_distribution_is_gumbel():
    """Kolmogorov-Smirnov over 400,000 values, fixed seed; false alarm 1e-6 (critical value 2.69 / sqrt(n))."""
    noise = (
        philox.gumbel(column(11, 12), column(0, 0), column(0, 0), torch.arange(200_000)).flatten().double()
    )
    values = noise.sort().values
    cdf = torch.exp(-torch.exp(-values))
    steps = torch.arange(1, len(values) + 1, dtype=torch.float64) / len(values)
    distance = torch.maximum((steps - cdf).abs(), (steps - 1 / len(values) - cdf).abs()).max()
    assert distance < 2.69 / math.sqrt(len(values))


def test_upper_tail_has_no_coarse_steps():
    """Above 11.3, where winners among 150,000 tokens lie, different words give different noise.

    The naive -log(-log u) from 24 bits has under 100 distinct values there, steps of 1 % and more.
    """
    words = np.arange(1, 2 * 26_000, 2, dtype=np.uint32)  # words of the largest noise
    noise = philox.gumbel_from_words_numpy(words)
    assert noise.min() > 11.3
    assert len(np.unique(noise)) > 0.99 * len(noise)


def test_positions_are_independent():
    """Correlation of the noise of neighbouring positions over 200,000 tokens; |r| < 5 / sqrt(n): false alarm 6e-7."""
    ids = torch.arange(200_000)
    first = philox.gumbel(column(5), column(100), column(0), ids)[0]
    for other in (
        philox.gumbel(column(5), column(101), column(0), ids)[0],
        philox.gumbel(column(6), column(100), column(0), ids)[0],
        first.roll(1),
    ):
        correlation = torch.corrcoef(torch.stack([first, other]))[0, 1]
        assert abs(correlation) < 5 / math.sqrt(len(ids))


def test_the_rough_logarithms_that_tell_what_can_win_err_within_their_bound():
    """`rough_log_times`, operation for operation, its approximate logarithms as wrong as the instruction set allows."""
    spread = (2.0 ** np.linspace(0, 32, 20_000)).astype(np.int64)
    words = np.unique(np.concatenate([np.arange(1, 5000), spread, 2**32 - spread]).clip(1, 2**32 - 1)).astype(
        np.uint32
    )
    exact = -philox.gumbel_from_words_numpy(words).astype(np.float64)
    u = (words | np.uint32(1)).astype(np.float32)
    error = 2.0**-22  # of lg2.approx: absolute between 1/2 and 2, else relative
    for first, second in itertools.product((-error, error), repeat=2):
        small = (u * np.float32(2.0**-33)).astype(np.float64) * u + u
        rest = (1 - u.astype(np.float64) * 2.0**-32).astype(np.float32).astype(np.float64)
        some = rest > 0  # u of 1 has the least noise, which `best_of_groups` puts in
        log = np.log2(rest[some])
        log = np.where(rest[some] > 0.5, log + first, log * (1 + first))
        times = np.log2(np.maximum(small[some], log * -2977044471.82 - 850.0)) * (1 + second)
        assert np.abs((times - 32) * math.log(2) - exact[some]).max() < 1e-4
