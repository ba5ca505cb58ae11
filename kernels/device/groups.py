"""The first launch: statistics of each group of 128 tokens of a row, from one read of the logits.

What a row needs is decided when the kernel runs, by the rules that are on for it: always the highest logit of a
group (NaN where the group holds one), for count and value rules that alone. Sums of weights where a mass or a
log-probability asks, noise where no rule is on, sums of the logits as given for log-probabilities.
A program works on groups of the vocabulary, listed tokens left out; with an edit list, further programs work on the
list itself, whose groups follow those of the vocabulary.
"""

# ruff: noqa: SIM102 (device code: compile-time tests stay apart)
import triton
import triton.language as tl

from ..noise.philox_triton import gumbel_at, gumbel_groups, rough_log_times
from .steps import KEEP_MASS, NO_RULE, TYPICAL, XTC, first_kind, toss
from .tokens import (
    BITMASK,
    FLOAT_MAX,
    GROUP,
    LISTED,
    LOG2E,
    edited,
    exp_of,
    finite_top,
    group_bits,
    load_listed,
    mask_bit,
    quotient,
    scaled,
)

MAX, SUM, NOISE, RAW_MAX, RAW_SUM = (tl.constexpr(i) for i in range(5))
PLANES = tl.constexpr(5)  # statistics of a group
SUMS, NOISES, RAWS = (
    tl.constexpr(8),
    tl.constexpr(16),
    tl.constexpr(32),
)  # what a launch may ask for: bits of `wants`
REPORT = tl.constexpr(64)  # sums for the log-probability of rows in which no rule is on
COIN = tl.constexpr(128)  # a rule tosses a coin
MOST_TILES = tl.constexpr(8)  # of a program

MOST = tl.constexpr(1048576.0)  # temperatures up to this, and from its inverse on, divide by a product
NOISE_BAND = tl.constexpr(1e-3)  # error bound of scores around 0
LEAST_NOISE = tl.constexpr(-4.4777)  # philox.GUMBEL_MIN to four places
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def rough_band(top):
    """Error bound of the scores NOISE around the highest one, top that of the scaled logits: both sides round."""
    return NOISE_BAND + tl.abs(top) * 1e-6


@triton.jit
def nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def highest(x, PTX: tl.constexpr):
    """float32 maximum of each row of [R, GROUP]: the largest float for +inf, a positive NaN where the row has a NaN."""
    if PTX:
        top = tl.reduce(x.to(tl.float32), 1, nan_max)
    else:
        x = x.to(tl.float32)
        top = tl.where(tl.sum((x != x).to(tl.int32), axis=1) > 0, float("nan"), tl.max(x, axis=1))
    return tl.where(top != top, float("nan"), finite_top(top))


@triton.jit
def weights_of(shift, PTX: tl.constexpr):
    """exp of shifts from a maximum; 0 for NaN, which a product makes of a logit of -inf."""
    if PTX:
        return tl.maximum(exp_of(shift, PTX), 0.0)
    return tl.exp(tl.where(shift == shift, shift, -float("inf")))


@triton.jit
def plain_temperature(temperature):
    """Whether a product and a correction divide by a temperature to the last bit (but for logits that weigh nothing).

    The second launch uses the sums of such rows alone.
    """
    even = (temperature.to(tl.int32, bitcast=True) & 0x7FFFFF) != 0x7FFFFF
    return even & (temperature <= MOST) & (temperature >= 1 / MOST)


@triton.jit
def sum_of(x, top, temperature, PTX: tl.constexpr):
    """Sum of exp(x / temperature - top / temperature) of each row of [R, GROUP]; tokens at -inf weigh 0."""
    safe = tl.where(top > -float("inf"), top, 0.0)
    if PTX:
        inverse = tl.div_rn(1.0, temperature)
        shift = quotient(x, temperature, inverse) - quotient(safe, temperature, inverse)[:, None]
    else:
        shift = scaled(x, temperature) - scaled(safe, temperature)[:, None]
    return tl.sum(weights_of(shift, PTX), axis=1)


@triton.jit
def best_score(z, top, inverse, noise):
    """Highest score of each group [R] of logits z with their maxima, relative to the maximum; inverse: 1 /
    temperature."""
    shift = z - tl.where(top > -float("inf"), top, 0.0)[:, None]
    return tl.max(tl.where(z > -float("inf"), shift * inverse + noise, -float("inf")), axis=1)


@triton.jit
def best_of_groups(z, top, temperature, key, first, GROUPS: tl.constexpr, PTX: tl.constexpr):
    """`best_score` of the tokens from first[i] on, to within NOISE_BAND / 10."""
    inverse = tl.div_rn(1.0, temperature)
    if PTX:
        shift = z - tl.where(top > -float("inf"), top, 0.0)[:, None]
        times = rough_log_times(key[0], key[1], key[2], first, GROUPS, GROUP)
        score = tl.max(tl.fma(shift, inverse * LOG2E, -times), axis=1)
        best = tl.maximum(tl.fma(score, LN2, 32 * LN2), LEAST_NOISE)  # that of the group's highest logit
        return tl.where(top > -float("inf"), best, -float("inf"))
    noise = gumbel_groups(key[0], key[1], key[2], first, GROUPS, GROUP)
    return best_score(z, top, inverse, noise)


NUMBERS = (
    "groups_of_vocab", "groups", "width", "wants", "tiles", "programs", "kinds", "more_kinds", "places", "more_places",
    "seconds", "more_seconds", "steps", "mask_stride", "listed_length", "touched_stride", "rows",
)  # fmt: skip
POINTERS = (
    "stats", "counters", "seeds", "positions", "streams", "temperatures", "limits", "bitmask", "listed_ids",
    "biases", "seen", "listed_counts", "touched", "repetition", "presence", "frequency", "values", "point_values",
)  # fmt: skip


@triton.jit
def asked_of(wants, seeds, positions, streams, temperatures, limits, program, row, rows, vocab):
    """(sums?, noise?, temperature, key) of a row: what its group statistics are to hold beside the maxima."""
    ask_sum, ask_noise = row < 0, row < 0
    temperature = tl.full((), 1.0, tl.float32)
    key = (temperature.to(tl.int64), temperature.to(tl.int64), temperature.to(tl.int64))
    if wants & (SUMS | NOISES | REPORT):
        temperature = tl.load(temperatures + row)
        greedy = temperature <= 0
        temperature = tl.where(greedy, 1.0, temperature)
        key = (tl.load(seeds + row), tl.load(positions + row), tl.load(streams + row))
        kind = first_kind(program, limits, row, rows, vocab, toss(key, wants & COIN))
        free = greedy | (kind == NO_RULE)
        ask_noise = ((wants & NOISES) != 0) & free & (greedy == 0)
        ask_sum = (((wants & REPORT) != 0) & free) | (
            ((wants & SUMS) != 0) & (greedy == 0) & ((kind == KEEP_MASS) | (kind == TYPICAL) | (kind == XTC))
        )
    return ask_sum, ask_noise, temperature, key


@triton.jit
def marked_tiles(bits, start, group, tiles, vocab, GROUPS: tl.constexpr):
    """int32, bit i set where tile i from `group` on, of GROUPS groups, has a bit set; at most MOST_TILES tiles."""
    WORDS: tl.constexpr = GROUPS * (GROUP // 32)
    tile = tl.arange(0, MOST_TILES)
    word = group * (GROUP // 32) + tile[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    inside = (tile[:, None] < tiles) & (word < tl.cdiv(vocab, 32))
    found = tl.load(bits + start + word, mask=inside, other=0)
    return tl.sum(tl.max((found != 0).to(tl.int32), axis=1) << tile, axis=0)


@triton.jit
def list_groups(part, row, logits, vocab, groups_of_vocab, groups, at, width, wants, asked, bitmask, mask_stride,
                sparse, values, point_values, rows, GROUPS: tl.constexpr, POINTS: tl.constexpr,
                PTX: tl.constexpr):  # fmt: skip
    """Statistics of GROUPS groups of an edit list, whose edited logits are kept in `values` for later launches."""
    ask_sum, ask_noise, temperature, key = asked
    wide_row, length = row.to(tl.int64), sparse[4]
    place = (part * GROUPS + tl.arange(0, GROUPS))[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    ids, z = load_listed(place, row, logits, vocab, sparse, wants)
    lost = z != z
    if wants & BITMASK:
        allowed = mask_bit(bitmask + wide_row * mask_stride, ids, (ids >= 0) & (ids < vocab))
        z = tl.where(allowed != 0, z, -float("inf"))
    z = tl.where(lost, float("nan"), edited(z, ids, point_values, row, rows, POINTS))
    top = highest(z, PTX)
    group = groups_of_vocab + part * GROUPS + tl.arange(0, GROUPS)
    at, own = at + group, group < groups
    tl.store(at + MAX * width, top, mask=own)
    if ask_sum:
        tl.store(at + SUM * width, sum_of(z, top, temperature, PTX), mask=own)
    if ask_noise:
        noise = gumbel_at(key[0], key[1], key[2], tl.maximum(ids, 0))
        tl.store(at + NOISE * width, best_score(z, top, tl.div_rn(1.0, temperature), noise), mask=own)
    tl.store(values + wide_row * length + place, z, mask=(place < length) & own[:, None])


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=POINTERS)
def group_kernel(
    logits, stride, vocab, groups_of_vocab, groups, stats, width, counters, wants, tiles, programs,
    seeds, positions, streams, temperatures, limits,
    kinds, more_kinds, places, more_places, seconds, more_seconds, steps,
    bitmask, mask_stride, listed_ids, biases, seen, listed_counts, listed_length, touched, touched_stride,
    repetition, presence, frequency, values, point_values, rows,
    GROUPS: tl.constexpr, LIST: tl.constexpr, POINTS: tl.constexpr, PTX: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Statistics of the groups into stats [rows, PLANES, width]; grid (rows, programs and more for an edit list).

    wants: bits LISTED, BITMASK (of `tokens`), SUMS, NOISES, RAWS, REPORT, COIN. programs: with the vocabulary's groups,
    tiles of GROUPS groups each; the others have LIST groups of the edit list, whose tokens count in the statistics of
    the logits as given alone elsewhere.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, part = tl.program_id(0), tl.program_id(1)
    logits += row.to(tl.int64) * stride
    stats += row.to(tl.int64) * (PLANES * width)
    program = (kinds, more_kinds, places, more_places, seconds, more_seconds, steps)
    if part >= programs:
        asked = asked_of(wants, seeds, positions, streams, temperatures, limits, program, row, rows, vocab)
        sparse = (listed_ids, biases, seen, listed_counts, listed_length, repetition, presence, frequency)
        list_groups(part - programs, row, logits, vocab, groups_of_vocab, groups, stats, width, wants, asked, bitmask,
                    mask_stride, sparse, values, point_values, rows, LIST, POINTS, PTX)  # fmt: skip
        return
    inner = tl.arange(0, GROUPS)
    ids = (part * tiles * GROUPS + inner)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(logits + ids, mask=ids < vocab, other=-float("inf"))  # before what it does not wait for
    if part == 0:
        slot = tl.arange(0, 4)
        tl.store(counters + row * 4 + slot, slot * 0)
    marks = part * 0
    if wants & LISTED:
        marks = marked_tiles(
            touched, row.to(tl.int64) * touched_stride, part * tiles * GROUPS, tiles, vocab, GROUPS
        )
    ask_sum, ask_noise, temperature, key = asked_of(
        wants, seeds, positions, streams, temperatures, limits, program, row, rows, vocab
    )
    masked = len(POINTS) > 0 or wants & BITMASK
    for tile in range(tiles):
        end = tl.where(tile + 1 < tiles, vocab, 0) - GROUPS * GROUP
        following = tl.load(logits + ids + GROUPS * GROUP, mask=ids < end, other=-float("inf"))
        group = (part * tiles + tile) * GROUPS + inner
        at, inside = stats + group, group < groups_of_vocab
        own = x if PTX else x.to(tl.float32)  # the interpreter cannot compare bfloat16
        if wants & RAWS:
            top, z = highest(own, PTX), tl.minimum(own.to(tl.float32), FLOAT_MAX)
            tl.store(at + RAW_MAX * width, top, mask=inside)
            tl.store(at + RAW_SUM * width, sum_of(z, top, 1.0, PTX), mask=inside)
        if wants & LISTED:
            if (marks >> tile) & 1:
                gone = group_bits(touched, row.to(tl.int64) * touched_stride, group, vocab)
                own = tl.where(gone, -float("inf"), own).to(own.dtype)  # their NaN is told with the list
        top, z = highest(own, PTX), tl.minimum(own.to(tl.float32), FLOAT_MAX)
        if masked:
            if wants & BITMASK:
                allowed = group_bits(bitmask, row.to(tl.int64) * mask_stride, group, vocab)
                z = tl.where(allowed, z, -float("inf"))
            z = edited(z, ids, point_values, row, rows, POINTS)
            top = tl.where(top != top, top, highest(z, PTX))  # a mask does not hide a NaN
        tl.store(at + MAX * width, top, mask=inside)
        if ask_sum:
            tl.store(at + SUM * width, sum_of(z, top, temperature, PTX), mask=inside)
        if ask_noise:
            best = best_of_groups(z, top, temperature, key, group * GROUP, GROUPS, PTX)
            tl.store(at + NOISE * width, best, mask=inside)
        x, ids = following, ids + GROUPS * GROUP
