"""Temperatures that follow a row's entropy: a sweep between a first look at the groups' maxima and the real one."""

# ruff: noqa: RUF059 (device code: tuples are unpacked whole)

import triton
import triton.language as tl

from ...noise.philox_triton import exact_exp, exact_log
from ..groups import MAX, PLANES
from ..sums import FIXED_ONE, fixed
from ..tokens import FLOAT_MAX, GROUP, load_groups
from .moments import PARTS, SUMS, leave_part, sum_of_parts

NEAR, SMALLEST = tl.constexpr(40.0), tl.constexpr(1e-30)  # reference.NEAR, reference.SMALLEST


@triton.jit
def found_temperature(form, low, high, power, count, mass, dot):
    """`reference.temperatures` from float32 sums."""
    entropy = tl.maximum(exact_log(mass * (1 / FIXED_ONE)) + tl.div_rn(dot, mass), 0.0)
    share = tl.minimum(tl.div_rn(entropy, exact_log(tl.maximum(count, 2.0))), 1.0)
    grown = exact_exp(power * exact_log(tl.maximum(share, SMALLEST)))
    none = tl.where(power <= 0, 1.0, 0.0)
    grown = tl.where(share < SMALLEST, none, tl.where(power == 1, share, grown))
    by_theta = low * exact_exp(tl.div_rn(power, tl.maximum(entropy, 1e-9)) * exact_log(high))
    found = tl.where(form == 1, low + (high - low) * grown, by_theta)
    return tl.minimum(tl.maximum(found, 1e-6), FLOAT_MAX)


@triton.jit(
    do_not_specialize=(
        "groups_of_vocab", "groups", "width", "wants", "mask_stride", "listed_length", "touched_stride", "rows",
    ),
    do_not_specialize_on_alignment=(
        "stats", "counters", "parts", "found", "adaptive", "temperatures", "bitmask", "listed_ids", "values", "touched",
        "point_values",
    ),
)  # fmt: skip
def temperature_kernel(
    logits, stride, vocab, groups_of_vocab, groups, stats, width, counters, wants, parts, found, adaptive, temperatures,
    bitmask, mask_stride, listed_ids, values, listed_length, touched, touched_stride, point_values, rows,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, POINTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The temperature of every row into found [rows]; grid (rows, up to PARTS). adaptive [4, rows], see `sample`."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row, part = tl.program_id(0), tl.program_id(1)
    form, temperature = tl.load(adaptive + row), tl.load(temperatures + row)
    if (form <= 0) | (temperature <= 0):
        tl.store(found + row, temperature)
        return
    wide_row = row.to(tl.int64)
    group = tl.arange(0, WIDTH)
    tops = tl.load(stats + wide_row * (PLANES * width) + MAX * width + group, mask=group < groups,
                   other=-float("inf"))  # fmt: skip
    top = tl.max(tops, axis=0)
    sparse = (listed_ids, values, listed_length, touched, touched_stride)
    count = tl.zeros((GROUPS * GROUP,), tl.int64)
    mass, dot = count, count
    for start in range(part * GROUPS, groups, tl.num_programs(1) * GROUPS):
        mine = start + tl.arange(0, GROUPS)
        mine = tl.where(mine < groups, mine, -1)
        z, ids = load_groups(mine, row, logits + wide_row * stride, vocab, groups_of_vocab, wants, bitmask,
                             mask_stride, sparse, point_values, rows, POINTS)  # fmt: skip
        x = tl.reshape(z, (GROUPS * GROUP,))
        shift = tl.maximum(x - top, -NEAR)
        weight = exact_exp(shift)
        count += (x > -float("inf")).to(tl.int64)
        mass += fixed(weight)
        dot += fixed(shift * -weight)
    sums = (tl.sum(count, axis=0), tl.sum(mass, axis=0), tl.sum(dot, axis=0))
    parts += wide_row * (PARTS * SUMS)
    if leave_part(sums, part, parts, counters + row * 4 + 3):
        total, place = sum_of_parts(parts, 3).to(tl.int64), tl.arange(0, SUMS)
        count_of = tl.sum(tl.where(place == 0, total, 0), axis=0).to(tl.float32)
        mass_of = tl.sum(tl.where(place == 1, total, 0), axis=0).to(tl.float32)
        dot_of = tl.sum(tl.where(place == 2, total, 0), axis=0).to(tl.float32)
        adaptive += row
        low, high, power = (
            tl.load(adaptive + rows),
            tl.load(adaptive + 2 * rows),
            tl.load(adaptive + 3 * rows),
        )
        own = found_temperature(form, low, high, power, count_of, mass_of, dot_of)
        tl.store(found + row, tl.where(own == own, own, temperature))  # NaN: a row that has no token
