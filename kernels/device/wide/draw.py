"""The token of a wide row: the best above the bins of the boundaries, and the list of what is inside, settled exactly.

What is left, rows whose boundary lies among more tokens than the list takes, or not where a sample had it, is searched
by reading the row again and again.
"""

# ruff: noqa: RUF059, SIM102 (device code: tuples are unpacked whole, and compile-time tests stay apart)
import triton
import triton.language as tl

from ..groups import COIN, PLANES
from ..row import DONE, FRAMED, FULL, LEFT, NOBODY, NONE_KEPT, moments_at, no_token, write_logprobs
from ..steps import CUT_TIES, asks_moments, first_of, steps_of_row, toss
from ..sums import BELOW_ALL, fixed
from ..tokens import GROUP, key_value, ordered_key, scaled
from .bins import bin_of
from .rows import (
    ABOVE,
    BEST,
    DOT,
    FIRST_BIN,
    FRAME,
    GUESSED,
    HIGHEST,
    HIGHEST_KEY,
    LAST_BIN,
    LEAST,
    LISTED_SO_FAR,
    LOWEST,
    LOWEST_KEY,
    LUMP_BEST,
    LUMP_BIN,
    MASS_ABOVE,
    NUMBERS,
    PEAK,
    POINTERS,
    SUMS,
    WHOLE,
    last_of_row,
    list_tokens,
    read,
    scores_of,
)  # fmt: skip
from .settle import STEP, entries, is_left, settle


@triton.jit
def collect(part, programs, source, tops, least, top, greedy, key, frames, sums, lists, report, N: tl.constexpr,
            GROUPS: tl.constexpr, POINTS: tl.constexpr):  # fmt: skip
    """This program's share of the row: the best of the tokens above the list and of the lump, and the list itself."""
    first, last = tl.load(frames + FIRST_BIN), tl.load(frames + LAST_BIN)
    lump = tl.load(frames + LUMP_BIN)
    best = tl.full((GROUPS * GROUP,), NOBODY, tl.int64)
    lumped = best
    dots = best * 0
    lowest, highest = best.to(tl.int32) * 0 + 2147483647, best.to(tl.int32) * 0 - 2147483647
    for start in range(part * GROUPS, source[4], programs * GROUPS):
        y, ids = read(start, source, tops, least, GROUPS, POINTS)
        place, there = bin_of(top - y), y > -float("inf")
        if (first > 0) | (lump >= 0):
            both = scores_of(y, ids, top, greedy, key)
            upper, within = there & (place < first), there & (place == lump)
            best = tl.maximum(best, tl.where(upper, both, NOBODY))
            lumped = tl.maximum(lumped, tl.where(within, both, NOBODY))
            own = ordered_key(y)
            lowest = tl.where(within, tl.minimum(lowest, own), lowest)
            highest = tl.where(within, tl.maximum(highest, own), highest)
            if report == FULL:
                dots += part_of_entropy(y, top, upper)
        inside = there & (place >= first) & (place <= last) & (place != lump)
        list_tokens(y, ids, inside, frames, lists, N)
    if (first > 0) | (lump >= 0):
        tl.atomic_max(sums + BEST, tl.max(best, axis=0), sem="relaxed")
        tl.atomic_max(sums + LUMP_BEST, tl.max(lumped, axis=0), sem="relaxed")
        tl.atomic_min(frames + LOWEST_KEY, tl.min(lowest, axis=0), sem="relaxed")
        tl.atomic_max(frames + HIGHEST_KEY, tl.max(highest, axis=0), sem="relaxed")
        tl.atomic_add(sums + DOT, tl.sum(dots, axis=0), sem="relaxed")


@triton.jit
def part_of_entropy(y, top, kept):
    """Fixed-point -weight * shift of the kept tokens."""
    weight = tl.exp(y - top)
    return tl.where(kept & (weight > 0), fixed(-weight * (y - top)), 0)


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def wide_kernel(
    logits, stride, vocab, groups_of_vocab, groups, stats, width, counters, wants, report,
    frames, records, sums, lists, totals, tokens, floats, counts,
    seeds, positions, streams, temperatures, limits,
    kinds, more_kinds, places, more_places, seconds, more_seconds, steps,
    bitmask, mask_stride, listed_ids, values, listed_length, touched, touched_stride, point_values, rows,
    GROUPS: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, DEVICES: tl.constexpr, SPECIAL: tl.constexpr,
    POINTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The rows that the second launch has left: list, settle, draw; grid (rows, programs).

    SPECIAL, DEVICES: as in `row`.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    mode = tl.load(counters + row * 4 + 1)
    if (mode == DONE) | ((mode == FRAMED) & (tl.program_id(1) > 0)):
        return
    wide_row = row.to(tl.int64)
    temperature = tl.load(temperatures + row)
    greedy = temperature <= 0
    temperature = tl.where(greedy, 1.0, temperature)
    key = (tl.load(seeds + row), tl.load(positions + row), tl.load(streams + row))
    least = tl.load(records + row * 2 + LEAST)
    top = scaled(tl.load(records + row * 2 + PEAK), temperature)
    sparse = (listed_ids, values, listed_length, touched, touched_stride)
    source = (row, logits + wide_row * stride, vocab, groups_of_vocab, groups, wants, bitmask, mask_stride, sparse,
              point_values, rows, temperature)  # fmt: skip
    tops = stats + wide_row * (PLANES * width)
    frames += row * FRAME
    sums += wide_row * SUMS
    lists += wide_row * N
    last_program = mode == FRAMED
    if mode == LEFT:
        collect(tl.program_id(1), tl.num_programs(1), source, tops, least, top, greedy, key, frames, sums, lists,
                report, N, GROUPS, POINTS)  # fmt: skip
        last_program = last_of_row(frames, tl.num_programs(1))
    if last_program:
        program = (kinds, more_kinds, places, more_places, seconds, more_seconds, steps)
        row_steps = steps_of_row(program, limits, row, rows, vocab, toss(key, wants & COIN))
        steps = tl.where(greedy, 0, steps)
        cut = tl.max(((row_steps[0] == CUT_TIES) & row_steps[3]).to(tl.int32), axis=0)
        found = tl.load(frames + LISTED_SO_FAR, volatile=True)
        lump_bin, last = tl.load(frames + LUMP_BIN), tl.load(frames + LAST_BIN)
        lump_key = tl.load(frames + LOWEST_KEY, volatile=True)
        one_value = (lump_key == tl.load(frames + HIGHEST_KEY, volatile=True)) & (cut == 0)
        held = (found <= N) & ((mode == FRAMED) | ((last >= -1) & ((lump_bin < 0) | one_value)))
        number = tl.where(held & (mode == LEFT) & (lump_bin >= 0), tl.load(counters + row * 4 + 2), 0)
        lump = (lump_key, number)
        everything = (tl.full((), BELOW_ALL, tl.int32), ordered_key(top))
        lowest, highest = tl.load(frames + LOWEST), tl.load(frames + HIGHEST)
        framed = held & (mode == FRAMED)
        span = (
            tl.where(framed, lowest - 1, everything[0]),
            tl.where(framed & (highest < everything[1]), highest + 1, everything[1]),
        )
        edge, last_id, end, going = steps * 0, steps * 0, groups, steps * 0 + 1
        ceiling, high = ordered_key(top), top
        above = (tl.load(frames + ABOVE).to(tl.int64), tl.load(sums + MASS_ABOVE))
        whole = tl.load(sums + WHOLE)
        statistics = (top, whole, whole, top.to(tl.float64), top.to(tl.float64), top)
        if len(SPECIAL) > 0:
            index, first = first_of(row_steps[0], row_steps[3])
            if asks_moments(first) & (greedy == 0):
                statistics = moments_at(totals + wide_row * SUMS)
        while going > 0:
            above = (tl.where(held, above[0], 0), tl.where(held, above[1], 0))
            end = tl.where(held, tl.cdiv(found, GROUP), groups)
            edge, last_id, ceiling, high = settle(
                row_steps, steps, whole, statistics, top, above, lump, span,
                (held, end, source, tops, least, lists, found), POINTS, SPECIAL, DEVICES,
            )  # fmt: skip
            going = tl.where(
                framed & (tl.load(frames + GUESSED) > 0) & ((edge > highest) | (edge < lowest)), 1, 0
            )
            if going > 0:  # the guess did not hold: the row itself
                held, framed, span = held & (held == 0), framed & (framed == 0), everything
        top = high
        best = tl.full((STEP * GROUP,), NOBODY, tl.int64)
        many, mass, dot = best.to(tl.int32) * 0, best * 0, best * 0
        for start in range(0, end, STEP):
            y, ids = entries(start, (held, end, source, tops, least, lists, found), POINTS)
            kept = is_left(y, ids, (edge, last_id, ceiling, top))
            best = tl.maximum(best, tl.where(kept, scores_of(y, ids, top, greedy, key), NOBODY))
            many += kept.to(tl.int32)
            mass += tl.where(kept, fixed(tl.exp(y - top)), 0)
            if report == FULL:
                dot += part_of_entropy(y, top, kept)
        winner = tl.max(best, axis=0)
        if held:
            winner = tl.maximum(winner, tl.load(sums + BEST, volatile=True))
            if (number > 0) & (lump_key >= edge):
                winner = tl.maximum(winner, tl.load(sums + LUMP_BEST, volatile=True))
        if len(DEVICES) > 0:
            if winner == NOBODY:
                no_token(row, rows, NONE_KEPT, tokens, floats, counts, report)
                return
        token = 2147483647 - (winner & 0xFFFFFFFF).to(tl.int32)
        tl.store(tokens + row, token.to(tl.int64))
        if report != 0:
            lumps = tl.where((number > 0) & (lump_key >= edge), number, 0).to(tl.int64)
            value = key_value(lump_key)
            one = fixed(tl.exp(value - top))
            part = fixed(-tl.exp(value - top) * (value - top))
            many_left = tl.sum(many, axis=0).to(tl.int64) + above[0] + lumps
            mass_left = tl.sum(mass, axis=0) + above[1] + lumps * one
            dot_left = (
                tl.sum(dot, axis=0) + tl.where(held, tl.load(sums + DOT, volatile=True), 0) + lumps * part
            )
            near = (token // GROUP) // GROUPS * GROUPS
            chosen = tl.full((GROUPS * GROUP,), -float("inf"), tl.float32)
            higher = tl.zeros((GROUPS * GROUP,), tl.int32)
            logit = -float("inf")
            for turn in range(
                tl.where(report == FULL, 2, 1)
            ):  # the token's logit, then how many are above it
                for start in range(0, groups, GROUPS):
                    if (turn == 1) | (start == near) | (start + GROUPS > groups_of_vocab):
                        y, ids = read(start, source, tops, least, GROUPS, POINTS)
                        chosen = tl.maximum(chosen, tl.where(ids == token, y, -float("inf")))
                        higher += tl.where((turn == 1) & (y > logit), 1, 0)
                logit = tl.max(chosen, axis=0)
            write_logprobs(row, rows, token, logit, top, mass_left, dot_left,
                           many_left, tl.sum(higher, axis=0) + 1, source[1], vocab, tops, width, groups_of_vocab,
                           floats, counts, report, WIDTH)  # fmt: skip
