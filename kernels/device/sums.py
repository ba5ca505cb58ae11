"""Sums over the tokens of a row, in fixed point where they decide what is kept."""

# ruff: noqa: RUF005 (device code: tuples grow by +)
import triton
import triton.language as tl

from .tokens import FLOAT_MAX

FIXED_ONE = tl.constexpr(
    34359738368.0
)  # 2**35: V <= 2**18 masses of 1 fit an int64 exactly representable in float64
BELOW_ALL = tl.constexpr(-2139095040)  # ordered key of the lowest finite float


@triton.jit
def fixed(weight):
    """Fixed-point int64 of a weight in [0, 128]."""
    return (weight * FIXED_ONE).to(tl.int64)


@triton.jit
def plus(a, b):
    """Sums of two tuples, member by member."""
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (a[i] + b[i],)
    return out


@triton.jit
def spread(mass, dot, form):
    """Entropy of tokens given their sums of weight and of -weight * shift, in fixed point.

    form: (partial?, log of the whole mass, whole mass); partial: their share of the whole's entropy.
    """
    partial, log_whole, whole = form
    some = tl.maximum(mass, 1).to(tl.float32)
    own = tl.log(some / FIXED_ONE) + dot.to(tl.float32) / some
    share = (mass.to(tl.float32) / FIXED_ONE * log_whole + dot.to(tl.float32) / FIXED_ONE) / whole
    return tl.where(mass > 0, tl.where(partial, share, own), 0.0)


@triton.jit
def moments(y, kept, top, FULL: tl.constexpr):
    """What each kept token adds to the number, the fixed mass and the fixed sum of -weight * shift, relative to top;
    with FULL also to the sums of shift and its square (float64), and of the square of weight."""
    shift = tl.where(kept, tl.maximum(y - top, -FLOAT_MAX), 0.0)
    weight = tl.where(kept, tl.exp(shift), 0.0)
    dot = fixed(tl.where(weight > 0, -weight * shift, 0.0))
    wide, squares = tl.zeros(y.shape, tl.float64), weight * 0
    if FULL:
        wide, squares = shift.to(tl.float64), weight * weight
    return kept.to(tl.float32), fixed(weight), dot, wide, wide * wide, squares


@triton.jit
def no_moments(N: tl.constexpr):
    """`moments` of nothing, vectors [N]."""
    real, whole, wide = tl.zeros((N,), tl.float32), tl.zeros((N,), tl.int64), tl.zeros((N,), tl.float64)
    return real, whole, whole, wide, wide, real


@triton.jit
def totals(parts, FULL: tl.constexpr):
    """The sum of each vector of `moments`; 0 of those that are not asked for."""
    count, mass, dot = tl.sum(parts[0], axis=0), tl.sum(parts[1], axis=0), tl.sum(parts[2], axis=0)
    first, second, squares = tl.zeros((), tl.float64), tl.zeros((), tl.float64), tl.zeros((), tl.float32)
    if FULL:
        first, second, squares = tl.sum(parts[3], axis=0), tl.sum(parts[4], axis=0), tl.sum(parts[5], axis=0)
    return count, mass, dot, first, second, squares
