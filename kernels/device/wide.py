"""Rows whose tokens that matter do not fit the short list of the second launch, by many programs a row.

`bin_kernel` counts the tokens of each distance from the highest, and sums their mass in fixed point, by integer
atomics; the last program of a row finds the bins in which the rules' boundaries lie. `wide_kernel` draws among the
tokens above them, lists those inside, and its last program settles the boundaries exactly and draws. One bin with
more tokens than the list takes, of one value, goes into the list as one lump. What is left, rows whose boundary lies
among more tokens than the list takes, is searched by reading the row again and again.
"""

# ruff: noqa: RUF059 (device code: tuples are unpacked whole)
import triton
import triton.language as tl

from ..noise.philox_triton import gumbel_at
from .groups import PLANES
from .row import DONE, FRAMED, FULL, LEFT, write_logprobs
from .search import BELOW_ALL, FIXED_ONE, fixed
from .steps import CUT_TIES, KEEP_COUNT, KEEP_MASS, KEEP_VALUE, MASS_SHARE, entry, first_of, min_p_limit, steps_of_row
from .tokens import GROUP, key_value, load_groups, ordered_key, scaled

BINS = tl.constexpr(4096)
MANTISSA, LOWEST = tl.constexpr(7), tl.constexpr(-20)  # 128 bins a doubling, from 2**-20 on
FIRST_BIN, LAST_BIN, LUMP_BIN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # of a row's frame
ABOVE, LISTED_SO_FAR, LOWEST_KEY, HIGHEST_KEY, FINISHED = (tl.constexpr(i) for i in range(3, 8))
HIGHEST, LOWEST_LISTED, GUESSED, ACTIVE = (tl.constexpr(i) for i in (0, 1, 2, 5))  # of the frame of a row that is FRAMED
FRAME = tl.constexpr(8)
SAMPLE = tl.constexpr(32)  # groups
LEAST, PEAK = tl.constexpr(0), tl.constexpr(1)  # of a row's record
WHOLE, MASS_ABOVE, DOT, BEST, LUMP_BEST = (tl.constexpr(i) for i in range(5))  # of a row's sums
SUMS = tl.constexpr(8)
NOBODY = tl.constexpr(-9223372036854775807)
PIVOTS = tl.constexpr(8)
NO_BIN = tl.constexpr(1 << 20)


@triton.jit
def bin_of(distance):
    """Bin of a distance >= 0; the last one takes the rest."""
    bits = distance.to(tl.int32, bitcast=True) >> (23 - MANTISSA)
    return tl.minimum(tl.maximum(bits - ((127 + LOWEST) << MANTISSA), 0), BINS - 1)


@triton.jit
def read(start, source, tops, least, GROUPS: tl.constexpr, POINTS: tl.constexpr):
    """Scaled logits and ids [GROUPS * GROUP] of the groups from `start` on that hold a token at or above a bound;
    -inf elsewhere, and where a token is below it."""
    row, logits, vocab, of_vocab, groups, wants, bitmask, mask_stride, sparse, values, rows, temperature = (
        source
    )
    group = start + tl.arange(0, GROUPS)
    top = tl.load(tops + group, mask=group < groups, other=-float("inf"))
    group = tl.where((top >= least) & (top > -float("inf")), group, -1)
    z, ids = load_groups(
        group, row, logits, vocab, of_vocab, wants, bitmask, mask_stride, sparse, values, rows, POINTS
    )
    y = tl.where(z >= least, scaled(z, temperature), -float("inf"))
    return tl.reshape(y, (GROUPS * GROUP,)), tl.reshape(ids, (GROUPS * GROUP,))


@triton.jit
def frame_of(z, least, top, temperature, rest, vocab, found, N: tl.constexpr, TOKENS: tl.constexpr):
    """Between which keys the boundary of a mass rule lies, from a sample [TOKENS] of the row's logits.

    Up to N tokens at or above `least` are all inside. Else the tail beyond a depth is taken with five standard
    deviations to either side, of weights as high as they can be there; who uses it finds out whether it holds.
    rest: mass that the rule leaves out. found: number of tokens at or above `least` where it is known, else 0.

    Returns:
        (highest key, lowest key, whether they are guessed, whether N tokens may be too few).
    """
    depth = tl.where(z > -float("inf"), top - scaled(z, temperature), float("inf"))
    each = vocab.to(tl.float32) / TOKENS
    floor = top - scaled(least, temperature)
    many = tl.sum((depth <= floor).to(tl.float32), axis=0) * each
    many = tl.where(found > 0, found.to(tl.float32), many + 5 * tl.sqrt((many + each) * each))
    near, far, guessed = floor * 0, floor, many >= N
    if guessed:
        weight = tl.exp(-depth)
        far, step = near, tl.max(tl.where(depth <= floor, depth, 0.0), axis=0)
        turn, upper = tl.arange(0, 4) % 2, tl.arange(0, 4) < 2
        for _ in range(6):
            step *= 0.33333334
            edges = tl.where(upper, near, far) + (turn + 1).to(tl.float32) * step
            tail = tl.sum(tl.where(depth[:, None] >= edges[None, :], weight[:, None], 0.0), axis=0) * each
            error = 5 * tl.sqrt(tl.maximum(tail, rest) * each * tl.exp(-edges))
            near += tl.sum((upper & (tail - error >= rest)).to(tl.float32), axis=0) * step
            far += tl.sum(((upper == 0) & (tail + error > rest)).to(tl.float32), axis=0) * step
        far = tl.minimum(far + step, floor)
        many = tl.sum(((depth >= near) & (depth <= far)).to(tl.float32), axis=0) * each
        many += 5 * tl.sqrt((many + each) * each)
    high = tl.where(near > 0, ordered_key(top - near), 2147483647)
    low = ordered_key(tl.where(far < floor, top - far, scaled(least, temperature)))
    return high, low, guessed, many >= N


@triton.jit
def frame_row(part, programs, source, active, least, top, rest, greedy, key, counters, frames, sums, lists,
              N: tl.constexpr, GROUPS: tl.constexpr, POINTS: tl.constexpr):  # fmt: skip
    """This program's share of a row that is FRAMED: the list, and the number, mass and best of the tokens above it.

    Returns:
        whether the list may be too short: then nothing was done.
    """
    row, logits, vocab, of_vocab, groups, wants, bitmask, mask_stride, sparse, values, rows, temperature = source
    some = tl.arange(0, SAMPLE) * of_vocab // SAMPLE
    seen, unused = load_groups(
        some, row, logits, vocab, of_vocab, wants, bitmask, mask_stride, sparse, values, rows, POINTS
    )
    seen = tl.reshape(seen, (SAMPLE * GROUP,))
    found = tl.load(counters + row * 4)
    high, low, guessed, short = frame_of(seen, least, top, temperature, rest, vocab, found, N, SAMPLE * GROUP)
    if short == 0:
        n = tl.load(frames + ACTIVE)
        if part == 0:
            tl.store(frames + HIGHEST, high)
            tl.store(frames + LOWEST_LISTED, low)
            tl.store(frames + GUESSED, guessed.to(tl.int32))
        best = tl.full((GROUPS * GROUP,), NOBODY, tl.int64)
        many, mass = best * 0, best * 0
        for start in range(part * GROUPS, n, programs * GROUPS):
            place = start + tl.arange(0, GROUPS)
            group = tl.load(active + place, mask=place < n, other=-1)
            z, ids = load_groups(
                group, row, logits, vocab, of_vocab, wants, bitmask, mask_stride, sparse, values, rows, POINTS
            )
            y = tl.reshape(tl.where(z >= least, scaled(z, temperature), -float("inf")), (GROUPS * GROUP,))
            its = tl.reshape(ids, (GROUPS * GROUP,))
            own = ordered_key(y)
            if guessed:
                upper = own > high
                best = tl.maximum(best, tl.where(upper, scores_of(y, its, top, greedy, key), NOBODY))
                mass += tl.where(upper, fixed(tl.exp(y - top)), 0)
                many += upper.to(tl.int64)
            list_tokens(y, its, (own <= high) & (own >= low) & (y > -float("inf")), frames, lists, N)
        if guessed:
            tl.atomic_max(sums + BEST, tl.max(best, axis=0), sem="relaxed")
            tl.atomic_add(sums + MASS_ABOVE, tl.sum(mass, axis=0), sem="relaxed")
            tl.atomic_add(frames + ABOVE, tl.sum(many, axis=0).to(tl.int32), sem="relaxed")
    return short


@triton.jit
def list_tokens(y, ids, inside, frames, lists, N: tl.constexpr):
    """Append tokens to the row's list, (scaled logit, id) as one int64; those beyond N are counted alone."""
    spot = tl.atomic_add(frames + LISTED_SO_FAR + ids * 0, 1, mask=inside, sem="relaxed")
    pair = (y.to(tl.int32, bitcast=True).to(tl.int64) << 32) | ids.to(tl.int64)
    tl.store(lists + spot, pair, mask=inside & (spot < N))


@triton.jit
def last_of_row(frames, programs):
    """Whether this program is the last of its row, and may read what the others have written."""
    tl.debug_barrier()
    return tl.atomic_add(frames + FINISHED, 1, sem="acq_rel") == programs - 1


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
            if (kind == KEEP_VALUE) & (seen > 0):
                low = bin_of(top - min_p_limit(top, value))
                high = low
            if (kind == KEEP_VALUE) & (seen == 0):  # nothing below it was counted
                least, most = mass_of_all, mass_of_all
            else:
                if low < BINS:
                    least = tl.minimum(least, tl.max(tl.where(bins < low, masses, 0), axis=0))
                    most = tl.minimum(most, tl.max(tl.where(bins <= high, masses, 0), axis=0))
                    first, last = tl.minimum(first, low), tl.where(seen > 0, last, high)
                    seen = seen + 1
                elif seen == 0:
                    least, most = tl.where(kind == KEEP_COUNT, least, mass_of_all), most
    return first, last


@triton.jit
def lay_frame(counts, first, last, frames, lumps, N: tl.constexpr):
    """Store which bins are listed, and the one that goes into the list as a lump."""
    bins = tl.arange(0, BINS)
    end = tl.where(last < 0, BINS - 1, last)
    few = tl.sum(tl.where(bins <= end, counts, 0), axis=0) < N
    first, last = tl.where(few, 0, first), tl.where(few, end, last)  # no need to tell them apart
    own = tl.where((bins >= first) & (bins <= last), counts, 0)
    inside, most = tl.sum(own, axis=0), tl.max(own, axis=0)
    lump = tl.min(tl.where((own == most) & (own > 0), bins, NO_BIN), axis=0)
    tl.store(frames + FIRST_BIN, first)
    tl.store(frames + LAST_BIN, tl.where(inside - most < N, last, -2))  # -2: too many for the list even so
    tl.store(frames + LUMP_BIN, tl.where(inside < N, -1, lump))
    tl.store(lumps, most)
    tl.store(frames + ABOVE, tl.sum(tl.where(bins < first, counts, 0), axis=0))
    tl.store(frames + LISTED_SO_FAR, first * 0)
    tl.store(frames + LOWEST_KEY, first * 0 + 2147483647)
    tl.store(frames + HIGHEST_KEY, first * 0 - 2147483647)
    tl.store(frames + FINISHED, first * 0)
    return first


NUMBERS = (
    "groups_of_vocab", "groups", "width", "wants", "report", "kinds", "more_kinds", "places", "more_places",
    "seconds", "more_seconds", "steps", "mask_stride", "listed_length", "touched_stride", "rows",
)  # fmt: skip
POINTERS = (
    "stats", "counters", "active", "counts_of", "masses_of", "frames", "records", "sums", "lists", "tokens", "floats", "counts",
    "seeds", "positions", "streams", "temperatures", "limits", "bitmask", "listed_ids", "values", "touched",
    "point_values",
)  # fmt: skip


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
    if mode == FRAMED:
        tossed = tl.full((), 1.0, tl.float32)
        program = (kinds, more_kinds, places, more_places, seconds, more_seconds, steps)
        kind, parameter, second, on = steps_of_row(program, limits, row, rows, vocab, tossed)
        index, first = first_of(kind, on)
        rest = (1 - entry(parameter, index)) * (tl.load(sums + wide_row * SUMS + WHOLE).to(tl.float32) / FIXED_ONE)
        key = (tl.load(seeds + row), tl.load(positions + row), tl.load(streams + row))
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
        program = (kinds, more_kinds, places, more_places, seconds, more_seconds, steps)
        row_steps = steps_of_row(program, limits, row, rows, vocab, tl.full((), 1.0, tl.float32))
        bins = tl.arange(0, BINS)
        number = tl.load(counts_of + bins, cache_modifier=".cg")
        mass = tl.cumsum(tl.load(masses_of + bins, cache_modifier=".cg"), axis=0)
        whole = tl.load(sums + wide_row * SUMS + WHOLE)
        whole = tl.where(whole <= 0, tl.max(mass, axis=0), whole)  # the second launch did not know it
        tl.store(sums + wide_row * SUMS + WHOLE, whole)
        first, last = boundaries(
            tl.cumsum(number, axis=0), mass, whole, row_steps, tl.where(greedy, 0, steps), top
        )
        first = lay_frame(number, first, last, frames, counters + row * 4 + 2, N)
        tl.store(sums + wide_row * SUMS + MASS_ABOVE, tl.max(tl.where(bins < first, mass, 0), axis=0))


@triton.jit
def scores_of(y, ids, top, greedy, key):
    """Score and lowest id as one int64 that orders as they do."""
    noise = gumbel_at(key[0], key[1], key[2], tl.maximum(ids, 0))
    score = ordered_key((y - top) + tl.where(greedy, 0.0, noise))
    return (score.to(tl.int64) << 32) | (2147483647 - ids).to(tl.int64)


@triton.jit
def entries(start, held, source, tops, least, lists, found, GROUPS: tl.constexpr, POINTS: tl.constexpr):
    """Scaled logits and ids [GROUPS * GROUP] from `start` on: of the list if it is held, else of the row's groups."""
    if held:
        slot = start * GROUP + tl.arange(0, GROUPS * GROUP)
        pair = tl.load(lists + slot, mask=slot < found, other=-36028792723996673)  # -inf, -1
        y, ids = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True), pair.to(tl.int32)
    else:
        y, ids = read(start, source, tops, least, GROUPS, POINTS)
    return y, ids


@triton.jit
def beyond(pivots, last_ids, by_mass, lump, held, end, source, tops, least, lists, found, top,
           GROUPS: tl.constexpr, POINTS: tl.constexpr):  # fmt: skip
    """For each of eight keys, number or mass of the tokens above it, and of those at it with an id up to `last_ids`: of
    the list and the lump (key, number), or of the row."""
    total = tl.zeros((PIVOTS,), tl.int64)
    for start in range(0, end, GROUPS):
        y, ids = entries(start, held, source, tops, least, lists, found, GROUPS, POINTS)
        own, unit = ordered_key(y)[:, None], tl.where(by_mass, fixed(tl.exp(y - top)), 1)
        unit = tl.where(y > -float("inf"), unit, 0)
        over = (own > pivots[None, :]) | ((own == pivots[None, :]) & (ids[:, None] <= last_ids[None, :]))
        total += tl.sum(tl.where(over, unit[:, None], 0), axis=0)
    one = tl.where(by_mass, fixed(tl.exp(key_value(lump[0]) - top)), 1) * lump[1]
    with_lump = (pivots < lump[0]) | ((pivots == lump[0]) & (last_ids == 2147483647))
    return total + tl.where(with_lump, one, 0)


@triton.jit
def settle(row_steps, steps, whole, above, lump, span, held, end, source, tops, least, lists, found, top,
           GROUPS: tl.constexpr, POINTS: tl.constexpr):  # fmt: skip
    """(key of the lowest token left, last id kept of those at it) after all steps.

    whole: mass of the row. above: (number, mass) of the tokens above the list. span: (lowest, highest) key that the
    first boundary can have. lump, held, end: see `beyond`.
    """
    kinds, parameters, seconds, on = row_steps
    edge, last_id = span[0], tl.full((), 2147483647, tl.int32)
    taken = steps * 0
    for i in range(steps):
        if entry(on.to(tl.int32), i) > 0:
            kind, value = entry(kinds, i), entry(parameters, i)
            by_id, by_mass = kind == CUT_TIES, kind == KEEP_MASS
            if kind == KEEP_VALUE:
                limit = ordered_key(min_p_limit(top, value))
                last_id = tl.where(limit > edge, 2147483647, last_id)
                edge = tl.maximum(edge, limit)
            else:
                share = value.to(tl.float64) * tl.where(by_mass, MASS_SHARE, 1.0)
                target = tl.where(by_mass, share * whole.to(tl.float64), share)
                base = tl.where(by_mass, above[1], above[0])
                low = tl.where(by_id, 0, edge).to(tl.int64)
                high = tl.where(by_id, source[2] - 1, tl.maximum(span[1], edge)).to(tl.int64)
                asked = by_mass & (taken > 0)  # the mass of what is left, first
                while (low < high) | asked:
                    middle = low + (high - low) * (tl.arange(0, PIVOTS) + 1) // (PIVOTS + 1)
                    pivots = tl.where(by_id | asked, edge, middle.to(tl.int32))
                    lasts = tl.where(asked, last_id, tl.where(by_id, middle.to(tl.int32), -2))
                    amount = base + beyond(pivots, lasts, by_mass, lump, held, end, source, tops, least, lists, found,
                                           top, GROUPS, POINTS)  # fmt: skip
                    amount = amount.to(tl.float64)
                    if asked:
                        target = share * tl.max(amount, axis=0)
                        asked = asked & (asked == 0)
                    else:
                        enough = tl.where(by_id, amount >= target, amount < target)
                        low = tl.max(tl.where(enough, low, middle + 1), axis=0)
                        high = tl.min(tl.where(enough, middle, high), axis=0)
                found_edge = tl.where(by_id, edge, high.to(tl.int32))
                last_id = tl.where(by_id, high.to(tl.int32), tl.where(found_edge > edge, 2147483647, last_id))
                edge = found_edge
            taken += 1
    return edge, last_id


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
    frames, records, sums, lists, tokens, floats, counts,
    seeds, positions, streams, temperatures, limits,
    kinds, more_kinds, places, more_places, seconds, more_seconds, steps,
    bitmask, mask_stride, listed_ids, values, listed_length, touched, touched_stride, point_values, rows,
    GROUPS: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, POINTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The rows that the second launch has left: list, settle, draw; grid (rows, programs)."""
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
        row_steps = steps_of_row(program, limits, row, rows, vocab, tl.full((), 1.0, tl.float32))
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
        lowest, highest = tl.load(frames + LOWEST_LISTED), tl.load(frames + HIGHEST)
        framed = held & (mode == FRAMED)
        span = (
            tl.where(framed, lowest - 1, everything[0]),
            tl.where(framed & (highest < everything[1]), highest + 1, everything[1]),
        )
        edge, last_id, end, going = steps * 0, steps * 0, groups, steps * 0 + 1
        above = (tl.load(frames + ABOVE).to(tl.int64), tl.load(sums + MASS_ABOVE))
        while going > 0:
            above = (tl.where(held, above[0], 0), tl.where(held, above[1], 0))
            end = tl.where(held, tl.cdiv(found, GROUP), groups)
            edge, last_id = settle(row_steps, steps, tl.load(sums + WHOLE), above, lump, span, held, end, source,
                                   tops, least, lists, found, top, GROUPS, POINTS)  # fmt: skip
            going = tl.where(framed & (tl.load(frames + GUESSED) > 0) & ((edge > highest) | (edge < lowest)), 1, 0)
            if going > 0:  # the guess did not hold: the row itself
                held, framed, span = held & (held == 0), framed & (framed == 0), everything
        best = tl.full((GROUPS * GROUP,), NOBODY, tl.int64)
        many, mass, dot = best * 0, best * 0, best * 0
        for start in range(0, end, GROUPS):
            y, ids = entries(start, held, source, tops, least, lists, found, GROUPS, POINTS)
            own = ordered_key(y)
            kept = ((own > edge) | ((own == edge) & (ids <= last_id))) & (y > -float("inf"))
            best = tl.maximum(best, tl.where(kept, scores_of(y, ids, top, greedy, key), NOBODY))
            many += kept.to(tl.int64)
            mass += tl.where(kept, fixed(tl.exp(y - top)), 0)
            if report == FULL:
                dot += part_of_entropy(y, top, kept)
        winner = tl.max(best, axis=0)
        if held:
            winner = tl.maximum(winner, tl.load(sums + BEST, volatile=True))
            if (number > 0) & (lump_key >= edge):
                winner = tl.maximum(winner, tl.load(sums + LUMP_BEST, volatile=True))
        token = 2147483647 - (winner & 0xFFFFFFFF).to(tl.int32)
        tl.store(tokens + row, token.to(tl.int64))
        if report != 0:
            lumps = tl.where((number > 0) & (lump_key >= edge), number, 0).to(tl.int64)
            value = key_value(lump_key)
            one = fixed(tl.exp(value - top))
            part = fixed(-tl.exp(value - top) * (value - top))
            many_left = tl.sum(many, axis=0) + above[0] + lumps
            mass_left = tl.sum(mass, axis=0) + above[1] + lumps * one
            dot_left = (
                tl.sum(dot, axis=0) + tl.where(held, tl.load(sums + DOT, volatile=True), 0) + lumps * part
            )
            near = (token // GROUP) // GROUPS * GROUPS
            chosen = tl.full((GROUPS * GROUP,), -float("inf"), tl.float32)
            higher = chosen.to(tl.int64) * 0
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
            write_logprobs(row, rows, token, logit, top, mass_left, dot_left, many_left, tl.sum(higher, axis=0) + 1,
                           source[1], vocab, tops, width, groups_of_vocab, floats, counts, report,
                           WIDTH)  # fmt: skip
