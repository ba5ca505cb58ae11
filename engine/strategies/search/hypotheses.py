"""Hypotheses: the finished sequences that a beam search has found for one prompt."""

from __future__ import annotations

from torch import Tensor

from ...errors import ParameterError
from ...loop.generation import Generation
from ..kit.requests import Requests, limit, stop_ids

NEVER = -1e9  # added to scores that must not win; finite, so that it makes no NaN


class Hypotheses:
    """The finished sequences of one prompt, and whether its live beams can still improve on them."""

    def __init__(self, requests: Requests, row: int, engine, num_beams, length_penalty, early_stopping):
        asked = requests.asked[row]
        for name, off in (("stop", ()), ("criteria", ()), ("max_time", None), ("n", 1)):
            if getattr(asked.params, name) != off:
                raise ParameterError(f"beam search does not take {name}={getattr(asked.params, name)!r}")
        self.requests, self.row, self.engine = requests, row, engine
        self.stops, self.limit = stop_ids(asked, engine), limit(asked, engine)
        self.num_beams, self.length_penalty, self.early_stopping = num_beams, length_penalty, early_stopping
        self.length, self.finished = 0, []  # finished: (score, trail), best first

    def advance(self, tokens: list[int]) -> list[bool]:
        """One token more; which of the candidate tokens end their sequence."""
        self.length += 1
        return [token in self.stops or self.length >= self.limit for token in tokens]

    def offer(self, value: Tensor, trail: list) -> None:
        """A finished sequence of the present length; the worst one goes if there are more than num_beams."""
        score = float(value / self.length**self.length_penalty)
        self.finished = sorted([*self.finished, (score, trail)], key=lambda pair: -pair[0])[: self.num_beams]

    def open(self, value: Tensor, ended: Tensor) -> bool:
        """Whether to go on, when `value` is the score sum of the best live beam."""
        full = len(self.finished) == self.num_beams
        if ended.all() or (full and self.early_stopping is True):
            return False
        longest = self.early_stopping == "never" and self.length_penalty > 0
        length = self.limit if longest else self.length
        return float(value / length**self.length_penalty) > (self.finished[-1][0] if full else NEVER)

    def results(self, count: int) -> list[Generation]:
        """The `count` best finished sequences as Generations."""
        results = []
        for sample in range(count):
            request = self.requests.open(self.row, self.engine)
            request.sample = sample
            if sample >= len(self.finished):
                results.append(request.end("error", "no possible sequence was left").generation)
                continue
            for token, raw_logprob, logprob in self.finished[sample][1]:
                event = request.push(token, raw_logprob, logprob, None)
            results.append(event.generation)
        return results
