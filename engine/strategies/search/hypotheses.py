"""Hypotheses: the finished sequences that a beam search has found for one prompt."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ...errors import ParameterError
from ...loop.generation import Generation
from ..kit.requests import Requests, limit, stop_ids

NEVER = -1e9  # added to scores that must not win; finite, so that it makes no NaN


@dataclass(frozen=True)
class Beams:
    """What a beam search is told beside the parameters of its requests; see `beam_search`. None: not said."""

    num_beams: int | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    num_return_sequences: int | None = None
    renormalize_logits: bool | None = None

    def read(self, params: Any) -> tuple[Beams, Any]:
        """With what GenerationConfigs and dicts say where these do not, and the params without it.

        Raises:
            ParameterError: a value that makes no sense, or two configurations that differ.
        """
        listed = params if isinstance(params, list | tuple) else [params]
        found, rest = zip(*(self._split(item) for item in listed), strict=True) if listed else ((), ())
        told = {}
        for field in fields(self):
            given = [own[field.name] for own in found if own.get(field.name) is not None]
            if any(value != given[0] for value in given):
                raise ParameterError(f"{field.name} differs between the prompts: {given}; search them apart")
            own = getattr(self, field.name)
            told[field.name] = own if own is not None else given[0] if given else UNSAID[field.name]
        return Beams(**told)._checked(), list(rest) if isinstance(params, list | tuple) else rest[0]

    def _split(self, item: Any) -> tuple[dict[str, Any], Any]:
        names = [field.name for field in fields(self)]
        if isinstance(item, dict):
            return {n: item.get(n) for n in names}, {k: v for k, v in item.items() if k not in names}
        if not hasattr(item, "to_diff_dict"):
            return {}, item
        own, rest = {name: getattr(item, name, None) for name in names}, copy.copy(item)
        for name in names:
            setattr(rest, name, None)
        return own, rest

    def _checked(self) -> Beams:
        if not 1 <= self.num_return_sequences <= self.num_beams:
            raise ParameterError(
                f"num_return_sequences={self.num_return_sequences} is not from 1 to num_beams={self.num_beams}"
            )
        if self.early_stopping not in (True, False, "never"):
            raise ParameterError(f'early_stopping={self.early_stopping!r} is none of True, False, "never"')
        return self


UNSAID = {"num_beams": 4, "length_penalty": 1.0, "early_stopping": False, "num_return_sequences": 1,
          "renormalize_logits": False}  # fmt: skip


class Hypotheses:
    """The finished sequences of one prompt, and whether its live beams can still improve on them."""

    def __init__(self, requests: Requests, row: int, engine, num_beams, length_penalty, early_stopping):
        asked = requests.asked[row]
        for name, off in (("stop", ()), ("criteria", ()), ("max_time", None), ("n", 1)):
            if getattr(asked.params, name) != off:
                raise ParameterError(f"beam search does not take {name}={getattr(asked.params, name)!r}")
        self.requests, self.row, self.engine = requests, row, engine
        self.stops, self.limit = stop_ids(asked, engine), limit(asked, engine)
        self.least = max(2, 1 + len(self.stops))  # candidates of a beam, so that one of them goes on
        self.num_beams, self.length_penalty, self.early_stopping = num_beams, length_penalty, early_stopping
        self.length, self.finished = 0, []  # finished: (score, trail), best first
        self.first = 0.0  # when the first tokens were there

    def advance(self, tokens: list[int]) -> list[bool]:
        """One token more; which of the candidate tokens end their sequence."""
        self.length += 1
        self.first = self.first or time.monotonic()
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
            request.sample, request.first = sample, self.first
            if sample >= len(self.finished):
                results.append(request.end("error", "no possible sequence was left").generation)
                continue
            for token, raw_logprob, logprob in self.finished[sample][1]:
                event = request.push(token, raw_logprob, logprob, None)
            results.append(event.generation)
        return results
