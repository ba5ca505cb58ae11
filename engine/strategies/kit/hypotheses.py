"""Hypotheses: the finished sequences that a search by beams has found for one prompt."""

from __future__ import annotations

import time

from ...errors import ParameterError
from ...loop.generation import Generation
from .requests import Requests, limit, stop_ids

NEVER = -1e9  # a score that must not win; finite, so that it makes no NaN


class Hypotheses:
    """The finished sequences of one prompt, best first, and whether its live beams can still improve on them.

    A sequence is its last `Candidate` and the trail before it. `over` is for the beams: nothing goes on here.
    """

    def __init__(self, requests: Requests, row: int, engine, size, length_penalty, early_stopping):
        asked = requests.asked[row]
        for name, off in (("stop", ()), ("criteria", ()), ("max_time", None), ("n", 1)):
            if getattr(asked.params, name) != off:
                raise ParameterError(f"beam search does not take {name}={getattr(asked.params, name)!r}")
        self.requests, self.row, self.engine = requests, row, engine
        self.stops, self.limit = stop_ids(asked, engine), limit(asked, engine)
        self.least = max(2, 1 + len(self.stops))  # candidates of a beam, so that one of them goes on
        self.size, self.length_penalty, self.early_stopping = size, length_penalty, early_stopping
        self.length, self.finished, self.over = 0, [], False  # finished: (score, trail)
        self.first = 0.0  # when the first tokens were there

    def advance(self) -> None:
        """The candidates are one token longer."""
        self.length += 1
        self.first = self.first or time.monotonic()

    def ends(self, token: int) -> bool:
        """Whether a candidate's sequence ends with this token."""
        return token in self.stops or self.length >= self.limit

    def score(self, value: float) -> float:
        """Of a sequence of the present length."""
        return value / self.length**self.length_penalty

    def offer(self, trail) -> None:
        """A finished sequence of the present length; the worst one goes if there are too many."""
        found = [*self.finished, (self.score(trail[0].value), trail)]
        self.finished = sorted(found, key=lambda pair: -pair[0])[: self.size]

    def open(self, value: float) -> bool:
        """Whether to go on, when `value` is the score sum of the best live beam."""
        full = len(self.finished) == self.size
        if full and self.early_stopping is True:
            return False
        longest = self.early_stopping == "never" and self.length_penalty > 0
        length = self.limit if longest else self.length
        return value / length**self.length_penalty > (self.finished[-1][0] if full else NEVER)

    def results(self, count: int) -> list[Generation]:
        """The `count` best finished sequences as Generations, with the `extra` "score"."""
        results = []
        for sample in range(count):
            request = self.requests.open(self.row, self.engine)
            request.sample, request.first = sample, self.first
            if sample >= len(self.finished):
                results.append(request.end("error", "no possible sequence was left").generation)
                continue
            request.extra["score"], trail = self.finished[sample]
            steps = []
            while trail is not None:
                step, trail = trail
                steps.append(step)
            for step in reversed(steps):
                event = request.push(step.token, step.raw_logprob, step.logprob, None)
            results.append(event.generation)
        return results
