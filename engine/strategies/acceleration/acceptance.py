"""Which draft tokens are accepted: rules that leave the law of every token as it is, and one that does not."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.sampling.draw import draw

EPSILON = 0.09  # of typical acceptance
DRAFT, COIN = 2**30, 2**31  # streams of the drafts and of the acceptance tests, clear of the samples' own


def one_hot(tokens: Tensor, like: Tensor) -> Tensor:
    """Distributions [B, V] that are sure of tokens [B], with the type of `like` [B, V]."""
    return torch.zeros_like(like).scatter_(1, tokens[:, None], 1.0)


def law(processed: Tensor, greedy: Tensor | None) -> Tensor:
    """Probabilities [B, V] of the next token, from processed logits [B, V]; greedy [B] bool rows are sure."""
    probabilities = processed.softmax(-1)
    if greedy is None:
        return probabilities
    return torch.where(greedy[:, None], one_hot(processed.argmax(-1), processed), probabilities)


def ratio(processed: Tensor, proposed: Tensor, q: Tensor | None, context, greedy) -> tuple[Tensor, Tensor]:
    """Tokens [B] with the law of `processed` [B, V], and which of them are the proposed ones.

    Args:
        processed: [B, V] logits that the pipeline left.
        proposed: [B] draft tokens, -1 where there is none.
        q: [B, V] what they were drawn from, None where they were certain.
        context: noise keys.
        greedy: [B] bool, rows that take the argmax, or None.
    """
    p, ids = law(processed, greedy), proposed.clamp(min=0)
    q = one_hot(ids, p) if q is None else q
    chance = (p.gather(1, ids[:, None]) / q.gather(1, ids[:, None])).clamp(max=1)
    odds = torch.cat([chance, 1 - chance], 1).log()
    coin = draw(odds, context.seeds, context.positions, context.streams + COIN)
    accepted = (coin == 0) & (proposed >= 0)
    rest = torch.where(proposed[:, None] >= 0, (p - q).clamp(min=0), p)
    rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, p)  # p = q but for rounding
    other = draw(rest.log(), context.seeds, context.positions, context.streams)
    return torch.where(accepted, proposed, other), accepted


def coupled(processed: Tensor, proposed: Tensor, q: Tensor | None, context, greedy) -> tuple[Tensor, Tensor]:
    """Tokens [B] as plain decoding draws them, and which of them are the proposed ones; see `ratio`."""
    chosen = draw(processed, context.seeds, context.positions, context.streams, greedy)
    return chosen, chosen == proposed


def typical(processed: Tensor, proposed: Tensor, q: Tensor | None, context, greedy) -> tuple[Tensor, Tensor]:
    """Not lossless: a draft token is accepted where p >= min(e, sqrt(e) e^-H), e = 0.09 (Medusa, arXiv 2401.10774).

    H is the entropy of `processed`; e and its root are the paper's. Greedy rows accept so, too. See `ratio`.
    """
    p = processed.softmax(-1)
    entropy = -(p * p.clamp(min=1e-30).log()).sum(-1)
    level = torch.minimum(torch.full_like(entropy, EPSILON), EPSILON**0.5 * (-entropy).exp())
    fine = (p.gather(1, proposed.clamp(min=0)[:, None])[:, 0] >= level) & (proposed >= 0)
    chosen = draw(processed, context.seeds, context.positions, context.streams, greedy)
    return torch.where(fine, proposed, chosen), fine


RULES = {"ratio": ratio, "coupled": coupled, "typical": typical}
