"""The highest raw log-probabilities of a row, from the group maxima that the first launch leaves.

The n-th highest maximum of a group bounds the n-th highest logit, so only groups at or above it are read.
Equal logits come in order of id.
"""

# ruff: noqa: RUF005, RUF059 (device code: tuples grow by + and are unpacked whole)
import triton
import triton.language as tl

from .search import (
    BELOW_ALL,
    BY_LOGIT,
    COUNT,
    activate,
    bound_by_groups,
    chunk,
    gather,
    listed,
    search,
)
from .tokens import ordered_key


@triton.jit
def place(x, ids, key, above, room, vocab, higher, ties, lists):
    """Store tokens above a key at the slots from `higher` on, those at it behind `above`, `room` slots in all;
    returns how many of each there are by now."""
    there = (ids >= 0) & (ids < vocab)
    over = ((ordered_key(x) > key) & there).to(tl.int32)
    level = ((ordered_key(x) == key) & there).to(tl.int32)
    slot = tl.where(over > 0, higher + tl.cumsum(over, axis=0), above + ties + tl.cumsum(level, axis=0)) - 1
    wanted = ((over + level) > 0) & (slot < room)
    tl.store(lists[0] + slot, x, mask=wanted)
    tl.store(lists[1] + slot, ids, mask=wanted)
    return higher + tl.sum(over, axis=0), ties + tl.sum(level, axis=0)


@triton.jit
def store_ranked(n, highest, log_mass, lists, top_ids, top_logprobs, TOP: tl.constexpr):
    """Store the first n listed tokens by logit, equal ones by id."""
    down, across = tl.arange(0, TOP)[:, None], tl.arange(0, TOP)[None, :]
    x, ids = (
        tl.load(lists[0] + down, mask=down < n, other=0.0),
        tl.load(lists[1] + down, mask=down < n, other=0),
    )
    y = tl.load(lists[0] + across, mask=across < n, other=0.0)
    others = tl.load(lists[1] + across, mask=across < n, other=0)
    before = ((ordered_key(y) > ordered_key(x)) | ((ordered_key(y) == ordered_key(x)) & (others < ids))) & (
        across < n
    )
    rank = tl.sum(before.to(tl.int32), axis=1)[:, None]
    tl.store(top_ids + rank, ids.to(tl.int64), mask=down < n)
    tl.store(top_logprobs + rank, (x - highest) - log_mass, mask=down < n)


@triton.jit
def write_top(n, raw_top, raw_sum, group, inside, source, lists, top_ids, top_logprobs,
              TOP: tl.constexpr, CAPACITY: tl.constexpr, VARIANT: tl.constexpr):  # fmt: skip
    """Store ids and log-probabilities of the n highest logits as given; NaN for a row with a NaN, or all -inf."""
    vocab, of_vocab, active = source[2], source[3], source[10]
    highest = tl.max(raw_top, axis=0)
    mass = tl.sum(tl.where(inside, raw_sum * tl.exp(raw_top - highest), 0.0), axis=0)
    if mass == mass:
        own = inside & (group < of_vocab)
        low = bound_by_groups(
            n.to(tl.float64), tl.where(own, raw_top, -float("inf")), highest, own.to(tl.int64)
        )
        low = tl.where(low <= BELOW_ALL, BELOW_ALL - 1, low)
        source = source[:11] + (activate((ordered_key(raw_top) >= low) & own, group, active),)
        bounds = (ordered_key(highest), n * 0, n * 0)
        frame = (n * 0 + COUNT, n * 0 + BY_LOGIT, highest, highest * 0, low)
        found = gather(low, 2147483647, source, bounds, frame, lists, CAPACITY, VARIANT)
        x, ids = listed(found, lists, CAPACITY)
        held = (found <= CAPACITY).to(tl.int32)
        form = (n < 0, highest, highest)
        key, above, dots = search(n.to(tl.float64), low, ordered_key(highest), x, ids, held, source, bounds,
                                  frame, form, lists, CAPACITY, VARIANT)  # fmt: skip
        above = above.to(tl.int32)
        tl.debug_barrier()
        if held > 0:
            higher, ties = place(x, ids, key, above, n, vocab, n * 0, n * 0, lists)
        else:
            higher, ties = n * 0, n * 0
            for start in range(0, source[11], VARIANT[0]):
                y, there = chunk(start, source, bounds, VARIANT)
                higher, ties = place(y, there, key, above, n, vocab, higher, ties, lists)
        tl.debug_barrier()
        store_ranked(n, highest, tl.log(mass), lists, top_ids, top_logprobs, TOP)
        tl.debug_barrier()
    else:
        slot = tl.arange(0, TOP)
        tl.store(top_ids + slot, slot.to(tl.int64), mask=slot < n)
        tl.store(top_logprobs + slot, slot * float("nan"), mask=slot < n)
