"""Verification of a drafted chain of tokens with the whole sampling pipeline folded in.

Every position draws its own token with the noise of its position, as the loop would without a draft, and a
drafted token is accepted while it equals the drawn one. So the output is, token for token, what sampling
without a draft gives, whatever the draft. A draft that is drawn with the same seeds and positions shares the
noise, which makes the two agree often (Gumbel coupling, arXiv 2408.07978).
"""

from typing import NamedTuple

import torch

from .sample import sample


class Verified(NamedTuple):
    """Result of `verify`."""

    tokens: torch.Tensor  # int64 [B, n + 1]; the first accepted + 1 of a row are its output, the rest is -1
    accepted: torch.Tensor  # int64 [B], drafted tokens accepted, 0 to n
    drawn: object  # Drawn of all B * (n + 1) positions, row by row


def verify(logits, draft, *, seeds, positions, counts=None, streams=None, temperature=None, **pipeline):
    """Accept the longest prefix of each drafted chain that sampling itself would have produced, and one token
    more.

    Args:
        logits: [B, n + 1, V]; logits[:, i] follows the first i drafted tokens.
        draft: int64 [B, n].
        seeds: int64 [B].
        positions: int64 [B], absolute position of the first token to draw.
        counts: int64 [B] or None, number of drafted tokens of a row; default n.
        streams: int64 [B] or None.
        temperature: float32 [B] or None.
        pipeline: further arguments of `sample`; per-row ones have B values, which all positions of a row
            share, except `edits` and `bitmask`, which have B * (n + 1) rows. Values in `rules` likewise have
            B * (n + 1).

    Returns:
        Verified. A position without a drawable token has token -1 and ends the chain.

    Raises:
        ValueError: shapes do not fit.
    """
    rows, steps = logits.shape[:2]
    if tuple(draft.shape) != (rows, steps - 1):
        raise ValueError(
            f"draft of shape {tuple(draft.shape)}: expected ({rows}, {steps - 1}) for these logits"
        )
    offsets = torch.arange(steps, device=logits.device)
    spread = {"seeds": seeds, "streams": streams, "temperature": temperature}
    for name in ("top_k", "top_p", "min_p"):
        spread[name] = pipeline.pop(name, None)
    spread = {name: value.repeat_interleave(steps) for name, value in spread.items() if value is not None}
    drawn = sample(
        logits.flatten(0, 1), positions=(positions[:, None] + offsets).flatten(), **spread, **pipeline
    )
    tokens = drawn.tokens.view(rows, steps)
    agrees = tokens[:, :-1] == draft
    if counts is not None:
        agrees &= offsets[:-1] < counts[:, None]
    accepted = agrees.to(torch.int64).cumprod(dim=1).sum(dim=1)
    return Verified(torch.where(offsets <= accepted[:, None], tokens, -1), accepted, drawn)
