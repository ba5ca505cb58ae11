"""Where the draft tokens of speculative decoding come from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

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


@dataclass
class Drafts:
    """What is proposed behind each row: a line of tokens, or a tree of them.

    tokens: of each row. parents: the place of each token's parent, which comes before it; -1: the row's last token.
    laws: [B, n + 1, V] what the children of each row's last token, and those of each draft, were drawn from; None
    where they are certain.
    """

    tokens: list[list[int]]
    parents: list[list[int]]
    laws: Tensor | None = None

    @classmethod
    def certain(cls, rows: Sequence[Sequence], depths: Sequence[int]) -> Drafts:
        """Of a line of tokens for each row, or of several, whose common beginnings become one; cut at the depths."""
        drafts = cls([[] for _ in rows], [[] for _ in rows])
        for row, given in enumerate(rows):
            places: dict[tuple[int, int], int] = {}
            for line in given if given and not hasattr(given[0], "__index__") else [given]:
                above = -1
                for token in line[: depths[row]]:
                    if (above, token) not in places:
                        places[above, token] = drafts.add(row, int(token), above)
                    above = places[above, token]
        return drafts

    def add(self, row: int, token: int, parent: int) -> int:
        """Put one more token behind a parent, and tell its place."""
        self.tokens[row].append(token)
        self.parents[row].append(parent)
        return len(self.tokens[row]) - 1

    def below(self, row: int, place: int) -> list[int]:
        """The places of the tokens that follow the one at `place`, or the row's last token (-1)."""
        return [at for at, parent in enumerate(self.parents[row]) if parent == place]

    def cut(self, stops: Sequence[Collection[int]]) -> None:
        """Let each row's line end at its first stop token."""
        for own, ids, parents in zip(stops, self.tokens, self.parents, strict=True):
            end = next((at for at, token in enumerate(ids) if token in own), len(ids)) + 1
            del ids[end:], parents[end:]

    @property
    def lines(self) -> bool:
        """Whether no row has a tree."""
        return all(row == [*range(-1, len(row) - 1)] for row in self.parents)


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
        fed = self.state.lengths.tolist()
        unseen = [row[n:] for row, n in zip(tokens, fed, strict=True)]
        walk = self.state = self.engine.extend(self.state, unseen)
        drafts, laws = Drafts([[] for _ in depths], [[] for _ in depths]), []
        level = [
            (row, -1) for row in range(len(depths))
        ]  # the row and place behind which each of the walk stands
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
        if laws:
            size = (len(depths), 1 + max(map(len, drafts.tokens)), laws[0][1].shape[1])
            drafts.laws = torch.zeros(size, device=seeds.device)
            for level, q in laws:
                rows, places = torch.tensor(level, device=seeds.device).T
                drafts.laws[rows, places + 1] = q
        return drafts

    def select(self, index: list[int]) -> None:
        """Keep these rows."""
        self.state = self.state and self.state.select(index)


def without_replacement(logits: Tensor, count: int, seeds, positions, streams, greedy) -> Tensor:
    """Tokens [B, count] drawn from logits [B, V] one after the other, none twice; -1 where none is left."""
    found: list[Tensor] = []
    for _ in range(count):
        found.append(draw(logits, seeds, positions, streams, greedy))
        logits = logits.scatter(1, found[-1].clamp(min=0)[:, None], -torch.inf)
    return torch.stack(found, 1)
