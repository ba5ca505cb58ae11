"""Beams: the live sequences of several searches in one State, and what may follow them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from .hypotheses import NEVER, Hypotheses
from .requests import Requests


class Candidate(NamedTuple):
    """A beam's continuation by one token: its score sum, the beam's row, and the token's log-probabilities."""

    value: float
    row: int
    token: int
    raw_logprob: float
    logprob: float


class Beams:
    """`size` live sequences of each search, side by side; each search is a `Hypotheses`.

        beams = Beams(engine, prompts, params, 4, 1.0, False)
        while beams.live:
            raw, processed, context = beams.look()
            found = beams.candidates(raw, processed)
            beams.go([beams.settle(*each) for each in zip(beams.live, found, strict=True)], raw)
        results = [search.results(1)[0] for search in beams.searches]

    Args:
        engine, prompts, params, overrides: as for `Requests.start`.
        size: beams of a search. rule: length penalty and early stopping, see `Hypotheses`.
        groups: searches of a prompt.
    """

    def __init__(self, engine, prompts, params, size: int, *rule, groups: int = 1, **overrides):
        self.engine, self.size = engine, size
        state, requests = Requests.start(engine, prompts, params, **overrides)
        owners = [row for row in range(len(state)) for _ in range(groups)]
        self.searches = [Hypotheses(requests, row, engine, size, *rule) for row in owners]
        self.live, fan = list(self.searches), [row for row in owners for _ in range(size)]
        self.state, self.requests, self.trails = state.select(fan), requests.select(fan), [None] * len(fan)
        self.scores = torch.full((len(owners), size), NEVER, device=state.logits.device)
        self.scores[:, 0] = 0.0  # at first the beams of a search are equal: only one may go on

    def look(self):
        """Log-probabilities [R, V] of the next token, what the processors make of them, and the context they saw."""
        raw = self.state.logits.log_softmax(-1)
        least = torch.tensor([search.least for search in self.live], device=raw.device)
        least = least.repeat_interleave(self.size)[:, None]
        context = replace(self.requests.at(self.state), beams=self.size, least=least)
        return raw, self.requests.rows.apply(raw, context), context

    def candidates(
        self, raw: Tensor, processed: Tensor, noise: Tensor | float = 0.0
    ) -> list[list[Candidate]]:
        """Each search's best continuations, as many as it may need; noise [S, size * V] is for the choice alone."""
        total = processed.unflatten(0, (-1, self.size)) + self.scores[..., None]
        widths = [search.least * self.size for search in self.live]
        noisy = total.flatten(1) + noise
        best = noisy.topk(min(max(widths), noisy.shape[1])).indices  # [S, K]
        rows = best // raw.shape[1] + torch.arange(0, len(raw), self.size, device=best.device)[:, None]
        found = iter(self.at(raw, processed, rows.flatten(), (best % raw.shape[1]).flatten()))
        return [[next(found) for _ in range(best.shape[1])][:width] for width in widths]

    def at(self, raw: Tensor, processed: Tensor, rows: Tensor, tokens: Tensor) -> list[Candidate]:
        """The continuations of rows [N] by tokens [N]."""
        laws = raw[rows, tokens], processed[rows, tokens]
        values = torch.stack([laws[1] + self.scores.flatten()[rows], *laws], 1).tolist()
        places = torch.stack([rows, tokens], 1).tolist()
        return [Candidate(v, *place, *pair) for place, (v, *pair) in zip(places, values, strict=True)]

    def settle(self, search: Hypotheses, found: Sequence[Candidate]) -> list[Candidate]:
        """Offer what ends among the best; the candidates that go on, unless the search is over."""
        search.advance()
        for each in found[: self.size]:
            if search.ends(each.token) and each.value > NEVER:
                search.offer((each, self.trails[each.row]))
        going = sorted(found, key=lambda each: (each.token in search.stops, -each.value))[: self.size]
        search.over = all(search.ends(each.token) for each in found) or not search.open(going[0].value)
        return going

    def go(self, picks: Sequence[Sequence[Candidate]], raw: Tensor) -> list[Candidate]:
        """Go on with the candidates picked for each live search; those that are over leave. The rows there are now."""
        kept = [each for s, own in zip(self.live, picks, strict=True) if not s.over for each in own]
        self.live = [search for search in self.live if not search.over]
        self.trails = [(each, self.trails[each.row]) for each in kept]
        if kept:
            values, rows, tokens = zip(*(each[:3] for each in kept), strict=True)
            self.scores = torch.tensor(values, device=raw.device).view(-1, self.size)
            chosen = torch.tensor(tokens, device=raw.device)
            self.state, self.requests = self.requests.branch(self.engine, self.state, rows, chosen, raw)
        return kept
