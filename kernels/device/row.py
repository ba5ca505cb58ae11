"""The second launch: one program a row lists the few tokens that matter, ranks them by comparing all pairs, and draws.

A bound from the statistics of the groups says which groups can hold a token that matters. Their tokens at or above
it are listed, at most N. Each listed token then knows how many tokens, of which mass in fixed point, are above it: a
rule is a comparison. Rows of which more has to be looked at are left to the kernels of `wide`, or to `general`.
"""

# ruff: noqa: SIM102 (device code: compile-time tests stay apart)
import triton
import triton.language as tl

from ..noise.philox_triton import gumbel_at
from .groups import COIN, MAX, NOISE, PLANES, RAW_MAX, RAW_SUM, SUM, plain_temperature
from .order.bounds import lowest_after_xtc, lowest_logit
from .order.ranks import COUNT_BIT, four_sums, ranks, store_order, take_special, ties_before
from .steps import (
    CUT_TIES,
    HEAD,
    KEEP_COUNT,
    KEEP_MASS,
    KEEP_VALUE,
    LIGHTEST,
    MASS_SHARE,
    NO_RULE,
    TOP_H,
    TYPICAL,
    XTC,
    asks_moments,
    entry,
    first_of,
    min_p_limit,
    steps_of_row,
    toss,
)
from .sums import FIXED_ONE, fixed
from .tokens import FLOAT_MAX, GROUP, finite_top, key_value, load_groups, ordered_key, scaled

CHOSEN, FULL = tl.constexpr(1), tl.constexpr(2)  # reports
NO_TOKEN, NONE_KEPT = tl.constexpr(-1), tl.constexpr(-2)  # draw.NO_TOKEN, draw.NONE_KEPT
NOBODY = tl.constexpr(-9223372036854775807)  # a score below all
FEW = tl.constexpr(2)  # groups at a time where no rule is on
# rows drawn here, left to other kernels, and left with a list of active groups: a mass first, then values alone
DONE, LEFT, FRAMED = (tl.constexpr(i) for i in range(3))
WIDE_BINS = tl.constexpr(4096)  # wide.BINS


@triton.jit
def moments_at(totals):
    """What `order.moments` has left of a row: (count, mass, dot, sums of shift, of its square, of the weight's)."""
    mass, dot = tl.load(totals + 1).to(tl.int64), tl.load(totals + 2).to(tl.int64)
    count, squares = tl.load(totals).to(tl.float32), tl.load(totals + 5).to(tl.float32)
    return count, mass, dot, tl.load(totals + 3), tl.load(totals + 4), squares


@triton.jit
def best_of_all(n, hidden, active, source, temperature, top, greedy, key, POINTS: tl.constexpr):
    """(token, its logit, fixed-point mass of all) of the first active group and those behind `hidden` ones, n in all;
    no list."""
    row, logits, vocab, of_vocab, wants, bitmask, mask_stride, sparse, values, rows = source
    best = tl.full((FEW * GROUP,), -9223372036854775807, tl.int64)
    mass, logit = best * 0, best.to(tl.float32)
    for start in range(0, n, FEW):
        place = start + tl.arange(0, FEW)
        group = tl.load(active + place + tl.where(place > 0, hidden, 0), mask=place < n, other=-1)
        z, ids = load_groups(
            group,
            row,
            logits,
            vocab,
            of_vocab,
            wants,
            bitmask,
            mask_stride,
            sparse,
            values,
            rows,
            POINTS,
            True,
        )
        y, ids = tl.reshape(scaled(z, temperature), (FEW * GROUP,)), tl.reshape(ids, (FEW * GROUP,))
        noise = gumbel_at(key[0], key[1], key[2], tl.maximum(ids, 0))
        score = ordered_key((y - top) + tl.where(greedy, 0.0, noise))
        both = (score.to(tl.int64) << 32) | (2147483647 - ids).to(tl.int64)
        wins = (y > -float("inf")) & (both > best)
        best, logit = tl.where(wins, both, best), tl.where(wins, y, logit)
        mass += fixed(tl.exp(y - top))
    winner = tl.max(best, axis=0)
    token = 2147483647 - (winner & 0xFFFFFFFF).to(tl.int32)
    logit = tl.max(tl.where(best == winner, logit, -float("inf")), axis=0)
    return token, logit, tl.sum(mass, axis=0)


@triton.jit
def leave(row, mode, n, lowest, least, peak, whole, counters, records, counts_of, masses_of, frames, sums):
    """Leave the row to the kernels of `wide` or `general`: a bound, the highest logit, the row's mass, and zeros.

    mode: LEFT or FRAMED. n: number of active groups. lowest: key of the bound.
    """
    wide_row = row.to(tl.int64)
    tl.store(counters + row * 4 + 1, mode)
    tl.store(records + row * 2, least)
    tl.store(records + row * 2 + 1, peak)
    slot = tl.arange(0, 8)
    frame = tl.where(slot == 0, 2147483647, tl.where(slot == 1, lowest, tl.where(slot == 5, n, slot * 0)))
    tl.store(frames + row * 8 + slot, frame)
    start = tl.where(slot < 3, 0, -9223372036854775807)  # sums, then the best scores
    tl.store(sums + wide_row * 8 + slot, tl.where(slot == 0, whole, start))
    bins = tl.arange(0, WIDE_BINS)
    tl.store(counts_of + wide_row * WIDE_BINS + bins, bins * 0)
    tl.store(masses_of + wide_row * WIDE_BINS + bins, bins.to(tl.int64) * 0)


@triton.jit
def write_logprobs(row, rows, token, logit, top, mass, dot, number, rank, logits, vocab, at, width,
                   groups_of_vocab, floats, counts, report, WIDTH: tl.constexpr):  # fmt: skip
    """Store the log-probabilities of a drawn token; with FULL also entropy, number of kept tokens and rank.

    mass, dot: fixed-point sums of weight and of -weight * shift over the kept tokens.
    """
    group = tl.arange(0, WIDTH)
    tops = tl.load(at + RAW_MAX * width + group, mask=group < groups_of_vocab, other=-float("inf"))
    parts = tl.load(at + RAW_SUM * width + group, mask=group < groups_of_vocab, other=0.0)
    given = finite_top(tl.load(logits + token, mask=token < vocab, other=float("nan")).to(tl.float32))
    highest = tl.max(tops, axis=0)
    raw = tl.sum(tl.where(group < groups_of_vocab, parts * tl.exp(tops - highest), 0.0), axis=0)
    total = mass.to(tl.float32) / FIXED_ONE
    tl.store(floats + row, (given - highest) - tl.log(raw))
    tl.store(floats + rows + row, (logit - top) - tl.log(total))
    if report == FULL:
        tl.store(floats + 2 * rows + row, tl.log(total) + dot.to(tl.float32) / FIXED_ONE / total)
        tl.store(counts + row, number.to(tl.int64))
        tl.store(counts + rows + row, rank.to(tl.int64))


@triton.jit
def no_token(row, rows, code, tokens, floats, counts, report):
    """Store the result of a row without a drawable token: NO_TOKEN or NONE_KEPT for one."""
    tl.store(tokens + row, tl.full((), 0, tl.int64) + code)
    if report != 0:
        for i in tl.static_range(3):
            tl.store(floats + i * rows + row, float("nan"))
        for i in tl.static_range(2):
            tl.store(counts + i * rows + row, tl.full((), 0, tl.int64))


@triton.jit(
    do_not_specialize=(
        "groups_of_vocab", "groups", "width", "wants", "report", "kinds", "more_kinds", "places", "more_places",
        "seconds", "more_seconds", "steps", "mask_stride", "listed_length", "touched_stride", "rows",
    ),
    do_not_specialize_on_alignment=(
        "stats", "counters", "active", "lists", "keys_of", "weights_of", "ids_of", "counts_of", "masses_of", "frames",
        "records", "sums", "totals", "tokens", "floats", "counts",
        "seeds", "positions", "streams", "temperatures", "limits", "bitmask", "listed_ids",
        "values", "touched", "point_values",
    ),
)  # fmt: skip
def row_kernel(
    logits, stride, vocab, groups_of_vocab, groups, stats, width, counters, wants, report,
    active, lists, keys_of, weights_of, ids_of, counts_of, masses_of, frames, records, sums, totals, tokens, floats,
    counts, seeds, positions, streams, temperatures, limits,
    kinds, more_kinds, places, more_places, seconds, more_seconds, steps,
    bitmask, mask_stride, listed_ids, values, listed_length, touched, touched_stride, point_values, rows,
    WIDTH: tl.constexpr, N: tl.constexpr, PART: tl.constexpr, DEVICES: tl.constexpr, SPECIAL: tl.constexpr,
    POINTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Draw a token, from the statistics of the first launch; grid (rows,). counters[row, 1]: DONE, LEFT or FRAMED.

    SPECIAL: () or what of rules by entropy, distance and moments is compiled in (`order.ranks`), DEVICES as in
    `general`; totals: sums over the rows, for those that come first.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    wide_row = row.to(tl.int64)
    group = tl.arange(0, WIDTH)
    inside = group < groups
    at = stats + wide_row * (PLANES * width) + group
    tops = tl.load(at + MAX * width, mask=inside, other=-float("inf"))
    noise = tl.load(at + NOISE * width, mask=inside, other=-float("inf"))  # used where no rule is on
    temperature = tl.load(temperatures + row)
    seed, position, stream = tl.load(seeds + row), tl.load(positions + row), tl.load(streams + row)
    tossed = toss((seed, position, stream), wants & COIN)
    program = (kinds, more_kinds, places, more_places, seconds, more_seconds, steps)
    kind, parameter, second, on = steps_of_row(program, limits, row, rows, vocab, tossed)
    highest = tl.max(ordered_key(tops), axis=0)
    if (highest > 0x7F7FFFFF) | (highest < -0x7F7FFFFF - 1):  # a NaN, or -inf alone
        no_token(row, rows, NO_TOKEN, tokens, floats, counts, report)
        return
    peak = (highest ^ ((highest >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    greedy = temperature <= 0
    senseless = tl.max(((parameter != parameter) | (second != second)).to(tl.int32), axis=0)
    if (greedy == 0) & (senseless > 0):
        no_token(row, rows, NONE_KEPT, tokens, floats, counts, report)
        return
    temperature = tl.where(greedy, 1.0, temperature)
    top = scaled(peak, temperature)
    index, first = first_of(kind, on)
    free = greedy | (first == NO_RULE)
    moments = (top, seed, seed, top.to(tl.float64), top.to(tl.float64), top)
    if len(SPECIAL) > 0:
        if asks_moments(first) & (greedy == 0):
            moments = moments_at(totals + wide_row * 8)
    shares, whole = tops, seed * 0
    if (((first == KEEP_MASS) | (first == TYPICAL) | (first == XTC)) & (greedy == 0)) | (
        free & (report != 0)
    ):
        part = tl.load(at + SUM * width, mask=inside, other=0.0)
        shares = tl.where(inside, tl.exp(scaled(tops, temperature) - top), 0.0)
        whole = tl.sum(fixed(part * shares), axis=0)
    least, near = lowest_logit(
        tops, shares, peak, inside, first, entry(parameter, index), temperature, greedy, noise, whole, moments, vocab,
        DEVICES,
    )  # fmt: skip
    strange = row < 0
    if len(SPECIAL) > 0:
        if (first == XTC) & (greedy == 0):
            moments = (moments[0], whole, moments[2], moments[3], moments[4], moments[5])
            least, strange = lowest_after_xtc(
                kind, parameter, on, index, tops, peak, inside, temperature, moments
            )
    massive = (first == KEEP_MASS) & (greedy == 0)
    limits = tl.where(on & (kind == KEEP_VALUE), min_p_limit(top, parameter), -float("inf"))
    limit = tl.max(limits, axis=0)
    plain = tl.max((on & (tl.arange(0, 16) != index) & (kind != KEEP_VALUE)).to(tl.int32), axis=0) == 0
    if massive & plain & (limit > -float("inf")):  # what no value rule keeps is not asked for
        least = tl.maximum(least, limit * temperature - tl.abs(limit * temperature) * 1e-5 - 1e-30)
    if free & (report == FULL):
        least, near = -FLOAT_MAX, inside
    far = (tl.abs(peak) >= 1e30) | (
        plain_temperature(temperature) == 0
    )  # sums and noise are not to be trusted
    if far:
        least, whole = tl.full((), -FLOAT_MAX, tl.float32), tl.full((), -1, tl.int64)
        near = inside
    chosen = near & tl.where(greedy & (far == 0) & (report != FULL), tops == peak, tops >= least)
    slot = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    n = tl.sum(chosen.to(tl.int32), axis=0)
    active += wide_row * width
    lists += wide_row * N
    sparse = (listed_ids, values, listed_length, touched, touched_stride)
    everything = least  # of what a rule keeps whose end the list may not have
    if len(SPECIAL) > 0:
        if SPECIAL[2]:
            deepest = (peak - LIGHTEST * 1.00001 * temperature) - tl.abs(peak) * 1e-6
            everything = tl.where((first == TOP_H) & (greedy == 0), tl.maximum(deepest, -FLOAT_MAX), least)
    crowded = n > tl.where(massive, N // 2, N)
    lowest = ordered_key(scaled(least, temperature))
    mode = tl.where(massive & plain & (far == 0) & (report != FULL), FRAMED, LEFT)
    tl.store(active + slot, group, mask=chosen)
    tl.debug_barrier()
    if free & (report != FULL):
        hidden = n * 0
        if greedy & (far == 0):  # of equal groups of the vocabulary the first has the lowest id
            hidden = tl.maximum(tl.sum((chosen & (group < groups_of_vocab)).to(tl.int32), axis=0) - 1, 0)
        source = (row, logits + wide_row * stride, vocab, groups_of_vocab, wants, bitmask, mask_stride, sparse,
                  point_values, rows)  # fmt: skip
        token, logit, mass = best_of_all(n - hidden, hidden, active, source, temperature, top, greedy,
                                         (seed, position, stream), POINTS)  # fmt: skip
        tl.store(tokens + row, token.to(tl.int64))
        if report != 0:
            mass = tl.where(whole > 0, whole, mass)
            write_logprobs(row, rows, token, logit, top, mass, mass, n, n,
                           logits + wide_row * stride, vocab, stats + wide_row * (PLANES * width), width,
                           groups_of_vocab, floats, counts, report, WIDTH)  # fmt: skip
        return
    if strange | far | free | crowded:
        leave(
            row,
            mode,
            n,
            lowest,
            everything,
            peak,
            whole,
            counters,
            records,
            counts_of,
            masses_of,
            frames,
            sums,
        )
        return
    for start in range(0, n, PART):
        place = start + tl.arange(0, PART)
        mine = tl.load(active + place, mask=place < n, other=-1)
        z, ids = load_groups(mine, row, logits + wide_row * stride, vocab, groups_of_vocab, wants, bitmask,
                             mask_stride, sparse, point_values, rows, POINTS, True)  # fmt: skip
        want = z >= least
        spot = tl.atomic_add(counters + row * 4 + tl.zeros_like(ids), 1, mask=want, sem="relaxed")
        pair = (z.to(tl.int32, bitcast=True).to(tl.int64) << 32) | ids.to(tl.int64)
        tl.store(lists + spot, pair, mask=want & (spot < N))
    tl.debug_barrier()
    slot = tl.arange(0, N)
    pair = tl.load(lists + slot)  # beside their number; what is beyond it is never used
    found = tl.load(counters + row * 4, volatile=True)
    if found > N:
        leave(
            row,
            mode,
            n,
            lowest,
            everything,
            peak,
            whole,
            counters,
            records,
            counts_of,
            masses_of,
            frames,
            sums,
        )
        return
    there = slot < found
    ids = pair.to(tl.int32)
    x = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    y = scaled(x, temperature)
    keys = tl.where(there, ordered_key(y), -2147483648)
    weight = tl.where(there, fixed(tl.exp(y - top)), 0)
    keys_of += wide_row * N
    weights_of += wide_row * N
    ids_of += wide_row * N
    kept = there & (y > -float("inf"))
    noise = gumbel_at(seed, position, stream, tl.maximum(ids, 0))
    store_order(keys, weight + COUNT_BIT, slot, keys_of, weights_of)
    number, mass = ranks(keys, keys_of, weights_of, found, N)
    above, short = number, found < 0
    for i in range(steps):
        if entry(on.to(tl.int32), i) > 0:
            now, value = entry(kind, i), entry(parameter, i)
            if now == KEEP_COUNT:
                kept = kept & (number.to(tl.float32) < value)
            if now == KEEP_VALUE:
                kept = kept & (y >= min_p_limit(top, value))
            if now == KEEP_MASS:
                left = tl.sum(tl.where(kept, weight, 0), axis=0)
                left = tl.where(massive & (i == index), whole, left)
                kept = kept & (
                    (mass.to(tl.float64) < value.to(tl.float64) * MASS_SHARE * left.to(tl.float64))
                    | (y == top)
                )
            if now == CUT_TIES:
                tl.store(ids_of + slot, ids)
                tl.debug_barrier()
                before = number + ties_before(keys, ids, keys_of, ids_of, found, N)
                kept = kept & (before.to(tl.float32) < value)
            if len(SPECIAL) > 0:
                if (now >= XTC) & (now != HEAD):
                    kept, keys, weight, number, mass, top, too_short = take_special(
                        now, value, entry(second, i), i == index, moments, y, ids, keys, kept, weight, number, mass,
                        top, vocab, slot, (keys_of, weights_of, ids_of), found, SPECIAL, DEVICES, N,
                    )  # fmt: skip
                    short = short | too_short
    if len(SPECIAL) > 0:
        if short & (scaled(least, temperature) > scaled(peak, temperature) - LIGHTEST):
            leave(
                row,
                LEFT,
                n,
                lowest,
                everything,
                peak,
                whole,
                counters,
                records,
                counts_of,
                masses_of,
                frames,
                sums,
            )
            return
    score = ordered_key((y - top) + noise)
    both = (score.to(tl.int64) << 32) | (2147483647 - ids).to(tl.int64)
    best = tl.max(tl.where(kept, both, NOBODY), axis=0)
    if best == NOBODY:
        no_token(row, rows, NONE_KEPT, tokens, floats, counts, report)
        return
    token = 2147483647 - (best & 0xFFFFFFFF).to(tl.int32)
    tl.store(tokens + row, token.to(tl.int64))
    if report != 0:
        drawn = (ids == token) & there  # one place
        part = fixed(tl.where(kept & (weight > 0), -tl.exp(y - top) * (y - top), 0.0))
        numbers = (kept.to(tl.int64) << 32) + tl.where(drawn, above + 1, 0)
        left, key, dot, numbers = four_sums(
            tl.where(kept, weight, 0), tl.where(drawn, ordered_key(y), 0).to(tl.int64), part, numbers
        )
        logit, many, rank = key_value(key.to(tl.int32)), (numbers >> 32).to(tl.int32), numbers.to(tl.int32)
        write_logprobs(row, rows, token, logit, top, left, dot, many, rank,
                       logits + wide_row * stride, vocab, stats + wide_row * (PLANES * width), width,
                       groups_of_vocab, floats, counts, report, WIDTH)  # fmt: skip
