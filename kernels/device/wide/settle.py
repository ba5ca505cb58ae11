"""What the steps leave of a wide row: each boundary is searched for exactly, eight keys at a time, in the row's list.

A row with more tokens than the list takes is read instead. A table is (whether the list is held, its end in groups or
the row's, source, the groups' maxima, lowest logit, list, its length); what is left is a state: (key of the lowest
token, last id of those at it, key of the highest token, its logit). SPECIAL, DEVICES: see `row`.
"""

# ruff: noqa: RUF059, SIM102 (device code: tuples are unpacked whole, and compile-time tests stay apart)
import triton
import triton.language as tl

from ..steps import (
    BY_FUNCTION,
    CUT_TIES,
    ENTROPY_SHARE,
    HEAD,
    HEAD_TOKENS,
    KEEP_MASS,
    KEEP_VALUE,
    LIGHTEST,
    MASS_SHARE,
    TAIL_FREE,
    TAIL_TOKENS,
    TOP_H,
    TYPICAL,
    XTC,
    entry,
    min_p_limit,
    one_token,
    value_limit,
)
from ..sums import BELOW_ALL, FIXED_ONE, fixed, moments, no_moments, plus, spread, totals
from ..tokens import GROUP, key_value, ordered_key
from .rows import read

PIVOTS = tl.constexpr(8)
STEP = tl.constexpr(4)  # groups at a time
LAST = tl.constexpr(2147483647)


@triton.jit
def entries(start, table, POINTS: tl.constexpr):
    """Scaled logits and ids [STEP * GROUP] from `start` on: of the list if it is held, else of the row's groups."""
    held, end, source, tops, least, lists, found = table
    if held:
        slot = start * GROUP + tl.arange(0, STEP * GROUP)
        pair = tl.load(lists + slot, mask=slot < found, other=-36028792723996673)  # -inf, -1
        y, ids = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True), pair.to(tl.int32)
    else:
        y, ids = read(start, source, tops, least, STEP, POINTS)
    return y, ids


@triton.jit
def is_left(y, ids, state):
    """Whether tokens are left."""
    own, edge = ordered_key(y), state[0]
    return ((own > edge) | ((own == edge) & (ids <= state[1]))) & (own <= state[2]) & (y > -float("inf"))


@triton.jit
def rank_key(y, centre, by_distance, top, SPECIAL: tl.constexpr):
    """int32 that orders tokens as a step ranks them."""
    key = ordered_key(y)
    if len(SPECIAL) > 0:
        if SPECIAL[1]:
            key = tl.where(by_distance, ordered_key(-tl.abs((y - top) - centre)), key)
    return key


@triton.jit
def beyond(pivots, last_ids, by_mass, by_distance, centre, state, lump, table,
           POINTS: tl.constexpr, SPECIAL: tl.constexpr):  # fmt: skip
    """For each of eight keys, number or mass, and sum of -weight * shift where asked for, of the tokens above it and of
    those at it with an id up to `last_ids`: of the list and the lump (key, number), or of the row."""
    total, top = tl.zeros((STEP * GROUP, PIVOTS), tl.int64), state[3]
    dots = total
    for start in range(0, table[1], STEP):
        y, ids = entries(start, table, POINTS)
        kept, weight = y > -float("inf"), tl.exp(y - top)
        if len(SPECIAL) > 0:
            kept = is_left(y, ids, state)
        own = rank_key(y, centre, by_distance, top, SPECIAL)[:, None]
        unit = tl.where(kept, tl.where(by_mass, fixed(weight), 1), 0)
        over = (own > pivots[None, :]) | ((own == pivots[None, :]) & (ids[:, None] <= last_ids[None, :]))
        total += tl.where(over, unit[:, None], 0)
        if len(SPECIAL) > 0:
            if SPECIAL[2]:
                its = fixed(tl.where(kept & (weight > 0), -weight * (y - top), 0.0))
                dots += tl.where(over, its[:, None], 0)
    one = tl.where(by_mass, fixed(tl.exp(key_value(lump[0]) - top)), 1) * lump[1]
    with_lump = (pivots < lump[0]) | ((pivots == lump[0]) & (last_ids == LAST))
    amount = tl.sum(total, axis=0) + tl.where(with_lump, one, 0)
    part = amount
    if len(SPECIAL) > 0:
        if SPECIAL[2]:
            part = tl.sum(dots, axis=0)
    return amount, part


@triton.jit
def sums_left(floor, state, table, POINTS: tl.constexpr, FULL: tl.constexpr):
    """`sums.moments` of what is left at or above a key."""
    top = state[3]
    found = no_moments(STEP * GROUP)
    for start in range(0, table[1], STEP):
        y, ids = entries(start, table, POINTS)
        kept = is_left(y, ids, state) & (ordered_key(y) >= floor)
        found = plus(found, moments(y, kept, top, FULL))
    return totals(found, FULL)


@triton.jit
def extent(rank, by_distance, centre, state, table, POINTS: tl.constexpr, SPECIAL: tl.constexpr):
    """Lowest and highest key of what is left and ranks at or above a key."""
    first = tl.full((STEP * GROUP,), LAST, tl.int32)
    last = -first
    for start in range(0, table[1], STEP):
        y, ids = entries(start, table, POINTS)
        inside = is_left(y, ids, state) & (rank_key(y, centre, by_distance, state[3], SPECIAL) >= rank)
        own = ordered_key(y)
        first, last = (
            tl.minimum(first, tl.where(inside, own, LAST)),
            tl.maximum(last, tl.where(inside, own, -LAST)),
        )
    return tl.min(first, axis=0), tl.max(last, axis=0)


@triton.jit
def run_below(key, place, state, table, POINTS: tl.constexpr):
    """(highest key that is left below a key, how many tokens are at it, the weight of one); 0 of them from place
    TAIL_TOKENS on."""
    best = tl.full((STEP * GROUP,), -LAST, tl.int32)
    many = best * 0
    end = tl.where(place < TAIL_TOKENS, table[1], 0)
    for start in range(0, end, STEP):
        y, ids = entries(start, table, POINTS)
        own = ordered_key(y)
        own = tl.where(is_left(y, ids, state) & (own < key), own, -LAST)
        many = tl.where(own > best, 1, many + (own == best).to(tl.int32))
        best = tl.maximum(best, own)
    found = tl.max(best, axis=0)
    number = tl.where(found > -LAST, tl.sum(tl.where(best == found, many, 0), axis=0), 0)
    return found, number, tl.where(number > 0, fixed(tl.exp(key_value(found) - state[3])), 0)


@triton.jit
def tail_free(z, state, table, POINTS: tl.constexpr):
    """Key of the last token that tail-free sampling keeps: run by run of equal ones, inside of which nothing bends."""
    limit, key = z.to(tl.float64), state[2]
    ends = table[2][2] - 2  # the last two tokens of a vocabulary have no second difference
    for turn in range(2):  # the whole sum, then where its share is passed
        total, going = tl.full((), 0, tl.int64), turn >= 0
        key, many, own = run_below(state[2] * 0 + LAST, state[2] * 0, state, table, POINTS)
        place = many
        following, others, weight = run_below(key, place, state, table, POINTS)
        while going:
            third, more, light = run_below(following, place + others, state, table, POINTS)
            total += tl.where((many > 1) & (place - 2 < ends), tl.abs(own - weight), 0)
            bend = (own - weight) - (weight - tl.where(others > 1, weight, light))
            total += tl.where(place - 1 < ends, tl.abs(bend), 0)
            passed = (turn > 0) & (ends > 0) & ((total.to(tl.float64) > limit) | (place > ends))
            going = (others > 0) & (passed == 0)
            if going:
                key, many, own = following, others, weight
                following, others, weight = third, more, light
                place += many
        limit = tl.where(turn == 0, limit * ENTROPY_SHARE * total.to(tl.float64), limit)
    return key


@triton.jit
def search(low, high, target, asked, share, by, centre, form, base, state, lump, table,
           POINTS: tl.constexpr, SPECIAL: tl.constexpr):  # fmt: skip
    """(the lowest key, or id, in [low, high] with less than `target` above it, that amount, its -weight * shift).

    asked: whether target is a share of the mass of what is left, to be found first. by: (id?, mass?, distance?,
    entropy?). form: see `sums.spread`. base: (number, mass) of the tokens above the list.
    """
    by_id, by_mass, by_distance, by_entropy = by
    start = tl.where(by_mass, base[1], base[0])
    above, dots = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    while (low < high) | asked:
        middle = low + (high - low) * (tl.arange(0, PIVOTS) + 1) // (PIVOTS + 1)
        pivots = tl.where(by_id | asked, state[0], middle.to(tl.int32))
        lasts = tl.where(asked, state[1], tl.where(by_id, middle.to(tl.int32), -2))
        amount, dot = beyond(pivots, lasts, by_mass, by_distance & (asked == 0), centre, state, lump, table,
                             POINTS, SPECIAL)  # fmt: skip
        amount += start
        if asked:
            target = share * tl.max(amount, axis=0).to(tl.float64)
            asked = asked & (asked == 0)
        else:
            enough = tl.where(by_id, amount.to(tl.float64) >= target, amount.to(tl.float64) < target)
            if len(SPECIAL) > 0:
                if SPECIAL[2]:
                    enough = tl.where(by_entropy, spread(amount, dot, form).to(tl.float64) <= target, enough)
                    above = tl.maximum(above, tl.max(tl.where(enough, amount, 0), axis=0))
                    dots = tl.maximum(dots, tl.max(tl.where(enough, dot, 0), axis=0))
            low = tl.max(tl.where(enough, low, middle + 1), axis=0)
            high = tl.min(tl.where(enough, middle, high), axis=0)
    return high.to(tl.int32), above, dots


@triton.jit
def entropy_form(statistics, partial, head, top):
    """(mass, -weight * shift, form) of an entropy's whole: of all that is left, or of its hundred highest tokens."""
    count, mass, dot, first, second, squares = statistics
    surplus = tl.where(partial, tl.maximum(count - HEAD_TOKENS, 0.0), 0.0).to(
        tl.int64
    )  # ties of the last one
    one, its = one_token(head, top)
    mass, dot = mass - surplus * one, dot - surplus * its
    whole = tl.maximum(mass, 1).to(tl.float32) / FIXED_ONE
    return mass, dot, (partial, tl.log(whole), whole)


@triton.jit
def settle(row_steps, steps, whole, statistics, top, base, lump, span, table,
           POINTS: tl.constexpr, SPECIAL: tl.constexpr, DEVICES: tl.constexpr):  # fmt: skip
    """The state after all steps.

    whole: mass of the row. statistics: its moments, where the first step asks for them. base: see `search`. span:
    (lowest, highest) key that the first boundary can have. lump: see `beyond`.
    """
    kinds, parameters, seconds, on = row_steps
    edge, last_id, ceiling = span[0], tl.full((), LAST, tl.int32), ordered_key(top)
    head, taken = edge, steps * 0
    for i in range(steps):
        if entry(on.to(tl.int32), i) > 0:
            kind, value = entry(kinds, i), entry(parameters, i)
            state, below = (edge, last_id, ceiling, top), edge
            direct = kind == KEEP_VALUE
            near, partial, by_entropy = taken < 0, taken < 0, taken < 0
            if len(SPECIAL) > 0:
                direct = direct | (kind == XTC) | ((kind >= BY_FUNCTION) & (kind < TAIL_FREE))
                near, by_entropy = kind == TYPICAL, kind == TOP_H
                partial = by_entropy & (entry(seconds, i) > 0)
                below = tl.where(partial, tl.maximum(edge, head), edge)
                if (kind >= XTC) & (kind != HEAD) & (kind != TAIL_FREE) & (taken > 0):
                    statistics = sums_left(below, state, table, POINTS, SPECIAL[3])
            if direct:
                if len(SPECIAL) > 0:
                    limit = value_limit(kind, statistics, top, value, DEVICES)
                else:
                    limit = min_p_limit(top, value)
                key = tl.where(limit == limit, ordered_key(limit), LAST)
                if len(SPECIAL) > 0:
                    if kind == XTC:
                        ceiling, unused = extent(key, near, top, state, table, POINTS, SPECIAL)
                        key = edge
            else:
                by_id, by_mass = kind == CUT_TIES, kind == KEEP_MASS
                share = value.to(tl.float64) * tl.where(by_mass, MASS_SHARE, 1.0)
                target = tl.where(by_mass, share * whole.to(tl.float64), share)
                low = tl.where(by_id, 0, edge).to(tl.int64)
                high = tl.maximum(tl.minimum(span[1], ceiling), edge)
                high = tl.where(by_id, table[2][2] - 1, high).to(tl.int64)
                centre, form = top, (partial, top, top)
                if len(SPECIAL) > 0:
                    mass, dot, form = entropy_form(statistics, partial, head, top)
                    centre = -(dot.to(tl.float32) / tl.maximum(mass, 1).to(tl.float32))
                    low, high = tl.where(near, BELOW_ALL, low), tl.where(near, 0, high)
                    least = tl.maximum(value.to(tl.float64) * MASS_SHARE * mass.to(tl.float64), 1.0)
                    target = tl.where(kind == HEAD, HEAD_TOKENS, tl.where(near, least, target))
                    low = tl.where(by_entropy, tl.maximum(below, ordered_key(top - LIGHTEST)), low)
                    most = value.to(tl.float64) * ENTROPY_SHARE * spread(mass, dot, form).to(tl.float64)
                    target = tl.where(by_entropy, most, target)
                    if SPECIAL[4]:
                        if kind == TAIL_FREE:  # nothing is left to search
                            low = tail_free(value, state, table, POINTS).to(tl.int64)
                            high = low
                key, above, dots = search(low, high, target, by_mass & (taken > 0), share,
                                          (by_id, by_mass | near | by_entropy, near, by_entropy), centre, form, base,
                                          state, lump, table, POINTS, SPECIAL)  # fmt: skip
                last_id = tl.where(by_id, key, last_id)
                key = tl.where(by_id, edge, key)
                if len(SPECIAL) > 0:
                    if SPECIAL[1]:
                        if near:
                            key, ceiling = extent(key, near, centre, state, table, POINTS, SPECIAL)
                    if SPECIAL[2]:
                        if by_entropy:
                            weight, part = one_token(key, top)
                            fits = spread(above + weight, dots + part, form).to(tl.float64) <= most
                            if (fits == 0) & (key < ceiling):  # the first copy of the next token is too much
                                key, unused = extent(key + 1, near, top, state, table, POINTS, SPECIAL)
                    head = tl.where(kind == HEAD, key, head)
                    key = tl.where(kind == HEAD, edge, key)
            last_id = tl.where(key > edge, LAST, last_id)
            edge = tl.maximum(edge, key)
            if len(SPECIAL) > 0:
                if ceiling < state[2]:
                    top = key_value(ceiling)
            taken += 1
    return edge, last_id, ceiling, top
