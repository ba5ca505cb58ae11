"""Candidates of a row in the second launch: listing them, sums over them, the search for a threshold.

Candidates are the tokens of the active groups. They are listed and held in registers where the list is long
enough; if it is not, a sweep reads the active groups again. A search narrows a bracket of keys by five
pivots a sweep, draws its ends in to keys that tokens have, and lists what is inside as soon as that fits.

A frame says what a search ranks by and sums: (MODE, RANK, top, centre, key of the lowest token left).
VARIANT is (groups a step, pointwise edits, ceilings?, ranks by distance?, sums of entropy?, all moments?).
"""

# ruff: noqa: RUF005, RUF059 (device code: tuples grow by + and are unpacked whole)
import triton
import triton.language as tl

from .tokens import FLOAT_MAX, GROUP, key_value, load_groups, ordered_key, scaled

COUNT, MASS, ENTROPY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what a search sums
BY_LOGIT, BY_DISTANCE, BY_ID = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what it ranks by
FIXED_ONE = tl.constexpr(
    34359738368.0
)  # 2**35: V <= 2**18 masses of 1 fit an int64 exactly representable in float64
BELOW_ALL = tl.constexpr(-2139095040)  # ordered key of the lowest finite float
WEIGHTLESS = tl.constexpr(24.5)  # a token this far below the maximum has fixed-point weight 0


@triton.jit
def fixed(weight):
    """Fixed-point int64 of a weight in [0, 128]."""
    return (weight * FIXED_ONE).to(tl.int64)


@triton.jit
def visible(x, ids, bounds, VARIANT: tl.constexpr):
    """Logits with -inf for the tokens above the ceiling and for the ties cut off: bounds are (ceiling key,
    key of the ties, last id kept of them)."""
    if VARIANT[2]:
        x = tl.where(ordered_key(x) > bounds[0], -float("inf"), x)
    return tl.where((ordered_key(x) == bounds[1]) & (ids > bounds[2]), -float("inf"), x)


@triton.jit
def chunk(start, source, bounds, VARIANT: tl.constexpr):
    """Scaled logits and ids [VARIANT[0] * GROUP] of the active groups from `start` on."""
    (
        row,
        logits,
        vocab,
        of_vocab,
        bitmask,
        mask_stride,
        sparse,
        values,
        rows,
        temperature,
        active,
        n,
        wants,
    ) = source
    slot = start + tl.arange(0, VARIANT[0])
    group = tl.load(active + slot, mask=slot < n, other=-1)
    x, ids = load_groups(
        group, row, logits, vocab, of_vocab, wants, bitmask, mask_stride, sparse, values, rows, VARIANT[1]
    )
    x = tl.reshape(scaled(x, temperature), (VARIANT[0] * GROUP,))
    ids = tl.reshape(ids, (VARIANT[0] * GROUP,))
    return visible(x, ids, bounds, VARIANT), ids


@triton.jit
def activate(chosen, group, active):
    """Write the chosen group numbers, in order, to `active`; returns how many there are."""
    slot = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.debug_barrier()
    tl.store(active + slot, group, mask=chosen)
    tl.debug_barrier()
    return tl.sum(chosen.to(tl.int32), axis=0)


@triton.jit
def rank_key(x, ids, frame, VARIANT: tl.constexpr):
    """int32 that orders tokens as the frame ranks them; below BELOW_ALL for those that take no part."""
    mode, rank, top, centre, floor = frame
    own = ordered_key(x)
    key = own
    if VARIANT[3]:
        near = tl.where(own >= floor, ordered_key(-tl.abs((x - top) - centre)), BELOW_ALL - 1)
        key = tl.where(rank == BY_DISTANCE, near, key)
    low_id_first = tl.where(own == floor, -1 - ids, BELOW_ALL - 1)
    return tl.where(rank == BY_ID, low_id_first, key)


@triton.jit
def gather(low, high, source, bounds, frame, lists, CAPACITY: tl.constexpr, VARIANT: tl.constexpr):
    """List the tokens of the active groups with a rank key in [low, high], at most CAPACITY; returns their
    number.

    A number above CAPACITY says only that there are too many to list.
    """
    listed_x, listed_ids = lists
    found, start = source[11] * 0, source[11] * 0
    tl.debug_barrier()
    while (start < source[11]) & (found <= CAPACITY):
        x, ids = chunk(start, source, bounds, VARIANT)
        key = rank_key(x, ids, frame, VARIANT)
        wanted = ((key >= low) & (key <= high)).to(tl.int32)
        slot = found + tl.cumsum(wanted, axis=0) - 1
        room = (wanted > 0) & (slot < CAPACITY)
        tl.store(listed_x + slot, x, mask=room)
        tl.store(listed_ids + slot, ids, mask=room)
        found += tl.sum(wanted, axis=0)
        start += VARIANT[0]
    tl.debug_barrier()
    return found


@triton.jit
def listed(found, lists, CAPACITY: tl.constexpr):
    """Logits and ids [CAPACITY] of the list; -inf and -1 beyond it, and everywhere if it was too short."""
    slot = tl.arange(0, CAPACITY)
    there = slot < tl.where(found <= CAPACITY, found, 0)
    x = tl.load(lists[0] + slot, mask=there, other=-float("inf"))
    return x, tl.load(lists[1] + slot, mask=there, other=-1)


@triton.jit
def eighths(v):
    """A vector as rows of eight, so that each thread reduces what it holds before threads meet."""
    return tl.reshape(v, (v.shape[0] // 8, 8))


@triton.jit
def plus(a, b):
    """Sums of two tuples, member by member."""
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (a[i] + b[i],)
    return out


@triton.jit
def totals(a):
    """Sum of each vector of a tuple."""
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (tl.sum(a[i], axis=0),)
    return out


@triton.jit
def sums_above(x, key, pivots, frame, VARIANT: tl.constexpr):
    """What the frame sums, int64 vectors, over the tokens above each pivot; then, for entropy, the sums of
    -weight * shift."""
    weight = tl.exp(x - frame[2])
    whole = fixed(weight)
    unit = tl.where(frame[0] == COUNT, whole * 0 + 1, whole)
    out = ()
    for i in tl.static_range(len(pivots)):
        out = out + (tl.sum(eighths(tl.where(key > pivots[i], unit, 0)), axis=1),)
    if VARIANT[4]:
        dot = fixed(tl.where(weight > 0, weight * (frame[2] - x), 0.0))
        for i in tl.static_range(len(pivots)):
            out = out + (tl.sum(eighths(tl.where(key > pivots[i], dot, 0)), axis=1),)
    return out


@triton.jit
def ends_inside(key, low, high):
    """Lowest and highest key in [low, high], vectors; `high` and `low` where there is none."""
    inside = (key >= low) & (key <= high)
    first = tl.min(eighths(tl.where(inside, key, high)), axis=1)
    return first, tl.max(eighths(tl.where(inside, key, low)), axis=1)


@triton.jit
def sweep(pivots, low, high, x, ids, held, source, bounds, frame, VARIANT: tl.constexpr):
    """(`sums_above` as int64 scalars, first, last) over all candidates; first and last are the lowest and
    highest rank key in [low, high]: the list x if it holds the candidates, else the active groups."""
    key = rank_key(x, ids, frame, VARIANT)
    sums = totals(sums_above(x, key, pivots, frame, VARIANT))
    first, last = ends_inside(key, low, high)
    first, last = tl.min(first, axis=0), tl.max(last, axis=0)
    if held == 0:
        zero = tl.zeros((VARIANT[0] * GROUP // 8,), tl.int64)
        parts = ()
        for _i in tl.static_range(len(sums)):
            parts = parts + (zero,)
        lowest, highest = zero.to(tl.int32) + high, zero.to(tl.int32) + low
        for start in range(0, source[11], VARIANT[0]):
            y, there = chunk(start, source, bounds, VARIANT)
            rank = rank_key(y, there, frame, VARIANT)
            parts = plus(parts, sums_above(y, rank, pivots, frame, VARIANT))
            lower, higher = ends_inside(rank, low, high)
            lowest, highest = tl.minimum(lowest, lower), tl.maximum(highest, higher)
        sums = plus(sums, totals(parts))
        first, last = tl.minimum(first, tl.min(lowest, axis=0)), tl.maximum(last, tl.max(highest, axis=0))
    return sums, first, last


@triton.jit
def between(low, high, rank, VARIANT: tl.constexpr):
    """Five pivots in [low, high): quarters of the keys and two fifths of the values; sixths of the ids."""
    quarter = (high - low) // 4
    out = (low + quarter, low + 2 * quarter, low + 3 * quarter)
    a, b = key_value(low.to(tl.int32)), key_value(high.to(tl.int32))
    for i in tl.static_range(2, 4):
        fifth = ordered_key(a * (1 - 0.2 * i) + b * (0.2 * i)).to(tl.int64)
        out = out + (tl.minimum(tl.maximum(fifth, low), high - 1),)
    keys = ()
    for i in tl.static_range(len(out)):
        even = low + (high - low) * (i + 1) // 6
        keys = keys + (tl.where(rank == BY_ID, even, out[i]).to(tl.int32),)
    return keys


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
def most_inside(above, below, low, frame):
    """An upper bound of the number of tokens from `low` on, between two sums above keys."""
    mode, rank, top, centre, floor = frame
    value = key_value(low.to(tl.int32))
    shift = tl.where(rank == BY_DISTANCE, value + centre, value - top)
    least = tl.exp(shift) * FIXED_ONE
    weight = tl.where(least > 4096.0, least * 0.998, 1e-9)  # fixed point cuts off up to one unit a token
    return (below - above).to(tl.float32) / tl.where(mode == COUNT, 1.0, weight)


@triton.jit
def search(target, lowest, highest, x, ids, held, source, bounds, frame, form, lists,
           CAPACITY: tl.constexpr, VARIANT: tl.constexpr):  # fmt: skip
    """(smallest token's rank key in [lowest, highest] that has less than `target` (float64) above it, that
    sum, and the sum of -weight * shift).

    For entropy: at most `target` above it. At least the highest token must pass.
    """
    low, high = lowest.to(tl.int64), highest.to(tl.int64)
    above, dots = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    below = tl.full((), 1 << 62, tl.int64)
    base, base_dots = above, dots
    untried = held * 0 + 1
    while low < high:
        if ((held == 0) & (untried > 0)) & (most_inside(above, below, low, frame) <= CAPACITY):
            found = gather(low.to(tl.int32), high.to(tl.int32), source, bounds, frame, lists, CAPACITY,
                           VARIANT)  # fmt: skip
            x, ids = listed(found, lists, CAPACITY)
            held, untried = (found <= CAPACITY).to(tl.int32), untried * 0
            base, base_dots = tl.where(held > 0, above, base), tl.where(held > 0, dots, base_dots)
        pivots = between(low, high, frame[1], VARIANT)
        sums, first, last = sweep(pivots, low.to(tl.int32), high.to(tl.int32), x, ids, held, source, bounds,
                                  frame, VARIANT)  # fmt: skip
        for i in tl.static_range(len(pivots)):
            total, dot = sums[i] + base, base_dots
            passes = total.to(tl.float64) < target
            if VARIANT[4]:
                dot = sums[i + len(pivots)] + base_dots
                small = spread(total, dot, form).to(tl.float64) <= target
                passes = tl.where(frame[0] == ENTROPY, small, passes)
            pivot = pivots[i].to(tl.int64)
            lower, higher = passes & (pivot < high), (passes == 0) & (pivot >= low)
            high, above, dots = (
                tl.where(lower, pivot, high),
                tl.where(lower, total, above),
                tl.where(lower, dot, dots),
            )
            low, below = tl.where(higher, pivot + 1, low), tl.where(higher, total, below)
        low, high = tl.maximum(low, first.to(tl.int64)), tl.minimum(high, last.to(tl.int64))
    return high.to(tl.int32), above, dots


@triton.jit
def moments(x, key, top, FULL: tl.constexpr):
    """Count, fixed mass, fixed sum of -weight * shift of the tokens at or above a key, relative to top; with
    FULL also the sums of shift and its square (float64), and of the square of weight."""
    kept = ordered_key(x) >= key
    shift = tl.where(kept, tl.maximum(x - top, -FLOAT_MAX), 0.0)
    weight = tl.where(kept, tl.exp(shift), 0.0)
    count = tl.sum(kept.to(tl.float32), axis=0)
    mass = tl.sum(fixed(weight), axis=0)
    dot = tl.sum(fixed(tl.where(weight > 0, -weight * shift, 0.0)), axis=0)
    first, second, squares = tl.zeros((), tl.float64), tl.zeros((), tl.float64), tl.zeros((), tl.float32)
    if FULL:
        wide = shift.to(tl.float64)
        first, second = tl.sum(wide, axis=0), tl.sum(wide * wide, axis=0)
        squares = tl.sum(weight * weight, axis=0)
    return count, mass, dot, first, second, squares


@triton.jit
def sweep_moments(key, top, x, held, source, bounds, FULL: tl.constexpr, VARIANT: tl.constexpr):
    """`moments` over all candidates."""
    # an empty sum first: what the list holds is no part of the sum when it is too short for all candidates
    found = moments(tl.where(held > 0, x, -float("inf")), key, top, FULL)
    if held == 0:
        for start in range(0, source[11], VARIANT[0]):
            y, ids = chunk(start, source, bounds, VARIANT)
            found = plus(found, moments(y, key, top, FULL))
    return found


@triton.jit
def bound_by_groups(target, group_top, top, weight):
    """A key at or below what `search` finds for this target, from one token (the largest) a group.

    Groups weigh less than the tokens they stand for, so a key with `target` or more above it by groups has
    that by tokens. Stops when the bound is as close as a bfloat16 step.
    """
    key = ordered_key(group_top)
    zero = weight * 0
    lowest = tl.min(tl.where(key < BELOW_ALL, 2147483647, key), axis=0) - 1
    open_end = tl.sum(tl.where(key > lowest, weight, zero), axis=0).to(tl.float64) < target
    low = tl.where(open_end, BELOW_ALL - 1, lowest).to(tl.int64)
    high = ordered_key(top).to(tl.int64)
    while high - low > 32768:
        step = (high - low) // 4
        q1, q2, q3 = low + step, low + 2 * step, low + 3 * step
        p1 = tl.sum(tl.where(key > q1, weight, zero), axis=0).to(tl.float64) < target
        p2 = tl.sum(tl.where(key > q2, weight, zero), axis=0).to(tl.float64) < target
        p3 = tl.sum(tl.where(key > q3, weight, zero), axis=0).to(tl.float64) < target
        high = tl.where(p1, q1, tl.where(p2, q2, tl.where(p3, q3, high)))
        low = tl.where(p1, low, tl.where(p2, q1, tl.where(p3, q2, q3)))
    return (low + 1).to(tl.int32)
