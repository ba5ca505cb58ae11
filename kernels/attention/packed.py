"""Attention of packed new tokens over paged cells: rows of any number of queries, one after another, unpadded."""

import torch

from .. import dispatch
from .attention import check_heads, paged_attention_reference, uncovered

_GATHERED = 1 << 26  # numbers of keys that the reference gathers at once


def paged_attention_packed(
    q, keys, values, block_table, starts, lengths, *, scale=None, sliding_window=None, softcap=None, sinks=None,
    kernels=None, out=None,
):  # fmt: skip
    """Causal attention of R rows' new tokens, packed in one axis; reads no value on the host.

    Row r's queries are tokens starts[r] .. starts[r + 1] - 1, its newest; each sees the row's cells up to its own.

    Args:
        q: [T, Hq, D] queries; float16, bfloat16 or float32.
        keys: [N_blocks, block_size, Hk, D] in q's dtype; Hq a multiple of Hk.
        values: [N_blocks, block_size, Hk, Dv] in q's dtype.
        block_table: [R, M] int32 or int64, valid block ids; arbitrary ones beyond a row's length.
        starts: [R + 1] int32 or int64, from 0 on and never falling, at most T; equal ones make a row without queries.
            Tokens from starts[R] on belong to no row and get zeros.
        lengths: [R] int32 or int64, valid cells of each row with its new ones, <= M * block_size.
        scale, sliding_window, softcap, sinks, kernels: as in `attention.paged_attention`.
        out: [T, Hq, Dv] contiguous, written instead of a new tensor.

    Returns:
        [T, Hq, Dv] in q's dtype.

    Raises:
        ValueError: shapes that do not fit.
        dispatch.KernelUnavailable: kernels="triton" cannot run here or does not cover this call.
    """
    check_heads(q, keys, values)
    if not len(starts) - 1 == len(lengths) == len(block_table):
        raise ValueError(
            f"starts has {len(starts)} entries, lengths {len(lengths)} and block_table {len(block_table)} rows; "
            f"R rows have R + 1, R and R"
        )
    options = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap, "sinks": sinks}
    if dispatch.select("paged_attention_packed", q.device, kernels, uncovered(q, keys, values)) == "torch":
        result = paged_attention_packed_reference(q, keys, values, block_table, starts, lengths, **options)
        return result if out is None else out.copy_(result)
    from . import packed_triton

    out = q.new_empty(*q.shape[:2], values.shape[-1]) if out is None else out
    q = q if q.stride(-1) == 1 else q.contiguous()
    options["scale"] = q.shape[-1] ** -0.5 if scale is None else scale
    return packed_triton.launch(q, keys, values, block_table, starts, lengths, out, **options)


def paged_attention_packed_reference(
    q,
    keys,
    values,
    block_table,
    starts,
    lengths,
    *,
    scale=None,
    sliding_window=None,
    softcap=None,
    sinks=None,
):
    """Defines `paged_attention_packed`, whose arguments it shares: every token as a row of its own."""
    rows, token = len(lengths), torch.arange(len(q), device=q.device)
    row = torch.searchsorted(starts[1:], token.to(starts.dtype), right=True)
    real, row = row < rows, row.clamp(max=rows - 1)
    seen = torch.where(real, lengths[row] - (starts[row + 1] - token - 1), 0)
    piece = max(1, _GATHERED // max(1, block_table.shape[1] * keys[0].numel()))
    parts = [
        paged_attention_reference(
            queries[:, None], keys, values, block_table[at], length,
            scale=scale, sliding_window=sliding_window, softcap=softcap, sinks=sinks,
        )[:, 0]
        for queries, at, length in zip(q.split(piece), row.split(piece), seen.split(piece), strict=True)
    ]  # fmt: skip
    return torch.cat(parts)
