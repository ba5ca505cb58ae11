"""Verify: which drafts become text, and what came of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...loop.generation import Generation
from ...pipeline.drawing import logprob_of
from ..kit.requests import Requests, push
from .spots import Spots


@dataclass(kw_only=True, repr=False)
class Speculation(Generation):
    """A Generation and its drafts' fate: tokens proposed, accepted, and forward passes of the model."""

    drafted: int = 0
    accepted: int = 0
    passes: int = 0

    @property
    def acceptance(self) -> float:
        """Share of draft tokens accepted; NaN without drafts."""
        return self.accepted / self.drafted if self.drafted else float("nan")


def verify(requests: Requests, live, tokens, drafts, logits: Tensor, rule: str):
    """Commit the draft tokens that a rule accepts, and one token more, or as many as it takes to end a row.

    Args:
        requests, live: of the rows; tokens are pushed to `live`.
        tokens, drafts, logits: see `Spots`. rule: see `speculative`.

    Returns:
        The requests after it, each row's newly committed tokens, the places of its accepted drafts, and its Events.
    """
    spots, new, paths, walked, events = Spots(requests, tokens, drafts, logits), [], [], [], []
    judged = spots.judged(rule)
    for row in range(len(live)):
        path, trail = [], [spots.number[row, -1]]
        while (number := judged[trail[-1]][1]) >= 0:
            path.append(drafts.below(row, path[-1] if path else -1)[number][0])
            trail.append(spots.number[row, path[-1]])
        walked.append(trail)
        new.append([judged[spot][0] for spot in trail])
        paths.append(path)
    flat = [spot for trail in walked for spot in trail]
    told = iter(logprobs(spots, flat, [judged[spot][0] for spot in flat]))
    for row, trail in enumerate(walked):
        own = []
        for spot, token, laws in [(spot, judged[spot][0], next(told)) for spot in trail]:
            if not own or own[-1].generation is None:
                own.append(push(live[row], token, *laws, failure=spots.failures[spot]))
        events.append(own)
        del new[row][len(own) :], paths[row][len(own) :]
    after = spots.after([trail[-1] for trail in walked], [judged[trail[-1]][0] for trail in walked])
    return after, new, paths, events


def logprobs(spots: Spots, numbers: Sequence[int], tokens: Sequence[int]) -> list[list[float]]:
    """Log-probabilities of tokens behind some spots, the model's and the pipeline's; NaN where no token is left."""
    ids, laws = torch.tensor(tokens, device=spots.given.device), [spots.given]
    laws += [] if spots.processed is spots.given else [spots.processed]
    told = [logprob_of(law[list(numbers)], ids) for law in laws]
    return torch.stack([told[0], told[-1]], 1).tolist()
