"""Contrastive search (SimCTG, arXiv 2202.06417): probable tokens whose hidden state is unlike all before."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from ...errors import ParameterError
from ...loop.generation import Generation
from ..kit.decode import decode


def contrastive_search(
    engine, prompts, params=None, *, k=4, alpha=0.6, stream=False, **options
) -> list[Generation]:
    """Take the v of the k most probable tokens that maximises (1 - alpha) p(v) - alpha max_j cos(h_v, h_j).

    h_v is the last layer's hidden state at v when v is appended, h_j that of every token before it, prompt
    included. p is what the pipeline leaves; nothing is drawn. A token costs one pass of k rows for each prompt.

    Args:
        prompts, params, options: as for `decode`.
        k: candidates a step, >= 1.
        alpha: weight of the degeneration penalty, 0 (greedy search) to 1.

    Returns:
        One Generation for each prompt, in order.
    """
    if k < 1 or not 0 <= alpha <= 1:
        raise ParameterError(f"contrastive search takes k >= 1 and alpha in [0, 1], got k={k}, alpha={alpha}")
    search = Contrast(k, lambda now, best: (k, alpha))
    return decode(engine, prompts, params, step=search, hidden=True, stream=stream, **options)


class Contrast:
    """The step of contrastive search.

    Args:
        most: candidates that are tried, K.
        settings: (now, best log-probabilities [B, K]) -> how many of them count, and alpha; numbers, or [B, 1] each.
    """

    def __init__(self, most: int, settings):
        self.most, self.settings, self.past = most, settings, {}

    def __call__(self, now):
        fed = normalize(now.state.hidden().float(), dim=-1)
        for request, row, count in zip(now.live, fed, now.state.counts, strict=True):
            self.past[request] = torch.cat([self.past.get(request, row[:0]), row[:count]])
        self.past = {request: self.past[request] for request in now.live}
        best, candidates = now.logprobs.topk(min(self.most, now.logits.shape[1]))  # [B, K]
        width = best.shape[1]
        fan = [row for row in range(len(now)) for _ in range(width)]
        tried = now.engine.step(now.state.select(fan), candidates.flatten(), hidden=True)
        hidden = normalize(tried.hidden()[:, 0].float(), dim=-1).unflatten(0, candidates.shape)  # [B, K, D]
        pairs = zip(hidden, self.past.values(), strict=True)
        closest = torch.stack([(h @ seen.T).amax(-1) for h, seen in pairs])
        count, alpha = self.settings(now, best)
        # A candidate that the pipeline excluded (p = 0) must not win by being different.
        out = (best == -torch.inf) | (torch.arange(width, device=best.device) >= count)
        choice = ((1 - alpha) * best.exp() - alpha * closest).masked_fill(out, -torch.inf).argmax(-1)
        rows = torch.arange(len(now), device=choice.device)
        return candidates[rows, choice], tried.select(rows * width + choice)
