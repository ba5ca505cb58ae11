"""Between which logits the boundary of a mass rule lies, and the list of the tokens there.

Rows whose first rule keeps a mass, others at most values. Where a bound from the statistics of the groups leaves too
many tokens for the list, a sample of the row narrows it (Floyd and Rivest 1975): what is above is summed, not listed.
"""

# ruff: noqa: RUF059 (device code: tuples are unpacked whole)
import triton
import triton.language as tl

from ..row import NOBODY
from ..sums import fixed
from ..tokens import GROUP, load_groups, ordered_key, scaled
from .rows import ABOVE, ACTIVE, BEST, GUESSED, HIGHEST, LOWEST, MASS_ABOVE, list_tokens, scores_of

SAMPLE = tl.constexpr(32)  # groups


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
        deepest = step * 0.9999
        turn, upper = tl.arange(0, 4) % 2, tl.arange(0, 4) < 2
        for _ in range(6):
            step *= 0.33333334
            edges = tl.where(upper, near, far) + (turn + 1).to(tl.float32) * step
            tail = tl.sum(tl.where(depth[:, None] >= edges[None, :], weight[:, None], 0.0), axis=0) * each
            error = 5 * tl.sqrt(tl.maximum(tail, rest) * each * tl.exp(-edges))
            near += tl.sum((upper & (tail - error >= rest)).to(tl.float32), axis=0) * step
            far += tl.sum(((upper == 0) & (tail + error > rest)).to(tl.float32), axis=0) * step
        far = tl.where(
            far + step < deepest, far + step, floor
        )  # the floor may be a limit, deeper than the sample
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
    row, logits, vocab, of_vocab, groups, wants, bitmask, mask_stride, sparse, values, rows, temperature = (
        source
    )
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
            tl.store(frames + LOWEST, low)
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
