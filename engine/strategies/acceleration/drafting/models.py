"""A second model that draws draft tokens, as a line or as a tree."""

from __future__ import annotations

import torch
from torch import Tensor

from ....errors import ParameterError
from ...kit.drawing import law, without_replacement
from ...kit.requests import Requests
from .drafts import Drafts


class DraftModel:
    """A second engine that draws draft tokens with the requests' own pipeline.

    Its State covers all committed tokens. A draft is a walk from there on newer States, which are then
    forgotten: there is nothing to take back when the target rejects it.
    """

    def __init__(self, engine, vocab_size: int):
        if engine.vocab_size != vocab_size:
            raise ParameterError(
                f"the draft has {engine.vocab_size} tokens, its target {vocab_size}; they must agree"
            )
        self.engine, self.state = engine, None

    def propose(self, tokens, requests: Requests, widths, depths, seeds: Tensor, streams: Tensor) -> Drafts:
        """Draft tokens for each row, drawn with the noise of seeds and streams [B].

        Args:
            tokens: committed ids of each row, at least one of them new to this model.
            widths: children of each draft at every depth, drawn without replacement.
            depths: how deep each row may go, >= 0.
        """
        if self.state is None:
            prompts = {request.index: request.prompt for request in requests.asked}
            filled = self.engine.prefill(list(prompts.values()))
            self.state = filled.select([list(prompts).index(request.index) for request in requests.asked])
        unseen = [ids[row.length :] for ids, row in zip(tokens, self.state.rows, strict=True)]
        walk = self.state = self.engine.extend(self.state, unseen)
        drafts, laws = Drafts(len(depths)), []
        level = [
            (row, -1) for row in range(len(depths))
        ]  # row and place behind which each of the walk stands
        for depth, width in enumerate(widths[: max(depths)], 1):
            context, greedy = requests.at(walk), requests.rows.greedy_rows()
            processed = requests.rows.apply(walk.logits, context)
            laws.append((level, law(processed, greedy)))
            rows = torch.tensor([row for row, _ in level], device=seeds.device)
            keys = seeds[rows], context.positions, streams[rows]
            fan = [
                (at, token, (row, drafts.add(row, token, place)))
                for at, ids in enumerate(without_replacement(processed, width, *keys, greedy).tolist())
                for row, place in [level[at]]
                for token in ids
                if token >= 0 and depth <= depths[row]
            ]
            fan = [each for each in fan if depth < min(len(widths), depths[each[2][0]])]
            if not fan:
                break
            forked, chosen, level = zip(*fan, strict=True)
            walk, requests = requests.branch(
                self.engine, walk, forked, torch.tensor(chosen, device=rows.device)
            )
        size = (len(depths), 1, 1 + max(map(len, drafts.tokens)), self.engine.vocab_size)
        drafts.laws = torch.zeros(size, device=seeds.device)
        for level, q in laws:
            rows, places = torch.tensor(level, device=seeds.device).T
            drafts.laws[rows, 0, places + 1] = q
        return drafts
