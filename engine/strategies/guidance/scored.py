"""FUDGE (arXiv 2104.05218) and ARGS (arXiv 2402.01694): the best few tokens, weighed by a scorer of the longer text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...errors import ParameterError
from ...loop.generation import Generation
from ..kit.decode import decode


def scored(
    engine, prompts, params=None, *, scorer: Callable[[Sequence[list[int]]], Sequence[float] | Tensor], k=200,
    weight=1.0, stream=False, **options,
) -> list[Generation]:  # fmt: skip
    """logit(v) + weight scorer(tokens, v) over the k most probable v, -inf elsewhere, before the pipeline.

    FUDGE: the scorer is log P(attribute | prefix v), weight 1, k 200; the result is P(v | prefix, attribute) by
    Bayes. ARGS: the scorer is a reward, k 10, weight w = 1.5, at temperature 0. A token costs one forward pass of
    one row, and k texts for the scorer, for each prompt.

    Args:
        prompts, params, options: as for `decode`.
        scorer: token ids of N texts, prompts included -> N numbers, in one call a step.
        k: candidates, >= 1.
        weight: of the score; 0 is top-k decoding.
    """
    if k < 1:
        raise ParameterError(f"scored decoding takes k >= 1, got {k}")

    def logits(now):
        best, ids = now.logits.topk(min(k, now.logits.shape[1]))  # [B, k]
        texts = [[*text, v] for text, row in zip(now.state.tokens, ids.tolist(), strict=True) for v in row]
        scores = torch.as_tensor(scorer(texts), dtype=torch.float32, device=best.device)
        if scores.shape != (len(texts),):
            raise ParameterError(f"the scorer gave {list(scores.shape)} numbers for {len(texts)} texts")
        return torch.full_like(now.logits, -torch.inf).scatter(1, ids, best + weight * scores.view_as(best))

    return decode(engine, prompts, params, logits=logits, stream=stream, **options)


def of_text(engine, score: Callable[[str], float]) -> Callable[[Sequence[list[int]]], list[float]]:
    """A scorer of ids from a scorer of text."""
    return lambda texts: [score(engine.decode(ids)) for ids in texts]
