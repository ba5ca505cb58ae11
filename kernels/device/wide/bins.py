"""Rows that are left: how many tokens, of which mass, are at each distance from the highest.

Every program counts by integer atomics; the last one of a row finds the bins in which the rules' boundaries lie. One
bin with more tokens than the list takes, of one value, goes into the list as one lump. A row that is FRAMED gets its
list here.
"""

# ruff: noqa: RUF059 (device code: tuples are unpacked whole)
import triton
import triton.language as tl

from ..groups import COIN, PLANES
from ..row import DONE, FRAMED, LEFT
from ..steps import (
    KEEP_COUNT,
    KEEP_MASS,
    KEEP_VALUE,
    MASS_SHARE,
    XTC,
    entry,
    first_of,
    min_p_limit,
    steps_of_row,
    toss,
)
from ..sums import FIXED_ONE, fixed
from ..tokens import scaled
from .frame import frame_row
from .rows import (
    ABOVE,
    FINISHED,
    FIRST_BIN,
    FRAME,
    HIGHEST_KEY,
    LAST_BIN,
    LEAST,
    LISTED_SO_FAR,
    LOWEST_KEY,
    LUMP_BIN,
    MASS_ABOVE,
    NUMBERS,
    PEAK,
    POINTERS,
    SUMS,
    WHOLE,
    last_of_row,
    read,
)  # fmt: skip

BINS = tl.constexpr(4096)
MANTISSA, LOWEST = tl.constexpr(7), tl.constexpr(-20)  # 128 bins a doubling, from 2**-20 on
NO_BIN = tl.constexpr(1 << 20)


@triton.jit
def bin_of(distance):
    """Bin of a distance >= 0; the last one takes the rest."""
    bits = distance.to(tl.int32, bitcast=True) >> (23 - MANTISSA)
    return tl.minimum(tl.maximum(bits - ((127 + LOWEST) << MANTISSA), 0), BINS - 1)


@triton.jit
def boundaries(counts, masses, whole, row_steps, steps, top):
    """(first, last) bin in which the boundary of a rule can lie; NO_BIN and -1 if no rule has one.

    counts, masses: cumulative sums over the bins. What a mass is a share of lies between two sums where the boundary
    before it is known by its bin alone.
    """
    kinds, parameters, seconds, on = row_steps
    bins = tl.arange(0, BINS)
    total, mass_of_all = tl.max(counts, axis=0), tl.max(masses, axis=0)
    first, last = total * 0 + NO_BIN, total * 0 - 1
    least, most = whole, whole
    seen = total * 0
    for i in range(steps):
        if entry(on.to(tl.int32), i) > 0:
            kind, value = entry(kinds, i), entry(parameters, i)
            low, high = first * 0 + NO_BIN, first * 0 + NO_BIN
            if kind == KEEP_COUNT:
                low = tl.sum((counts.to(tl.float32) < value).to(tl.int32), axis=0)
                high = low
            if kind == KEEP_MASS:
                share = value.to(tl.float64) * MASS_SHARE
                low = tl.sum((masses.to(tl.float64) < share * least.to(tl.float64)).to(tl.int32), axis=0)
                high = tl.sum((masses.to(tl.float64) < share * most.to(tl.float64)).to(tl.int32), axis=0)
                ends = tl.max(tl.where(masses < mass_of_all, bins + 1, 0), axis=0)  # the last bin with mass
                low, high = tl.minimum(low, ends), tl.minimum(high, ends)
            if kind == KEEP_VALUE:
                low = bin_of(top - min_p_limit(top, value))
                high = low
            if low < BINS:
                least = tl.minimum(least, tl.max(tl.where(bins < low, masses, 0), axis=0))
                most = tl.minimum(most, tl.max(tl.where(bins <= high, masses, 0), axis=0))
                first, last = tl.minimum(first, low), tl.where(seen > 0, last, high)
                seen = seen + 1
            elif seen == 0:
                least, most = tl.where(kind == KEEP_COUNT, least, mass_of_all), most
    return first, last


@triton.jit
def lay_frame(counts, first, last, entire, frames, lumps, N: tl.constexpr):
    """Store which bins are listed, and the one that goes into the list as a lump; entire: all down to the last bin."""
    bins = tl.arange(0, BINS)
    end = tl.where(last < 0, BINS - 1, last)
    few = tl.sum(tl.where(bins <= end, counts, 0), axis=0) < N
    few = few | entire  # no need to tell them apart
    first, last = tl.where(few, 0, first), tl.where(few, end, last)
    own = tl.where((bins >= first) & (bins <= last), counts, 0)
    inside, most = tl.sum(own, axis=0), tl.where(entire, 0, tl.max(own, axis=0))
    lump = tl.min(tl.where((own == most) & (own > 0), bins, NO_BIN), axis=0)
    tl.store(frames + FIRST_BIN, first)
    tl.store(frames + LAST_BIN, tl.where(inside - most < N, last, -2))  # -2: too many for the list even so
    tl.store(frames + LUMP_BIN, tl.where((inside < N) | entire, -1, lump))
    tl.store(lumps, most)
    tl.store(frames + ABOVE, tl.sum(tl.where(bins < first, counts, 0), axis=0))
    tl.store(frames + LISTED_SO_FAR, first * 0)
    tl.store(frames + LOWEST_KEY, first * 0 + 2147483647)
    tl.store(frames + HIGHEST_KEY, first * 0 - 2147483647)
    tl.store(frames + FINISHED, first * 0)
    return first


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def bin_kernel(
    logits, stride, vocab, groups_of_vocab, groups, stats, width, counters, wants, report,
    active, lists, counts_of, masses_of, frames, records, sums,
    seeds, positions, streams, temperatures, limits,
    kinds, more_kinds, places, more_places, seconds, more_seconds, steps,
    bitmask, mask_stride, listed_ids, values, listed_length, touched, touched_stride, point_values, rows,
    GROUPS: tl.constexpr, N: tl.constexpr, POINTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Tokens and their mass by bins of the distance from the highest, and the bins of the boundaries; or the list of a
    row that is FRAMED.

    grid (rows, programs); counts_of int32 and masses_of int64 [rows, BINS], zeroed by the second launch.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    mode = tl.load(counters + row * 4 + 1)
    if mode == DONE:
        return
    part, programs = tl.program_id(1), tl.num_programs(1)
    wide_row = row.to(tl.int64)
    temperature = tl.load(temperatures + row)
    greedy = temperature <= 0
    temperature = tl.where(greedy, 1.0, temperature)
    least, peak = tl.load(records + row * 2 + LEAST), tl.load(records + row * 2 + PEAK)
    top = scaled(peak, temperature)
    sparse = (listed_ids, values, listed_length, touched, touched_stride)
    source = (row, logits + wide_row * stride, vocab, groups_of_vocab, groups, wants, bitmask, mask_stride, sparse,
              point_values, rows, temperature)  # fmt: skip
    frames += row * FRAME
    program = (kinds, more_kinds, places, more_places, seconds, more_seconds, steps)
    key = (tl.load(seeds + row), tl.load(positions + row), tl.load(streams + row))
    tossed = toss(key, wants & COIN)
    if mode == FRAMED:
        kind, parameter, second, on = steps_of_row(program, limits, row, rows, vocab, tossed)
        index, first = first_of(kind, on)
        rest = (1 - entry(parameter, index)) * (
            tl.load(sums + wide_row * SUMS + WHOLE).to(tl.float32) / FIXED_ONE
        )
        short = frame_row(part, programs, source, active + wide_row * width, least, top, rest, greedy, key, counters,
                          frames, sums + wide_row * SUMS, lists + wide_row * N, N, GROUPS, POINTS)  # fmt: skip
        if short == 0:
            return
        if part == 0:
            tl.store(counters + row * 4 + 1, LEFT)
    counts_of += wide_row * BINS
    masses_of += wide_row * BINS
    for start in range(part * GROUPS, groups, programs * GROUPS):
        y, ids = read(start, source, stats + wide_row * (PLANES * width), least, GROUPS, POINTS)
        place = bin_of(top - y)
        there = y > -float("inf")
        weight = fixed(tl.exp(y - top))
        tl.atomic_add(counts_of + place, 1, mask=there, sem="relaxed")
        tl.atomic_add(masses_of + place, weight, mask=there & (weight > 0), sem="relaxed")
    if last_of_row(frames, programs):
        row_steps = steps_of_row(program, limits, row, rows, vocab, tossed)
        special, unused = first_of(row_steps[0], row_steps[3] & (row_steps[0] >= XTC))
        entire = (special < 16) & (greedy == 0)  # what a rule of another kind keeps, no bin tells
        bins = tl.arange(0, BINS)
        number = tl.load(counts_of + bins, cache_modifier=".cg")
        mass = tl.cumsum(tl.load(masses_of + bins, cache_modifier=".cg"), axis=0)
        whole = tl.load(sums + wide_row * SUMS + WHOLE)
        whole = tl.where(whole <= 0, tl.max(mass, axis=0), whole)  # the second launch did not know it
        tl.store(sums + wide_row * SUMS + WHOLE, whole)
        first, last = boundaries(
            tl.cumsum(number, axis=0),
            mass,
            whole,
            row_steps,
            tl.where(greedy, 0, tl.minimum(steps, special)),
            top,
        )
        first = lay_frame(number, first, last, entire, frames, counters + row * 4 + 2, N)
        tl.store(sums + wide_row * SUMS + MASS_ABOVE, tl.max(tl.where(bins < first, mass, 0), axis=0))
