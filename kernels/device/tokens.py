"""Reading a row: groups of 128 tokens with edits, masks and temperature applied in registers.

A row is seen as groups of GROUP tokens: first the vocabulary in order, in which tokens of the sparse edit
list are left out, then the edit list itself. Every kernel that looks at logits goes through `load_groups`.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(128)
FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
LISTED, REPLACED, BITMASK = (
    tl.constexpr(1),
    tl.constexpr(2),
    tl.constexpr(4),
)  # edits of a launch: bits of `wants`
LOG2E = tl.constexpr(1.4426950408889634)


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
def quotient(x, temperature, inverse):
    """x / temperature to the last bit where neither is far from 1, from inverse = 1 / temperature: a product and a
    correction (Markstein 1990). NaN for infinite x; a temperature with all bits of its mantissa set may err."""
    q = x * inverse
    return tl.fma(tl.fma(-temperature, q, x), inverse, q)


@triton.jit
def exp_of(x, PTX: tl.constexpr):
    """exp(x), 0 where it would be denormal if PTX."""
    if PTX:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * LOG2E], dtype=tl.float32,
                                         is_pure=True, pack=1)  # fmt: skip
    return tl.exp(x)


@triton.jit
def mask_bit(bits, ids, inside):
    """Bit of each token id in a packed int32 row; 0 where not inside."""
    words = tl.load(bits + (ids >> 5), mask=inside, other=0)
    return (words >> (ids & 31)) & 1


@triton.jit
def group_bits(bits, start, group, vocab):
    """bool [R, GROUP], the bits of the tokens of groups [R] in a packed int32 row; one word serves 32 tokens."""
    word = group[:, None] * (GROUP // 32) + tl.arange(0, GROUP // 32)[None, :]
    words = tl.load(bits + start + word, mask=word < tl.cdiv(vocab, 32), other=0)
    bit = (words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
    return tl.reshape(bit, (group.shape[0], GROUP)) != 0


@triton.jit
def edited(x, ids, point_values, row, rows, POINTS: tl.constexpr):
    """x after the pointwise edits, device functions (logit, token id, parameter) -> logit."""
    for i in tl.static_range(len(POINTS)):
        changed = finite_top(POINTS[i](x, ids, tl.load(point_values + i * rows + row)))
        x = tl.where(x == -float("inf"), x, changed)
    return x


@triton.jit
def load_listed(entry, row, logits, vocab, sparse, wants):
    """Ids and edited logits of entries (int32 [R, GROUP]) of the edit list; -1 and -inf beyond it.

    wants: with REPLACED the list holds the new logits, else it edits the given ones. A NaN given stays one.
    """
    ids_list, biases, seen, counts, length, repetition, presence, frequency = sparse
    inside = (entry >= 0) & (entry < length)
    at = row.to(tl.int64) * length + entry
    ids = tl.load(ids_list + at, mask=inside, other=-1)
    listed = (ids >= 0) & (ids < vocab)
    x = finite_top(tl.load(logits + ids, mask=listed, other=-float("inf")).to(tl.float32))
    if wants & REPLACED:
        x = tl.where(x == x, tl.load(biases + at, mask=listed, other=-float("inf")), x)
    else:
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
    groups, row, logits, vocab, groups_of_vocab, wants, bitmask, mask_stride, sparse, point_values, rows,
    POINTS: tl.constexpr, APART: tl.constexpr = False,
):  # fmt: skip
    """Tokens of groups, edited but not scaled.

    Args:
        groups: int32 [R], group numbers; negative ones are empty.
        row: row number; logits points to that row.
        wants: bits LISTED and BITMASK: the edits there are. POINTS: see `edited`.
        APART: for few groups: threads read tokens one by one, as they read edits, and need not meet to exchange them.
        sparse: (ids, edited logits, length, bits of the touched tokens, their stride) of the edit list.

    Returns:
        (x float32 [R, GROUP], -inf where excluded, ids int32 [R, GROUP], -1 where there is no token).
    """
    ids = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    if APART:
        ids = tl.max_contiguous(ids, [1, 1])
    inside = (ids >= 0) & (ids < vocab)
    x = finite_top(tl.load(logits + ids, mask=inside, other=-float("inf")).to(tl.float32))
    if wants & BITMASK:
        allowed = mask_bit(bitmask + row.to(tl.int64) * mask_stride, ids, inside) != 0
        x = tl.where(allowed, x, tl.where(x != x, x, -float("inf")))
    x = edited(x, ids, point_values, row, rows, POINTS)
    if wants & LISTED:
        ids_list, values, length, touched, touched_stride = sparse
        x = tl.where(
            mask_bit(touched + row.to(tl.int64) * touched_stride, ids, inside) != 0, -float("inf"), x
        )
        place = ids - groups_of_vocab * GROUP
        there = (place >= 0) & (place < length)
        at = row.to(tl.int64) * length + place
        x = tl.where(there, tl.load(values + at, mask=there, other=-float("inf")), x)
        ids = tl.where(there, tl.load(ids_list + at, mask=there, other=-1), ids)
    return x, tl.where((ids >= 0) & (ids < vocab), ids, -1)
