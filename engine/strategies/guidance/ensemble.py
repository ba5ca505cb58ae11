"""Ensembles: the product or the mixture of what several models, or one model under several prompts, expect next."""

from __future__ import annotations

import torch

from ...errors import ParameterError
from ...loop.generation import Generation
from ..kit.decode import decode


def ensemble(
    engine, prompts, params=None, *, others, weights=None, kind="product", stream=False, **options
) -> list[Generation]:
    """sum_i w_i log p_i (product of experts, Hinton 2002), or log sum_i w_i p_i (mixture), before the pipeline.

    A token costs a forward pass of each member, one row for each prompt.

    Args:
        prompts, params, options: as for `decode`.
        others: the other members: Engines of the same vocabulary, or pairs (Engine, its own prompts).
        weights: one for `engine` and each other, in this order; None: equal ones that sum to 1. Those of a mixture
            are made to sum to 1; those of a product need not (below 0 moves away from a member).
        kind: "product" or "mixture".
    """
    members = [other if isinstance(other, tuple) else (other, prompts) for other in others]
    weights = [1 / (len(members) + 1)] * (len(members) + 1) if weights is None else list(weights)
    if len(weights) != len(members) + 1 or kind not in ("product", "mixture"):
        raise ParameterError(
            f"an ensemble of {len(members) + 1} models takes as many weights and kind 'product' or 'mixture', "
            f"got weights={weights}, kind={kind!r}"
        )
    if kind == "mixture" and (min(weights) < 0 or not sum(weights) > 0):
        raise ParameterError(f"a mixture's weights are at least 0 and not all 0, got {weights}")

    def logits(now):
        laws = torch.stack([each.log_softmax(-1) for each in now.joint.logits])  # [M, B, V]
        share = laws.new_tensor(weights)[:, None, None]
        if kind == "mixture":
            return (laws + (share / share.sum()).log()).logsumexp(0)
        # 0 times -inf is nothing: a member without weight excludes nothing
        return torch.where(share == 0, 0.0, laws * share).sum(0)

    return decode(engine, prompts, params, logits=logits, beside=members, stream=stream, **options)
