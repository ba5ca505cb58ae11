"""Rows of logits and an oracle for tests of the sampling kernels."""

import numpy as np
import torch

from handloom.kernels.sampling import rules


def generator(seed):
    return torch.Generator().manual_seed(seed)


def rows(batch, vocab, seed=0):
    """Yield (name, float32 [batch, vocab]): the kinds of rows on which samplers go wrong."""
    g = generator(seed)
    normal = torch.randn(batch, vocab, generator=g)
    zipf = -1.2 * torch.log(torch.stack([torch.randperm(vocab, generator=g) + 1.0 for _ in range(batch)]))
    third = torch.arange(vocab) % 3 == 0
    yield "normal", normal * 3
    yield "narrow", normal * 0.5
    yield "bfloat16", (normal * 3).bfloat16().float()
    yield "integers", (normal * 2).round()
    yield "equal", torch.zeros(batch, vocab)
    yield "two levels", (torch.arange(vocab) < vocab // 2).float().expand(batch, vocab).clone()
    yield "zipf", zipf
    yield "outlier", normal.index_fill(1, torch.tensor([vocab // 2]), 1e4)
    yield "offset", normal + 3e4
    yield "negative offset", normal - 3e4
    yield "wide", normal * 1e4
    yield "sorted", (normal * 2).sort(dim=1).values
    for value in (-torch.inf, -1e4, -1e9):
        yield f"third {value}", torch.where(third, value, normal)
    yield "one left", torch.full((batch, vocab), -torch.inf).index_fill(1, torch.tensor([vocab - 1]), 2.0)
    yield "signed zeros", torch.where(third, -0.0, 0.0).expand(batch, vocab).clone()
    yield "infinite", normal.index_fill(1, torch.tensor([0, vocab - 1]), torch.inf)
    broken = normal.clone()
    broken[0, vocab // 2] = torch.nan
    broken[-1] = -torch.inf
    yield "broken", broken


def oracle(row, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Kept tokens of a finite float32 row as a bool array, and how close the nucleus boundary is to p.

    The closeness is 0 where a token lies within a rounding step of the min-p limit.

    Float64, one stable sort, one loop; written from the definitions, not from the code under test.
    """
    x = (row.astype(np.float32) / np.float32(temperature)).astype(np.float64)
    order = np.argsort(-x, kind="stable")
    kept = x > -np.inf
    if 0 < top_k < len(x):
        kept &= x >= x[order[top_k - 1]]
    margin = np.inf
    if top_p < 1:
        weights = np.where(kept, np.exp(x - x.max()), 0.0)
        share, seen = weights / weights.sum(), 0.0
        for place, token in enumerate(order):
            margin = min(margin, abs(seen - top_p))
            if seen >= top_p and place > 0:
                kept &= x >= x[order[place - 1]]
                break
            seen += share[token]
    if 0 < min_p < 1:
        distance = np.abs(x[x > -np.inf] - x.max() - np.log(min_p)).min()
        margin = 0.0 if distance <= np.spacing(np.abs(x.max()), dtype=np.float32) else margin
    if min_p > 0:
        kept &= np.exp(x - x.max()) >= min(min_p, 1.0) * (1 - 1e-6)
    return kept, margin


def key(batch, seed=0):
    """Seeds, positions and streams of a batch, as keyword arguments."""
    g = generator(seed + 1000)
    return {
        "seeds": torch.randint(0, 2**62, (batch,), generator=g),
        "positions": torch.randint(0, 2**31, (batch,), generator=g),
        "streams": torch.randint(0, 4, (batch,), generator=g),
    }


def edits(batch, vocab, seed=0):
    """Random `SparseEdits`: history with repeats and padding, biases, bans, per-row penalties."""
    g = generator(seed + 2000)
    history = torch.randint(0, vocab, (batch, 24), generator=g)
    history[:, 5:10] = history[:, :5]
    history[:, 12] = -1
    zero = torch.zeros(batch, dtype=torch.int64)
    ids, seen, counts = rules.count_tokens(history, (zero, zero + 12), (zero + 24, zero + 24))
    bias = torch.randn(ids.shape, generator=g) * (torch.rand(ids.shape, generator=g) < 0.3)
    bias[torch.rand(ids.shape, generator=g) < 0.1] = -torch.inf
    penalties = (torch.tensor([1.0, 1.3, 0.8]), torch.tensor([0.0, 0.6]), torch.tensor([0.0, 0.3, -0.2]))
    picked = [values[torch.randint(len(values), (batch,), generator=g)] for values in penalties]
    return rules.SparseEdits(ids, bias, seen, counts, *picked, rules.touched_bits(ids, vocab))


def on(device, value):
    """Move a tensor, a tuple of tensors or rules, or a dict of these."""
    if isinstance(value, torch.Tensor):
        return value.to(device, copy=True)
    if isinstance(value, dict):
        return {name: on(device, part) for name, part in value.items()}
    if isinstance(value, tuple):
        parts = [on(device, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def back(drawn):
    """A `Drawn` on the host."""
    return type(drawn)(*(None if part is None else part.cpu() for part in drawn))


def differences(expected, got, tolerance=5e-5):
    """Names of the fields in which two `Drawn` differ: integers exactly, floats by `tolerance`, NaN equal NaN."""
    different = []
    for name, a, b in zip(expected._fields, expected, got, strict=True):
        if a is None and b is None:
            continue
        exact = a.dtype == torch.int64
        same = torch.equal(a, b) if exact else torch.allclose(a, b, atol=tolerance, rtol=1e-5, equal_nan=True)
        if not same:
            different.append(f"{name}: {a.tolist()} != {b.tolist()}")
    return different
