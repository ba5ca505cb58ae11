"""What the kernels for wide rows share: the layout of what they keep of a row; reading, listing, scoring."""

import triton
import triton.language as tl

from ...noise.philox_triton import gumbel_at
from ..tokens import GROUP, load_groups, ordered_key, scaled

FIRST_BIN, LAST_BIN, LUMP_BIN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # of a row's frame
ABOVE, LISTED_SO_FAR, LOWEST_KEY, HIGHEST_KEY, FINISHED = (tl.constexpr(i) for i in range(3, 8))
HIGHEST, LOWEST, GUESSED, ACTIVE = (
    tl.constexpr(i) for i in (0, 1, 2, 5)
)  # the same places where a row is FRAMED
FRAME = tl.constexpr(8)
LEAST, PEAK = tl.constexpr(0), tl.constexpr(1)  # of a row's record
WHOLE, MASS_ABOVE, DOT, BEST, LUMP_BEST = (tl.constexpr(i) for i in range(5))  # of a row's sums
SUMS = tl.constexpr(8)

NUMBERS = (
    "groups_of_vocab", "groups", "width", "wants", "report", "kinds", "more_kinds", "places", "more_places",
    "seconds", "more_seconds", "steps", "mask_stride", "listed_length", "touched_stride", "rows",
)  # fmt: skip
POINTERS = (
    "stats", "counters", "active", "counts_of", "masses_of", "frames", "records", "sums", "lists", "totals", "tokens",
    "floats", "counts", "seeds", "positions", "streams", "temperatures", "limits", "bitmask", "listed_ids", "values",
    "touched", "point_values",
)  # fmt: skip


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
def scores_of(y, ids, top, greedy, key):
    """Score and lowest id as one int64 that orders as they do."""
    noise = gumbel_at(key[0], key[1], key[2], tl.maximum(ids, 0))
    score = ordered_key((y - top) + tl.where(greedy, 0.0, noise))
    return (score.to(tl.int64) << 32) | (2147483647 - ids).to(tl.int64)


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
