"""The highest logits of a row as given, with their log-probabilities.

What a bound from the groups' maxima leaves is listed, and each token's place is how many come before it. Where ties
leave more than the list takes, the highest are taken one by one.
"""

import triton
import triton.language as tl

from .groups import PLANES, RAW_MAX, RAW_SUM
from .order.bounds import within_count
from .order.ranks import COLUMNS
from .row import NOBODY
from .tokens import GROUP, key_value, load_groups, ordered_key

TAKEN = tl.constexpr(9223372036854775807)


@triton.jit
def order_of(start, n, active, least, source, PART: tl.constexpr):
    """int64 [PART * GROUP] that orders tokens at or above a bound by logit, then lowest id; NOBODY for others."""
    row, logits, vocab, of_vocab, real = source
    place = start + tl.arange(0, PART)
    group = tl.load(active + place, mask=place < n, other=-1)
    edits = (active, real, row * 0, active, row * 0)  # none of them is read
    x, ids = load_groups(
        group, row, logits, vocab, of_vocab, row * 0, active, row * 0, edits, real, row * 0, (), True
    )
    order = (ordered_key(x).to(tl.int64) << 32) | (2147483647 - ids).to(tl.int64)
    return tl.reshape(tl.where((ids >= 0) & (x >= least), order, NOBODY), (PART * GROUP,))


@triton.jit
def store_top(order, place, wanted, highest, log_mass, top_ids, top_logprobs):
    """Store tokens at their places."""
    tl.store(top_ids + place, 2147483647 - (order & 0xFFFFFFFF), mask=wanted)
    logprob = (key_value((order >> 32).to(tl.int32)) - highest) - log_mass
    tl.store(top_logprobs + place, logprob, mask=wanted)


@triton.jit
def take_one_by_one(n_top, n, active, least, source, TOP: tl.constexpr, PART: tl.constexpr):
    """The n_top highest tokens [TOP], each in the place of the lowest of those before; their places."""
    slot = tl.arange(0, TOP)
    taken = tl.where(slot < n_top, slot.to(tl.int64) + (NOBODY + 1), TAKEN)
    for start in range(0, n, PART):
        order = order_of(start, n, active, least, source, PART)
        best, lowest = tl.max(order, axis=0), tl.min(taken, axis=0)
        while best > lowest:
            taken = tl.where(taken == lowest, best, taken)
            order = tl.where(order == best, NOBODY, order)
            best, lowest = tl.max(order, axis=0), tl.min(taken, axis=0)
    before = (taken[None, :] > taken[:, None]) & (slot[None, :] < n_top)
    return taken, tl.sum(before.to(tl.int32), axis=1)


@triton.jit(
    do_not_specialize=("groups_of_vocab", "width", "n_top"),
    do_not_specialize_on_alignment=("stats", "active", "lists", "counters", "top_ids", "top_logprobs"),
)
def top_kernel(
    logits, stride, vocab, groups_of_vocab, stats, width, counters, active, lists, top_ids, top_logprobs, n_top,
    WIDTH: tl.constexpr, N: tl.constexpr, TOP: tl.constexpr, PART: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The n_top highest logits as given, with their log-probabilities; NaN for a row with a NaN, or all -inf; grid
    (rows,). lists int64 [rows, N]; counters[row, 2] is 0."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0)
    wide_row = row.to(tl.int64)
    group = tl.arange(0, WIDTH)
    inside = group < groups_of_vocab
    at = stats + wide_row * (PLANES * width) + group
    tops = tl.load(at + RAW_MAX * width, mask=inside, other=-float("inf"))
    sums = tl.load(at + RAW_SUM * width, mask=inside, other=0.0)
    top_ids += wide_row * n_top
    top_logprobs += wide_row * n_top
    highest = tl.max(tops, axis=0)
    mass = tl.sum(tl.where(inside, sums * tl.exp(tops - highest), 0.0), axis=0)
    if mass != mass:
        first = tl.arange(0, TOP)
        tl.store(top_ids + first, first.to(tl.int64), mask=first < n_top)
        tl.store(top_logprobs + first, first * float("nan"), mask=first < n_top)
        return
    reach = within_count(highest - tops, inside, n_top.to(tl.float32))
    least = tl.where(
        reach < float("inf"), (highest - reach * 1.00001) - tl.abs(highest) * 1e-6, -float("inf")
    )
    chosen = inside & (tops >= least)
    active += wide_row * width
    lists += wide_row * N
    n = tl.sum(chosen.to(tl.int32), axis=0)
    slot = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(active + slot, group, mask=chosen)
    tl.debug_barrier()
    source = (row, logits + wide_row * stride, vocab, groups_of_vocab, stats)
    found = n
    if n <= N:
        for start in range(0, n, PART):
            order = order_of(start, n, active, least, source, PART)
            wanted = order != NOBODY
            free = tl.atomic_add(
                counters + row * 4 + 2 + wanted.to(tl.int32) * 0, 1, mask=wanted, sem="relaxed"
            )
            tl.store(lists + free, order, mask=wanted & (free < N))
        tl.debug_barrier()
        found = tl.load(counters + row * 4 + 2, volatile=True)
    log_mass = tl.log(mass)
    if found <= N:
        spot = tl.arange(0, N)
        order = tl.load(lists + spot)  # beside their number; what is beyond it is never used
        before = tl.zeros((N, COLUMNS), tl.int32)
        for start in range(0, found, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            others = tl.load(lists + column, mask=column < found, other=NOBODY)
            before += (others[None, :] > order[:, None]).to(tl.int32)
        rank = tl.sum(before, axis=1)
        store_top(order, rank, (spot < found) & (rank < n_top), highest, log_mass, top_ids, top_logprobs)
    else:
        taken, place = take_one_by_one(n_top, n, active, least, source, TOP, PART)
        store_top(taken, place, tl.arange(0, TOP) < n_top, highest, log_mass, top_ids, top_logprobs)
