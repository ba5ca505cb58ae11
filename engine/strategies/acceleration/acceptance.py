"""Which draft tokens are accepted: rules that leave the law of every token as it is, and one that does not."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.sampling.draw import draw
from ..kit.drawing import law, one_hot, scaled, toss

EPSILON = 0.09  # of typical acceptance


def ratio(
    processed: Tensor, proposed: Tensor, q: Tensor | None, context, greedy, sources=None
) -> tuple[Tensor, Tensor]:
    """Tokens [B] with the law p of `processed` [B, V], and which [B] of the proposed ones each is, or -1.

    The candidates are tried in order: one is accepted with probability min(1, p/q); otherwise p becomes what is left,
    max(p - q, 0), and q the law of the candidates behind it (recursive rejection; arXiv 2305.09781, 2402.14160).

    Args:
        processed: [B, V] logits that the pipeline left.
        proposed: [B, K] draft tokens, -1 where there is none.
        q: [B, S, V] what each source drew its own from, one after the other without replacement, independently of the
            other sources; None where they were certain.
        context: noise keys.
        greedy: [B] bool, rows that take the argmax, or None.
        sources: [B, K] of the draft tokens; None: there is one.
    """
    p, place = law(processed, greedy), torch.full_like(proposed[:, 0], -1)
    sources, rows = (
        torch.zeros_like(proposed) if sources is None else sources,
        torch.arange(len(p), device=p.device),
    )
    q = None if q is None else q.clone()
    for k, ids in enumerate(proposed.clamp(min=0).unbind(1)):
        sure, tried = one_hot(ids, p), (proposed[:, k] >= 0) & (place < 0)
        # a certain source, and the further candidates of a greedy one, are sure of what they propose
        own = sure if q is None else scaled(q[rows, sources[:, k]], sure)
        chance = (p.gather(1, ids[:, None]) / own.gather(1, ids[:, None])).clamp(max=1)
        place = torch.where(tried & toss(chance, k, context, context.positions), k, place)
        rest = scaled((p - own).clamp(min=0), p)  # p = q but for rounding
        p = torch.where((tried & (place < 0))[:, None], rest, p)
        if q is not None:
            q[rows, sources[:, k], ids] = 0.0
    other = draw(p.log(), context.seeds, context.positions, context.streams)
    return torch.where(place >= 0, at(proposed, place), other), place


def at(proposed: Tensor, place: Tensor) -> Tensor:
    """The proposed token [B] of each row's place; any where that is -1."""
    return proposed.gather(1, place.clamp(min=0)[:, None])[:, 0]


def first(fine: Tensor) -> Tensor:
    """The place [B] of the first candidate [B, K] that will do, or -1."""
    return torch.where(fine.any(1), fine.int().argmax(1), -1)


def coupled(processed: Tensor, proposed: Tensor, q, context, greedy, sources=None) -> tuple[Tensor, Tensor]:
    """Tokens [B] as plain decoding draws them, and the place of each among the proposed ones; see `ratio`."""
    chosen = draw(processed, context.seeds, context.positions, context.streams, greedy)
    return chosen, first((chosen[:, None] == proposed) & (proposed >= 0))


def typical(processed: Tensor, proposed: Tensor, q, context, greedy, sources=None) -> tuple[Tensor, Tensor]:
    """Not lossless: a draft token is accepted where p >= min(e, sqrt(e) e^-H), e = 0.09 (Medusa, arXiv 2401.10774).

    H is the entropy of `processed`; e and its root are the paper's. Greedy rows accept so, too. See `ratio`.
    """
    p = processed.softmax(-1)
    entropy = -(p * p.clamp(min=1e-30).log()).sum(-1)
    level = torch.minimum(torch.full_like(entropy, EPSILON), EPSILON**0.5 * (-entropy).exp())
    place = first((p.gather(1, proposed.clamp(min=0)) >= level[:, None]) & (proposed >= 0))
    chosen = draw(processed, context.seeds, context.positions, context.streams, greedy)
    return torch.where(place >= 0, at(proposed, place), chosen), place


def block(processed: Tensor, drafts: Tensor, q: Tensor | None, context, greedy) -> tuple[Tensor, Tensor]:
    """The rule that judges a line of drafts as a whole, and accepts the longest part of it that it can (2403.10444).

    With w_j = min(1, w_{j-1} p/q) at draft token j, the first j tokens are accepted with probability
    s_j / (s_j + 1 - w_j), s_j the sum of max(w_j p - q, 0), from which the next token is then drawn; all of them with
    w. So no fewer are accepted than by `ratio` in the mean, and the law is the same.

    Args:
        processed: [B, n + 1, V] logits that the pipeline left before each draft token, and behind the last.
        drafts: [B, n] tokens, -1 behind a row's last one. q: [B, n + 1, V] their laws; None: they are certain.
        context: noise keys [B] of the first token. greedy: [B] bool or None.

    Returns:
        [B, n + 1] tokens and, of each, 0 where it is the accepted draft, else -1: the row's last one.
    """
    w, reached, told = torch.ones_like(processed[:, 0, :1]), torch.zeros_like(context.positions), []
    ids = torch.nn.functional.pad(drafts, (0, 1), value=-1)
    for j, own in enumerate(ids.unbind(1)):
        p, more, token = law(processed[:, j], greedy), (own >= 0)[:, None], own.clamp(min=0)
        law_q = one_hot(token, p) if q is None else q[:, j]
        rest = torch.where(more, (w * p - law_q).clamp(min=0), p)
        s = rest.sum(1, keepdim=True)
        chance = torch.where(more, (s / (s + 1 - w)).nan_to_num(1.0), w)  # 0/0: w is 1, and p is q
        there = (ids[:, :j] >= 0).all(1)
        reached = torch.where(there & toss(chance, j, context, context.positions), j, reached)
        told.append(draw(scaled(rest, p).log(), context.seeds, context.positions + j, context.streams))
        w = torch.where(
            more, (w * p.gather(1, token[:, None]) / law_q.gather(1, token[:, None])).clamp(max=1), w
        )
    accepted = torch.arange(ids.shape[1], device=ids.device) < reached[:, None]
    return torch.where(accepted, ids, torch.stack(told, 1)), accepted.long() - 1


RULES = {"ratio": ratio, "coupled": coupled, "typical": typical}
