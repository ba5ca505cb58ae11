"""Truncation steps on the device: which are on for a row, and how each narrows what is left.

A rule is one step or two. A program of steps is data: seven int32 (kinds, places of the parameters in the table of
limits, places of the second parameters, four bits a step and seven steps in each of two; the number of steps).
"""

# ruff: noqa: RUF059, SIM102 (device code: tuples are unpacked whole, and compile-time tests stay apart)
import triton
import triton.language as tl

from ..noise.philox_triton import exact_log, philox_at
from .search import (
    BELOW_ALL,
    BY_DISTANCE,
    BY_ID,
    BY_LOGIT,
    COUNT,
    ENTROPY,
    FIXED_ONE,
    MASS,
    WEIGHTLESS,
    chunk,
    fixed,
    gather,
    listed,
    rank_key,
    search,
    spread,
    sweep_moments,
    visible,
)
from .tokens import key_value, ordered_key

KEEP_COUNT, KEEP_MASS, KEEP_VALUE, CUT_TIES = (tl.constexpr(i) for i in range(4))
XTC, TYPICAL, HEAD, TOP_H = (tl.constexpr(i) for i in range(4, 8))
BY_FUNCTION = tl.constexpr(
    8
)  # kinds from here on: value rules with a device function, in the order of DEVICES
NO_RULE = tl.constexpr(16)
MASS_SHARE = tl.constexpr(1 - 2.0**-21)  # rules.MASS_SHARE
ENTROPY_SHARE = tl.constexpr(1 + 2.0**-20)  # rules.ENTROPY_SHARE
HEAD_TOKENS = tl.constexpr(100.0)  # rules.HEAD_TOKENS
LIGHTEST = tl.constexpr(24.25)  # rules.LIGHTEST


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
    on = tl.where((kind == KEEP_MASS) | (kind == TYPICAL), parameter < 1, on)
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
def narrowing(kind, parameter, second, key, top, statistics, vocab, memory):
    """What a step searches for: (target, lowest key, highest key, frame, entropy form).

    memory: (number of tokens above the ties to cut, key of the last token of the head).
    """
    count, mass, dot, first, square, squares = statistics
    target, mode = parameter.to(tl.float64), kind * 0 + COUNT
    rank, lowest, highest = kind * 0 + BY_LOGIT, key, ordered_key(top)
    cut = kind == CUT_TIES
    target = tl.where(cut, target - memory[0].to(tl.float64), target)
    rank, lowest, highest = (
        tl.where(cut, BY_ID, rank),
        tl.where(cut, -vocab, lowest),
        tl.where(cut, -1, highest),
    )
    target = tl.where(kind == HEAD, HEAD_TOKENS, target)
    massive = (kind == KEEP_MASS) | (kind == TYPICAL)
    target = tl.where(massive, target * MASS_SHARE * mass.to(tl.float64), target)
    mode = tl.where(massive, MASS, mode)
    span = tl.where(kind == TOP_H, LIGHTEST, WEIGHTLESS)
    heavy = tl.maximum(key, ordered_key(top - span))
    lowest = tl.where((kind == KEEP_MASS) | (kind == TOP_H), heavy, lowest)
    near = kind == TYPICAL
    rank, lowest, highest = (
        tl.where(near, BY_DISTANCE, rank),
        tl.where(near, BELOW_ALL, lowest),
        tl.where(near, 0, highest),
    )
    partial = (kind == TOP_H) & (second > 0)
    lowest = tl.where(partial, tl.maximum(lowest, memory[1]), lowest)
    surplus = tl.where(partial, tl.maximum(count - HEAD_TOKENS, 0.0), 0.0).to(
        tl.int64
    )  # ties of the last one
    weight, part = one_token(memory[1], top)
    mass, dot = mass - surplus * weight, dot - surplus * part
    whole = tl.maximum(mass, 1).to(tl.float32) / FIXED_ONE
    form = (partial, tl.log(whole), whole)
    limit = parameter.to(tl.float64) * ENTROPY_SHARE * spread(mass, dot, form).to(tl.float64)
    target, mode = tl.where(kind == TOP_H, limit, target), tl.where(kind == TOP_H, ENTROPY, mode)
    centre = -(dot.to(tl.float32) / tl.maximum(mass, 1).to(tl.float32))
    return target, lowest, highest, (mode, rank, top, centre, key), form


@triton.jit
def one_token(key, top):
    """Fixed-point weight and -weight * shift of a token at a key."""
    shift = key_value(key) - top
    weight = tl.exp(shift)
    return fixed(weight), fixed(tl.where(weight > 0, -weight * shift, 0.0))


@triton.jit
def extent(edge, key, x, ids, held, source, bounds, frame, VARIANT: tl.constexpr):
    """Lowest and highest logit key among the candidates at or above `key` whose rank key is `edge` or more."""
    own = ordered_key(x)
    inside = (own >= key) & (rank_key(x, ids, frame, VARIANT) >= edge)
    first = tl.min(tl.where(inside, own, 2147483647), axis=0)
    last = tl.max(tl.where(inside, own, BELOW_ALL), axis=0)
    if held == 0:
        for start in range(0, source[11], VARIANT[0]):
            y, there = chunk(start, source, bounds, VARIANT)
            read = ordered_key(y)
            there = (read >= key) & (rank_key(y, there, frame, VARIANT) >= edge)
            first = tl.minimum(first, tl.min(tl.where(there, read, 2147483647), axis=0))
            last = tl.maximum(last, tl.max(tl.where(there, read, BELOW_ALL), axis=0))
    return first, last


@triton.jit
def narrow(begin, key, row_steps, count_of_steps, vocab, top, whole, source, lists,
           DEVICES: tl.constexpr, CAPACITY: tl.constexpr, VARIANT: tl.constexpr):  # fmt: skip
    """Take the steps in order, listing the candidates before each and at the end until they fit.

    row_steps: see `steps_of_row`.

    Returns:
        (key of the lowest token left, highest logit left, bounds, number of tokens above the ceiling, listed
        logits, listed ids, whether the list holds all that is left).
    """
    kinds, parameters, seconds, on = row_steps
    index, statistics, dropped, held = begin, whole, begin * 0, begin * 0
    bounds = (ordered_key(top), key * 0 + BELOW_ALL - 1, key * 0)
    memory = (tl.full((), 0, tl.int64), key)
    x, ids = listed(index * 0, lists, CAPACITY)
    while index <= count_of_steps:
        if held == 0:
            plain = (index * 0 + COUNT, index * 0 + BY_LOGIT, top, top * 0, key)
            found = gather(key, 2147483647, source, bounds, plain, lists, CAPACITY, VARIANT)
            x, ids = listed(found, lists, CAPACITY)
            held = (found <= CAPACITY).to(tl.int32)
        if entry(on.to(tl.int32), index) > 0:
            key, top, bounds, dropped, x, statistics, memory = take(
                entry(kinds, index), entry(parameters, index), entry(seconds, index), index > begin, key, top, bounds,
                dropped, x, ids, held, statistics, memory, vocab, source, lists, DEVICES, CAPACITY, VARIANT,
            )  # fmt: skip
        index += 1
    return key, top, bounds, dropped, x, ids, held


@triton.jit
def asks_moments(kind):
    """Whether a step that comes first asks for sums over the whole row that no group statistic has."""
    return (kind == TYPICAL) | (kind == TOP_H) | ((kind >= BY_FUNCTION) & (kind != NO_RULE))


@triton.jit
def needs_moments(kind):
    """Whether a step asks for sums over what is left."""
    return (kind == KEEP_MASS) | (kind >= XTC)


@triton.jit
def take(kind, parameter, second, later, key, top, bounds, dropped, x, ids, held, statistics, memory,
         vocab, source, lists, DEVICES: tl.constexpr, CAPACITY: tl.constexpr, VARIANT: tl.constexpr):  # fmt: skip
    """One step: the new (key, top, bounds, dropped, listed logits, statistics, memory).

    `later`: not the first step; statistics are of the whole row before it.
    """
    if needs_moments(kind) & later:
        start = tl.where((kind == TOP_H) & (second > 0), tl.maximum(key, memory[1]), key)
        statistics = sweep_moments(start, top, x, held, source, bounds, VARIANT[5], VARIANT)
    ceiling, plain = bounds[0], (kind * 0 + COUNT, kind * 0 + BY_LOGIT, top, top * 0, key)
    if (kind == KEEP_VALUE) | (kind == XTC) | (kind >= BY_FUNCTION):
        limit = ordered_key(value_limit(kind, statistics, top, parameter, DEVICES))
        if VARIANT[2]:
            if kind == XTC:
                ceiling, last = extent(limit, key, x, ids, held, source, bounds, plain, VARIANT)
        key = tl.where(kind == XTC, key, tl.maximum(key, limit))
    else:
        target, lowest, highest, frame, form = narrowing(
            kind, parameter, second, key, top, statistics, vocab, memory
        )
        edge, above, dots = search(
            target, lowest, highest, x, ids, held, source, bounds, frame, form, lists, CAPACITY, VARIANT
        )
        memory = (tl.where(kind == KEEP_COUNT, above, memory[0]), tl.where(kind == HEAD, edge, memory[1]))
        cut = kind == CUT_TIES
        bounds = (ceiling, tl.where(cut, key, bounds[1]), tl.where(cut, -1 - edge, bounds[2]))
        if VARIANT[3]:
            if kind == TYPICAL:
                first, ceiling = extent(edge, key, x, ids, held, source, bounds, frame, VARIANT)
                key = tl.maximum(key, first)
        if VARIANT[4]:
            if kind == TOP_H:
                weight, part = one_token(edge, top)
                inside = spread(above + weight, dots + part, form).to(tl.float64) <= target
                if (inside == 0) & (edge < highest):  # the first copy of the next token is too much
                    edge, last = extent(edge + 1, key, x, ids, held, source, bounds, plain, VARIANT)
                key = tl.maximum(key, edge)
        key = tl.where((kind == KEEP_COUNT) | (kind == KEEP_MASS), edge, key)
    if VARIANT[2]:
        if ceiling < bounds[0]:
            dropped += above_ceiling(ceiling, x, held, source, bounds, VARIANT)
            top = key_value(ceiling)
        bounds = (ceiling, bounds[1], bounds[2])
    return key, top, bounds, dropped, visible(x, ids, bounds, VARIANT), statistics, memory


@triton.jit
def above_ceiling(ceiling, x, held, source, bounds, VARIANT: tl.constexpr):
    """Number of candidates above a ceiling."""
    found = tl.sum((ordered_key(x) > ceiling).to(tl.int32), axis=0)
    if held == 0:
        found = found * 0
        for start in range(0, source[11], VARIANT[0]):
            y, ids = chunk(start, source, bounds, VARIANT)
            found += tl.sum((ordered_key(y) > ceiling).to(tl.int32), axis=0)
    return found
