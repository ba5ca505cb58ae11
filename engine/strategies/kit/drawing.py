"""Probabilities of the next token, and draws from them beside the one that decides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.sampling.draw import draw

COIN = 2**31  # streams of the tosses, clear of all others


@dataclass
class Keys:
    """Noise keys of R rows: int64 `[R]` each."""

    seeds: Tensor
    positions: Tensor
    streams: Tensor


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


def toss(chance: Tensor, number: int, context, positions: Tensor) -> Tensor:
    """[B] bool, True with probability `chance` [B, 1]; those of other numbers at a position are independent of it.

    Args:
        context: noise keys of the rows. positions: int64 [B].
    """
    odds = chance.new_full((len(chance), 2 * number + 2), -torch.inf)
    odds[:, 2 * number :] = torch.cat([chance, 1 - chance], 1).log()
    return draw(odds, context.seeds, positions, context.streams + COIN) == 2 * number


def without_replacement(logits: Tensor, count: int, seeds, positions, streams, greedy) -> Tensor:
    """Tokens [B, count] drawn from logits [B, V] one after the other, none twice; -1 where none is left."""
    found: list[Tensor] = []
    for _ in range(count):
        found.append(draw(logits, seeds, positions, streams, greedy))
        if len(found) < count:
            logits = logits.scatter(1, found[-1].clamp(min=0)[:, None], -torch.inf)
    return torch.stack(found, 1)


def conditioned(noisy: Tensor, limit: Tensor) -> Tensor:
    """Perturbed log-probabilities `[R, V]`, given that their maximum in each row is `limit [R]` (appendix B.3)."""
    top = noisy.amax(-1, keepdim=True)
    v = limit[:, None] - noisy + torch.log1p(-(noisy - top).exp())
    result = limit[:, None] - v.clamp(min=0) - torch.log1p((-v.abs()).exp())
    return torch.where(noisy == top, limit[:, None], result).masked_fill(noisy == -torch.inf, -torch.inf)
