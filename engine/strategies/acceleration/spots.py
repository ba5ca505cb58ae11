"""Spots: every place behind which a token may be drawn, and what a pass and the processors say there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kit.requests import Requests, padded
from .acceptance import RULES, block
from .drafting.drafts import Drafts


class Spots:
    """Each row's last token and all of its drafts, at once; where a processor has memory, depth after depth.

    number: of the spot at (row, place), place -1 for the row's last token. failures: why a spot has no token.
    given, processed: [N, V] logits of the spots, the model's and what the pipeline leaves.

    Args:
        requests: of the rows. tokens: committed ids of each row. drafts: what is proposed behind them.
        logits: [B, n + 1, V] after the committed tokens, and after each draft.
    """

    def __init__(self, requests: Requests, tokens, drafts: Drafts, logits: Tensor):
        self.requests, self.tokens, self.drafts, paths, levels = requests, tokens, drafts, {}, {}
        for row, parents in enumerate(drafts.parents):
            paths[row, -1] = []
            for place, parent in enumerate(parents):
                paths[row, place] = [*paths[row, parent], drafts.tokens[row][place]]
        remembers = requests.remembers
        for at, ids in paths.items():
            levels.setdefault(len(ids) if remembers else 0, []).append(at)
        order = [at for _, level in sorted(levels.items()) for at in level]
        self.number = {at: spot for spot, at in enumerate(order)}
        self.paths, self.rows = [paths[at] for at in order], [row for row, _ in order]
        self.where = torch.tensor([[row, place + 1] for row, place in order], device=logits.device).unbind(1)
        self.given, self.kept, self.failures, found = logits[self.where], [], {}, []
        self.whole = requests.select(self.rows)
        for depth, level in sorted(levels.items()):
            mine = [self.number[at] for at in level]
            above = [self.number[row, drafts.parents[row][place]] for row, place in level if depth]
            last = [self.paths[spot][-1] for spot in mine if depth]
            forks = self.after(above, last) if depth else (self.whole if len(levels) == 1 else requests)
            context = forks.context(*self._seen(mine))
            found.append(forks.rows.apply(self.given if forks is self.whole else self.given[mine], context))
            failures = context.failures
            self.failures |= {spot: failures.get(i) for i, spot in enumerate(mine)}
            self.kept += [(forks, i) for i in range(len(mine))]
        self.processed = torch.cat(found) if len(found) > 1 else found[0]

    def _seen(self, spots: Sequence[int]):
        """What `Requests.context` takes."""
        texts = [(self.tokens[self.rows[spot]], self.paths[spot]) for spot in spots]
        lengths = torch.tensor([len(text) + len(path) for text, path in texts], device=self.given.device)
        return lambda: [text + path for text, path in texts], lengths

    def after(self, spots: Sequence[int], tokens: Sequence[int]) -> Requests:
        """Requests one token [B] behind a spot of each row."""
        if not self.requests.remembers:
            return self.requests
        forks = Requests.concat([kept.select([i]) for kept, i in (self.kept[spot] for spot in spots)])
        ids = torch.tensor(tokens, device=self.given.device)
        return forks.after(ids, self.given[list(spots)], *self._seen(spots))

    def judged(self, rule: str) -> list[list[int]]:
        """The token that goes on behind each spot, and which of those proposed there it is, or -1."""
        if rule in ("ratio", "block") and all(self.requests.rows.greedy):
            rule = "coupled"  # which is the same, and cheaper
        chosen, number = self._as_lines() if rule == "block" else self._one_by_one(RULES[rule])
        return torch.stack([chosen.clamp(min=0), number], 1).tolist()

    def _one_by_one(self, rule) -> tuple[Tensor, Tensor]:
        laws, requests, ids, sources = self.drafts.laws, self.whole, [], []
        for row, place in self.number:
            tries = self.drafts.below(row, place)
            ids.append([self.drafts.tokens[row][child] for child, _ in tries])
            sources.append([source for _, source in tries])
        ids, sources = (padded(each, self.given.device, 1) for each in (ids, sources))
        q = None if laws is None else laws.transpose(1, 2)[self.where]
        context, greedy = requests.context(*self._seen(range(len(ids)))), requests.rows.greedy_rows()
        return rule(self.processed, ids, q, context, greedy, sources)

    def _as_lines(self) -> tuple[Tensor, Tensor]:
        laws, requests, lines = self.drafts.laws, self.requests, padded(self.drafts.tokens, self.given.device)
        dense = self.processed.new_zeros(len(requests), lines.shape[1] + 1, self.given.shape[1])
        dense[self.where] = self.processed
        context = requests.context(*self._seen([self.number[row, -1] for row in range(len(requests))]))
        law = None if laws is None else laws[:, 0]
        chosen, number = block(dense, lines, law, context, requests.rows.greedy_rows())
        return chosen[self.where], number[self.where]
