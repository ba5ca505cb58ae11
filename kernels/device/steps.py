"""Truncation steps on the device: which are on for a row, and their limits.

A rule is one step or two. A program of steps is data: seven int32 (kinds, places of the parameters in the table of
limits, places of the second parameters, four bits a step and seven steps in each of two; the number of steps).
"""

# ruff: noqa: RUF059 (device code: tuples are unpacked whole)
import triton
import triton.language as tl

from ..noise.philox_triton import exact_log, philox_at
from .sums import FIXED_ONE, fixed
from .tokens import key_value

KEEP_COUNT, KEEP_MASS, KEEP_VALUE, CUT_TIES = (tl.constexpr(i) for i in range(4))
XTC, TYPICAL, HEAD, TOP_H = (tl.constexpr(i) for i in range(4, 8))
BY_FUNCTION = tl.constexpr(
    8
)  # kinds from here on: value rules with a device function, in the order of DEVICES
TAIL_FREE = tl.constexpr(15)
NO_RULE = tl.constexpr(16)
MASS_SHARE = tl.constexpr(1 - 2.0**-21)  # rules.MASS_SHARE
ENTROPY_SHARE = tl.constexpr(1 + 2.0**-20)  # rules.ENTROPY_SHARE
HEAD_TOKENS = tl.constexpr(100.0)  # rules.HEAD_TOKENS
LIGHTEST = tl.constexpr(24.25)  # rules.LIGHTEST
TAIL_TOKENS = tl.constexpr(256)  # rules.TAIL_TOKENS


@triton.jit
def coin(seed, position, stream):
    """Uniform float32 in [0, 1) of a row: the noise word of token id 2**33, which no vocabulary reaches."""
    counter = tl.full((), 1, tl.uint32) << 31
    word, b, c, d = philox_at(seed, position, stream, counter)
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def nibble(low, high, index):
    """The index-th four bits of two int32 that hold seven each."""
    return (tl.where(index < 7, low, high) >> (4 * (index % 7))) & 15


@triton.jit
def steps_of_row(program, limits, row, rows, vocab, tossed):
    """(kind, parameter, second parameter, whether it is on for the row) of all steps, vectors [16]."""
    kinds, more_kinds, places, more_places, seconds, more_seconds, steps = program
    step = tl.arange(0, 16)
    there = step < steps
    kind = nibble(kinds, more_kinds, step)
    parameter = tl.load(limits + nibble(places, more_places, step) * rows + row, mask=there, other=0.0)
    second = tl.load(limits + nibble(seconds, more_seconds, step) * rows + row, mask=there, other=0.0)
    return kind, parameter, second, is_on(kind, parameter, second, vocab, tossed) & there


@triton.jit
def first_of(kind, on):
    """(index, kind) of the first step that is on; (16, NO_RULE) if none is."""
    step = tl.arange(0, 16)
    code = tl.min(tl.where(on, step * 32 + kind, 16 * 32 + NO_RULE), axis=0)
    return code >> 5, code & 31


@triton.jit
def first_kind(program, limits, row, rows, vocab, tossed):
    """Kind of the first step that is on for the row; NO_RULE if none is."""
    kind, parameter, second, on = steps_of_row(program, limits, row, rows, vocab, tossed)
    index, first = first_of(kind, on)
    return first


@triton.jit
def entry(values, index):
    """One member of a vector [16]."""
    return tl.sum(tl.where(tl.arange(0, 16) == index, values, 0), axis=0)


@triton.jit
def is_on(kind, parameter, second, vocab, tossed):
    """Whether a step acts on a row; `tossed` is the row's coin."""
    on = parameter > 0
    on = tl.where((kind == KEEP_COUNT) | (kind == CUT_TIES), on & (parameter < vocab), on)
    on = tl.where((kind == KEEP_MASS) | (kind == TYPICAL) | (kind == TAIL_FREE), parameter < 1, on)
    on = tl.where(kind == XTC, tossed < second, on)
    on = tl.where(kind == HEAD, on & (second > 0), on)
    return tl.where(kind == TOP_H, on & ((second > 0) | (parameter < 1)), on)


@triton.jit
def toss(key, asked):
    """The row's coin, where a step asks for one; key: (seed, position, stream)."""
    tossed = tl.full((), 1.0, tl.float32)
    if asked != 0:
        tossed = coin(key[0], key[1], key[2])
    return tossed


@triton.jit
def min_p_limit(top, parameter):
    """Threshold of min-p, which needs nothing but the highest logit."""
    return tl.minimum(top + exact_log(tl.minimum(tl.maximum(parameter, 1e-37), 1.0)), top)


@triton.jit
def value_limit(kind, statistics, top, parameter, DEVICES: tl.constexpr):
    """Threshold of the value rule, or level of the XTC rule, at a step from moments relative to top; never
    above top. NaN, which no token reaches, where a device function gives it."""
    count, mass, dot, first, second, squares = statistics
    weight = mass.to(tl.float32) / FIXED_ONE
    log_mass = tl.log(weight)
    mean = first / count
    variance = tl.maximum(second / count - mean * mean, 0.0)
    limit = top
    if kind == KEEP_VALUE:
        limit = min_p_limit(top, parameter)
    if kind == XTC:
        limit = top + log_mass + tl.log(tl.maximum(parameter, 1e-37))
    for i in tl.static_range(len(DEVICES)):
        if kind == BY_FUNCTION + i:
            limit = DEVICES[i](
                top,
                top + log_mass,
                log_mass + dot.to(tl.float32) / FIXED_ONE / weight,
                squares / (weight * weight),
                count,
                top + mean.to(tl.float32),
                tl.sqrt(variance.to(tl.float64)).to(tl.float32),
                parameter,
            )
    return tl.where(limit > top, top, limit)  # NaN stays


@triton.jit
def one_token(key, top):
    """Fixed-point weight and -weight * shift of a token at a key."""
    shift = key_value(key) - top
    weight = tl.exp(shift)
    return fixed(weight), fixed(tl.where(weight > 0, -weight * shift, 0.0))


@triton.jit
def asks_moments(kind):
    """Whether a step that comes first asks for sums over the whole row that no group statistic has."""
    return (kind == TYPICAL) | (kind == TOP_H) | ((kind >= BY_FUNCTION) & (kind < TAIL_FREE))
