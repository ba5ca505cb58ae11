"""Which draft tokens are accepted: rules that leave the law of every token as it is, and one that does not."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ParameterError
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


def scaled(weights: Tensor, otherwise: Tensor) -> Tensor:
    """Weights [B, V] as probabilities; rows without any take those of `otherwise` [B, V]."""
    total = weights.sum(1, keepdim=True)
    return torch.where(total > 0, weights / total, otherwise)


def ratio(processed: Tensor, proposed: Tensor, q: Tensor | None, context, greedy) -> tuple[Tensor, Tensor]:
    """Tokens [B] with the law p of `processed` [B, V], and the place [B] of each among the proposed ones, or -1.

    The candidates are tried in order: one is accepted with probability min(1, p/q); otherwise p becomes what is left,
    max(p - q, 0), and q the law of the candidates behind it (recursive rejection; arXiv 2305.09781, 2402.14160).

    Args:
        processed: [B, V] logits that the pipeline left.
        proposed: [B, K] draft tokens, -1 where there is none.
        q: [B, V] what they were drawn from, one after the other without replacement; None where they were certain.
        context: noise keys.
        greedy: [B] bool, rows that take the argmax, or None.
    """
    p, place = law(processed, greedy), torch.full_like(proposed[:, 0], -1)
    for k, ids in enumerate(proposed.clamp(min=0).unbind(1)):
        sure, tried = one_hot(ids, p), (proposed[:, k] >= 0) & (place < 0)
        own = sure if q is None else scaled(q, sure)  # a greedy draft's further candidates are certain
        chance = (p.gather(1, ids[:, None]) / own.gather(1, ids[:, None])).clamp(max=1)
        place = torch.where(tried & coin(chance, k, context, context.positions), k, place)
        rest = scaled((p - own).clamp(min=0), p)  # p = q but for rounding
        p = torch.where((tried & (place < 0))[:, None], rest, p)
        q = None if q is None else q * (1 - sure)
    other = draw(p.log(), context.seeds, context.positions, context.streams)
    return torch.where(place >= 0, at(proposed, place), other), place


def coin(chance: Tensor, number: int, context, positions: Tensor) -> Tensor:
    """[B] bool, True with probability `chance` [B, 1]; those of other numbers at a position are independent of it."""
    odds = chance.new_full((len(chance), 2 * number + 2), -torch.inf)
    odds[:, 2 * number :] = torch.cat([chance, 1 - chance], 1).log()
    return draw(odds, context.seeds, positions, context.streams + COIN) == 2 * number


def at(proposed: Tensor, place: Tensor) -> Tensor:
    """The proposed token [B] of each row's place; any where that is -1."""
    return proposed.gather(1, place.clamp(min=0)[:, None])[:, 0]


def first(fine: Tensor) -> Tensor:
    """The place [B] of the first candidate [B, K] that will do, or -1."""
    return torch.where(fine.any(1), fine.int().argmax(1), -1)


def coupled(processed: Tensor, proposed: Tensor, q: Tensor | None, context, greedy) -> tuple[Tensor, Tensor]:
    """Tokens [B] as plain decoding draws them, and the place of each among the proposed ones; see `ratio`."""
    chosen = draw(processed, context.seeds, context.positions, context.streams, greedy)
    return chosen, first((chosen[:, None] == proposed) & (proposed >= 0))


def typical(processed: Tensor, proposed: Tensor, q: Tensor | None, context, greedy) -> tuple[Tensor, Tensor]:
    """Not lossless: a draft token is accepted where p >= min(e, sqrt(e) e^-H), e = 0.09 (Medusa, arXiv 2401.10774).

    H is the entropy of `processed`; e and its root are the paper's. Greedy rows accept so, too. See `ratio`.
    """
    p = processed.softmax(-1)
    entropy = -(p * p.clamp(min=1e-30).log()).sum(-1)
    level = torch.minimum(torch.full_like(entropy, EPSILON), EPSILON**0.5 * (-entropy).exp())
    place = first((p.gather(1, proposed.clamp(min=0)) >= level[:, None]) & (proposed >= 0))
    chosen = draw(processed, context.seeds, context.positions, context.streams, greedy)
    return torch.where(place >= 0, at(proposed, place), chosen), place


RULES = {"ratio": ratio, "coupled": coupled, "typical": typical}


def block(requests, tokens, drafts, logits):
    """The rule that accepts the longest part of each row's draft that it can, judged as a whole (arXiv 2403.10444).

    With w_j = min(1, w_{j-1} p/q) at draft token j, the first j tokens are accepted with probability
    s_j / (s_j + 1 - w_j), s_j the sum of max(w_j p - q, 0), from which the next token is then drawn; all of them with
    w. So no fewer are accepted than by `ratio` in the mean, and the law is the same. The pipeline runs twice over a
    draft.

    Args:
        requests: of the rows. tokens: committed ids of each row. drafts: what is proposed behind them.
        logits: [B, n + 1, V] after the committed tokens, and after each draft token.

    Returns:
        A rule like `ratio`, which is to be asked for one token after the other.

    Raises:
        ParameterError: the drafts are trees.
    """
    if not drafts.lines:
        raise ParameterError('rule="block" takes one line of drafts a row, not a tree')
    laws, drafts = drafts.laws, drafts.tokens
    width, device, told = logits.shape[1], logits.device, []
    padded = torch.tensor([ids + [-1] * (width - len(ids)) for ids in drafts], device=device)  # [B, n + 1]
    greedy, w, reached, start = requests.rows.greedy_rows(), torch.ones_like(logits[:, 0, :1]), 0, None
    for j, ids in enumerate(padded.unbind(1)):
        seen = [row + draft[:j] for row, draft in zip(tokens, drafts, strict=True)]
        context = requests.context(lambda seen=seen: seen, torch.tensor([*map(len, seen)], device=device))
        start = context.positions if j == 0 else start
        p, more, sure = (
            law(requests.rows.apply(logits[:, j], context), greedy),
            (ids >= 0)[:, None],
            ids.clamp(min=0),
        )
        q = one_hot(sure, p) if laws is None else laws[:, j]
        rest = torch.where(more, (w * p - q).clamp(min=0), p)
        s = rest.sum(1, keepdim=True)
        chance = torch.where(more, (s / (s + 1 - w)).nan_to_num(1.0), w)  # 0/0: w is 1, and p is q
        there = (padded[:, :j] >= 0).all(1)
        reached = torch.where(there & coin(chance, j, context, start), j, reached)
        told.append(draw(scaled(rest, p).log(), context.seeds, context.positions, context.streams))
        w = torch.where(more, (w * p.gather(1, sure[:, None]) / q.gather(1, sure[:, None])).clamp(max=1), w)
        requests = requests.accept(ids, context)
    accepted = torch.arange(width, device=device) < reached[:, None]  # [B, n + 1]
    chosen, place = torch.where(accepted, padded, torch.stack(told, 1)), accepted.long() - 1
    answers = zip(chosen.unbind(1), place.unbind(1), strict=True)
    return lambda *_: next(answers)
