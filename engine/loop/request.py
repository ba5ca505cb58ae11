"""One sample of one request while it runs: what was asked, what came out, and what to report."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

from ..params.sampling_params import SamplingParams
from ..text.prompts import Prompt
from .generation import Event, Generation, Timings
from .stopping import Emission, Stopper


@dataclass(eq=False)
class Prefilled:
    """A prompt's computed row, shared by the samples that still wait for it; before that, how far it is."""

    row: Any = None
    claim: Any = None  # blocks behind the row that others stay out of, until the first sample has a slot
    filling: Any = None
    logits: Any = None  # [V] float32, after the prompt
    states: tuple = ()
    alternatives: int = 0  # to each of its tokens, that a request wants to see
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[dict[int, float] | None] | None = None
    waiting: int = 1

    def taken(self) -> None:
        """One sample has its copy; the last one lets the row go."""
        self.waiting -= 1
        if self.waiting == 0:
            self.row, self.logits, self.states = None, None, ()


@dataclass(eq=False)
class Request:
    """One sample of one request.

    Args:
        index, sample: which prompt of the call, and which of its `n` samples.
        prompt: the encoded prompt.
        params: what was asked, strings resolved to ids.
        seed: of its draws; with `sample` as the stream.
        prefilled: shared with the request's other samples.
        submitted: when the call began, on the clock of `time.monotonic`.
    """

    index: int
    sample: int
    prompt: Prompt
    params: SamplingParams
    seed: int
    prefilled: Prefilled
    submitted: float = field(default_factory=time.monotonic)
    stopper: Stopper | None = None
    admitted: float = 0.0
    computed: float = 0.0
    first: float = 0.0
    raw_logprobs: list[float] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    error: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)  # what a strategy tells with the result

    def start(self, engine) -> None:
        """The clock of `max_time` begins here."""
        self.admitted = time.monotonic()
        self.stopper = Stopper(
            self.params, engine.tokenizer, engine.eos_token_ids, self.prompt.ids, engine.max_length
        )

    def fork(self) -> Request:
        """An independent copy that goes on from here, as a second branch of the same sample."""
        return replace(
            self,
            stopper=self.stopper and self.stopper.fork(),
            raw_logprobs=list(self.raw_logprobs),
            logprobs=list(self.logprobs),
            top_logprobs=list(self.top_logprobs),
            extra=dict(self.extra),
        )

    def prefill_done(self) -> None:
        """The prompt is computed."""
        self.computed = time.monotonic()

    @property
    def room(self) -> int:
        """Tokens that prompt and output may take together, as far as the request's own limits say."""
        room = len(self.prompt) + self.params.max_new_tokens
        return room if self.params.max_length is None else min(room, self.params.max_length)

    def blocks(self, size: int) -> int:
        """Blocks of `size` cells that prompt and output may take together."""
        return -(-self.room // size)

    def push(self, token: int, raw: float, processed: float, top: tuple[list, list] | None) -> Event:
        """Take one drawn token; the event tells what may be shown, and whether it was the last."""
        if not self.first:  # a search sets it: it tells its tokens when it is through
            self.first = time.monotonic()
        self.raw_logprobs.append(raw)
        self.logprobs.append(processed)
        if self.params.logprobs is not None:
            count = self.params.logprobs
            self.top_logprobs.append(dict(list(zip(*top, strict=True))[:count]))
        try:
            emission = self.stopper.push(token)
        except Exception as error:  # noqa: BLE001 - a user's criterion must not take the other rows with it
            self.error = f"request {self.index}: a stopping criterion raised {type(error).__name__}: {error}"
            emission = self.stopper.finish("error")
        return self._event(emission, token, processed, raw)

    def end(self, reason: str, error: str | None = None) -> Event:
        """Finish from outside: cancelled, or an error of this row alone."""
        self.error = error or self.error
        return self._event(self.stopper.finish(reason), None, None, None)

    def cancelled(self, engine) -> Generation:
        """What there is of an unfinished request, begun or not."""
        if self.stopper is None:
            self.start(engine)
        return self.end("cancelled").generation

    def _event(self, emission: Emission, token, processed, raw) -> Event:
        text, finish, _ = emission
        result = self._generation() if finish else None
        return Event(self.index, self.sample, token, text, processed, raw, finish, result)

    def _generation(self) -> Generation:
        stopper, now = self.stopper, time.monotonic()
        count = len(stopper.token_ids)
        computed = self.computed or now
        first = self.first or now
        return Generation(
            request=self.index,
            sample=self.sample,
            prompt_token_ids=list(self.prompt.ids),
            token_ids=list(stopper.token_ids),
            text=stopper.text,
            finish_reason=stopper.finish_reason,
            stop_reason=stopper.stop_reason,
            logprobs=self.logprobs,
            raw_logprobs=self.raw_logprobs,
            top_logprobs=self.top_logprobs if self.params.logprobs is not None else None,
            prompt_logprobs=self.prefilled.prompt_logprobs,
            prompt_top_logprobs=self.prefilled.prompt_top_logprobs,
            error=self.error,
            timings=Timings.between(self.submitted, self.admitted, computed, first, now, count),
            seed=self.seed,
            params=self.params,
            token_texts=stopper.token_texts if stopper._detokenizer else [],
            extra=self.extra,
        )
