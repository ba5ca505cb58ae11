"""Frustratingly simple decoding (FSD, arXiv 2305.12675): an n-gram model of the text says what not to repeat."""

from __future__ import annotations

from collections import Counter, defaultdict

import torch

from ...errors import ParameterError
from ...loop.generation import Generation
from ..kit.decode import decode


def frustratingly_simple(
    engine, prompts, params=None, *, k=6, alpha=0.6, n=3, beta=0.9, rule="paper", stream=False, **options
) -> list[Generation]:
    """Take the v of the k most probable tokens that maximises (1 - alpha) p(v) - alpha p_w(v).

    p_w = sum_i l_i p_i(v | last i - 1 tokens), the i-gram frequencies of prompt and output, with l_n = beta, l_i =
    beta (1 - those above), l_1 the rest. p is what the pipeline leaves; nothing is drawn. A token costs one forward
    pass of one row for each prompt.

    Args:
        prompts, params, options: as for `decode`.
        k: candidates a step, >= 1. alpha: weight of the penalty, 0 (greedy search) to 1.
        n: longest n-gram, >= 1. beta: 0 to 1, weight of the longest.
        rule: "paper"; or "code" as in the authors' code, where an n-gram that was never seen leaves its weight to the
            shorter ones, and frequencies (but of single tokens) are count / (total + 1).
    """
    if k < 1 or n < 1 or not (0 <= alpha <= 1 and 0 <= beta <= 1) or rule not in ("paper", "code"):
        raise ParameterError(
            f"FSD takes k, n >= 1, alpha and beta in [0, 1] and rule 'paper' or 'code', got k={k}, n={n}, "
            f"alpha={alpha}, beta={beta}, rule={rule!r}"
        )
    models: dict = {}

    def step(now):
        best, ids = now.logprobs.topk(min(k, now.logits.shape[1]))  # [B, k]
        penalties = []
        for request, text, candidates in zip(now.live, now.state.tokens, ids.tolist(), strict=True):
            model = models.setdefault(request, NGrams(n, beta))
            model.read(text)
            penalties.append(
                [(model.probability if rule == "paper" else model.penalty)(v) for v in candidates]
            )
        score = (1 - alpha) * best.exp() - alpha * torch.tensor(penalties, device=best.device)
        choice = score.masked_fill(best == -torch.inf, -torch.inf).argmax(-1, keepdim=True)
        return ids.gather(1, choice)[:, 0]

    return decode(engine, prompts, params, step=step, stream=stream, **options)


class NGrams:
    """A smoothed n-gram model of one growing text."""

    def __init__(self, n: int, beta: float):
        self.n, self.beta, self.text = n, beta, []
        self.counts: dict[tuple, Counter] = defaultdict(Counter)  # the tokens behind each run of fewer than n
        self.weights, rest = {}, 1.0
        for size in range(n, 1, -1):
            self.weights[size] = beta * rest
            rest -= self.weights[size]
        self.weights[1] = rest

    def read(self, text: list[int]) -> None:
        """Count what is new in the text."""
        for at in range(len(self.text), len(text)):
            for size in range(1, min(self.n, at + 1) + 1):
                self.counts[tuple(text[at - size + 1 : at])][text[at]] += 1
        self.text = list(text)

    def probability(self, token: int) -> float:
        """Of a token behind the text."""
        total = 0.0
        for size, weight in self.weights.items():
            seen = self.counts.get(tuple(self.text[len(self.text) - size + 1 :]) if size > 1 else ())
            if seen and len(self.text) >= size - 1:
                total += weight * seen[token] / seen.total()
        return total

    def penalty(self, token: int) -> float:
        """Of a token behind the text, by the authors' code."""
        total, left = 0.0, float(len(self.text) >= self.n - 1)
        for size in range(self.n, 0, -1):
            seen = self.counts.get(
                tuple(self.text[len(self.text) - size + 1 :]) if size > 1 else (), Counter()
            )
            if seen[token]:
                total += (
                    left * (self.beta / (seen.total() + 1) if size > 1 else 1 / seen.total()) * seen[token]
                )
                left -= left * self.beta
        return total
