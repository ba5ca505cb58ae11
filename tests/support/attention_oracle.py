"""One query's attention written out, and the error that plain float arithmetic has in it; for tests of attention."""

import torch

WIDE = 128  # heads wider than this also get `chained_logits`


def plain_logits(q, keys):
    """q [H, D], keys [L, H, D] -> [H, L]: a dot product a cell, which torch sums in many lanes."""
    return torch.einsum("hd,lhd->hl", q, keys)


def chained_logits(q, keys):
    """As `plain_logits`, summed from left to right: the inner order of matrix products (MKL's, and a GPU's FMA)."""
    out = keys.new_zeros(q.shape[0], len(keys))
    for d in range(q.shape[1]):
        out = out + q[:, d, None] * keys[:, :, d].T
    return out


def attend_one(q, keys, values, scale, *, softcap=None, sinks=None, logits=plain_logits):
    """q [Hq, D] over keys [L, Hk, D] and values [L, Hk, Dv], all in one dtype -> [Hq, Dv]; sinks [Hq]."""
    group = q.shape[0] // keys.shape[1]
    keys, values = (t.repeat_interleave(group, 1) for t in (keys, values))
    scores = logits(q, keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None].to(q.dtype)], 1)
    weights = torch.softmax(scores, -1)[:, : len(keys)]
    return torch.einsum("hl,lhd->hd", weights, values)


def plain_error(oracle, dtype, dim, real=...):
    """Greatest error of plain arithmetic in `dtype` against float64, the worst of the orders that torch itself takes.

    Args:
        oracle: (dtype, logits) -> results. dim: head size. real: index of the results that count.

    Wide float32 heads are summed in a chain by torch's matrix products, which errs several times more than the many
    lanes of its dot products: at D = 256 on a Xeon 6.1e-5 before scaling, against 2.0e-5.
    """
    exact = oracle(torch.float64, plain_logits)
    orders = [plain_logits]
    if dtype == torch.float32 and dim > WIDE:
        orders.append(chained_logits)
    return exact, max((oracle(dtype, order).double() - exact)[real].abs().max() for order in orders)
