"""Contrastive decoding (arXiv 2210.15097, 2309.09117): what an expert knows better than an amateur."""

from __future__ import annotations

import math

import torch

from ...errors import ParameterError
from ...loop.generation import Generation
from ..kit.decode import decode


def contrastive_decoding(
    engine, prompts, params=None, *, amateur, amateur_prompts=None, alpha=0.1, beta=0.5, amateur_temperature=1.0,
    original=False, stream=False, **options,
) -> list[Generation]:  # fmt: skip
    """(1 + beta) s_e - beta s_a over tokens with p_e >= alpha max p_e, -inf elsewhere; s are logits.

    A token costs a forward pass of each model, one row for each prompt.

    Args:
        engine: the expert. prompts, params, options: as for `decode`.
        amateur: an Engine of the same vocabulary.
        amateur_prompts: its prompts, one for each; None: the same.
        alpha: plausibility, 0 (no token is masked) to 1 (only the expert's best stays).
        beta: strength of the contrast, as in arXiv 2309.09117; 0 is the expert's plain decoding among plausible ones.
        amateur_temperature: the amateur's logits are divided by it.
        original: log p_e - log p_a as in arXiv 2210.15097, instead of the weights with beta.
    """
    if not 0 <= alpha <= 1 or amateur_temperature <= 0:
        raise ParameterError(
            f"contrastive decoding takes alpha in [0, 1] and a temperature above 0, got alpha={alpha}, "
            f"amateur_temperature={amateur_temperature}"
        )

    def logits(now):
        expert, weak = now.joint.logits
        weak = weak / amateur_temperature
        contrast = (
            expert.log_softmax(-1) - weak.log_softmax(-1) if original else (1 + beta) * expert - beta * weak
        )
        return contrast.masked_fill(~plausible(expert, alpha), -torch.inf)

    given = prompts if amateur_prompts is None else amateur_prompts
    return decode(engine, prompts, params, logits=logits, beside=[(amateur, given)], stream=stream, **options)


def plausible(logits, alpha: float):
    """`[B, V]` bool: tokens with a probability of at least alpha times the largest."""
    return logits >= logits.amax(-1, keepdim=True) + (math.log(alpha) if alpha else -math.inf)
