"""Decode attention on the CPU: each row over its own cells of the paged cache, or short rows in one rectangle."""

import torch
from torch.nn.functional import scaled_dot_product_attention

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # (output, log-sum-exp)

# A mask repeated once per query head of a group is worth its memory only below this many entries.
_FOLDED_MASK_ENTRIES = 1 << 22
# Rows up to this long are cheaper gathered into one rectangle; longer ones where they lie.
RECTANGLE = 320
# Cells that all rows have in common from which on they are read once for all of them.
SHARED = 128


class CellPlan:
    """Where the cells of each row lie; worked out once a step and shared by all layers.

    Args:
        tables: per row its block ids in order (tuple, list or ndarray), at least ceil(length / block_size).
        lengths: per row the number of valid cells, the fresh ones included (python int >= 1).
        block_size: cells per block.
        counts: per row how many of the Q queries are real, 1..Q; None means all.
        tree: [B, Q, Q] bool, tree[b, j, f] = query j sees fresh cell f (itself, ancestors); None is causal.
        alone: attend every row by itself, so that its bits do not depend on its neighbours. Otherwise short rows
            with one query each may share a rectangle, whose cells beyond a row must then be finite, and a long
            beginning that all rows have in common is read once for all of them.

    Raises:
        ValueError: a row has no cell or too few blocks.
    """

    def __init__(self, tables, lengths, block_size, *, counts=None, tree=None, alone=True):
        self.lengths = [int(n) for n in lengths]
        self.counts = None if counts is None else [int(n) for n in counts]
        self.block_size, self.tree, self._masks, self._ids = block_size, tree, {}, {}
        self._tables = [
            self._blocks(row, *pair) for row, pair in enumerate(zip(tables, self.lengths, strict=True))
        ]
        self.starts = [self._start(table) for table in self._tables]
        free = not alone and tree is None and len(self.lengths) > 1
        self.together, self._index = free and self._pays(), None
        self.shared = self._common() if free and not self.together else 0  # leading cells of every row
        if self.shared:  # what is behind it, as a plan of its own
            tails = [table[self.shared // block_size :] for table in self._tables]
            self.rest = CellPlan(tails, [n - self.shared for n in self.lengths], block_size, alone=False)

    def _blocks(self, row, table, length):
        needed = -(-length // self.block_size)
        if not 1 <= needed <= len(table):
            raise ValueError(
                f"row {row}: length {length} needs 1..{len(table) * self.block_size} cells "
                f"(its table has {len(table)} blocks of {self.block_size})"
            )
        return tuple(table[:needed])

    def _start(self, table):
        """First cell of a row whose blocks follow each other in the pool, else None."""
        consecutive = table[-1] - table[0] == len(table) - 1 and table == tuple(
            range(table[0], table[0] + len(table))
        )
        return int(table[0]) * self.block_size if consecutive else None

    def lone(self, queries, window):
        """Whether there is one row with one query that sees all its cells, and they lie in one run."""
        return (
            queries == 1
            and len(self.lengths) == 1
            and self.starts[0] is not None
            and (window is None or window >= self.lengths[0])
        )

    def _pays(self):
        """Whether gathering all rows into one rectangle costs less than attending each alone (measured)."""
        longest, total = max(self.lengths), sum(self.lengths)
        return longest <= RECTANGLE and len(self.lengths) * longest <= 2 * total

    def _common(self):
        """Cells of the blocks with which all rows begin, at least one less than any row has; 0 where they are few."""
        most = (min(self.lengths) - 1) // self.block_size
        beside = enumerate(zip(*(table[:most] for table in self._tables), strict=True))
        blocks = next((place for place, ids in beside if len(set(ids)) > 1), most)
        return blocks * self.block_size if blocks * self.block_size >= SHARED else 0

    def rectangle(self, pool):
        """All rows' cells [B, Hk, L, D], L a whole number of blocks; what lies beyond a row is masked."""
        width = max(map(len, self._tables))
        if self._index is None:
            padded = [table + table[-1:] * (width - len(table)) for table in self._tables]
            self._index = torch.tensor(padded).flatten()
        cells = pool.index_select(0, self._index)
        return cells.view(len(self.lengths), width * self.block_size, *pool.shape[2:]).transpose(1, 2)

    def rectangle_mask(self, window, like):
        """Additive mask [B, 1, 1, L] of one query a row over `rectangle`, in `like`'s dtype."""
        key = ("rectangle", window, like.dtype)
        if key not in self._masks:
            cell = torch.arange(max(map(len, self._tables)) * self.block_size)
            length = torch.tensor(self.lengths)[:, None]
            seen = cell < length
            if window is not None:
                seen &= cell >= length - window
            mask = torch.zeros(seen.shape, dtype=like.dtype).masked_fill_(~seen, float("-inf"))
            self._masks[key] = mask[:, None, None]
        return self._masks[key]

    def cells(self, pool, flat, row, first):
        """Cells first..length-1 of a row, [1, Hk, n, D]: a view of consecutive blocks, else a copy.

        pool: [N_blocks, block_size, Hk, D]; flat: the same cells as `flat_cells(pool)`, made once for all.
        """
        start = self.starts[row]
        if start is None:
            skipped = first // self.block_size
            start = -skipped * self.block_size
            if row not in self._ids:
                self._ids[row] = torch.tensor(self._tables[row], device=pool.device)
            flat = flat_cells(pool.index_select(0, self._ids[row][skipped:]))
        return flat[:, :, start + first : start + self.lengths[row]]

    def shares(self, q, keys, values, window):
        """Whether rows of one query may read their common beginning together, by torch's kernel for the CPU."""
        seen = window is None or window >= max(self.lengths)
        alike = q.device.type == "cpu" and keys.shape[3] == values.shape[3] and not q.requires_grad
        return self.shared > 0 and q.shape[1] == 1 and seen and alike

    def beginning(self, pool, flat):
        """The cells that all rows share, [1, Hk, shared, D]; as `cells`."""
        start = self._start(self._tables[0][: self.shared // self.block_size])
        if start is not None:
            return flat[:, :, start : start + self.shared]
        if "shared" not in self._ids:
            self._ids["shared"] = torch.tensor(self._tables[0][: self.shared // self.block_size])
        return flat_cells(pool.index_select(0, self._ids["shared"]))

    def mask(self, row, queries, n, window, group, like):
        """Additive mask [queries * group, n] over a row's last n cells, in `like`'s dtype; kept for the step.

        Its rows are ordered (query, head of the group).
        """
        key = (queries, n, window, group, like.dtype, None if self.tree is None else row)
        if key not in self._masks:
            seen = self._visible(row, queries, n, window).repeat_interleave(group, 0)
            mask = torch.zeros(seen.shape, dtype=like.dtype, device=like.device)
            self._masks[key] = mask.masked_fill_(~seen.to(like.device), float("-inf"))
        return self._masks[key]

    def _visible(self, row, queries, n, window):
        base = n - queries
        cell, query = torch.arange(n), torch.arange(queries)[:, None]
        if self.tree is None:
            seen = cell <= base + query
            return seen if window is None else seen & (cell > base + query - window)
        tree = self.tree[row, :queries, :queries].cpu()
        depth = tree.sum(-1) - 1
        seen = torch.ones(queries, n, dtype=torch.bool)
        seen[:, base:] = tree
        if window is not None:
            position = torch.cat([torch.arange(base), base + depth])
            seen &= position > base + depth[:, None] - window
        return seen


def flat_cells(pool):
    """A pool [N_blocks, block_size, Hk, D] seen as one run of cells, [1, Hk, N_blocks * block_size, D]."""
    return pool.view(1, -1, *pool.shape[2:]).transpose(1, 2)


def paged_attention_cpu(
    q, keys, values, tables=None, lengths=None, *, counts=None, scale=None, sliding_window=None, softcap=None,
    sinks=None, tree=None, plan=None,
):  # fmt: skip
    """Attention of the fresh queries of each row over its own cells; nothing is padded, no row sees another.

    Args:
        q: [B, Q, Hq, D] queries, the real ones first in each row.
        keys: [N_blocks, block_size, Hk, D], contiguous; Hq a multiple of Hk.
        values: [N_blocks, block_size, Hk, Dv], contiguous.
        tables, lengths, counts, tree: see `CellPlan`; `plan` holds all four instead.
        scale, sliding_window, softcap, sinks: see `attention.paged_attention`.

    Returns:
        [B, Q, Hq, Dv] in q's dtype; zero for queries beyond a row's count.

    Raises:
        ValueError: see `CellPlan`.
    """
    if plan is None:
        plan = CellPlan(tables, lengths, keys.shape[1], counts=counts, tree=tree)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if plan.lone(q.shape[1], sliding_window) and softcap is None and sinks is None:
        return _attend_lone(q, keys, values, plan, scale)
    if plan.together and q.shape[1] == 1 and softcap is None and sinks is None:
        return _attend_rectangle(q, keys, values, plan, sliding_window, scale)
    if plan.shares(q, keys, values, sliding_window) and softcap is None and sinks is None:
        return _attend_shared(q, keys, values, plan, scale)
    rows = []
    attend = _row_attention(keys, values, plan, scale, sliding_window, softcap, sinks)
    for row in range(len(plan.lengths)):
        count = q.shape[1] if plan.counts is None else plan.counts[row]
        out = attend(row, q[row, :count])
        if count < q.shape[1]:
            out = torch.cat([out, out.new_zeros(q.shape[1] - count, *out.shape[1:])])
        rows.append(out)
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def packed_attention_cpu(
    q, keys, values, plan, *, scale=None, sliding_window=None, softcap=None, sinks=None
):  # fmt: skip
    """`packed.paged_attention_packed` on the CPU: each row over its own cells, so no row's bits see another.

    Args:
        q: [T, Hq, D] queries of the plan's rows, one row after another.
        keys: [N_blocks, block_size, Hk, D], contiguous. values: [N_blocks, block_size, Hk, Dv], contiguous.
        plan: `CellPlan` with `counts`, how many of the tokens each row has; those beyond their sum get zeros.
        scale, sliding_window, softcap, sinks: see `attention.paged_attention`.

    Returns:
        [T, Hq, Dv] in q's dtype.

    Raises:
        ValueError: the plan has no counts, or more tokens than q.
    """
    if plan.counts is None or sum(plan.counts) > len(q):
        raise ValueError(f"counts {plan.counts} of the plan do not fit {len(q)} tokens")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    attend = _row_attention(keys, values, plan, scale, sliding_window, softcap, sinks)
    pieces = q[: sum(plan.counts)].split(plan.counts)
    rows = [attend(row, piece) for row, piece in enumerate(pieces)]
    if (rest := len(q) - sum(plan.counts)) > 0:
        rows.append(q.new_zeros(rest, q.shape[1], values.shape[3]))
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _row_attention(keys, values, plan, scale, sliding_window, softcap, sinks):
    """The attention of one row by its number: (row, q [n, Hq, D]) -> [n, Hq, Dv]."""
    flat_keys, flat_values = flat_cells(keys), flat_cells(values)

    def attend(row, q):
        length, first, window = plan.lengths[row], 0, None
        if sliding_window is not None and sliding_window < length:
            first, window = max(0, length - len(q) - sliding_window + 1), sliding_window
        k, v = plan.cells(keys, flat_keys, row, first), plan.cells(values, flat_values, row, first)
        if softcap is None and sinks is None:
            return _attend(q, k, v, plan, row, window, scale)
        return _attend_explicitly(q, k, v, plan, row, window, scale, softcap, sinks)

    return attend


def _attend_lone(q, keys, values, plan, scale):
    """The batch of one, [1, 1, Hq, D] -> [1, 1, Hq, Dv]: as few calls as can be, for they are half its time."""
    length, start = plan.lengths[0], plan.starts[0]
    k, v = (
        torch.as_strided(
            pool,
            (1, pool.shape[2], length, pool.shape[3]),
            (0, pool.stride(2), pool.stride(1), 1),
            pool.storage_offset() + start * pool.stride(1),
        )
        for pool in (keys, values)
    )
    kv_heads = k.shape[1]
    folded = q.view(1, kv_heads, q.shape[2] // kv_heads, q.shape[3])
    out = scaled_dot_product_attention(folded, k, v, scale=scale)
    return out.reshape(1, 1, q.shape[2], v.shape[3])


def _attend_rectangle(q, keys, values, plan, window, scale):
    """One query a row, [B, 1, Hq, D], over all rows' cells at once -> [B, 1, Hq, Dv]."""
    rows, _, heads, dim = q.shape
    kv_heads = keys.shape[2]
    k, v = plan.rectangle(keys), plan.rectangle(values)
    mask = plan.rectangle_mask(window, q)
    folded = q.view(rows, kv_heads, heads // kv_heads, dim)
    out = scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale)
    return out.reshape(rows, 1, heads, -1)


def _attend_shared(q, keys, values, plan, scale):
    """One query a row, [B, 1, Hq, D], whose rows begin alike -> [B, 1, Hq, D]: the beginning is read once for all, what
    is behind it row by row or in a rectangle, and the two are joined by their log-sum-exps.
    """
    rows, _, heads, dim = q.shape
    kv_heads, group = keys.shape[2], heads // keys.shape[2]
    flat = flat_cells(keys), flat_cells(values)
    folded = q.view(rows, kv_heads, group, dim)
    queries = folded.transpose(0, 1).reshape(1, kv_heads, rows * group, dim)
    first, weight = flash(
        queries, plan.beginning(keys, flat[0]), plan.beginning(values, flat[1]), scale=scale
    )
    first = first.view(kv_heads, rows, group, dim).transpose(0, 1)  # [B, Hk, G, D]
    rest = plan.rest
    if rest.together:
        mask = rest.rectangle_mask(None, q)
        second, other = flash(
            folded, rest.rectangle(keys), rest.rectangle(values), attn_mask=mask, scale=scale
        )
    else:
        cells = [
            (rest.cells(keys, flat[0], row, 0), rest.cells(values, flat[1], row, 0)) for row in range(rows)
        ]
        parts = [flash(folded[row : row + 1], *pair, scale=scale) for row, pair in enumerate(cells)]
        second, other = (torch.cat(each) for each in zip(*parts, strict=True))
    share = (weight.view(kv_heads, rows, group).transpose(0, 1) - other.view(rows, kv_heads, group)).sigmoid()
    out = torch.lerp(second.float(), first.float(), share[..., None])
    return out.to(q.dtype).reshape(rows, 1, heads, dim)


def _attend(q, k, v, plan, row, window, scale):
    """One row through torch's fused attention: q [n, Hq, D], k, v [1, Hk, L, D or Dv] -> [n, Hq, Dv].

    The query heads of a group are folded into the query axis, so K and V are read once and never repeated.
    """
    queries, heads, dim = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    group = heads // kv_heads
    if queries == 1:
        out = scaled_dot_product_attention(q.view(1, kv_heads, group, dim), k, v, scale=scale)
        return out.reshape(1, heads, -1)
    if queries == length and window is None and plan.tree is None:
        q = q.transpose(0, 1)[None]
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=group > 1)
        return out[0].transpose(0, 1)
    if q.device.type == "cuda" and window is None and plan.tree is None:
        return _attend_tail(q, k, v, scale)
    if queries * group * length > _FOLDED_MASK_ENTRIES:
        mask = plan.mask(row, queries, length, window, 1, q)
        out = scaled_dot_product_attention(
            q.transpose(0, 1)[None], k, v, attn_mask=mask, scale=scale, enable_gqa=group > 1
        )
        return out[0].transpose(0, 1)
    mask = plan.mask(row, queries, length, window, group, q)
    q = q.view(queries, kv_heads, group, dim).transpose(0, 1).reshape(1, kv_heads, queries * group, dim)
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.view(kv_heads, queries, group, -1).transpose(0, 1).reshape(queries, heads, -1)


def _attend_tail(q, k, v, scale):
    """A later piece of a prompt on CUDA: the last n of L positions, causal, no mask in memory; as `_attend`.

    torch's flash kernel takes no groups behind such a bias, so keys and values are repeated for their query heads.
    """
    from torch.nn.attention.bias import causal_lower_right

    group = q.shape[1] // k.shape[1]
    k, v = (part.repeat_interleave(group, 1) for part in (k, v))
    bias = causal_lower_right(len(q), k.shape[2])
    return scaled_dot_product_attention(q.transpose(0, 1)[None], k, v, attn_mask=bias, scale=scale)[
        0
    ].transpose(0, 1)


def _attend_explicitly(q, k, v, plan, row, window, scale, softcap, sinks):
    """One row with softcap or sinks, which fused attention lacks; float32 inside, shapes as in `_attend`."""
    queries, heads, dim = q.shape
    kv_heads, length = k.shape[1], k.shape[2]
    group = heads // kv_heads
    folded = (
        q.view(queries, kv_heads, group, dim).transpose(0, 1).reshape(kv_heads, queries * group, dim).float()
    )
    scores = torch.bmm(folded * scale, k[0].float().transpose(1, 2))  # [Hk, n * G, L]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if queries > 1:
        scores = scores + plan.mask(row, queries, length, window, group, scores)
    if sinks is not None:
        sink = sinks.float().view(kv_heads, 1, group, 1).expand(-1, queries, -1, -1)
        scores = torch.cat([scores, sink.reshape(kv_heads, queries * group, 1)], -1)
    weights = torch.softmax(scores, -1)[..., :length]
    out = torch.bmm(weights, v[0].float()).to(q.dtype)
    return out.view(kv_heads, queries, group, -1).transpose(0, 1).reshape(queries, heads, -1)
