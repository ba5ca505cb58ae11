"""The fused sampler: two launches; the first splits the vocabulary over programs, the second has one a row.

First launch: statistics of each group of 128 tokens, from one read of the logits. Second launch: a bound from
the group statistics tells which groups can hold a token that matters; their tokens are gathered, exact
thresholds are found by search on ordered integer keys with masses in fixed-point integers, and noise is made
for survivors. Sums that decide anything are integers over a partition that depends on the vocabulary size
alone, so the result does not depend on split, row, or order.

VARIANT is (groups a step, form of the sparse edits (0: none), bitmask?, tuple of pointwise edits).
"""

# ruff: noqa: RUF059, SIM102 (device code: tuples are unpacked whole, and compile-time tests stay apart)
import triton
import triton.language as tl

from .triton_noise import gumbel_at, gumbel_groups
from .triton_tokens import FLOAT_MAX, GROUP, finite_top, key_value, load_groups, ordered_key, scaled

MAX, SUM, NOISE, DOT, COUNT, FIRST, SECOND, SQUARES, RAW_MAX, RAW_SUM = (tl.constexpr(i) for i in range(10))
COUNT_RULE, MASS_RULE, VALUE_RULE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
FIXED_ONE = tl.constexpr(
    34359738368.0
)  # 2**35: V <= 2**18 masses of 1 fit an int64 exactly representable in float64
MASS_SHARE = tl.constexpr(1 - 2.0**-21)  # rules.MASS_SHARE
BELOW_ALL = tl.constexpr(-2139095040)  # ordered key of the lowest finite float
NOISE_BAND = tl.constexpr(1e-3)  # error bound of the first launch's scores around 0


@triton.jit
def fixed(weight):
    """Fixed-point int64 of a weight in [0, 128]."""
    return (weight * FIXED_ONE).to(tl.int64)


@triton.jit
def rule_is_on(kind: tl.constexpr, parameter, vocab):
    if kind == COUNT_RULE:
        return (parameter > 0) & (parameter < vocab)
    elif kind == MASS_RULE:
        return parameter < 1
    else:
        return parameter > 0


@triton.jit
def first_rule(limits, row, rows, vocab, KINDS: tl.constexpr):
    """Index of the first rule that is on for the row; len(KINDS) if none is."""
    first = len(KINDS)
    for i in tl.static_range(len(KINDS)):
        on = rule_is_on(KINDS[i], tl.load(limits + i * rows + row), vocab)
        first = tl.where(on & (first == len(KINDS)), i, first)
    return first


@triton.jit
def group_statistics_kernel(
    logits, stride, vocab, groups_of_vocab, groups, stats, width,
    seeds, positions, streams, temperatures, limits, bitmask, mask_stride, sparse, point_values, rows,
    KINDS: tl.constexpr, VARIANT: tl.constexpr,
    MOMENTS: tl.constexpr, RAW: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Statistics of VARIANT[0] groups of a row into stats [rows, PLANES, width]; grid (rows, programs)."""
    row = tl.program_id(0)
    group = tl.program_id(1) * VARIANT[0] + tl.arange(0, VARIANT[0])
    group = tl.where(group < groups, group, -1)
    x, ids, raw = load_groups(
        group, row, logits + row.to(tl.int64) * stride, vocab, groups_of_vocab, bitmask, mask_stride, sparse,
        point_values, rows, VARIANT,
    )  # fmt: skip
    temperature = tl.load(temperatures + row)
    greedy = temperature <= 0
    if not (greedy | (temperature == 1.0)):
        y = scaled(x, temperature)
    else:
        y = x
    top = tl.max(y, axis=1)
    live = y > -float("inf")
    shift = tl.where(live, tl.maximum(y - top[:, None], -FLOAT_MAX), 0.0)
    weight = tl.where(live, tl.exp(shift), 0.0)
    broken = tl.sum(((raw != raw) | (x != x)).to(tl.int32), axis=1) > 0
    total = tl.where(broken, float("nan"), tl.sum(weight, axis=1))
    at = stats + row.to(tl.int64) * (PLANES * width) + group
    inside = group >= 0
    tl.store(at + MAX * width, top, mask=inside)
    tl.store(at + SUM * width, total, mask=inside)
    if (not greedy) & (first_rule(limits, row, rows, vocab, KINDS) == len(KINDS)):
        seed, position, stream = tl.load(seeds + row), tl.load(positions + row), tl.load(streams + row)
        noise = gumbel_groups(seed, position, stream, tl.maximum(group, 0) * GROUP, VARIANT[0], GROUP)
        if VARIANT[1]:
            beyond = (group >= groups_of_vocab)[:, None]
            noise = tl.where(beyond, gumbel_at(seed, position, stream, tl.maximum(ids, 0)), noise)
        tl.store(
            at + NOISE * width, tl.max(tl.where(live, shift + noise, -float("inf")), axis=1), mask=inside
        )
    if MOMENTS:
        tl.store(at + DOT * width, tl.sum(weight * shift, axis=1), mask=inside)
        tl.store(at + COUNT * width, tl.sum(live.to(tl.float32), axis=1), mask=inside)
        tl.store(at + FIRST * width, tl.sum(shift, axis=1), mask=inside)
        tl.store(at + SECOND * width, tl.sum(shift * shift, axis=1), mask=inside)
        tl.store(at + SQUARES * width, tl.sum(weight * weight, axis=1), mask=inside)
    if RAW:
        raw_top = tl.max(raw, axis=1)
        raw_weight = tl.where(raw > -float("inf"), tl.exp(raw - raw_top[:, None]), 0.0)
        tl.store(at + RAW_MAX * width, raw_top, mask=inside)
        tl.store(at + RAW_SUM * width, tl.sum(raw_weight, axis=1), mask=inside)


@triton.jit
def chunk(start, source, VARIANT: tl.constexpr):
    """Scaled logits and ids [VARIANT[0] * GROUP] of the active groups from `start` on."""
    (
        row,
        logits,
        vocab,
        groups_of_vocab,
        bitmask,
        mask_stride,
        sparse,
        values,
        rows,
        temperature,
        active,
        n,
    ) = source
    slot = start + tl.arange(0, VARIANT[0])
    group = tl.load(active + slot, mask=slot < n, other=-1)
    x, ids, raw = load_groups(
        group,
        row,
        logits,
        vocab,
        groups_of_vocab,
        bitmask,
        mask_stride,
        sparse,
        values,
        rows,
        VARIANT,
    )
    return tl.reshape(scaled(x, temperature), (VARIANT[0] * GROUP,)), tl.reshape(ids, (VARIANT[0] * GROUP,))


@triton.jit
def activate(chosen, group, active):
    """Write the chosen group numbers, in order, to `active`; returns how many there are."""
    slot = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.debug_barrier()
    tl.store(active + slot, group, mask=chosen)
    tl.debug_barrier()
    return tl.sum(chosen.to(tl.int32), axis=0)


@triton.jit
def gather(floor, source, n, listed_x, listed_ids, CAPACITY: tl.constexpr, VARIANT: tl.constexpr):
    """List the tokens of the active groups at or above `floor`, at most CAPACITY; returns their number.

    A number above CAPACITY says only that there are too many to list.
    """
    found = 0
    start = 0
    while (start < n) & (found <= CAPACITY):
        x, ids = chunk(start, source, VARIANT)
        wanted = (x >= floor) & (x > -float("inf"))
        slot = found + tl.cumsum(wanted.to(tl.int32), axis=0) - 1
        wanted = wanted & (slot < CAPACITY)
        tl.store(listed_x + slot, x, mask=wanted)
        tl.store(listed_ids + slot, ids, mask=wanted)
        found += tl.sum(((x >= floor) & (x > -float("inf"))).to(tl.int32), axis=0)
        start += VARIANT[0]
    tl.debug_barrier()
    return found


@triton.jit
def above(x, low, middle, high, top, MASS: tl.constexpr):
    """Count, or fixed-point mass, of the tokens whose key is above each of three keys."""
    key = ordered_key(x)
    if MASS:
        weight = fixed(tl.exp(x - top))
    else:
        weight = (key * 0 + 1).to(tl.int64)
    zero = weight * 0
    return (
        tl.sum(tl.where(key > low, weight, zero), axis=0),
        tl.sum(tl.where(key > middle, weight, zero), axis=0),
        tl.sum(tl.where(key > high, weight, zero), axis=0),
    )


@triton.jit
def sweep_above(low, middle, high, top, x, resident, source, MASS: tl.constexpr, VARIANT: tl.constexpr):
    """`above` over all candidates: the list x if it holds them, else the active groups."""
    a, b, c = above(tl.where(resident, x, -float("inf")), low, middle, high, top, MASS)
    if not resident:
        for start in range(0, source[11], VARIANT[0]):
            y, ids = chunk(start, source, VARIANT)
            a1, b1, c1 = above(y, low, middle, high, top, MASS)
            a, b, c = a + a1, b + b1, c + c1
    return a, b, c


@triton.jit
def search(target, lowest, top, x, resident, source, MASS: tl.constexpr, VARIANT: tl.constexpr):
    """Smallest key K >= lowest with less than `target` (float64) above it; at most the key of `top`."""
    low = lowest.to(tl.int64)
    high = ordered_key(top).to(tl.int64)
    while low < high:
        step = (high - low) // 4
        q1, q2, q3 = low + step, low + 2 * step, low + 3 * step
        a, b, c = sweep_above(
            q1.to(tl.int32), q2.to(tl.int32), q3.to(tl.int32), top, x, resident, source, MASS, VARIANT
        )
        p1, p2, p3 = a.to(tl.float64) < target, b.to(tl.float64) < target, c.to(tl.float64) < target
        high = tl.where(p1, q1, tl.where(p2, q2, tl.where(p3, q3, high)))
        low = tl.where(p1, low, tl.where(p2, q1 + 1, tl.where(p3, q2 + 1, q3 + 1)))
    return high.to(tl.int32)


@triton.jit
def moments(x, key, top):
    """Count, fixed mass, dot, first, second, squares of the tokens at or above a key, relative to top."""
    kept = ordered_key(x) >= key
    shift = tl.where(kept, tl.maximum(x - top, -FLOAT_MAX), 0.0)
    weight = tl.where(kept, tl.exp(shift), 0.0)
    return (
        tl.sum(kept.to(tl.float32), axis=0),
        tl.sum(fixed(weight), axis=0),
        tl.sum(weight * shift, axis=0),
        tl.sum(shift, axis=0),
        tl.sum(shift * shift, axis=0),
        tl.sum(weight * weight, axis=0),
    )


@triton.jit
def sweep_moments(key, top, x, resident, source, VARIANT: tl.constexpr):
    """`moments` over all candidates."""
    # an empty sum first: what the list holds is no part of the sum when it is too short for all candidates
    count, mass, dot, first, second, squares = moments(tl.where(resident, x, -float("inf")), key, top)
    if not resident:
        for start in range(0, source[11], VARIANT[0]):
            y, ids = chunk(start, source, VARIANT)
            count1, mass1, dot1, first1, second1, squares1 = moments(y, key, top)
            count, mass, dot = count + count1, mass + mass1, dot + dot1
            first, second, squares = first + first1, second + second1, squares + squares1
    return count, mass, dot, first, second, squares


@triton.jit
def value_limit(DEVICE: tl.constexpr, top, count, mass, dot, first, second, squares, parameter):
    """Threshold of a value rule from moments relative to top; never above top."""
    mass = mass.to(tl.float32) / FIXED_ONE
    log_mass = tl.log(mass)
    mean = first / count
    variance = second / count - mean * mean
    variance = tl.where(variance == variance, tl.maximum(variance, 0.0), float("inf"))  # inf - inf overflowed
    deviation = tl.sqrt(variance)
    limit = DEVICE(
        top,
        top + log_mass,
        log_mass - dot / mass,
        squares / (mass * mass),
        count,
        top + mean,
        deviation,
        parameter,
    )
    return tl.minimum(limit, top)


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


@triton.jit
def whole_moments(at, width, inside, group_top, group_sum, top):
    """`moments` of all tokens of a row, from its group statistics."""
    factor = tl.where(inside, tl.exp(group_top - top), 0.0)
    lag = tl.where(group_top > -float("inf"), group_top - top, 0.0)
    dots = tl.load(at + DOT * width, mask=inside, other=0.0)
    counts = tl.load(at + COUNT * width, mask=inside, other=0.0)
    firsts = tl.load(at + FIRST * width, mask=inside, other=0.0)
    seconds = tl.load(at + SECOND * width, mask=inside, other=0.0)
    squares = tl.load(at + SQUARES * width, mask=inside, other=0.0)
    return (
        tl.sum(counts, axis=0),
        tl.sum(fixed(group_sum * factor), axis=0),
        tl.sum(tl.where(factor > 0, factor * (dots + group_sum * lag), 0.0), axis=0),
        tl.sum(firsts + counts * lag, axis=0),
        tl.sum(seconds + 2 * firsts * lag + counts * lag * lag, axis=0),
        tl.sum(squares * factor * factor, axis=0),
    )


@triton.jit
def first_bound(begin, limits, row, rows, group_top, inside, top, whole,
                KINDS: tl.constexpr, DEVICES: tl.constexpr):  # fmt: skip
    """Key of the lowest token that the row's first active rule can keep."""
    key = tl.full((), BELOW_ALL, tl.int32)
    count, mass, dot, first, second, squares = whole
    for i in tl.static_range(len(KINDS)):
        if begin == i:
            parameter = tl.load(limits + i * rows + row)
            if KINDS[i] == COUNT_RULE:
                key = bound_by_groups(parameter.to(tl.float64), group_top, top, inside.to(tl.int32))
            elif KINDS[i] == MASS_RULE:
                target = parameter.to(tl.float64) * MASS_SHARE * mass.to(tl.float64)
                weight = tl.where(inside, tl.exp(group_top - top), 0.0)
                key = bound_by_groups(target, group_top, top, fixed(weight))
            else:
                key = ordered_key(
                    value_limit(DEVICES[i], top, count, mass, dot, first, second, squares, parameter)
                )
    return tl.maximum(key, BELOW_ALL)


@triton.jit
def choose_groups(begin, greedy, key, group_top, inside, top, scores, COUNT_OF_RULES: tl.constexpr):
    """The groups that can hold a token which matters: kept, highest, or winning by rough scores."""
    chosen = (ordered_key(group_top) >= key) & inside
    if begin == COUNT_OF_RULES:
        score = tl.load(scores, mask=inside, other=-float("inf")) + (group_top - top)
        near = score >= tl.max(tl.where(greedy, 0.0, score), axis=0) - NOISE_BAND
        chosen = chosen & tl.where(greedy, group_top == top, near)
    return chosen


@triton.jit
def narrow(
    begin,
    key,
    limits,
    row,
    rows,
    vocab,
    top,
    whole,
    x,
    resident,
    source,
    KINDS: tl.constexpr,
    DEVICES: tl.constexpr,
    NEEDS: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """Key of the lowest token that all rules keep."""
    count, mass, dot, first, second, squares = whole
    for i in tl.static_range(len(KINDS)):
        parameter = tl.load(limits + i * rows + row)
        if (begin <= i) & rule_is_on(KINDS[i], parameter, vocab):
            if KINDS[i] == COUNT_RULE:
                key = search(parameter.to(tl.float64), key, top, x, resident, source, False, VARIANT)
            elif KINDS[i] == MASS_RULE:
                if begin < i:
                    mass, b, c = sweep_above(key - 1, key, key, top, x, resident, source, True,
                                             VARIANT)  # fmt: skip
                target = parameter.to(tl.float64) * MASS_SHARE * mass.to(tl.float64)
                key = search(target, key, top, x, resident, source, True, VARIANT)
            elif i > 0:
                if begin < i:
                    if NEEDS[i]:
                        count, mass, dot, first, second, squares = sweep_moments(
                            key, top, x, resident, source, VARIANT
                        )
                    limit = value_limit(DEVICES[i], top, count, mass, dot, first, second, squares, parameter)
                    key = tl.maximum(key, ordered_key(limit))
    return key


@triton.jit
def best_of(x, ids, key, top, greedy, seed, position, stream):
    """(score, token, logit) of the winner among the tokens at or above a key; lowest id on ties."""
    kept = ordered_key(x) >= key
    noise = gumbel_at(seed, position, stream, tl.maximum(ids, 0))
    score = tl.where(kept, (x - top) + tl.where(greedy, 0.0, noise), -float("inf"))
    best = tl.max(score, axis=0)
    token = tl.min(tl.where(kept & (score == best), ids, 2147483647), axis=0)
    return best, token, tl.max(tl.where(kept & (ids == token), x, -float("inf")), axis=0)


@triton.jit
def pick(key, top, greedy, seed, position, stream, x, ids, resident, source, VARIANT: tl.constexpr):
    """(token, logit) drawn from all candidates at or above a key."""
    best, token, value = best_of(x, ids, key, top, greedy, seed, position, stream)
    if not resident:
        best, token = tl.full((), -float("inf"), tl.float32), tl.full((), 2147483647, tl.int32)
        for start in range(0, source[11], VARIANT[0]):
            y, there = chunk(start, source, VARIANT)
            score, candidate, logit = best_of(y, there, key, top, greedy, seed, position, stream)
            wins = (score > best) | ((score == best) & (candidate < token))
            best = tl.where(wins, score, best)
            token = tl.where(wins, candidate, token)
            value = tl.where(wins, logit, value)
    return token, value


@triton.jit
def report(
    token,
    value,
    key,
    begin,
    top,
    whole,
    raw,
    x,
    resident,
    source,
    group,
    group_top,
    inside,
    floats,
    counts,
    COUNT_OF_RULES: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """Store log-probabilities, entropy, kept count and rank of the drawn token."""
    row, logits, rows, active = source[0], source[1], source[8], source[10]
    count, mass, dot, first, second, squares = whole
    if begin < COUNT_OF_RULES:
        count, mass, dot, first, second, squares = sweep_moments(key, top, x, resident, source, VARIANT)
        higher, b, c = sweep_above(ordered_key(value), key, key, top, x, resident, source, False,
                                   VARIANT)  # fmt: skip
    else:
        n = activate((group_top > value) & inside, group, active)
        vocab, of_vocab, mask, mask_stride = source[2], source[3], source[4], source[5]
        wide = (
            row,
            logits,
            vocab,
            of_vocab,
            mask,
            mask_stride,
            source[6],
            source[7],
            rows,
            source[9],
            active,
            n,
        )
        higher, b, c = sweep_above(ordered_key(value), key, key, top, x, False, wide, False,
                                   VARIANT)  # fmt: skip
    total = mass.to(tl.float32) / FIXED_ONE
    log_mass = tl.log(total)
    raw_top, raw_sum = raw
    highest = tl.max(raw_top, axis=0)
    raw_mass = tl.sum(tl.where(inside, raw_sum * tl.exp(raw_top - highest), 0.0), axis=0)
    given = finite_top(tl.load(logits + token, mask=token < source[2], other=float("nan")).to(tl.float32))
    tl.store(floats + row, (given - highest) - tl.log(raw_mass))
    tl.store(floats + rows + row, (value - top) - log_mass)
    tl.store(floats + 2 * rows + row, log_mass - dot / total)
    tl.store(counts + row, count.to(tl.int64))
    tl.store(counts + rows + row, higher + 1)


@triton.jit
def report_nothing(row, rows, tokens, floats, counts, LOGPROBS: tl.constexpr):
    """Store the result of a row without a drawable token."""
    tl.store(tokens + row, tl.full((), -1, tl.int64))
    if LOGPROBS:
        for i in tl.static_range(3):
            tl.store(floats + i * rows + row, float("nan"))
        for i in tl.static_range(2):
            tl.store(counts + i * rows + row, tl.full((), 0, tl.int64))


@triton.jit
def sample_kernel(
    logits, stride, vocab, groups_of_vocab, groups, stats, width,
    active, listed_x, listed_ids, tokens, floats, counts,
    seeds, positions, streams, temperatures, limits, bitmask, mask_stride, sparse, point_values, rows,
    KINDS: tl.constexpr, DEVICES: tl.constexpr, NEEDS: tl.constexpr,
    VARIANT: tl.constexpr, MOMENTS: tl.constexpr, LOGPROBS: tl.constexpr,
    PLANES: tl.constexpr, WIDTH: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """One row: threshold, draw and report, from the statistics of the first launch; grid (rows,)."""
    row = tl.program_id(0)
    group = tl.arange(0, WIDTH)
    inside = group < groups
    at = stats + row.to(tl.int64) * (PLANES * width) + group
    group_top = tl.load(at + MAX * width, mask=inside, other=-float("inf"))
    group_sum = tl.load(at + SUM * width, mask=inside, other=0.0)
    top = tl.max(group_top, axis=0)
    if (top == -float("inf")) | (tl.sum((group_sum != group_sum).to(tl.int32), axis=0) > 0):
        report_nothing(row, rows, tokens, floats, counts, LOGPROBS)
        return
    temperature = tl.load(temperatures + row)
    greedy = temperature <= 0
    temperature = tl.where(greedy, 1.0, temperature)
    if MOMENTS:
        whole = whole_moments(at, width, inside, group_top, group_sum, top)
    else:
        mass = tl.sum(fixed(group_sum * tl.where(inside, tl.exp(group_top - top), 0.0)), axis=0)
        one = tl.full((), 1.0, tl.float32)
        whole = (one, mass, one, one, one, one)
    begin = tl.where(greedy, len(KINDS), first_rule(limits, row, rows, vocab, KINDS))
    key = first_bound(begin, limits, row, rows, group_top, inside, top, whole, KINDS, DEVICES)
    chosen = choose_groups(begin, greedy, key, group_top, inside, top, at + NOISE * width, len(KINDS))
    active += row.to(tl.int64) * width
    listed_x += row.to(tl.int64) * CAPACITY
    listed_ids += row.to(tl.int64) * CAPACITY
    n = activate(chosen, group, active)
    source = (row, logits + row.to(tl.int64) * stride, vocab, groups_of_vocab, bitmask, mask_stride, sparse,
              point_values, rows, temperature, active, n)  # fmt: skip
    found = gather(key_value(key), source, n, listed_x, listed_ids, CAPACITY, VARIANT)
    slot = tl.arange(0, CAPACITY)
    x = tl.load(listed_x + slot, mask=slot < found, other=-float("inf"))
    ids = tl.load(listed_ids + slot, mask=slot < found, other=-1)
    resident = found <= CAPACITY
    key = narrow(begin, key, limits, row, rows, vocab, top, whole, x, resident, source, KINDS, DEVICES, NEEDS,
                 VARIANT)  # fmt: skip
    seed, position, stream = tl.load(seeds + row), tl.load(positions + row), tl.load(streams + row)
    token, value = pick(key, top, greedy, seed, position, stream, x, ids, resident, source, VARIANT)
    tl.store(tokens + row, token.to(tl.int64))
    if LOGPROBS:
        raw_top = tl.load(at + RAW_MAX * width, mask=inside, other=-float("inf"))
        raw = (raw_top, tl.load(at + RAW_SUM * width, mask=inside, other=0.0))
        report(token, value, key, begin, top, whole, raw, x, resident, source, group, group_top, inside,
               floats, counts, len(KINDS), VARIANT)  # fmt: skip
