"""Philox words and Gumbel noise as Triton device functions; with contraction off, the bits of `philox`.

Kernels that call these must be launched with `enable_fp_fusion=False`.
"""

import triton
import triton.language as tl


@triton.jit
def exact_log(x):
    """Cephes logf of float32 x >= 0: the bits of `philox.log_reference`."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    fraction = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    return log_polynomial(fraction, exponent)


@triton.jit
def exact_log_complement(u):
    """log(1 - u) for u in (0, 1], without rounding 1 - u where it is near 1."""
    bits = (1.0 - u).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    fraction = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    return log_polynomial(tl.where(exponent == 0, -u, fraction), exponent)


@triton.jit
def log_polynomial(fraction, exponent):
    """log((1 + fraction) * 2**exponent), operation for operation as in `philox`."""
    square = fraction * fraction
    value = fraction * 7.0376836292e-2
    value = (value + -1.1514610310e-1) * fraction
    value = (value + 1.1676998740e-1) * fraction
    value = (value + -1.2420140846e-1) * fraction
    value = (value + 1.4249322787e-1) * fraction
    value = (value + -1.6668057665e-1) * fraction
    value = (value + 2.0000714765e-1) * fraction
    value = (value + -2.4999993993e-1) * fraction
    value = (value + 3.3333331174e-1) * fraction
    value = value * square
    scale = exponent.to(tl.float32)
    value = value + scale * -2.12194440e-4
    value = value - square * 0.5
    return (fraction + value) + scale * 0.693359375


@triton.jit
def exact_exp(x):
    """Cephes expf of float32 x, cut to [-87, 88]: the bits of `philox.exp_reference`."""
    x = tl.minimum(tl.maximum(x, -87.0), 88.0)
    power = tl.floor(x * 1.44269504 + 0.5)
    x = (x - power * 0.693359375) - power * -2.12194440e-4
    value = x * 1.9875691500e-4
    value = (value + 1.3981999507e-3) * x
    value = (value + 8.3334519073e-3) * x
    value = (value + 4.1665795894e-2) * x
    value = (value + 1.6666665459e-1) * x
    value = (value + 5.0000001201e-1) * (x * x) + x + 1.0
    return value * ((power.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def gumbel_from_words(words):
    """Gumbel noise of uint32 words."""
    uniform = (words | 1).to(tl.float32) * 2.3283064365386963e-10
    return -exact_log(-exact_log_complement(uniform))


@triton.jit
def philox_at(seed, position, stream, counters):
    """The four words of each uint32 counter: seed, position, stream are int64 scalars.

    Both halves of a product come from one wide multiplication, which `tl.philox` takes two for.
    """
    a, d = counters, counters * 0
    b, c = d + (position & 0xFFFFFFFF).to(tl.uint32), d + (stream & 0xFFFFFFFF).to(tl.uint32)
    low, high = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        first, second = a.to(tl.uint64) * 0xD2511F53, c.to(tl.uint64) * 0xCD9E8D57
        a, b = (second >> 32).to(tl.uint32) ^ b ^ low, second.to(tl.uint32)
        c, d = (first >> 32).to(tl.uint32) ^ d ^ high, first.to(tl.uint32)
        low, high = low + 0x9E3779B9, high + 0xBB67AE85
    return a, b, c, d


@triton.jit
def words_at(seed, position, stream, token_ids):
    """The word of each token id (int32, any shape, >= 0)."""
    a, b, c, d = philox_at(seed, position, stream, (token_ids >> 2).to(tl.uint32))
    lane = token_ids & 3
    return tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))


@triton.jit
def gumbel_at(seed, position, stream, token_ids):
    """Gumbel noise of token ids (int32, any shape, >= 0)."""
    return gumbel_from_words(words_at(seed, position, stream, token_ids))


@triton.jit
def gumbel_groups(seed, position, stream, first, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Gumbel noise [ROWS, WIDTH] of the tokens first[i] ... first[i] + WIDTH - 1; first int32 [ROWS],
    multiples of 4.

    One Philox call serves four tokens.
    """
    counters = (first >> 2)[:, None] + tl.arange(0, WIDTH // 4)[None, :]
    a, b, c, d = philox_at(seed, position, stream, counters.to(tl.uint32))
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, WIDTH))
    return gumbel_from_words(words)


@triton.jit
def rough_log_times(seed, position, stream, first, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """log2(E) + 32 of the tokens of `gumbel_groups`, whose noise is -log(E), to within 1e-4: to tell what can win.

    By the approximate logarithms of NVIDIA's devices. E = -log(1 - u) is the larger one of two bounds from below: u +
    u**2 / 2 where u is small, and the logarithm of 1 - u less its rounding where it is not.
    """
    counters = (first >> 2)[:, None] + tl.arange(0, WIDTH // 4)[None, :]
    a, b, c, d = philox_at(seed, position, stream, counters.to(tl.uint32))
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, WIDTH))
    u = (words | 1).to(tl.float32)  # 2**32 times it, E likewise
    small = tl.fma(u * 1.1641532182693481e-10, u, u)
    large = tl.fma(rough_log2(tl.fma(u, -2.3283064365386963e-10, 1.0)), -2977044471.82, -850.0)
    return rough_log2(tl.maximum(small, large))


@triton.jit
def rough_log2(x):
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32,
                                     is_pure=True, pack=1)  # fmt: skip


@triton.jit
def gumbel_kernel(seeds, positions, streams, token_ids, noise, words, columns, BLOCK: tl.constexpr):
    """noise[row, i], words[row, i] of token_ids[i]; grid (rows, blocks). Exists to compare bits."""
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    ids = tl.load(token_ids + column, mask=inside, other=0).to(tl.int32)
    seed, position, stream = tl.load(seeds + row), tl.load(positions + row), tl.load(streams + row)
    word = words_at(seed, position, stream, ids)
    at = row.to(tl.int64) * columns + column
    tl.store(words + at, word.to(tl.int64), mask=inside)
    tl.store(noise + at, gumbel_from_words(word), mask=inside)
