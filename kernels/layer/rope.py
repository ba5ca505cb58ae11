"""Rotary positions, and the write to the cells in one go: torch references, and the choice between them and Triton."""

import torch

from .. import dispatch
from .norm import Norm

WIDEST = 512


def rotate_and_write(
    q, k, v, cos, sin, keys, values, cells, *, q_norm: Norm | None = None, k_norm: Norm | None = None,
    rotated=None, interleaved=False, kernels=None,
):  # fmt: skip
    """Norm and rotate queries and keys of new tokens (arXiv 2104.09864), and put keys and values into their cells.

    Args:
        q: [T, Hq, D]; k: [T, Hk, D]; v: [T, Hv, Dv]; float16, bfloat16 or float32, the last axis contiguous.
        cos, sin: [T, W], or None where nothing is rotated.
        keys: [N, Hk, D]; values: [N, Hv, Dv]: all cells, in the dtype of k and v.
        cells: [T] int, where each token goes; of several tokens for one cell any may win.
        q_norm, k_norm: Norm over a head's D dimensions before the rotation, uncentered.
        rotated: leading dimensions that turn, W (the default: every angle stands there for both dimensions of its
            pair) or 2 W (once).
        interleaved: pairs are (2 i, 2 i + 1), not (i, i + rotated / 2).
        kernels: "auto", "triton", "torch" or None (see `dispatch`).

    Returns:
        The queries [T, Hq, D], contiguous. `keys` and `values` are changed.

    Raises:
        ValueError: shapes that do not fit. dispatch.KernelUnavailable: kernels="triton" cannot run here.
    """
    rotated = _check(q, k, v, cos, sin, keys, values, cells, rotated)
    options = {"q_norm": q_norm, "k_norm": k_norm, "rotated": rotated, "interleaved": interleaved}
    reason = uncovered(q, k, v, cos, keys, values, q_norm, k_norm)
    if dispatch.select("rotate_and_write", q.device, kernels, reason) == "torch":
        return rotate_and_write_reference(q, k, v, cos, sin, keys, values, cells, **options)
    from . import rope_triton

    return rope_triton.launch(q, k, v, cos, sin, keys, values, cells, **options)


def rotate_and_write_reference(
    q, k, v, cos, sin, keys, values, cells, *, q_norm=None, k_norm=None, rotated=None, interleaved=False
):
    """Defines `rotate_and_write`, whose arguments it shares: computed in float32, rounded once."""
    done = []
    for part, norm in ((q, q_norm), (k, k_norm)):
        wide = part.double() if part.dtype == torch.float64 else part.float()
        wide = wide if norm is None else norm(part)
        done.append((wide if cos is None else _rotate(wide, cos, sin, rotated, interleaved)).to(part.dtype))
    keys.index_copy_(0, cells, done[1].to(keys.dtype))
    values.index_copy_(0, cells, v.to(values.dtype))
    return done[0].contiguous()


def _rotate(x, cos, sin, rotated, interleaved):
    rotated = cos.shape[-1] if rotated is None else rotated
    half, kept = rotated // 2, x[..., rotated:]
    first = slice(0, rotated, 2) if interleaved else slice(0, half)
    second = slice(1, rotated, 2) if interleaved else slice(half, rotated)
    a, b = x[..., first], x[..., second]
    cos, sin = cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
    once = cos.shape[-1] == half
    cos_a, sin_a = (cos, sin) if once else (cos[..., first], sin[..., first])
    cos_b, sin_b = (cos, sin) if once else (cos[..., second], sin[..., second])
    a, b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    turned = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    return torch.cat((turned, kept), -1)


def look_up(table, positions, *, kernels=None):
    """Cosines and sines of positions (arXiv 2104.09864), from a table that has them.

    Args:
        table: [N, 2, W], contiguous: the cosines and the sines of each position.
        positions: [B, Q] int64; one that the table does not have gets those of the nearest that it has.
        kernels: "auto", "triton", "torch" or None (see `dispatch`).

    Returns:
        Cosines and sines [B, Q, W], views of one tensor [B, Q, 2, W].

    Raises:
        ValueError: shapes that do not fit. dispatch.KernelUnavailable: kernels="triton" cannot run here.
    """
    if table.dim() != 3 or table.shape[1] != 2 or not len(table) or positions.dim() != 2:
        raise ValueError(f"table {tuple(table.shape)} and positions {tuple(positions.shape)} do not fit")
    reason = None if table.is_contiguous() else "a table that is not contiguous"
    if dispatch.select("look_up", table.device, kernels, reason) == "torch":
        return look_up_reference(table, positions)
    from . import rope_triton

    return rope_triton.launch_look_up(table, positions)


def look_up_reference(table, positions):
    """Defines `look_up`, whose arguments it shares."""
    return table[positions.clamp(0, len(table) - 1)].unbind(-2)


def _check(q, k, v, cos, sin, keys, values, cells, rotated):
    tokens = len(q)
    fits = q.dim() == k.dim() == v.dim() == 3 and len(k) == len(v) == len(cells) == tokens
    if (
        not fits
        or q.shape[2] != k.shape[2]
        or keys.shape[1:] != k.shape[1:]
        or values.shape[1:] != v.shape[1:]
    ):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, cells {tuple(cells.shape)} of keys "
            f"{tuple(keys.shape)} and values {tuple(values.shape)} do not fit"
        )
    if cos is None:
        return 0
    rotated = cos.shape[-1] if rotated is None else rotated
    if cos.shape != sin.shape or cos.shape[0] != tokens or rotated not in (cos.shape[-1], 2 * cos.shape[-1]):
        raise ValueError(
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not turn {rotated} of {tokens} tokens"
        )
    if rotated % 2 or rotated > q.shape[2]:
        raise ValueError(f"{rotated} of {q.shape[2]} dimensions cannot be rotated in pairs")
    return rotated


def uncovered(q, k, v, cos, keys, values, q_norm=None, k_norm=None):
    """What keeps the Triton kernel from this call, in words; None where nothing does."""
    dtypes = {t.dtype for t in (q, k, v, keys, values)}
    if len(dtypes) > 1 or q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{' and '.join(sorted(map(str, dtypes)))} together"
    if max(q.shape[2], v.shape[2]) > WIDEST:
        return f"head sizes {q.shape[2]} and {v.shape[2]} (at most {WIDEST})"
    if any(t.stride(2) != 1 for t in (q, k, v, keys, values)) or (cos is not None and cos.stride(1) != 1):
        return "a last axis that is not contiguous"
    if any(n is not None and (n.centered or n.bias is not None) for n in (q_norm, k_norm)):
        return "a norm of heads that is centered or has a bias"
    return None
