"""When a request ends, and which text may be shown before it does."""

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ..errors import HandloomError, ParameterError
from ..pipeline.foreign.huggingface import fork, is_huggingface
from ..text.detokenizer import Detokenizer, special_tokens

FINISH_REASONS = ("eos", "stop", "length", "time", "cancelled", "error")


STATELESS = (
    "MaxLengthCriteria",
    "MaxTimeCriteria",
    "EosTokenCriteria",
    "StopStringCriteria",
)  # transformers' own


class Emission(NamedTuple):
    """What one token makes visible: text that is final, and the reason to finish or None.

    `stop_reason` says which one: the EOS or stop token id, the stop string, the criterion's name (or what it
    returned), "max_new_tokens", "max_length" or "max_time".
    """

    text: str
    finish: str | None = None
    stop_reason: int | str | None = None


class Progress:
    """A read-only view of one running request, which every stopping criterion receives."""

    __slots__ = ("_stopper",)

    def __init__(self, stopper: "Stopper"):
        self._stopper = stopper

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Output tokens so far, the newest last."""
        return tuple(self._stopper.token_ids)

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """Prompt tokens; -1 where the prompt was embeddings."""
        return tuple(self._stopper.prompt_ids)

    @property
    def text(self) -> str:
        """Output text so far, without bytes that are not a character yet; "" without a tokenizer."""
        return self._stopper.text

    @property
    def elapsed(self) -> float:
        """Seconds since the request was admitted."""
        return self._stopper.elapsed


class HFCriterion:
    """A Hugging Face `StoppingCriteria` as a criterion; `SamplingParams(criteria=...)` wraps them itself.

    It is called after each token of a request as `criterion(ids [1, T] int64, None)` with prompt and output,
    without positions that were given as embeddings, and ends that request alone. Every request has a copy of its
    own, so that state in the object is per request; tokenizers and models are shared.
    """

    def __init__(self, criterion: Callable[..., Any]):
        self.criterion = criterion
        self.__name__ = getattr(criterion, "__name__", type(criterion).__name__)

    def for_request(self) -> "HFCriterion":
        """The same criterion, from the state it is in now, for one request."""
        if type(self.criterion).__name__ in STATELESS:
            return self
        return HFCriterion(fork(self.criterion))

    def __call__(self, progress: Progress) -> bool:
        import torch

        ids = [token for token in progress.prompt_token_ids if token >= 0] + list(progress.token_ids)
        verdict = self.criterion(torch.tensor([ids]), None)
        return bool(verdict.any()) if isinstance(verdict, torch.Tensor) else bool(verdict)


def for_one_request(criterion: Any) -> Callable[[Progress], Any]:
    """A criterion as one request calls it: with a `Progress`, and with state of its own.

    transformers' are wrapped; one with a method `for_request` is asked for an instance; others are shared.
    """
    if is_huggingface_criterion(criterion):
        criterion = HFCriterion(criterion)
    return criterion.for_request() if hasattr(criterion, "for_request") else criterion


def is_huggingface_criterion(criterion: Any) -> bool:
    """True for a StoppingCriteria, a StoppingCriteriaList, or anything called as `criterion(input_ids, scores)`."""
    return is_huggingface(criterion, "StoppingCriteria")


class Stopper:
    """Decides for one request, token by token, whether it ends and which text may be shown.

    Where several reasons hold at the same token the first of this list is reported: EOS, stop token, stop
    string, criterion, length, time.

    Stop strings are looked for in the output's text alone, across token borders. The one that is completed
    first wins, as if the text came character by character (of several completed by the same character, the
    longest), so the result does not depend on token borders. Text that may become a stop string is held
    back. The text is cut before the match (after it with `include_stop`); `token_ids` keep every token. Stop
    strings completed before output token number `min_new_tokens` are ignored.

    An EOS or stop token adds no text, unless `include_stop` is set or, for EOS, `skip_special_tokens` is off.
    """

    def __init__(
        self,
        params: Any,
        tokenizer: Any = None,
        eos_token_ids: Iterable[int] = (),
        prompt_ids: Sequence[int] = (),
        max_total: int | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Start the request's clock.

        Args:
            params: SamplingParams of the request.
            tokenizer: a Hugging Face tokenizer; None gives no text.
            eos_token_ids: the model's ids that end a text, where the request has none of its own.
            prompt_ids: prompt tokens, -1 for embeddings.
            max_total: the engine's limit on prompt and output together; `params.max_length` may be lower.
            clock: returns seconds; `params.max_time` counts from now.

        Raises:
            ParameterError: stop strings without a tokenizer.
        """
        stop = (params.stop,) if isinstance(params.stop, str) else tuple(params.stop or ())
        if stop and tokenizer is None:
            raise ParameterError(f"stop={list(stop)!r} needs a tokenizer; without one pass stop_token_ids")
        self.params = params
        self.prompt_ids = prompt_ids
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self._eos = params.ends(eos_token_ids)
        self._stop_ids = frozenset(params.stop_token_ids or ())
        self._terminators = self._eos | self._stop_ids
        skips = tokenizer is not None and params.skip_special_tokens
        specials = special_tokens(tokenizer) if stop and skips else {}
        self._special_stops = {
            specials[s]: s for s in stop if s in specials
        }  # tokens that add no text to search
        self._search = StopSearch(stop)
        self._criteria = tuple(map(for_one_request, params.criteria or ()))
        self._detokenizer = None
        if tokenizer is not None:
            self._detokenizer = Detokenizer(tokenizer, prompt_ids, params.skip_special_tokens)
        totals = [t for t in (params.max_length, max_total) if t is not None]
        self._max_total = min(totals, default=None)
        limits = [params.max_new_tokens, *(total - len(prompt_ids) for total in totals)]
        self._last = min([limit for limit in limits if limit is not None], default=math.inf)
        self._deltas: list[str] = []  # one per token, before hold-back and trimming
        self._emitted: list[str] = []
        self._clock = clock
        self._start = clock()

    @property
    def text(self) -> str:
        """Text of the output so far, held-back text included; final and trimmed once finished."""
        if len(self._emitted) > 1:
            self._emitted = ["".join(self._emitted)]
        return (self._emitted[0] if self._emitted else "") + self._search.held

    @property
    def token_texts(self) -> list[str]:
        """The part of `text` that each token added; joins to `text`."""
        left = len(self.text)
        texts = []
        for delta in self._deltas:
            texts.append(delta[:left])
            left -= len(texts[-1])
        return texts

    @property
    def elapsed(self) -> float:
        """Seconds since the request was admitted."""
        return self._clock() - self._start

    def fork(self) -> "Stopper":
        """An independent copy: what is pushed to either does not change the other; its criteria are copies too."""
        twin = copy.copy(self)
        twin.token_ids, twin._deltas, twin._emitted = (
            list(self.token_ids),
            list(self._deltas),
            [*self._emitted],
        )
        twin._search = copy.copy(self._search)
        twin._detokenizer = self._detokenizer and self._detokenizer.fork()
        twin._criteria = tuple(map(for_one_request, self._criteria))
        return twin

    def push(self, token_id: int) -> Emission:
        """Take one generated token; return the text that is now final and whether the request ends.

        Raises:
            HandloomError: the request has already finished.
        """
        if self.finish_reason is not None:
            raise HandloomError(f"the request has finished ({self.finish_reason}) before token {token_id}")
        token_id = int(token_id)
        self.token_ids.append(token_id)
        if token_id in self._terminators:
            return self._push_terminator(token_id, *self._terminator(token_id))
        armed = len(self.token_ids) >= self.params.min_new_tokens
        if armed and token_id in self._special_stops:
            return self._push_special_stop(self._special_stops[token_id])
        text = delta = self._detokenizer.push(token_id) if self._detokenizer else ""
        self._deltas.append(delta)
        if self._search.strings:
            text, match = self._search.feed(delta, armed, self.params.include_stop)
            if match is not None:
                self._emitted.append(text)
                return self._end(text, "", "stop", match)
        if text:
            self._emitted.append(text)
        reason = self._criterion() if self._criteria else None
        if reason is None and (len(self.token_ids) >= self._last or self.params.max_time is not None):
            reason = self._limit()
        return Emission(text) if reason is None else self._end(text, self._flush(), *reason)

    def push_many(self, token_ids: Iterable[int]) -> list[Emission]:
        """Take a block of accepted tokens up to the one that ends the request.

        Returns one Emission per token consumed; its length tells how many were.
        """
        emissions = []
        for token_id in token_ids:
            emissions.append(self.push(token_id))
            if emissions[-1].finish is not None:
                break
        return emissions

    def finish(self, reason: str, stop_reason: int | str | None = None) -> Emission:
        """End the request from outside ("cancelled", "error" ...); return the text held back until now.

        Does nothing but repeat the reason where the request has already finished.

        Raises:
            ParameterError: `reason` is not a finish reason.
        """
        if reason not in FINISH_REASONS:
            raise ParameterError(f"unknown finish reason {reason!r}; valid are {', '.join(FINISH_REASONS)}")
        if self.finish_reason is not None:
            return Emission("", self.finish_reason, self.stop_reason)
        return self._end("", self._flush(), reason, stop_reason)

    def _terminator(self, token_id: int) -> tuple[str, bool]:
        """Return the finish reason of an EOS or stop token, and whether its text is shown."""
        if token_id in self._eos:
            return "eos", self.params.include_stop or not self.params.skip_special_tokens
        return "stop", self.params.include_stop

    def _push_terminator(self, token_id: int, reason: str, visible: bool) -> Emission:
        if visible and self._detokenizer:
            delta = self._detokenizer.push(token_id)
            self._deltas.append(delta)
            text = self._search.release() + delta + self._flush()
        else:
            text = self._flush()
            self._deltas.append("")
        return self._end("", text, reason, token_id)

    def _push_special_stop(self, string: str) -> Emission:
        """End at a special token that is a stop string, although it would add no text."""
        text, shown = self._flush(), string if self.params.include_stop else ""
        self._deltas.append(shown)
        return self._end("", text + shown, "stop", string)

    def _criterion(self) -> tuple[str, str] | None:
        for criterion in self._criteria:
            verdict = criterion(Progress(self))
            if isinstance(verdict, str) and verdict:
                return "stop", verdict
            if verdict:
                return "stop", getattr(criterion, "__name__", type(criterion).__name__)
        return None

    def _limit(self) -> tuple[str, str] | None:
        count = len(self.token_ids)
        if self.params.max_new_tokens is not None and count >= self.params.max_new_tokens:
            return "length", "max_new_tokens"
        if self._max_total is not None and len(self.prompt_ids) + count >= self._max_total:
            return "length", "max_length"
        if self.params.max_time is not None and self.elapsed >= self.params.max_time:
            return "time", "max_time"
        return None

    def _flush(self) -> str:
        """Return all text held back: a possible stop string, then bytes that never became a character."""
        rest = self._detokenizer.finish() if self._detokenizer else ""
        if rest and self._deltas:
            self._deltas[-1] += rest
        return self._search.release() + rest

    def _end(self, shown: str, rest: str, reason: str, stop_reason: int | str | None) -> Emission:
        """Finish: `shown` is this token's text, already recorded, and `rest` what was held back."""
        self._emitted.append(rest)
        self.finish_reason, self.stop_reason = reason, stop_reason
        return Emission(shown + rest, reason, stop_reason)


class StopSearch:
    """Finds the first stop string to be completed in a growing text, and holds back what may become one.

    `held` is the longest end of the text that a stop string begins with.
    """

    __slots__ = ("_first", "_longest", "held", "strings")

    def __init__(self, strings: Iterable[str]):
        self.held = ""
        self.strings = tuple(strings)
        self._first = frozenset(s[0] for s in self.strings)
        self._longest = max(map(len, self.strings), default=0)

    def feed(self, text: str, armed: bool = True, include_stop: bool = False) -> tuple[str, str | None]:
        """Append `text`; return the text that is now safe to show and the stop string found, or None.

        Args:
            text: the new text.
            armed: whether a stop string completed by it counts.
            include_stop: cut after the stop string rather than before it.
        """
        if not self.strings or not text:
            return text, None
        known, buffer = len(self.held), self.held + text
        match = self._find(buffer, known) if armed else None
        if match is not None:
            end, start, string = match
            self.held = ""
            return buffer[: end if include_stop else start], string
        safe = self._safe(buffer)
        self.held = buffer[safe:]
        return buffer[:safe], None

    def release(self) -> str:
        """Return the held text and hold nothing."""
        held, self.held = self.held, ""
        return held

    def _find(self, buffer: str, known: int) -> tuple[int, int, str] | None:
        """Return (end, start, string) of the first match that ends beyond the `known` characters."""
        best = None
        for string in self.strings:
            start = buffer.find(string, max(0, known - len(string) + 1))
            if start >= 0:
                found = (start + len(string), start, string)
                best = found if best is None else min(best, found)
        return best

    def _safe(self, buffer: str) -> int:
        """Return how many characters cannot be part of a stop string that is still to be completed."""
        for start in range(max(0, len(buffer) - self._longest + 1), len(buffer)):
            if buffer[start] in self._first:
                tail = buffer[start:]
                if any(len(s) > len(tail) and s.startswith(tail) for s in self.strings):
                    return start
        return len(buffer)
