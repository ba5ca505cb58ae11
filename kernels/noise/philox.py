"""Counter-based noise: Philox4x32-10 words and exact Gumbel noise, the same bits in torch, NumPy and Triton.

The noise of a token depends on nothing but (seed, position, stream, token id). Philox's key is the seed (low
and high 32 bits), its counter is (token id // 4, position, stream, 0), and the token takes output word token
id % 4.

A word w becomes u = f32(w | 1) * 2**-32 in (0, 1], then E = -log1p(-u) (exponential) and g = -log(E)
(Gumbel). The small end of u is the winning tail, where floats are dense, so rare tokens keep their
probability (the naive -log(-log u) has steps of 1.7 % at g = 12). The logarithm is the Cephes polynomial in
float32 multiplications, additions, subtractions and integer operations alone, all of which IEEE 754 defines
to the last bit. Hence g lies in [GUMBEL_MIN, GUMBEL_MAX].

Sources: Philox, Salmon et al., SC 2011 (Random123); Gumbel-max, arXiv 1411.0030; logf and expf, Cephes
mathematical library.
"""

import numpy as np
import torch

WORD_MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

GUMBEL_MIN = -4.48  # u rounded to 1: probability 2**-25
GUMBEL_MAX = 22.19  # u = 2**-32

SQRT_HALF_BITS = 0x3F3504F3
LOG_POLYNOMIAL = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
LN2_HIGH = 0.693359375
LN2_LOW = -2.12194440e-4
EXP_POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)


def philox_words_reference(seeds, positions, streams, token_ids):
    """Philox words in torch; this function defines the noise.

    Args:
        seeds: int64 [B], any value; only its 64 bits count.
        positions: int64 [B], absolute position of the token to draw, taken modulo 2**32.
        streams: int64 [B], taken modulo 2**32.
        token_ids: int64 [B, K] or [K], each in [0, 2**34).

    Returns:
        int64 [B, K], each in [0, 2**32).
    """
    keys = [(seeds & WORD_MASK)[:, None], ((seeds >> 32) & WORD_MASK)[:, None]]
    counter = torch.atleast_2d(token_ids) >> 2
    words = [
        counter,
        (positions & WORD_MASK)[:, None],
        (streams & WORD_MASK)[:, None],
        torch.zeros_like(counter),
    ]
    for _ in range(ROUNDS):
        first, second = words[0] * MULTIPLIERS[0], words[2] * MULTIPLIERS[1]  # wraps; the 64 bits are right
        words = [
            ((second >> 32) & WORD_MASK) ^ words[1] ^ keys[0],
            second & WORD_MASK,
            ((first >> 32) & WORD_MASK) ^ words[3] ^ keys[1],
            first & WORD_MASK,
        ]
        keys = [(key + step) & WORD_MASK for key, step in zip(keys, KEY_STEPS, strict=True)]
    lane = (token_ids & 3).expand(words[0].shape)
    return torch.stack(words, dim=-1).gather(-1, lane[..., None])[..., 0]


def gumbel_from_words_reference(words):
    """Gumbel noise of Philox words in torch: words int64 [...] in [0, 2**32) -> float32 [...]."""
    uniform = (words | 1).to(torch.float32) * 2.0**-32
    return -log_reference(-log_reference(1.0 - uniform, minus=uniform))


def log_reference(x, minus=None):
    """Cephes logf of float32 x >= 0; with `minus`, x is 1 - minus and is never rounded where that matters."""
    bits = x.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    fraction = (bits - (exponent << 23)).view(torch.float32) - 1.0
    if minus is not None:
        fraction = torch.where(exponent == 0, -minus, fraction)
    square = fraction * fraction
    value = fraction * LOG_POLYNOMIAL[0]
    for coefficient in LOG_POLYNOMIAL[1:-1]:
        value = (value + coefficient) * fraction
    value = (value + LOG_POLYNOMIAL[-1]) * fraction * square
    exponent = exponent.to(torch.float32)
    value = value + exponent * LN2_LOW
    value = value - square * 0.5
    return (fraction + value) + exponent * LN2_HIGH


def exp_reference(x):
    """Cephes expf of float32 x, cut to [-87, 88]: products and sums alone, so the same bits everywhere."""
    x = x.clamp(-87.0, 88.0)
    power = (x * 1.44269504).add_(0.5).floor_()
    x = (x - power * LN2_HIGH).sub_(power * LN2_LOW)
    value = x * EXP_POLYNOMIAL[0]
    for coefficient in EXP_POLYNOMIAL[1:-1]:
        value.add_(coefficient).mul_(x)
    value.add_(EXP_POLYNOMIAL[-1]).mul_(x * x).add_(x).add_(1.0)
    return value.mul_(power.to(torch.int32).add_(127).bitwise_left_shift_(23).view(torch.float32))


def gumbel_reference(seeds, positions, streams, token_ids):
    """Gumbel noise in torch on any device; arguments as `philox_words_reference`, returns float32 [B, K]."""
    return gumbel_from_words_reference(philox_words_reference(seeds, positions, streams, token_ids))


def philox_lanes_numpy(seeds, positions, streams, counters):
    """All four words of each counter: seeds, positions, streams int64 [B], counters uint64 [B or 1, C].

    Returns (words 0 and 2, words 1 and 3), each uint64 [2, B, C]; word i is that of token 4 * counter + i.
    """
    first = np.empty((2, len(seeds), counters.shape[1]), dtype=np.uint64)
    first[0] = counters
    first[1] = streams.view(np.uint64)[:, None] & WORD_MASK
    second = np.zeros((2, len(seeds), 1), dtype=np.uint64)
    second[0] = positions.view(np.uint64)[:, None] & WORD_MASK
    seeds = seeds.view(np.uint64)[:, None]
    return philox_rounds_numpy(first, second, np.stack([seeds & WORD_MASK, seeds >> 32]))


def philox_range_numpy(seeds, positions, streams, start, count):
    """Words of one row's tokens from `start` on, a multiple of 4: int64 [1] x 3 -> uint32 [count], in order."""
    counters = np.arange(start // 4, (start + count + 3) // 4, dtype=np.uint64)[None]
    even, odd = philox_lanes_numpy(seeds, positions, streams, counters)
    words = np.empty((counters.shape[1], 4), dtype=np.uint32)
    for lane, each in enumerate((even[0, 0], odd[0, 0], even[1, 0], odd[1, 0])):
        words[:, lane] = each
    return words.reshape(-1)[:count]


def philox_rounds_numpy(first, second, key):
    """Ten rounds: counter words (0, 2) and (1, 3) uint64 [2, B, C], key words uint64 [2, B, 1] -> the same pairs.

    The two halves of a round are alike, so each operation serves both.
    """
    for keys in (key + _KEY_STEPS) & WORD_MASK:
        products = first * _MULTIPLIERS
        first, second = (products >> 32)[::-1] ^ (second ^ keys), (products & WORD_MASK)[::-1]
    return first, second


_MULTIPLIERS = np.array(MULTIPLIERS, dtype=np.uint64)[:, None, None]
_KEY_STEPS = (
    np.arange(ROUNDS, dtype=np.uint64)[:, None, None, None] * np.array(KEY_STEPS, np.uint64)[:, None, None]
)


def philox_words_numpy(seeds, positions, streams, token_ids):
    """`philox_words_reference` in NumPy: int64 [B] each, token_ids int64 [B, K] or [K] -> uint32 [B, K]."""
    token_ids = np.atleast_2d(token_ids)
    first, second = philox_lanes_numpy(seeds, positions, streams, (token_ids >> 2).view(np.uint64))
    pair = np.where(token_ids & 1, second, first)
    return np.where(token_ids & 2, pair[1], pair[0]).astype(np.uint32)


def gumbel_from_words_numpy(words):
    """Gumbel noise of Philox words in NumPy: words uint32 [...] -> float32 [...]."""
    uniform = (words | np.uint32(1)).astype(np.float32) * np.float32(2.0**-32)
    return -log_numpy(-log_numpy(np.float32(1.0) - uniform, minus=uniform))


def log_numpy(x, minus=None):
    """`log_reference` in NumPy, operation for operation."""
    bits = x.view(np.int32)
    exponent = (bits - np.int32(SQRT_HALF_BITS)) >> 23
    fraction = (bits - (exponent << 23)).view(np.float32) - np.float32(1.0)
    if minus is not None:
        fraction = np.where(exponent == 0, -minus, fraction)
    square = fraction * fraction
    value = fraction * np.float32(LOG_POLYNOMIAL[0])
    for coefficient in LOG_POLYNOMIAL[1:-1]:
        value += np.float32(coefficient)
        value *= fraction
    value += np.float32(LOG_POLYNOMIAL[-1])
    value *= fraction
    value *= square
    exponent = exponent.astype(np.float32)
    value += exponent * np.float32(LN2_LOW)
    value -= square * np.float32(0.5)
    return (fraction + value) + exponent * np.float32(LN2_HIGH)


def gumbel_numpy(seeds, positions, streams, token_ids):
    """`gumbel_reference` in NumPy, bit for bit: int64 [B] x 3, int64 [B, K] or [K] -> float32 [B, K]."""
    return gumbel_from_words_numpy(philox_words_numpy(seeds, positions, streams, token_ids))


def gumbel(seeds, positions, streams, token_ids):
    """Gumbel noise of tokens, a pure function of (seed, position, stream, token id).

    Args:
        seeds: int64 [B].
        positions: int64 [B], absolute position of the token to draw.
        streams: int64 [B]; samples of one request and speculative drafts use different streams.
        token_ids: int64 [B, K] or [K] (the same tokens in every row), each >= 0.

    Returns:
        float32 [B, K], the same bits on every device.
    """
    if token_ids.device.type != "cpu":
        return gumbel_reference(seeds, positions, streams, token_ids)
    noise = gumbel_numpy(seeds.numpy(), positions.numpy(), streams.numpy(), token_ids.numpy())
    return torch.from_numpy(noise)
