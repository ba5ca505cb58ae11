"""The order of a listed row: for each token what is above it, and the rules that need more of it than a comparison.

A list holds at most 2**12 tokens. Each knows, by comparing all pairs, how many listed tokens of which mass are above
it, so a rule's boundary is a comparison with sums; a rule that drops the highest tokens has the order made anew.
"""

# ruff: noqa: SIM102 (device code: compile-time tests stay apart)
import triton
import triton.language as tl

from ..steps import (
    BY_FUNCTION,
    ENTROPY_SHARE,
    HEAD_TOKENS,
    LIGHTEST,
    MASS_SHARE,
    TAIL_FREE,
    TOP_H,
    TYPICAL,
    XTC,
    one_token,
    value_limit,
)
from ..sums import FIXED_ONE, fixed, spread
from ..tokens import FLOAT_MAX, ordered_key

COUNT_BIT = tl.constexpr(
    281474976710656
)  # 2**48: a weight carries its count above it; at most 2**12 weights of 2**35
COLUMNS = tl.constexpr(16)  # listed tokens that all others are compared with at a time
NOTHING = tl.constexpr(-2147483648)  # key of a place without a token


@triton.jit
def sums_above(keys, listed_keys, listed_weights, found, N: tl.constexpr):
    """For each of N keys, the sum of the int64 weights of the listed tokens above it."""
    total = tl.zeros((N, COLUMNS), tl.int64)
    for start in range(0, found, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        others = tl.load(listed_keys + column)
        weights = tl.load(listed_weights + column)
        total += tl.where(others[None, :] > keys[:, None], weights[None, :], 0)
    return tl.sum(total, axis=1)


@triton.jit
def ranks(keys, listed_keys, listed_weights, found, N: tl.constexpr):
    """For each of the N listed keys, the number and the fixed-point mass of the listed tokens above it."""
    above = sums_above(keys, listed_keys, listed_weights, found, N)
    return (above >> 48).to(tl.int32), above & (COUNT_BIT - 1)


@triton.jit
def ties_before(keys, ids, listed_keys, listed_ids, found, N: tl.constexpr):
    """For each of the N listed tokens, the number of listed tokens with the same key and a lower id."""
    total = tl.zeros((N, COLUMNS), tl.int32)
    for start in range(0, found, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        others = tl.load(listed_keys + column)
        there = tl.load(listed_ids + column)
        total += ((others[None, :] == keys[:, None]) & (there[None, :] < ids[:, None])).to(tl.int32)
    return tl.sum(total, axis=1)


@triton.jit
def store_order(keys, weights, slot, listed_keys, listed_weights):
    """Lay keys and weights where all threads find them."""
    tl.debug_barrier()  # others may still read what was there
    tl.store(listed_keys + slot, keys)
    tl.store(listed_weights + slot, weights)
    tl.debug_barrier()


@triton.jit
def two_sums(a, b):
    """The sums of two vectors of one type, for which threads meet once."""
    return tl.split(tl.sum(tl.join(a, b), axis=0))


@triton.jit
def four_sums(a, b, c, d):
    """The sums of four vectors of one type, for which threads meet once."""
    first, second = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), axis=0))
    a, b = tl.split(first)
    c, d = tl.split(second)
    return a, b, c, d


@triton.jit
def moments_of(y, kept, weight, top, FULL: tl.constexpr):
    """`sums.moments` of the kept tokens of a list."""
    shift = tl.where(kept, tl.maximum(y - top, -FLOAT_MAX), 0.0)
    light = tl.where(kept, tl.exp(shift), 0.0)
    mass, dot = two_sums(tl.where(kept, weight, 0), fixed(tl.where(light > 0, -light * shift, 0.0)))
    count, zero = top * 0, tl.zeros((), tl.float64)
    first, second, squares = zero, zero, top * 0
    if FULL:
        wide = shift.to(tl.float64)
        first, second = two_sums(wide, wide * wide)
        count, squares = two_sums(kept.to(tl.float32), light * light)
    return count, mass, dot, first, second, squares


@triton.jit
def keep_typical(y, kept, weight, share, statistics, top, slot, lists, found, N: tl.constexpr):
    """The kept tokens nearest to the mean logit that have this share of the mass."""
    mass, dot = statistics[1], statistics[2]
    centre = -(dot.to(tl.float32) / tl.maximum(mass, 1).to(tl.float32))
    near = tl.where(kept, ordered_key(-tl.abs((y - top) - centre)), NOTHING)
    store_order(near, tl.where(kept, weight, 0), slot, lists[0], lists[1])
    above = sums_above(near, lists[0], lists[1], found, N)
    target = share.to(tl.float64) * MASS_SHARE * mass.to(tl.float64)
    return kept & (above.to(tl.float64) < tl.maximum(target, 1.0))  # above the nearest one there is no mass


@triton.jit
def keep_top_h(y, keys, kept, weight, number, mass, alpha, head, statistics, top, slot, lists, found,
               N: tl.constexpr):  # fmt: skip
    """(the kept tokens of the longest prefix of the order whose entropy is within a share of the whole's, whether that
    is all of the listed ones)."""
    shift = tl.where(kept, y - top, 0.0)
    light = tl.where(kept, tl.exp(shift), 0.0)
    part = fixed(tl.where(light > 0, -light * shift, 0.0))
    all_mass, all_dot = statistics[1], statistics[2]
    partial, inside = head > 0, kept
    if partial:
        inside = kept & (number.to(tl.float32) < HEAD_TOKENS)
        edge = tl.min(tl.where(inside, keys, 2147483647), axis=0)
        counted = tl.where(inside, weight + COUNT_BIT, 0)
        all_mass, all_dot = two_sums(counted, tl.where(inside, part, 0))
        count, all_mass = (all_mass >> 48).to(tl.float32), all_mass & (COUNT_BIT - 1)
        surplus = tl.maximum(count - HEAD_TOKENS, 0.0).to(tl.int64)  # ties of the last one
        one, its = one_token(edge, top)
        all_mass, all_dot = all_mass - surplus * one, all_dot - surplus * its
    whole = tl.maximum(all_mass, 1).to(tl.float32) / FIXED_ONE
    form = (partial, tl.log(whole), whole)
    limit = alpha.to(tl.float64) * ENTROPY_SHARE * spread(all_mass, all_dot, form).to(tl.float64)
    store_order(keys, part, slot, lists[0], lists[1])
    dot = sums_above(keys, lists[0], lists[1], found, N)
    fits = spread(mass + weight, dot + part, form).to(tl.float64) <= limit  # its first copy
    fits = inside & fits & (y >= top - LIGHTEST)
    fails = kept & (fits == 0) & (y < top)
    barrier = tl.max(tl.where(fails, keys, NOTHING), axis=0)
    return kept & (keys > barrier), barrier == NOTHING


@triton.jit
def keep_tail_free(ids, keys, kept, weight, number, z, vocab, slot, lists, found, N: tl.constexpr):
    """The kept tokens up to the place where the second differences of their sorted weights sum to more than z."""
    tl.store(lists[2] + slot, ids)
    tl.debug_barrier()
    place = number + ties_before(keys, ids, lists[0], lists[2], found, N)  # of what is kept, from 0 on
    tl.store(lists[1] + slot, weight * 0)
    tl.debug_barrier()
    tl.store(lists[1] + place, weight, mask=kept)
    tl.debug_barrier()
    own = tl.load(lists[1] + slot, mask=slot < found, other=0)
    following = tl.load(lists[1] + slot + 1, mask=slot + 1 < found, other=0)
    third = tl.load(lists[1] + slot + 2, mask=slot + 2 < found, other=0)
    curvature = tl.where(slot < vocab - 2, tl.abs((own - following) - (following - third)), 0)
    limit = z.to(tl.float64) * ENTROPY_SHARE * tl.sum(curvature, axis=0).to(tl.float64)
    within = (tl.cumsum(curvature, axis=0).to(tl.float64) <= limit) & (slot < vocab - 2)
    return kept & ((number <= tl.sum(within.to(tl.int32), axis=0)) | (vocab < 3))


@triton.jit
def take_special(now, value, second, at_first, whole, y, ids, keys, kept, weight, number, mass, top, vocab, slot, lists,
                 found, SPECIAL: tl.constexpr, DEVICES: tl.constexpr, N: tl.constexpr):  # fmt: skip
    """One rule by entropy, distance, moments or curvature: (kept, keys, weight, number, mass, top, whether the list is
    too short).

    whole: moments of the row, for the first rule. SPECIAL: see `search`, from its third member on.
    """
    statistics, short = whole, now < 0
    if (at_first == 0) & (now != TAIL_FREE) & ((now != TOP_H) | (second <= 0)):
        statistics = moments_of(y, kept, weight, top, SPECIAL[3])
    highest = top
    if (now == XTC) | ((now >= BY_FUNCTION) & (now < TAIL_FREE)):
        limit = value_limit(now, statistics, top, value, DEVICES)
        if now == XTC:
            least = tl.min(tl.where(kept & (y >= limit), y, float("inf")), axis=0)
            kept, highest = kept & (y <= least), least
        else:
            kept = kept & (y >= limit)
    if SPECIAL[1]:
        if now == TYPICAL:
            kept = keep_typical(y, kept, weight, value, statistics, top, slot, lists, found, N)
            highest = tl.max(tl.where(kept, y, -float("inf")), axis=0)
    if SPECIAL[2]:
        if now == TOP_H:
            kept, short = keep_top_h(y, keys, kept, weight, number, mass, value, second, statistics, top, slot,
                                     lists, found, N)  # fmt: skip
            short = short & at_first & (second <= 0)
    if SPECIAL[4]:
        if now == TAIL_FREE:
            kept = keep_tail_free(ids, keys, kept, weight, number, value, vocab, slot, lists, found, N)
    if SPECIAL[0]:
        if highest < top:  # the order begins at another token
            top = highest
            keys = tl.where(kept, keys, NOTHING)
            weight = tl.where(kept, fixed(tl.exp(y - top)), 0)
            store_order(keys, weight + tl.where(kept, COUNT_BIT, 0), slot, lists[0], lists[1])
            number, mass = ranks(keys, lists[0], lists[1], found, N)
        elif now == TYPICAL:  # the order was laid over
            store_order(keys, weight + tl.where(kept, COUNT_BIT, 0), slot, lists[0], lists[1])
    return kept, keys, weight, number, mass, top, short
