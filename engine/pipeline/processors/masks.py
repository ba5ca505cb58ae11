"""Hooks over the whole vocabulary: packed bitmasks (grammars), bias functions, and a watermark
written with one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...cache.transfer import upload
from ...errors import ParameterError
from ...kernels.noise.philox import philox_words_numpy, philox_words_reference
from ..forms import Context, Edit

WORD_BITS = 32


def unpack_bitmask(mask: Tensor, vocab_size: int) -> Tensor:
    """Packed mask [B, ceil(V / 32)] int32 (bit i % 32 of word i // 32 allows token i) as [B, V] bool."""
    bits = torch.arange(WORD_BITS, device=mask.device, dtype=torch.int32)
    return ((mask[..., None] >> bits) & 1).bool().flatten(-2)[..., :vocab_size]


def pack_bitmask(allowed: Tensor) -> Tensor:
    """[B, V] bool as a packed mask [B, ceil(V / 32)] int32, the inverse of `unpack_bitmask`."""
    rows, vocab = allowed.shape
    padded = torch.nn.functional.pad(allowed, (0, -vocab % WORD_BITS)).view(rows, -1, WORD_BITS)
    weights = torch.ones(1, dtype=torch.int64) << torch.arange(WORD_BITS)
    words = (padded.long() * weights.to(allowed.device)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


class Bitmask(Edit):
    """Allow the tokens whose bit is set in a packed int32 mask, the layout of xgrammar and llguidance.

    Give a function `(context) -> [B, ceil(V / 32)] int32`, which is asked at every step. Rows that shall be
    free get all ones (-1). Off at None.
    """

    name = "bitmask"
    kind = "opaque"  # asks the host at every step
    defaults = {"bitmask": None}
    identity_when_off = True

    def on(self, settings):
        return settings["bitmask"] is not None

    def pack(self, rows, context):
        sources = {id(row["bitmask"]): row["bitmask"] for row in rows if row["bitmask"] is not None}
        return {"sources": [(f, [row["bitmask"] is f for row in rows]) for f in sources.values()]}

    def mask(self, context: Context) -> Tensor:
        whole = None
        for source, mine in context.values.sources:
            mask, shape = source(context), (len(mine), -(-context.vocab_size // WORD_BITS))
            if mask.dtype != torch.int32 or tuple(mask.shape) != shape:
                raise ParameterError(
                    f"bitmask is {mask.dtype} {tuple(mask.shape)}; needed: torch.int32 {shape}"
                )
            if not all(mine):
                mask = torch.where(upload(mine, mask.device, None)[:, None], mask, -1)
            whole = mask if whole is None else whole & mask
        return whole


class BiasHook(Edit):
    """Add what a function returns: `function(context, vocab_size) -> [B, V] or [1, V] float32`."""

    name = "bias_hook"
    kind = "opaque"  # may do anything on the host

    def __init__(self, function: Callable[[Context, int], Tensor]):
        super().__init__()
        self.function = function

    def edit(self, logits: Tensor, context: Context) -> Tensor:
        return logits + self.function(context, logits.shape[-1])


class Watermark(Edit):
    """Green-list watermark (Kirchenbauer et al. 2023, 2301.10226, left hash): + delta on a pseudo-random
    share gamma of the vocabulary, chosen by the key and the previous token. Off at delta 0.

    A token is green iff the Philox word of (key, previous token, token) is below gamma * 2^32, so that the
    list is the same on every device, unlike one drawn by a device's generator. `watermark_score` detects it.
    """

    name = "watermark"
    defaults = {"delta": 0.0, "gamma": 0.25, "key": 15485863}
    needs_history = True
    identity_when_off = True

    def settings(self, params=None, row=0):
        return super().settings(None, row)  # explicit only: requests have no such fields

    def pack(self, rows, context):
        def column(field, kind):
            return upload([[row[field]] for row in rows], context.device, kind)

        kinds = {"delta": torch.float32, "gamma": torch.float64, "key": torch.int64}
        return {field: column(field, kind) for field, kind in kinds.items()}

    def edit(self, logits: Tensor, context: Context) -> Tensor:
        v = context.values
        last = (context.lengths - 1).clamp(min=0)[:, None]
        previous = context.history.gather(1, last)[:, 0]
        green = green_tokens(v.key[:, 0], previous, logits.shape[-1], v.gamma)
        return logits + v.delta * green


def green_tokens(keys: Tensor, previous: Tensor, vocab_size: int, gamma: Tensor | float) -> Tensor:
    """Which tokens are green after `previous` [B] int64 under `keys` [B] int64: [B, V] bool."""
    ids, stream = torch.arange(vocab_size, device=keys.device), torch.ones_like(keys)
    if keys.device.type == "cpu":
        words = philox_words_numpy(keys.numpy(), previous.numpy(), stream.numpy(), ids.numpy()).astype(
            "int64"
        )
        return torch.from_numpy(words) < gamma * 2.0**32
    return philox_words_reference(keys, previous, stream, ids) < gamma * 2.0**32


def watermark_score(ids, vocab_size: int, gamma: float = 0.25, key: int = 15485863) -> float:
    """z-score of the number of green tokens in `ids` (two or more); above 4: watermarked.

    Repeated pairs (previous token, token) count once, as they carry no new evidence.
    """
    pairs = sorted(set(itertools.pairwise(ids)))
    if not pairs:
        raise ParameterError("watermark_score needs at least two token ids")
    previous = torch.tensor([pair[0] for pair in pairs])
    green = green_tokens(torch.full_like(previous, key), previous, vocab_size, gamma)
    hits = int(green[torch.arange(len(pairs)), [pair[1] for pair in pairs]].sum())
    return (hits - gamma * len(pairs)) / math.sqrt(len(pairs) * gamma * (1 - gamma))
