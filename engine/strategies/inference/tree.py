"""The tree of a search: beginnings of a text, what they are worth, and the walk to a new one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ...state import State


@dataclass
class Node:
    """A beginning of the output: its State (a value, so the tree can hold it), visits and mean value."""

    state: State | None
    priors: dict[int, float] = field(default_factory=dict)
    children: dict[int, Node] = field(default_factory=dict)
    visits: int = 0
    total: float = 0.0

    def best(self, c: float) -> int:
        """The token with the largest Q + c p sqrt(visits) / (1 + its visits)."""

        def score(item):
            token, prior = item
            child = self.children.get(token)
            mean, visits = (child.total / child.visits, child.visits) if child and child.visits else (0.0, 0)
            return mean + c * prior * math.sqrt(self.visits) / (1 + visits)

        return max(self.priors.items(), key=score)[0]

    def walk(self, c: float) -> tuple[list[Node], list[int]]:
        """The nodes from here to one that is not visited yet, or has nothing behind it, and the tokens between."""
        path, tokens = [self], []
        while path[-1].priors and (len(path) == 1 or path[-1].visits):
            tokens.append(path[-1].best(c))
            path.append(path[-1].children.setdefault(tokens[-1], Node(None)))
        return path, tokens
