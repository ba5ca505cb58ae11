"""Sums over a whole row, for rules that ask for its entropy, mean or deviation before anything is truncated.

One more sweep by as many programs for every row: each leaves its part, and the last one of a row adds them in order.
"""

# ruff: noqa: RUF059 (device code: tuples are unpacked whole)
import triton
import triton.language as tl

from ..groups import COIN, MAX, PLANES
from ..steps import asks_moments, first_kind, toss
from ..sums import moments, no_moments, plus
from ..sums import totals as sums_of
from ..tokens import GROUP, load_groups, scaled

PARTS = tl.constexpr(32)  # programs a row, at most
SUMS = tl.constexpr(8)  # room for count, mass, dot, shift, shift**2, weight**2


@triton.jit
def leave_part(found, part, parts, counter):
    """Leave this program's sums; whether it is the last one of its row."""
    for i in tl.static_range(len(found)):
        tl.store(parts + part * SUMS + i, found[i].to(tl.float64))
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(1) - 1


@triton.jit
def sum_of_parts(parts, NUMBER: tl.constexpr):
    """The sums [SUMS] of what all programs of a row have left, in order."""
    place = tl.arange(0, PARTS)[:, None] * SUMS + tl.arange(0, SUMS)[None, :]
    taken = tl.load(
        parts + place,
        mask=((place % SUMS) < NUMBER) & (place < tl.num_programs(1) * SUMS),
        other=0.0,
        cache_modifier=".cg",
    )
    return tl.sum(taken, axis=0)


@triton.jit(
    do_not_specialize=(
        "groups_of_vocab", "groups", "width", "wants", "kinds", "more_kinds", "places", "more_places",
        "seconds", "more_seconds", "steps", "mask_stride", "listed_length", "touched_stride", "rows",
    ),
    do_not_specialize_on_alignment=(
        "stats", "counters", "parts", "totals", "seeds", "positions", "streams", "temperatures", "limits", "bitmask",
        "listed_ids", "values", "touched", "point_values",
    ),
)  # fmt: skip
def moment_kernel(
    logits, stride, vocab, groups_of_vocab, groups, stats, width, counters, wants, parts, totals,
    seeds, positions, streams, temperatures, limits,
    kinds, more_kinds, places, more_places, seconds, more_seconds, steps,
    bitmask, mask_stride, listed_ids, values, listed_length, touched, touched_stride, point_values, rows,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, FULL: tl.constexpr, POINTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sums of `sums.moments` of rows whose first rule asks for them; grid (rows, up to PARTS).

    parts [rows, PARTS, SUMS] and totals [rows, SUMS] are float64: integers below 2**53 are exact there.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, part = tl.program_id(0), tl.program_id(1)
    temperature = tl.load(temperatures + row)
    key = (tl.load(seeds + row), tl.load(positions + row), tl.load(streams + row))
    program = (kinds, more_kinds, places, more_places, seconds, more_seconds, steps)
    first = first_kind(program, limits, row, rows, vocab, toss(key, wants & COIN))
    if (temperature <= 0) | (asks_moments(first) == 0):
        return
    wide_row = row.to(tl.int64)
    group = tl.arange(0, WIDTH)
    tops = tl.load(stats + wide_row * (PLANES * width) + MAX * width + group, mask=group < groups,
                   other=-float("inf"))  # fmt: skip
    top = scaled(tl.max(tops, axis=0), temperature)
    sparse = (listed_ids, values, listed_length, touched, touched_stride)
    found = no_moments(GROUPS * GROUP)
    for start in range(part * GROUPS, groups, tl.num_programs(1) * GROUPS):
        mine = start + tl.arange(0, GROUPS)
        mine = tl.where(mine < groups, mine, -1)
        z, ids = load_groups(mine, row, logits + wide_row * stride, vocab, groups_of_vocab, wants, bitmask,
                             mask_stride, sparse, point_values, rows, POINTS)  # fmt: skip
        y = tl.reshape(scaled(z, temperature), (GROUPS * GROUP,))
        found = plus(found, moments(y, y > -float("inf"), top, FULL))
    found = sums_of(found, FULL)
    parts += wide_row * (PARTS * SUMS)
    if leave_part(found, part, parts, counters + row * 4 + 3):
        tl.store(totals + wide_row * SUMS + tl.arange(0, SUMS), sum_of_parts(parts, len(found)))
