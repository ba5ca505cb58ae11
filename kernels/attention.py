"""Attention over a paged key/value cache: a torch reference, a Triton decode kernel, and the choice between them."""

import torch


def paged_attention_reference(
    q, keys, values, block_table, lengths, *, counts=None, scale=None, sliding_window=None, softcap=None, sinks=None,
    tree=None,
):  # fmt: skip
    """Attention of fresh queries over paged cells; defines what the kernels compute. No value is read on the host.

    q: [B, Q, Hq, D], real queries first in each row. keys: [N_blocks, block_size, Hk, D]; values: last axis may be
    another Dv; Hq a multiple of Hk. block_table: [B, M] int, valid block ids, arbitrary beyond a row's length.
    lengths: [B] int, valid cells with the fresh ones; a row without cells returns zeros. counts: [B] int, real
    queries (None: Q); query j stands at position lengths - counts + j. scale: float, default D ** -0.5.
    sliding_window: a query at position p sees positions p - sliding_window + 1 .. p. softcap: logits become
    softcap * tanh(logits / softcap) (arXiv 2408.00118). sinks: [Hq] one more logit per head in the denominator
    (arXiv 2309.17453). tree: [B, Q, Q] bool, tree[b, j, f]: query j sees fresh cell f (itself and its ancestors;
    all older cells are seen); None is causal.
    Returns [B, Q, Hq, Dv] in q's dtype; queries beyond a row's count are finite and mean nothing.
    """
    batch, queries, heads, dim = q.shape
    size, kv_heads = keys.shape[1], keys.shape[2]
    scale = dim**-0.5 if scale is None else scale
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    table = block_table.long()
    k = keys[table].reshape(batch, -1, kv_heads, dim).to(exact)
    v = values[table].reshape(batch, -1, kv_heads, values.shape[-1]).to(exact)
    seen = _visible(table.shape[1] * size, queries, lengths, counts, sliding_window, tree)  # [B, Q, L]
    v = torch.where((torch.arange(k.shape[1], device=q.device) < lengths[:, None])[:, :, None, None], v, 0)
    folded = q.to(exact).view(batch, queries, kv_heads, heads // kv_heads, dim)
    scores = torch.einsum("bqhgd,blhd->bqhgl", folded, k) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = torch.where(seen[:, :, None, None], scores, float("-inf"))
    peak = scores.amax(-1, keepdim=True)
    if sinks is not None:
        sink = sinks.to(exact).view(1, 1, kv_heads, -1, 1)
        peak = torch.maximum(peak, sink)
    peak = torch.where(torch.isfinite(peak), peak, 0)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - peak)
    weights = weights / torch.where(total == 0, 1, total)
    return torch.einsum("bqhgl,blhd->bqhgd", weights, v).reshape(batch, queries, heads, -1).to(q.dtype)


def _visible(cells, queries, lengths, counts, window, tree):
    """Which of a row's cells each query sees: [B, Q, cells] bool, made on the device of `lengths`."""
    device = lengths.device
    length = lengths.long()[:, None, None]
    base = length - (
        queries if counts is None else counts.long()[:, None, None]
    )  # cells older than the queries
    cell = torch.arange(cells, device=device)[None, None]
    query = torch.arange(queries, device=device)[None, :, None]
    if tree is None:
        depth, fresh_depth, seen = query, cell - base, cell <= base + query
    else:
        depth = tree.sum(-1, keepdim=True) - 1
        fresh = (cell - base).clamp(0, queries - 1).expand(len(length), queries, cells)
        fresh_depth = torch.where(cell < base, cell - base, depth.transpose(1, 2).gather(2, fresh[:, :1]))
        seen = (cell < base) | tree.gather(2, fresh)
    if window is not None:
        seen = seen & (fresh_depth > depth - window)
    return seen & (cell < length)
