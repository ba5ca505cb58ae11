"""The rows that a short list does not serve: many tokens left, or rules by entropy, distance or moments.

One program a row. A bound from the group statistics tells which groups can hold a token that matters; their tokens
are gathered, or read again in every step where they are too many; exact thresholds are found by search on ordered
integer keys with masses in fixed-point integers, and noise is made for survivors. Sums that decide anything are
integers, so the result depends neither on split, nor row, nor order.

DEVICES holds the device functions of value rules, VARIANT what else is compiled in (`search`).
"""

# ruff: noqa: RUF005, RUF059 (device code: tuples are unpacked whole)
import triton
import triton.language as tl

from ..noise.philox_triton import gumbel_at
from .groups import COIN, MAX, NOISE, PLANES, RAW_MAX, RAW_SUM, rough_band
from .row import DONE, NONE_KEPT, no_token
from .search import (
    BELOW_ALL,
    BY_LOGIT,
    COUNT,
    FIXED_ONE,
    activate,
    bound_by_groups,
    chunk,
    fixed,
    gather,
    listed,
    moments,
    plus,
    search,
    sweep_moments,
)
from .steps import (
    BY_FUNCTION,
    KEEP_COUNT,
    KEEP_MASS,
    KEEP_VALUE,
    MASS_SHARE,
    NO_RULE,
    entry,
    first_of,
    narrow,
    needs_moments,
    steps_of_row,
    toss,
    value_limit,
)
from .tokens import finite_top, ordered_key, scaled

NONE = tl.constexpr(2147483647)  # the token of a row of which nothing is left


@triton.jit
def first_bound(kind, parameter, group_top, inside, top, whole, DEVICES: tl.constexpr):
    """Key of the lowest token that a first step can keep."""
    key = tl.full((), BELOW_ALL, tl.int32)
    if (kind == KEEP_VALUE) | ((kind >= BY_FUNCTION) & (kind != NO_RULE)):
        key = ordered_key(value_limit(kind, whole, top, parameter, DEVICES))
    if (kind == KEEP_COUNT) | (kind == KEEP_MASS):
        by_mass = kind == KEEP_MASS
        weight = fixed(tl.where(inside, tl.exp(group_top - top), 0.0))
        weight = tl.where(by_mass, weight, inside.to(tl.int64))
        target = parameter.to(tl.float64)
        target = tl.where(by_mass, target * MASS_SHARE * whole[1].to(tl.float64), target)
        key = bound_by_groups(target, group_top, top, weight)
    return tl.maximum(key, BELOW_ALL)


@triton.jit
def choose_groups(free, greedy, key, group_top, inside, top, scores):
    """The groups that can hold a token which matters: kept, highest, or winning by rough scores."""
    chosen = (ordered_key(group_top) >= key) & inside
    if free:
        score = tl.load(scores, mask=inside, other=-float("inf")) + (group_top - top)
        near = score >= tl.max(tl.where(greedy, 0.0, score), axis=0) - rough_band(top)
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
def place(x, ids, key, above, room, vocab, higher, ties, lists):
    """Store tokens above a key at the slots from `higher` on, those at it behind `above`, `room` slots in all;
    returns how many of each there are by now."""
    there = (ids >= 0) & (ids < vocab)
    over = ((ordered_key(x) > key) & there).to(tl.int32)
    level = ((ordered_key(x) == key) & there).to(tl.int32)
    slot = tl.where(over > 0, higher + tl.cumsum(over, axis=0), above + ties + tl.cumsum(level, axis=0)) - 1
    wanted = ((over + level) > 0) & (slot < room)
    tl.store(lists[0] + slot, x, mask=wanted)
    tl.store(lists[1] + slot, ids, mask=wanted)
    return higher + tl.sum(over, axis=0), ties + tl.sum(level, axis=0)


@triton.jit
def store_ranked(n, highest, log_mass, lists, top_ids, top_logprobs, TOP: tl.constexpr):
    """Store the first n listed tokens by logit, equal ones by id."""
    down, across = tl.arange(0, TOP)[:, None], tl.arange(0, TOP)[None, :]
    x, ids = (
        tl.load(lists[0] + down, mask=down < n, other=0.0),
        tl.load(lists[1] + down, mask=down < n, other=0),
    )
    y = tl.load(lists[0] + across, mask=across < n, other=0.0)
    others = tl.load(lists[1] + across, mask=across < n, other=0)
    before = ((ordered_key(y) > ordered_key(x)) | ((ordered_key(y) == ordered_key(x)) & (others < ids))) & (
        across < n
    )
    rank = tl.sum(before.to(tl.int32), axis=1)[:, None]
    tl.store(top_ids + rank, ids.to(tl.int64), mask=down < n)
    tl.store(top_logprobs + rank, (x - highest) - log_mass, mask=down < n)


@triton.jit
def write_top(n, raw_top, raw_sum, group, inside, source, lists, top_ids, top_logprobs,
              TOP: tl.constexpr, CAPACITY: tl.constexpr, VARIANT: tl.constexpr):  # fmt: skip
    """Store ids and log-probabilities of the n highest logits as given; NaN for a row with a NaN, or all -inf."""
    vocab, of_vocab, active = source[2], source[3], source[10]
    highest = tl.max(raw_top, axis=0)
    mass = tl.sum(tl.where(inside, raw_sum * tl.exp(raw_top - highest), 0.0), axis=0)
    if mass == mass:
        own = inside & (group < of_vocab)
        low = bound_by_groups(
            n.to(tl.float64), tl.where(own, raw_top, -float("inf")), highest, own.to(tl.int64)
        )
        low = tl.where(low <= BELOW_ALL, BELOW_ALL - 1, low)
        source = source[:11] + (activate((ordered_key(raw_top) >= low) & own, group, active), source[12])
        bounds = (ordered_key(highest), n * 0 + BELOW_ALL - 1, n * 0)
        frame = (n * 0 + COUNT, n * 0 + BY_LOGIT, highest, highest * 0, low)
        found = gather(low, 2147483647, source, bounds, frame, lists, CAPACITY, VARIANT)
        x, ids = listed(found, lists, CAPACITY)
        held = (found <= CAPACITY).to(tl.int32)
        form = (n < 0, highest, highest)
        key, above, dots = search(n.to(tl.float64), low, ordered_key(highest), x, ids, held, source, bounds,
                                  frame, form, lists, CAPACITY, VARIANT)  # fmt: skip
        above = above.to(tl.int32)
        tl.debug_barrier()
        if held > 0:
            higher, ties = place(x, ids, key, above, n, vocab, n * 0, n * 0, lists)
        else:
            higher, ties = n * 0, n * 0
            for start in range(0, source[11], VARIANT[0]):
                y, there = chunk(start, source, bounds, VARIANT)
                higher, ties = place(y, there, key, above, n, vocab, higher, ties, lists)
        tl.debug_barrier()
        store_ranked(n, highest, tl.log(mass), lists, top_ids, top_logprobs, TOP)
        tl.debug_barrier()
    else:
        slot = tl.arange(0, TOP)
        tl.store(top_ids + slot, slot.to(tl.int64), mask=slot < n)
        tl.store(top_logprobs + slot, slot * float("nan"), mask=slot < n)


@triton.jit(
    do_not_specialize=(
        "groups_of_vocab", "groups", "width", "wants", "report", "kinds", "more_kinds", "places", "more_places",
        "seconds", "more_seconds", "steps", "mask_stride", "listed_length", "touched_stride", "rows",
    ),
    do_not_specialize_on_alignment=(
        "stats", "counters", "active", "listed_x", "listed_to", "tokens", "floats", "counts", "seeds", "positions",
        "streams", "temperatures", "limits", "bitmask", "listed_ids",
        "values", "touched", "point_values",
    ),
)  # fmt: skip
def general_kernel(
    logits, stride, vocab, groups_of_vocab, groups, stats, width, counters, wants, report_on,
    active, listed_x, listed_to, tokens, floats, counts,
    seeds, positions, streams, temperatures, limits,
    kinds, more_kinds, places, more_places, seconds, more_seconds, steps,
    bitmask, mask_stride, listed_ids, values, listed_length, touched, touched_stride, point_values, rows,
    DEVICES: tl.constexpr, VARIANT: tl.constexpr, WIDTH: tl.constexpr, CAPACITY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The rows that the second launch has left, one program each; grid (rows,)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    if tl.load(counters + row * 4 + 1) == DONE:
        return
    wide_row = row.to(tl.int64)
    group = tl.arange(0, WIDTH)
    inside = group < groups
    at = stats + wide_row * (PLANES * width) + group
    active += wide_row * width
    lists = (listed_x + wide_row * CAPACITY, listed_to + wide_row * CAPACITY)
    logits += wide_row * stride
    sparse = (listed_ids, values, listed_length, touched, touched_stride)
    temperature = tl.load(temperatures + row)
    greedy = temperature <= 0
    temperature = tl.where(greedy, 1.0, temperature)
    key = (tl.load(seeds + row), tl.load(positions + row), tl.load(streams + row))
    program = (kinds, more_kinds, places, more_places, seconds, more_seconds, steps)
    kind, parameter, second, on = steps_of_row(program, limits, row, rows, vocab, toss(key, wants & COIN))
    on = on & (greedy == 0)
    begin, first = first_of(kind, on)
    begin = tl.minimum(begin, steps)
    group_top = scaled(tl.load(at + MAX * width, mask=inside, other=-float("inf")), temperature)
    top = tl.max(group_top, axis=0)
    n = activate(inside & (group_top > -float("inf")), group, active)
    source = (row, logits, vocab, groups_of_vocab, bitmask, mask_stride, sparse, point_values, rows, temperature,
              active, n, wants)  # fmt: skip
    whole = (
        top * 0,
        row.to(tl.int64) * 0,
        row.to(tl.int64) * 0,
        top.to(tl.float64) * 0,
        top.to(tl.float64) * 0,
        top * 0,
    )
    free = first == NO_RULE
    if (free & (report_on != 0)) | ((free == 0) & needs_moments(first)):
        nothing = (ordered_key(top), row * 0 + BELOW_ALL - 1, row * 0)
        x, ids = listed(row * 0, lists, CAPACITY)
        whole = sweep_moments(row * 0 + BELOW_ALL, top, x, row * 0, source, nothing, VARIANT[5], VARIANT)
    low = first_bound(first, entry(parameter, begin), group_top, inside, top, whole, DEVICES)
    chosen = choose_groups(free, greedy, low, group_top, inside, top, at + NOISE * width)
    n = activate(chosen, group, active)
    source = source[:11] + (n, wants)
    low, top, bounds, dropped, x, ids, held = narrow(
        begin, low, (kind, parameter, second, on), steps, vocab, top, whole, source, lists, DEVICES, CAPACITY, VARIANT,
    )  # fmt: skip
    token, value = pick(low, top, greedy, key[0], key[1], key[2], x, ids, held, source, bounds, VARIANT)
    if token == NONE:
        no_token(row, rows, NONE_KEPT, tokens, floats, counts, report_on)
        return
    tl.store(tokens + row, token.to(tl.int64))
    if report_on != 0:
        if free:  # what was gathered is what can win; the rank counts every token above it
            held, low = held * 0, low * 0 + BELOW_ALL
            n = activate((group_top > value) & inside, group, active)
            source = source[:11] + (n, wants)
        raw_top = tl.load(at + RAW_MAX * width, mask=group < groups_of_vocab, other=-float("inf"))
        raw = (raw_top, tl.load(at + RAW_SUM * width, mask=group < groups_of_vocab, other=0.0))
        report(token, value, low, top, dropped, whole, free == 0, raw, x, held, source, bounds, inside, floats,
               counts, VARIANT)  # fmt: skip


@triton.jit(
    do_not_specialize=("groups_of_vocab", "width", "n_top"),
    do_not_specialize_on_alignment=("stats", "active", "listed_x", "listed_to", "top_ids", "top_logprobs"),
)
def top_kernel(
    logits, stride, vocab, groups_of_vocab, stats, width, active, listed_x, listed_to, top_ids, top_logprobs, n_top,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, CAPACITY: tl.constexpr, TOP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The n_top highest logits as given, with their log-probabilities; grid (rows,)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    wide_row = row.to(tl.int64)
    group = tl.arange(0, WIDTH)
    inside = group < groups_of_vocab
    at = stats + wide_row * (PLANES * width) + group
    raw_top = tl.load(at + RAW_MAX * width, mask=inside, other=-float("inf"))
    raw_sum = tl.load(at + RAW_SUM * width, mask=inside, other=0.0)
    lists = (listed_x + wide_row * CAPACITY, listed_to + wide_row * CAPACITY)
    nothing = (listed_to, stats, row * 0, listed_to, row * 0)
    source = (row, logits + wide_row * stride, vocab, groups_of_vocab, listed_to, row * 0, nothing, stats, row * 0,
              tl.full((), 1.0, tl.float32), active + wide_row * width, row * 0, row * 0)  # fmt: skip
    write_top(row * 0 + n_top, raw_top, raw_sum, group, inside, source, lists, top_ids + wide_row * n_top,
              top_logprobs + wide_row * n_top, TOP, CAPACITY, (GROUPS, (), False, False, False, False))  # fmt: skip
