"""Reading a row: groups of 128 tokens with edits, masks and temperature applied in registers.

A row is seen as groups of GROUP tokens: first the vocabulary in order, in which tokens of the sparse edit
list are left out, then the edit list itself. Every kernel that looks at logits goes through `load_groups`.
"""

# ruff: noqa: RUF059 (device code: tuples are unpacked whole, and compile-time tests stay apart)
import triton
import triton.language as tl

GROUP = tl.constexpr(128)
FLOAT_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def ordered_key(x):
    """int32 that orders as the float32 does; -0 and +0 are one value."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_value(key):
    """The float32 of an ordered key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def finite_top(x):
    """+inf becomes the largest float; NaN stays."""
    return tl.where(x > FLOAT_MAX, FLOAT_MAX, x)


@triton.jit
def scaled(x, temperature):
    """x / temperature, finite values staying finite and -inf staying -inf."""
    y = tl.div_rn(x, temperature)
    y = tl.where(y > FLOAT_MAX, FLOAT_MAX, y)
    y = tl.where(y < -FLOAT_MAX, -FLOAT_MAX, y)
    return tl.where(x == -float("inf"), x, y)


@triton.jit
def mask_bit(bits, ids, inside):
    """Bit of each token id in a packed int32 row; 0 where not inside."""
    words = tl.load(bits + (ids >> 5), mask=inside, other=0)
    return (words >> (ids & 31)) & 1


@triton.jit
def load_listed(entry, row, logits, vocab, sparse, FORM: tl.constexpr):
    """Ids and edited logits of entries (int32 [R, GROUP]) of the edit list; -1 and -inf beyond it.

    FORM: 1, the list edits the logits; 2, it holds the new ones.
    """
    ids_list, biases, seen, counts, length, touched, touched_stride, repetition, presence, frequency = sparse
    inside = (entry >= 0) & (entry < length)
    at = row.to(tl.int64) * length + entry
    ids = tl.load(ids_list + at, mask=inside, other=-1)
    listed = (ids >= 0) & (ids < vocab)
    if FORM == 2:
        x = tl.load(biases + at, mask=listed, other=-float("inf"))
    else:
        x = finite_top(tl.load(logits + ids, mask=listed, other=-float("inf")).to(tl.float32))
        x = x + tl.load(biases + at, mask=listed, other=0.0)
        factor = tl.load(repetition + row)
        repeated = tl.where(x < 0, x * factor, tl.div_rn(x, x * 0 + factor))
        again = tl.load(seen + at, mask=listed, other=0) > 0
        x = tl.where(again, tl.where(x * 0 + factor != 1.0, repeated, x), x)
        count = tl.load(counts + at, mask=listed, other=0)
        there = tl.where(count > 0, tl.load(presence + row), 0.0)
        x = x - (there + tl.load(frequency + row) * count.to(tl.float32))
    return tl.where(listed, ids, -1), tl.where(listed, finite_top(x), -float("inf"))


@triton.jit
def load_groups(
    groups, row, logits, vocab, groups_of_vocab, bitmask, mask_stride, sparse, point_values, rows,
    VARIANT: tl.constexpr,
):  # fmt: skip
    """Tokens of groups, edited but not scaled.

    Args:
        groups: int32 [R], group numbers; negative ones are empty.
        row: row number; logits points to that row.
        VARIANT: (_, form of the sparse edits (0: none), bitmask?, pointwise edits); the last are device functions
            (logit, token id, parameter) -> logit.

    Returns:
        (x float32 [R, GROUP], -inf where excluded, ids int32 [R, GROUP], raw float32 [R, GROUP]); raw is the
        logit as given, -inf for the groups of the edit list.
    """
    ids = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (ids >= 0) & (ids < vocab)
    raw = finite_top(tl.load(logits + ids, mask=inside, other=-float("inf")).to(tl.float32))
    x = raw
    if VARIANT[1]:
        x = tl.where(mask_bit(sparse[5] + row.to(tl.int64) * sparse[6], ids, inside) != 0, -float("inf"), x)
        listed, edited = load_listed(ids - groups_of_vocab * GROUP, row, logits, vocab, sparse, VARIANT[1])
        beyond = ids >= groups_of_vocab * GROUP
        x = tl.where(beyond, edited, x)
        ids = tl.where(beyond, listed, ids)
        inside = (ids >= 0) & (ids < vocab)
    if VARIANT[2]:
        allowed = mask_bit(bitmask + row.to(tl.int64) * mask_stride, ids, inside) != 0
        x = tl.where(allowed, x, tl.where(x != x, x, -float("inf")))
    for i in tl.static_range(len(VARIANT[3])):
        edited = finite_top(VARIANT[3][i](x, ids, tl.load(point_values + i * rows + row)))
        x = tl.where(x == -float("inf"), x, edited)
    return x, ids, raw
