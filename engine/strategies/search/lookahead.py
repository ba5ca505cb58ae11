"""Lookahead heuristics (NeuroLogic A*esque, arXiv 2112.08726): candidates are judged by what would follow them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...errors import ParameterError
from ...loop.generation import Generation
from ..kit.decode import decode


def lookahead(
    engine, prompts, params=None, *, heuristic: Callable[[Sequence[list[int]]], Sequence[float]], k=5, depth=8,
    weight=1.0, stream=False, **options,
) -> list[Generation]:  # fmt: skip
    """logit(v) + weight h(v and its greedy continuation) over the k most probable v, -inf elsewhere.

    A token costs 1 + depth forward passes, depth of them with k rows for each prompt.

    Args:
        prompts, params, options: as for `decode`.
        heuristic: output ids of N continuations (without prompts) -> N numbers, such as the log-probability of a
            constraint that comes to be satisfied.
        k: candidates, >= 1.
        depth: greedy tokens behind each candidate, >= 0; 0 judges the candidates themselves.
        weight: of the heuristic; 0 is top-k decoding.
    """
    if k < 1 or depth < 0:
        raise ParameterError(f"lookahead takes k >= 1 and depth >= 0, got k={k}, depth={depth}")

    def logits(now):
        best, ids = now.logits.topk(min(k, now.logits.shape[1]))  # [B, k]
        rows = [row for row in range(len(now)) for _ in range(ids.shape[1])]
        walk, token = now.state.select(rows), ids.flatten()
        texts = [[*text, v] for text, v in zip(walk.new_tokens, token.tolist(), strict=True)]
        for _ in range(depth):
            walk = now.engine.step(walk, token)
            token = walk.logits.argmax(-1)
            texts = [[*text, v] for text, v in zip(texts, token.tolist(), strict=True)]
        scores = torch.tensor(list(heuristic(texts)), device=best.device).view_as(best)
        return torch.full_like(now.logits, -torch.inf).scatter(1, ids, best + weight * scores)

    return decode(engine, prompts, params, logits=logits, stream=stream, **options)
