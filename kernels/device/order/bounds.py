"""A logit below which no token of a row matters, from the statistics of its groups and the first rule that is on."""

import triton
import triton.language as tl

from ..groups import rough_band
from ..steps import (
    BY_FUNCTION,
    HEAD,
    HEAD_TOKENS,
    KEEP_COUNT,
    KEEP_MASS,
    KEEP_VALUE,
    NO_RULE,
    TAIL_FREE,
    TOP_H,
    TYPICAL,
    XTC,
    entry,
    first_of,
    min_p_limit,
    value_limit,
)
from ..sums import FIXED_ONE
from ..tokens import FLOAT_MAX, scaled

BINS = tl.constexpr(512)
MANTISSA, LOWEST = tl.constexpr(4), tl.constexpr(-16)  # bins of a distance: 16 a doubling, from 2**-16 on
MOST_OF_TOP_H = tl.constexpr(128.0)  # groups in which top-H as first rule looks for its boundary
NOISE_MOST = tl.constexpr(22.2)  # philox.GUMBEL_MAX
SPAN = tl.constexpr(24.5)  # a token so far below the highest weighs nothing


@triton.jit
def within_count(distance, inside, goal):
    """A distance within which a number of the groups are; inf if there are fewer."""
    bits = distance.to(tl.int32, bitcast=True) >> (23 - MANTISSA)
    number = tl.minimum(tl.maximum(bits - ((127 + LOWEST) << MANTISSA), 0), BINS - 1)
    groups = tl.histogram(number, BINS, mask=inside)
    place = tl.sum((tl.cumsum(groups, axis=0).to(tl.float32) < goal).to(tl.int32), axis=0)
    end = (place + 1 + ((127 + LOWEST) << MANTISSA)) << (23 - MANTISSA)
    return tl.where(place >= BINS - 1, float("inf"), end.to(tl.float32, bitcast=True))


@triton.jit
def within_mass(depth, shares, goal):
    """A depth, up to SPAN, within which the shares of the groups sum to a goal; more than SPAN if they do not."""
    low, step = goal * 0, goal * 0 + SPAN
    for _ in range(5):
        step *= 0.25
        edges = low + (tl.arange(0, 4) + 1).to(tl.float32) * step
        sums = tl.sum(tl.where(depth[:, None] < edges[None, :], shares[:, None], 0.0), axis=0)
        low += tl.sum((sums < goal).to(tl.float32), axis=0) * step
    return low + step


@triton.jit
def lowest_logit(tops, shares, peak, inside, first, parameter, temperature, greedy, noise, whole, sums, vocab,
                 DEVICES: tl.constexpr):  # fmt: skip
    """A bound, before temperature, below which no token of the row matters; and the groups that can win by scores."""
    reach = tl.full((), float("inf"), tl.float32)
    near = inside
    if greedy:
        reach = reach * 0 + 0.0
        reach = tl.where(reach == reach, reach, 0.0)
    elif first == KEEP_VALUE:
        top = scaled(peak, temperature)
        reach = (top - min_p_limit(top, parameter)) * temperature
    elif (first >= BY_FUNCTION) & (first != NO_RULE):
        top = scaled(peak, temperature)
        limit = tl.where(first == TAIL_FREE, -float("inf"), value_limit(first, sums, top, parameter, DEVICES))
        reach = (top - limit) * temperature
    elif (
        (first == KEEP_COUNT) | (first == HEAD) | (first == TOP_H)
    ):  # where top-H ends is found out by looking
        goal = tl.where(first == HEAD, HEAD_TOKENS, MOST_OF_TOP_H)
        goal = tl.where(first == KEEP_COUNT, parameter, goal)
        reach = within_count(tl.maximum(peak - tops, 0.0), inside, goal)
    elif (first == KEEP_MASS) | (
        first == TYPICAL
    ):  # what is below may have no more than the mass that is not kept
        total = whole.to(tl.float32) / FIXED_ONE
        rest = tl.maximum(0.99 * (1 - parameter) - 1e-5, 0.0) * total
        reach = tl.minimum(-tl.log(tl.maximum(rest / vocab.to(tl.float32), 1e-37)), SPAN)
        depth = scaled(peak, temperature) - scaled(tops, temperature)
        # the highest tokens of the groups above it are not below it
        reach = tl.minimum(reach, within_mass(depth, shares, total - rest))
        if first == TYPICAL:  # as far below the mean logit as the highest is above, or as that mass reaches
            centre = sums[2].to(tl.float32) / tl.maximum(sums[1], 1).to(tl.float32)
            reach = tl.maximum(reach, centre * 2.0001 + 1e-4)
        reach = reach * temperature
    elif first == NO_RULE:
        score = noise + (tops - peak) / temperature
        best = tl.max(score, axis=0)
        band = rough_band(peak / temperature)
        near = inside & (score >= best - band)
        reach = (NOISE_MOST + band - best) * temperature
    slack = tl.abs(peak) * 1e-6 + 1e-30
    least = tl.where(reach < float("inf"), (peak - reach * 1.00001) - slack, -FLOAT_MAX)
    return tl.where(least > -FLOAT_MAX, least, -FLOAT_MAX), near


@triton.jit
def lowest_after_xtc(kind, parameter, on, index, tops, peak, inside, temperature, moments):
    """The same bound where XTC comes first, from the rule behind it; whether that gives none: then the whole row
    matters.

    At most 1 / threshold tokens reach the threshold, and the lowest of them is left.
    """
    top, threshold = scaled(peak, temperature), entry(parameter, index)
    after, behind = first_of(kind, on & (tl.arange(0, 16) > index))
    reach = tl.full((), float("inf"), tl.float32)
    if behind == KEEP_COUNT:
        goal = entry(parameter, after) + 1.001 / tl.maximum(threshold, 1e-6) + 1.0
        reach = within_count(tl.maximum(peak - tops, 0.0), inside, goal)
    if behind == KEEP_VALUE:
        level = value_limit(XTC, moments, top, threshold, ())
        reach = (top - min_p_limit(level, entry(parameter, after))) * temperature
    least = tl.where(
        reach < float("inf"), (peak - reach * 1.00001) - (tl.abs(peak) * 1e-6 + 1e-30), -FLOAT_MAX
    )
    return tl.maximum(least, -FLOAT_MAX), (behind != KEEP_COUNT) & (behind != KEEP_VALUE)
