"""Drafts: what is proposed behind each row, a line of tokens or a tree of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ....errors import ParameterError


class Drafts:
    """What is proposed behind each row; equal beginnings are one.

    tokens: of each row. parents: the place of each token's parent, which comes before it; -1: the row's last token.
    tries: (place, source) of each row's proposals, in order; several sources may propose one token.
    laws: [B, S, n + 1, V] what source s drew the children of each row's last token from, and those of each draft;
    None where all are certain.
    """

    def __init__(self, rows: int, laws: Tensor | None = None):
        self.tokens, self.parents, self.tries = ([[] for _ in range(rows)] for _ in range(3))
        self.places: list[dict[tuple[int, int], int]] = [{} for _ in range(rows)]
        self.laws = laws

    @classmethod
    def certain(cls, rows: Sequence[Sequence], depths: Sequence[int]) -> Drafts:
        """Of a line of tokens for each row, or of several; cut at the depths."""
        drafts = cls(len(rows))
        for row, given in enumerate(rows):
            for line in given if len(given) and not hasattr(given[0], "__index__") else [given]:
                above = -1
                for token in line[: depths[row]]:
                    above = drafts.add(row, int(token), above)
        return drafts

    @classmethod
    def merged(cls, parts: Sequence[Drafts], like: Tensor) -> Drafts:
        """One tree of several sources' (SpecInfer's merge), with their laws in the type of `like` [B, V]."""
        if len(parts) == 1:
            return parts[0]
        drafts, firsts = cls(len(like)), [[] for _ in parts]
        for source, part in enumerate(parts):
            for row, ids in enumerate(part.tokens):
                where = {-1: -1}
                for place, (token, parent) in enumerate(zip(ids, part.parents[row], strict=True)):
                    where[place] = drafts.add(row, token, where[parent], source)
                    if part.below(row, parent)[0][0] == place:
                        firsts[source].append((row, where[parent] + 1, parent + 1, token))
        size = len(like), len(parts), 1 + max(map(len, drafts.tokens)), like.shape[1]
        drafts.laws = like.new_zeros(size)
        for source, (part, first) in enumerate(zip(parts, firsts, strict=True)):
            rows, places, own, tokens = (
                torch.tensor(first, dtype=torch.long, device=like.device).view(-1, 4).T
            )
            if part.laws is None:  # sure of the first child; `ratio` makes it sure of the others
                drafts.laws[rows, source, places, tokens] = 1.0
            else:
                drafts.laws[rows, source, places] = part.laws[rows, 0, own]
        return drafts

    def add(self, row: int, token: int, parent: int, source: int = 0) -> int:
        """Propose one more token behind a parent, and tell its place."""
        place = self.places[row].setdefault((parent, token), len(self.tokens[row]))
        if place == len(self.tokens[row]):
            self.tokens[row].append(token)
            self.parents[row].append(parent)
        if (place, source) not in self.tries[row]:
            self.tries[row].append((place, source))
        return place

    def below(self, row: int, place: int) -> list[tuple[int, int]]:
        """(place, source) of what is proposed behind the token at `place`, or behind the row's last token (-1)."""
        return [each for each in self.tries[row] if self.parents[row][each[0]] == place]

    def cut(self, stops: Sequence[Collection[int]]) -> None:
        """Let each row's line end at its first stop token.

        Raises:
            ParameterError: the drafts are trees.
        """
        if not self.lines:
            raise ParameterError('rule="block" takes one line of drafts a row, not a tree')
        for own, ids, parents, tries in zip(stops, self.tokens, self.parents, self.tries, strict=True):
            end = next((at for at, token in enumerate(ids) if token in own), len(ids)) + 1
            del ids[end:], parents[end:], tries[end:]

    @property
    def lines(self) -> bool:
        """Whether no row has a tree."""
        return all(row == [*range(-1, len(row) - 1)] for row in self.parents)
