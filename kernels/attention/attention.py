"""Attention over a paged key/value cache: its torch reference, and the choice between that and Triton."""

import torch

from .. import dispatch

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def paged_attention(
    q, keys, values, block_table, lengths, *, counts=None, scale=None, sliding_window=None, softcap=None,
    sinks=None, tree=None, kernels=None, splits=None, workspace=None, out=None,
):  # fmt: skip
    """Attention of fresh queries over paged cells; reads no value on the host, so a CUDA graph can hold it.

    Args:
        q: [B, Q, Hq, D] queries, the real ones first in each row; float16, bfloat16 or float32.
        keys: [N_blocks, block_size, Hk, D] in q's dtype; Hq a multiple of Hk.
        values: [N_blocks, block_size, Hk, Dv] in q's dtype.
        block_table: [B, M] int32 or int64, valid block ids; arbitrary ones beyond a row's length.
        lengths: [B] int32 or int64, valid cells with the fresh ones, <= M * block_size; 0 gives zeros.
        counts: [B] int, real queries of each row in 0..Q; None means Q. Query j of a row stands at position
            lengths - counts + j and sees the cells up to its own.
        scale: float, default D ** -0.5.
        sliding_window: int >= 1; a query at position p sees positions p - sliding_window + 1 .. p.
        softcap: float > 0; logits become softcap * tanh(logits / softcap) (arXiv 2408.00118).
        sinks: [Hq] float, one more logit per head in the softmax's denominator (arXiv 2508.10925).
        tree: [B, Q, Q] bool; tree[b, j, f]: query j sees fresh cell f, which is itself or an ancestor
            (older cells are all seen). A query's position is then lengths - counts + its number of ancestors.
        kernels: "auto", "triton", "torch" or None (see `dispatch`).
        splits: programs a sequence (Triton only); default fills the device. It touches the last bits.
        workspace: float32, what `attention_workspace` gives, for a launch that allocates nothing.
        out: [B, Q, Hq, Dv] contiguous, written instead of a new tensor.

    Returns:
        [B, Q, Hq, Dv] in q's dtype; queries beyond a row's count are finite and mean nothing.

    Raises:
        ValueError: shapes that do not fit, or a workspace that is too small.
        dispatch.KernelUnavailable: kernels="triton" cannot run here or does not cover this call.
    """
    check_heads(q, keys, values)
    if len(block_table) != len(q):
        raise ValueError(f"block_table has {len(block_table)} rows, q has {len(q)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = {
        "scale": scale,
        "sliding_window": sliding_window,
        "softcap": softcap,
        "sinks": sinks,
        "tree": tree,
    }
    if dispatch.select("paged_attention", q.device, kernels, uncovered(q, keys, values)) == "torch":
        result = paged_attention_reference(q, keys, values, block_table, lengths, counts=counts, **options)
        return result if out is None else out.copy_(result)
    from . import attention_triton

    batch, queries, heads, _ = q.shape
    dim_v = values.shape[-1]
    if splits is None:
        cells = block_table.shape[1] * keys.shape[1]
        splits = default_splits(batch, keys.shape[2], cells, q.device, max(q.shape[-1], dim_v))
    if workspace is None:
        workspace = attention_workspace(batch, queries, heads, dim_v, splits, q.device)
    parts, lse = _workspace_views(workspace, batch * queries * heads, splits, dim_v)
    out = q.new_empty(batch, queries, heads, dim_v) if out is None else out
    return attention_triton.launch(
        q if q.stride(-1) == 1 else q.contiguous(),
        keys, values, block_table, lengths, out, parts, lse, splits=splits, counts=counts, **options,
    )  # fmt: skip


def attention_workspace(batch, queries, heads, dim_v, splits, device):
    """Scratch memory of `paged_attention` for calls up to this size: float32 [n], n = 0 for one split."""
    cells = batch * queries * heads * splits * (dim_v + 1) if splits > 1 else 0
    return torch.empty(cells, dtype=torch.float32, device=device)


def default_splits(batch, kv_heads, cells, device, dim=128):
    """Programs a sequence: as many as a device runs at once (three a multiprocessor; two where heads are wider than
    128), so that none waits for another, each of at least 128 cells; 1 to 64."""
    if device.type != "cuda":
        return 1
    together = torch.cuda.get_device_properties(device).multi_processor_count * (3 if dim <= 128 else 2)
    return max(1, min(together // (batch * kv_heads), -(-cells // 128), 64))


def _workspace_views(workspace, outputs, splits, dim_v):
    """The parts [outputs * splits * dim_v] and their log-weights [outputs * splits] inside a workspace."""
    if splits == 1:
        return workspace, workspace
    parts, weights = outputs * splits * dim_v, outputs * splits
    if workspace.numel() < parts + weights:
        raise ValueError(f"workspace has {workspace.numel()} floats; this call needs {parts + weights}")
    return workspace[:parts], workspace[parts : parts + weights]


def check_heads(q, keys, values):
    """Raise ValueError where head sizes or their numbers do not fit; q [..., Hq, D]."""
    (heads, dim), kv_heads = q.shape[-2:], keys.shape[2]
    if keys.shape[3] != dim or heads % kv_heads or values.shape[:3] != keys.shape[:3]:
        raise ValueError(
            f"q {tuple(q.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)} do not fit: "
            f"head size and a whole number of query heads per key head are needed"
        )


def uncovered(q, keys, values):
    """What keeps the Triton kernel from this call, in words; None where nothing does."""
    if q.dtype not in DTYPES or keys.dtype != q.dtype or values.dtype != q.dtype:
        return f"q {q.dtype} with keys {keys.dtype} and values {values.dtype} (one of {DTYPES} for all three)"
    if max(q.shape[-1], values.shape[-1]) > MAX_HEAD_DIM:
        return f"head sizes {q.shape[-1]} and {values.shape[-1]} (at most {MAX_HEAD_DIM})"
    if keys.stride(-1) != 1 or values.stride(-1) != 1:
        return "keys or values whose last axis is not contiguous"
    return None


def paged_attention_reference(
    q, keys, values, block_table, lengths, *, counts=None, scale=None, sliding_window=None, softcap=None,
    sinks=None, tree=None,
):  # fmt: skip
    """Defines `paged_attention`, whose arguments it shares: cells gathered, softmax in float32 (or 64)."""
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
