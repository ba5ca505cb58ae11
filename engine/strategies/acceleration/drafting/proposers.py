"""All that drafts for a run: models and functions, whose drafts are merged."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kit.requests import Requests
from .drafts import Drafts
from .models import DraftModel

DRAFT, APART = (
    2**30,
    2**24,
)  # streams of drafts, clear of the samples' own, and those of one model from the next's
ROUND = 0x9E3779B97F4A7C15 - 2**64  # odd: seeds of one request's rounds apart from those of its neighbours


class Proposers:
    """All that drafts for a run: engines, functions, or several of either, whose drafts are merged."""

    def __init__(self, drafts, vocab_size: int):
        self.all = [DraftModel(each, vocab_size) if hasattr(each, "prefill") else each for each in drafts]

    def propose(self, tokens, requests: Requests, widths, depths, rule: str, like: Tensor) -> Drafts:
        """Drafts behind each row's tokens, at most as deep as `depths` says; `like` [B, V] is the target's logits.

        "ratio" looks at no draft behind the one that it rejects, so the next round may draw with its noise; "block"
        has looked, and "coupled" wants the noise of the draw itself. Several models draw apart from each other.
        """
        seeds, streams, found = requests.seeds, requests.streams + (0 if rule == "coupled" else DRAFT), []
        if rule == "block":
            seeds = seeds + torch.tensor([len(row) for row in tokens], device=seeds.device) * ROUND
        for number, each in enumerate(self.all):
            if isinstance(each, DraftModel):
                own = streams if rule == "coupled" else streams + number * APART
                found.append(each.propose(tokens, requests, widths, depths, seeds, own))
            else:
                lines = [each(row, count) for row, count in zip(tokens, depths, strict=True)]
                found.append(Drafts.certain(lines, depths))
        return Drafts.merged(found, like)

    def select(self, index: list[int]) -> None:
        """Keep these rows."""
        for each in self.all:
            if isinstance(each, DraftModel):
                each.state = each.state and each.state.select(index)

    def observe(self, tokens, drafts: Drafts, logits: Tensor) -> None:
        """Tell those that want it what the model found most probable behind a line of drafts and before it."""
        watching = [each for each in self.all if hasattr(each, "observe")]
        if watching and drafts.lines:
            for row, ids, best in zip(tokens, drafts.tokens, logits.argmax(-1).tolist(), strict=True):
                for each in watching:
                    each.observe(row, ids, best[: len(ids) + 1])
