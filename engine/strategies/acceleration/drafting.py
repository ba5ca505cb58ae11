"""Where the draft tokens of speculative decoding come from."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ParameterError
from ...kernels.sampling.draw import draw
from ..kit.requests import Requests
from .acceptance import law


def prompt_lookup(tokens: list[int], count: int, max_ngram: int = 3) -> list[int]:
    """What followed the last few tokens when they occurred before; [] if they never did (Saxena 2023).

    Args:
        tokens: ids of one sequence, prompt included.
        count: how many tokens are wanted, >= 0; fewer come back where the text ends.
        max_ngram: longest run of tokens to look for; shorter ones are tried after it.

    The latest occurrence that has `count` tokens behind it wins, else the earliest.
    """
    for size in range(min(max_ngram, len(tokens) - 1), 0, -1):
        tail = tokens[-size:]
        ends = [i + size for i in range(len(tokens) - size) if tokens[i : i + size] == tail]
        if ends:
            end = max((end for end in ends if end + count <= len(tokens)), default=ends[0])
            return tokens[end : end + count]
    return []


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

    def propose(self, tokens, requests: Requests, counts, streams: Tensor) -> tuple[list, Tensor | None]:
        """Draft tokens for each row, and the law [B, n, V] that each was drawn from (None: no drafts).

        Args:
            tokens: committed ids of each row, at least one of them new to this model.
            counts: how many tokens to draft for each row, >= 0.
            streams: int64 [B] noise streams to draw from.
        """
        if self.state is None:
            prompts = {request.index: request.prompt for request in requests.asked}
            filled = self.engine.prefill(list(prompts.values()))
            self.state = filled.select([list(prompts).index(request.index) for request in requests.asked])
        fed = self.state.lengths.tolist()
        unseen = [row[n:] for row, n in zip(tokens, fed, strict=True)]
        walk = self.state = self.engine.extend(self.state, unseen)
        drawn, laws, greedy = [], [], requests.rows.greedy_rows()
        for step in range(max(counts)):
            if step:
                walk = self.engine.step(walk, drawn[-1])
            context = requests.at(walk)
            processed = requests.rows.apply(walk.logits, context)
            chosen = draw(processed, context.seeds, context.positions, streams, greedy).clamp(min=0)
            requests = requests.accept(chosen, context)
            drawn.append(chosen)
            laws.append(law(processed, greedy))
        if not drawn:
            return [[] for _ in counts], None
        rows = torch.stack(drawn, 1).tolist()
        return [row[:n] for row, n in zip(rows, counts, strict=True)], torch.stack(laws, 1)

    def select(self, index: list[int]) -> None:
        """Keep these rows."""
        self.state = self.state and self.state.select(index)
