"""DoLa (arXiv 2309.03883): the last layer against the earlier one that differs most from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import ParameterError
from ...loop.generation import Generation
from ..kit.decode import decode
from .contrastive_decoding import plausible


def dola(
    engine, prompts, params=None, *, layers="low", alpha=0.1, rule="paper", stream=False, **options
) -> list[Generation]:
    """log q_N - log q_M over tokens with q_N >= alpha max q_N; M is the premature layer of the largest JSD to N.

    q_j is the output layer on hidden state j, without the final norm (as in the authors' code and transformers). A
    token costs one forward pass, and one row of the output layer for each candidate layer.

    Args:
        prompts, params, options: as for `decode`. The paper adds repetition_penalty=1.2.
        layers: "low" or "high" half of the layers, every second of at most 20 of them, as transformers chooses them;
            or numbers of hidden states, 0 the embeddings.
        alpha: plausibility; 0 to 1.
        rule: "paper" chooses M by the Jensen-Shannon divergence; "code" as the authors' code and transformers (for
            one row), which turn both KL divergences round.
    """
    candidates = bucket(engine, layers)
    if rule not in ("paper", "code") or not 0 <= alpha <= 1:
        raise ParameterError(
            f"DoLa takes rule 'paper' or 'code' and alpha in [0, 1], got {rule!r} and {alpha}"
        )

    def logits(now):
        final = now.logits.log_softmax(-1)
        last = torch.tensor(now.state.counts, device=final.device) - 1
        rows = torch.arange(len(now), device=final.device)
        inner = torch.stack([now.state.hidden(layer)[rows, last] for layer in candidates])  # [L, B, D]
        early = engine.head(inner.flatten(0, 1), norm=False).unflatten(0, inner.shape[:2]).log_softmax(-1)
        early = early[divergence(final, early, turned=rule == "code").argmax(0), rows]
        return (final - early).masked_fill(~plausible(now.logits, alpha), -torch.inf)

    return decode(engine, prompts, params, logits=logits, hidden=True, stream=stream, **options)


def divergence(p: Tensor, q: Tensor, turned: bool) -> Tensor:
    """Jensen-Shannon divergence `[L, B]` of log-probabilities p `[B, V]` and q `[L, B, V]`; or with the means first."""
    middle = torch.logaddexp(p.expand_as(q), q) - math.log(2)

    def kl(one, other):
        return (one.exp() * (one - other)).sum(-1)

    return kl(middle, p) + kl(middle, q) if turned else kl(p, middle) + kl(q, middle)


def bucket(engine, layers) -> list[int]:
    """Numbers of the hidden states to contrast with."""
    depth = engine.config.num_hidden_layers
    if layers not in ("low", "high"):
        numbers = list(layers) if not isinstance(layers, str) else []
        if not numbers or not all(isinstance(n, int) and 0 <= n < depth for n in numbers):
            raise ParameterError(f'layers={layers!r} is not "low", "high" or numbers in 0..{depth - 1}')
        return numbers
    # Tied embeddings make hidden state 0 a copy of the input word.
    first = (
        2
        if engine.config.tie_word_embeddings and depth > 2
        else 1
        if engine.config.tie_word_embeddings
        else 0
    )
    middle = 20 if depth > 40 else depth // 2
    if layers == "low":
        return list(range(first, middle, 2)) or [first]
    return list(range(depth - 20 if depth > 40 else depth // 2, depth, 2))
