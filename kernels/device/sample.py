"""The fused sampler: two launches; the first splits the vocabulary over programs, the second has one a row.

First launch: statistics of each group of 128 tokens, from one read of the logits. Second launch: a bound from
the group statistics tells which groups can hold a token that matters; their tokens are gathered, exact
thresholds are found by search on ordered integer keys with masses in fixed-point integers, and noise is made
for survivors. Sums that decide anything are integers over a partition that depends on the vocabulary size
alone, so the result does not depend on split, row, or order.

STEPS, DEVICES and NEEDS describe the truncation rules (`triton_steps`), VARIANT what is compiled in
(`triton_search`), PLAIN the same for the logits as given.
"""

# ruff: noqa: RUF059 (device code: tuples are unpacked whole)
import triton
import triton.language as tl

from ..noise.philox_triton import gumbel_at, gumbel_groups
from .search import BELOW_ALL, FIXED_ONE, activate, bound_by_groups, chunk, fixed, moments, plus
from .steps import (
    KEEP_COUNT,
    KEEP_MASS,
    KEEP_VALUE,
    MASS_SHARE,
    first_step,
    narrow,
    step_at,
    toss,
    value_limit,
)
from .tokens import FLOAT_MAX, GROUP, finite_top, load_groups, ordered_key, scaled
from .top import write_top

MAX, SUM, NOISE, DOT, LIVE, MEAN, DEVIATION, SQUARES, RAW_MAX, RAW_SUM = (tl.constexpr(i) for i in range(10))
NOISE_BAND = tl.constexpr(1e-3)  # error bound of the first launch's scores around 0
FAR = tl.constexpr(1.2e18)  # shifts beyond it are squared at a smaller scale
SHRINK = tl.constexpr(8.271806125530277e-25)  # 2**-80


@triton.jit
def centred(shift, live):
    """Count, mean and standard deviation of each row of shifts [R, GROUP], also where squares overflow."""
    count = tl.sum(live.to(tl.float32), axis=1)
    share = 1.0 / tl.maximum(count, 1.0)
    mean = tl.sum(tl.where(live, shift * share[:, None], 0.0), axis=1)
    lag = tl.where(live, shift - mean[:, None], 0.0)
    scale = tl.where(tl.max(tl.abs(lag), axis=1) > FAR, SHRINK, 1.0)
    lag = lag * scale[:, None]
    return count, mean, tl.sqrt(tl.sum(lag * lag * share[:, None], axis=1)) / scale


@triton.jit
def group_statistics_kernel(
    logits, stride, vocab, groups_of_vocab, groups, stats, width,
    seeds, positions, streams, temperatures, limits, bitmask, mask_stride, sparse, point_values, rows,
    STEPS: tl.constexpr, VARIANT: tl.constexpr,
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
    tossed = toss(seeds, positions, streams, row, STEPS)
    if (not greedy) & (first_step(limits, row, rows, vocab, tossed, STEPS) == len(STEPS)):
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
        count, mean, deviation = centred(shift, live)
        tl.store(at + LIVE * width, count, mask=inside)
        tl.store(at + MEAN * width, mean, mask=inside)
        tl.store(at + DEVIATION * width, deviation, mask=inside)
        tl.store(at + SQUARES * width, tl.sum(weight * weight, axis=1), mask=inside)
    if RAW:
        raw_top = tl.max(raw, axis=1)
        raw_weight = tl.where(raw > -float("inf"), tl.exp(raw - raw_top[:, None]), 0.0)
        tl.store(at + RAW_MAX * width, raw_top, mask=inside)
        unread = tl.sum((raw != raw).to(tl.int32), axis=1) > 0
        raw_total = tl.where(unread, float("nan"), tl.sum(raw_weight, axis=1))
        tl.store(at + RAW_SUM * width, raw_total, mask=inside)


@triton.jit
def whole_moments(at, width, inside, group_top, group_sum, top):
    """`moments` of all tokens of a row, from its group statistics."""
    factor = tl.where(inside, tl.exp(group_top - top), 0.0)
    lag = tl.where(group_top > -float("inf"), tl.maximum(group_top - top, -FLOAT_MAX), 0.0)
    dots = tl.load(at + DOT * width, mask=inside, other=0.0)
    counts = tl.load(at + LIVE * width, mask=inside, other=0.0)
    mean = tl.load(at + MEAN * width, mask=inside, other=0.0).to(tl.float64) + lag
    deviation = tl.load(at + DEVIATION * width, mask=inside, other=0.0).to(tl.float64)
    squares = tl.load(at + SQUARES * width, mask=inside, other=0.0)
    return (
        tl.sum(counts, axis=0),
        tl.sum(fixed(group_sum * factor), axis=0),
        tl.sum(fixed(tl.where(factor > 0, -factor * (dots + group_sum * lag), 0.0)), axis=0),
        tl.sum(counts * mean, axis=0),
        tl.sum(counts * (deviation * deviation + mean * mean), axis=0),
        tl.sum(squares * factor * factor, axis=0),
    )


@triton.jit
def first_bound(begin, limits, row, rows, group_top, inside, top, whole,
                STEPS: tl.constexpr, DEVICES: tl.constexpr):  # fmt: skip
    """Key of the lowest token that the row's first active step can keep."""
    key = tl.full((), BELOW_ALL, tl.int32)
    kind, parameter, second = step_at(begin, limits, row, rows, STEPS)
    if begin < len(STEPS):
        if kind == KEEP_VALUE:
            key = ordered_key(value_limit(begin, whole, top, parameter, STEPS, DEVICES))
        if (kind == KEEP_COUNT) | (kind == KEEP_MASS):
            by_mass = kind == KEEP_MASS
            weight = fixed(tl.where(inside, tl.exp(group_top - top), 0.0))
            weight = tl.where(by_mass, weight, inside.to(tl.int64))
            target = parameter.to(tl.float64)
            target = tl.where(by_mass, target * MASS_SHARE * whole[1].to(tl.float64), target)
            key = bound_by_groups(target, group_top, top, weight)
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
def best_of(x, ids, key, top, greedy, seed, position, stream):
    """(score, token, logit) of the winner among the tokens at or above a key; lowest id on ties."""
    kept = ordered_key(x) >= key
    noise = gumbel_at(seed, position, stream, tl.maximum(ids, 0))
    score = tl.where(kept, (x - top) + tl.where(greedy, 0.0, noise), -float("inf"))
    best = tl.max(score, axis=0)
    token = tl.min(tl.where(kept & (score == best), ids, 2147483647), axis=0)
    return best, token, tl.max(tl.where(kept & (ids == token), x, -float("inf")), axis=0)


@triton.jit
def pick(key, top, greedy, seed, position, stream, x, ids, held, source, bounds, VARIANT: tl.constexpr):
    """(token, logit) drawn from all candidates at or above a key."""
    best, token, value = best_of(x, ids, key, top, greedy, seed, position, stream)
    if held == 0:
        best, token = tl.full((), -float("inf"), tl.float32), tl.full((), 2147483647, tl.int32)
        for start in range(0, source[11], VARIANT[0]):
            y, there = chunk(start, source, bounds, VARIANT)
            score, candidate, logit = best_of(y, there, key, top, greedy, seed, position, stream)
            wins = (score > best) | ((score == best) & (candidate < token))
            best = tl.where(wins, score, best)
            token = tl.where(wins, candidate, token)
            value = tl.where(wins, logit, value)
    return token, value


@triton.jit
def moments_and_rank(x, key, top, value):
    """(count, mass, sum of -weight * shift, number of tokens above a value) of the tokens at or above a key."""
    count, mass, dot, first, second, squares = moments(x, key, top, False)
    return count, mass, dot, tl.sum((x > value).to(tl.int64), axis=0)


@triton.jit
def report(token, value, key, top, dropped, whole, truncated, raw, x, held, source, bounds, inside, floats, counts,
           VARIANT: tl.constexpr):  # fmt: skip
    """Store log-probabilities, entropy, kept count and rank of the drawn token."""
    row, logits, vocab, rows = source[0], source[1], source[2], source[8]
    found = moments_and_rank(tl.where(held > 0, x, -float("inf")), key, top, value)
    if held == 0:
        for start in range(0, source[11], VARIANT[0]):
            y, there = chunk(start, source, bounds, VARIANT)
            found = plus(found, moments_and_rank(y, key, top, value))
    count, mass, dot, higher = found
    count, mass = tl.where(truncated, count, whole[0]), tl.where(truncated, mass, whole[1])
    dot = tl.where(truncated, dot, whole[2])
    total = mass.to(tl.float32) / FIXED_ONE
    log_mass = tl.log(total)
    raw_top, raw_sum = raw
    highest = tl.max(raw_top, axis=0)
    raw_mass = tl.sum(tl.where(inside, raw_sum * tl.exp(raw_top - highest), 0.0), axis=0)
    given = finite_top(tl.load(logits + token, mask=token < vocab, other=float("nan")).to(tl.float32))
    tl.store(floats + row, (given - highest) - tl.log(raw_mass))
    tl.store(floats + rows + row, (value - top) - log_mass)
    tl.store(floats + 2 * rows + row, log_mass + dot.to(tl.float32) / FIXED_ONE / total)
    tl.store(counts + row, count.to(tl.int64))
    tl.store(counts + rows + row, higher + dropped + 1)


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
    active, listed_x, listed_ids, tokens, floats, counts, top_ids, top_logprobs, n_top,
    seeds, positions, streams, temperatures, limits, bitmask, mask_stride, sparse, point_values, rows,
    STEPS: tl.constexpr, DEVICES: tl.constexpr, NEEDS: tl.constexpr,
    VARIANT: tl.constexpr, MOMENTS: tl.constexpr, LOGPROBS: tl.constexpr,
    PLANES: tl.constexpr, WIDTH: tl.constexpr, CAPACITY: tl.constexpr, TOP: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """One row: threshold, draw and report, from the statistics of the first launch; grid (rows,)."""
    row = tl.program_id(0)
    group = tl.arange(0, WIDTH)
    inside = group < groups
    at = stats + row.to(tl.int64) * (PLANES * width) + group
    group_top = tl.load(at + MAX * width, mask=inside, other=-float("inf"))
    group_sum = tl.load(at + SUM * width, mask=inside, other=0.0)
    active += row.to(tl.int64) * width
    lists = (listed_x + row.to(tl.int64) * CAPACITY, listed_ids + row.to(tl.int64) * CAPACITY)
    if TOP > 0:
        raw_top = tl.load(at + RAW_MAX * width, mask=inside, other=-float("inf"))
        raw_sum = tl.load(at + RAW_SUM * width, mask=inside, other=0.0)
        given = (row, logits + row.to(tl.int64) * stride, vocab, groups_of_vocab, bitmask, mask_stride, sparse,
                 point_values, rows, tl.full((), 1.0, tl.float32), active, row * 0)  # fmt: skip
        at_top = row.to(tl.int64) * n_top
        write_top(row * 0 + n_top, raw_top, raw_sum, group, inside, given, lists, top_ids + at_top,
                  top_logprobs + at_top, TOP, CAPACITY, PLAIN)  # fmt: skip
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
        one, wide = tl.full((), 1.0, tl.float32), tl.full((), 0.0, tl.float64)
        whole = (one, mass, mass * 0, wide, wide, one)
    tossed = toss(seeds, positions, streams, row, STEPS)
    begin = first_step(limits, row, rows, vocab, tossed, STEPS)
    begin = tl.where(greedy, len(STEPS), begin)
    key = first_bound(begin, limits, row, rows, group_top, inside, top, whole, STEPS, DEVICES)
    chosen = choose_groups(begin, greedy, key, group_top, inside, top, at + NOISE * width, len(STEPS))
    n = activate(chosen, group, active)
    source = (row, logits + row.to(tl.int64) * stride, vocab, groups_of_vocab, bitmask, mask_stride, sparse,
              point_values, rows, temperature, active, n)  # fmt: skip
    key, top, bounds, dropped, x, ids, held = narrow(
        begin, key, limits, row, rows, vocab, tossed, top, whole, source, lists,
        STEPS, DEVICES, NEEDS, CAPACITY, VARIANT,
    )  # fmt: skip
    seed, position, stream = tl.load(seeds + row), tl.load(positions + row), tl.load(streams + row)
    token, value = pick(key, top, greedy, seed, position, stream, x, ids, held, source, bounds, VARIANT)
    tl.store(tokens + row, token.to(tl.int64))
    if LOGPROBS:
        truncated = begin < len(STEPS)
        if not truncated:  # what was gathered is what can win; the rank counts every token above it
            held, key = held * 0, key * 0 + BELOW_ALL
            n = activate((group_top > value) & inside, group, active)
            source = (row, logits + row.to(tl.int64) * stride, vocab, groups_of_vocab, bitmask, mask_stride, sparse,
                      point_values, rows, temperature, active, n)  # fmt: skip
        raw_top = tl.load(at + RAW_MAX * width, mask=inside, other=-float("inf"))
        raw = (raw_top, tl.load(at + RAW_SUM * width, mask=inside, other=0.0))
        report(token, value, key, top, dropped, whole, truncated, raw, x, held, source, bounds, inside, floats,
               counts, VARIANT)  # fmt: skip
