"""Results in the shapes of OpenAI's API, whole and as they stream."""

from __future__ import annotations

import math
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property
from typing import Any

from ...engine import Engine
from ...loop.generation import Event, Generation
from ...text.detokenizer import token_texts
from .reading import Asked
from .refusals import encoded
from .tools import ToolText

MARK = "\0text\0"  # stands for a text, and is none that a model's name could hold
LEAST = -9999.0  # what OpenAI's API writes for a log-probability of minus infinity
FINISH = {"eos": "stop", "stop": "stop", "length": "length", "time": "length", "cancelled": "stop"}


class Answer:
    """The answer to one request, as `/v1/completions` gives it.

    Args:
        engine: whose tokenizer shows tokens. asked: the request. model: its name.
    """

    kind, prefix, chunk = "text_completion", "cmpl", "text_completion"

    def __init__(self, engine: Engine, asked: Asked, model: str):
        self.engine, self.asked = engine, asked
        self.head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.kind,
            "created": int(time.time()),
        }
        self.head["model"] = model
        self._shown: dict[int, str] = {}
        self._seen: Counter[int] = Counter()  # tokens of each choice that were told

    # -- whole

    def whole(self, results: Sequence[Generation]) -> dict[str, Any]:
        """The answer when all results are there; of the samples of a prompt the best are shown."""
        n, shown = self.asked.samples, []
        for first in range(0, len(results), n):
            group = results[first : first + n]
            if self.asked.returned < n:
                group = sorted(group, key=mean_logprob, reverse=True)[: self.asked.returned]
            shown += group
        choices = [self.choice(number, result) for number, result in enumerate(shown)]
        return self.head | {"choices": choices, "usage": self.usage(results)}

    def choice(self, number: int, result: Generation) -> dict[str, Any]:
        """One result."""
        return {
            "index": number,
            **self.content(result, number),
            "finish_reason": self.finish(result, number),
            **self.extras(result),
        }

    def content(self, result: Generation, number: int) -> dict[str, Any]:
        """What was generated, behind the prompt where that is echoed."""
        text = "" if self.asked.silent else result.text
        ids = [] if self.asked.silent else result.token_ids
        before = (
            token_texts(self.engine.tokenizer, result.prompt_token_ids, (), False) if self.asked.echo else []
        )
        found = {"text": "".join(before) + text, "logprobs": None}
        if self.asked.logprobs:
            texts = [*before, *(result.token_texts if ids else ())]
            prompt = result.prompt_token_ids if before else []
            chosen, top = (
                [*(result.prompt_logprobs or ())][: len(prompt)],
                [*(result.prompt_top_logprobs or ())],
            )
            chosen += result.raw_logprobs[: len(ids)]
            top = [
                *(top or [None] * len(prompt))[: len(prompt)],
                *(result.top_logprobs or [{}] * len(ids))[: len(ids)],
            ]
            found["logprobs"] = self.logprobs(texts, [*prompt, *ids], chosen, top)
        return found

    def logprobs(self, texts, ids, chosen, top, start: int = 0) -> dict[str, Any]:
        """OpenAI's four lists; the drawn token is among the alternatives."""
        offsets = []
        for text in texts:
            offsets.append(start)
            start += len(text)
        rows = zip(ids, chosen, top, strict=True)
        return {
            "tokens": [self.shown(token) for token in ids],
            "token_logprobs": [finite(value) for value in chosen],
            "top_logprobs": [None if best is None else self.alternatives(best, i, p) for i, p, best in rows],
            "text_offset": offsets,
        }

    def alternatives(self, best: dict[int, float], token: int, logprob: float) -> dict[str, float]:
        """Texts of alternatives; where several tokens look alike the most probable stands for them."""
        found: dict[str, float] = {}
        for i, value in [*best.items(), (token, logprob)]:
            text = self.shown(i)
            found[text] = max(found.get(text, LEAST), finite(value))
        return found

    def shown(self, token: int) -> str:
        """The text of a single token."""
        if token not in self._shown:
            known = self.engine.tokenizer is not None
            self._shown[token] = (
                self.engine.decode([token], skip_special_tokens=False) if known else str(token)
            )
        return self._shown[token]

    def finish(self, result: Generation, number: int) -> str:
        """Why a choice ended, in OpenAI's words."""
        return "length" if self.asked.silent else FINISH[result.finish_reason]

    def extras(self, result: Generation) -> dict[str, Any]:
        """What was asked for beyond OpenAI's fields."""
        found: dict[str, Any] = {"stop_reason": result.stop_reason}
        if self.asked.token_ids:
            found |= {"prompt_token_ids": result.prompt_token_ids, "token_ids": result.token_ids}
        if self.asked.both_logprobs:
            found["raw_logprobs"] = [finite(value) for value in result.raw_logprobs]
            found["processed_logprobs"] = [finite(value) for value in result.logprobs]
        if self.asked.prompt_logprobs:
            found["prompt_logprobs"] = result.prompt_logprobs and [
                finite(value) for value in result.prompt_logprobs
            ]
        if result.seed is not None:
            found["seed"] = result.seed
        if self.asked.strategy:
            plain, told = {each.name for each in fields(Generation)}, result.to_dict()
            found["extra"] = told["extra"] | {name: told[name] for name in vars(result) if name not in plain}
        if self.asked.trace:
            found["trace"] = result.extra["trace"]
        return found

    def usage(self, results: Sequence[Generation]) -> dict[str, int]:
        """Tokens in and out."""
        prompts = {r.request: len(r.prompt_token_ids) for r in results}
        out = 0 if self.asked.silent else sum(r.n_new for r in results)
        return {"prompt_tokens": sum(prompts.values()), "completion_tokens": out,
                "total_tokens": sum(prompts.values()) + out}  # fmt: skip

    # -- in parts

    @cached_property
    def _place(self) -> dict[tuple[int, int], int]:
        """Which choice a sample is, by the numbers that the loop has given; a strategy has samples of its own."""
        return (
            {} if self.asked.strategy else {(r.index, r.sample): i for i, r in enumerate(self.asked.requests)}
        )

    def opening(self) -> list[dict[str, Any]]:
        """Chunks before the first token."""
        if not self.asked.echo:
            return []
        texts = [self.engine.decode(r.prompt.ids, skip_special_tokens=False) for r in self.asked.requests]
        return [self.part(i, {"text": text, "logprobs": None}) for i, text in enumerate(texts)]

    def sent(self, event: Event) -> bytes:
        """The server-sent event of one event of the loop; nothing where it shows nothing yet."""
        number = self._plain.get((event.request, event.sample)) if event.generation is None else None
        if number is None:
            chunk = self.chunk_of(event)
            return b"" if chunk is None else sent(chunk)
        if not event.text:
            return b""
        before, behind = self._frames[number]
        return before + encoded(event.text) + behind

    @cached_property
    def _plain(self) -> dict[tuple[int, int], int]:
        """The choices whose chunks are told apart by their text alone."""
        more = self.asked.logprobs or self.asked.token_ids or self.asked.offer or self.asked.strategy
        return {} if more else self._place

    @cached_property
    def _frames(self) -> list[tuple[bytes, bytes]]:
        """What stands before and behind a text in the chunks of each choice; written once, for a token has no time."""
        found = []
        for number in self._place.values():
            event = Event(0, 0, None, MARK)
            chunk = sent(self.part(number, self.delta(number, event, None)))
            before, _, behind = chunk.partition(encoded(MARK))
            found.append((before, behind))
        return found

    def chunk_of(self, event: Event) -> dict[str, Any] | None:
        """The chunk of one event, or None where it shows nothing yet."""
        key = event.request, event.sample
        if event.generation is not None and event.generation.error is not None:
            return None  # which the answer as a whole tells
        number = self._place.setdefault(key, len(self._place))
        logprobs, ids = None, []
        if event.token_id is not None:
            at, ids = self._seen[number], [event.token_id]
            self._seen[number] += 1
            if self.asked.logprobs:
                best = self.asked.requests[number].top_logprobs[at]
                logprobs = self.logprobs([self.shown(event.token_id)], ids, [event.raw_logprob], [best])
        delta = self.delta(number, event, logprobs)
        if self.asked.token_ids:
            delta["token_ids"] = ids
        if event.generation is not None:
            extras = {"stop_reason": event.generation.stop_reason, "seed": event.generation.seed}
            return self.part(number, delta, self.finish(event.generation, number), extras)
        return self.part(number, delta) if any(delta.values()) else None

    def delta(self, number: int, event: Event, logprobs: Any) -> dict[str, Any]:
        """What a chunk adds to a choice."""
        return {"text": event.text, "logprobs": logprobs}

    def part(
        self, number: int, delta: dict, finish: str | None = None, extras: dict | None = None
    ) -> dict[str, Any]:
        """A chunk."""
        choice = {"index": number, **delta, "finish_reason": finish, **(extras or {})}
        return self.head | {"object": self.chunk, "choices": [choice]}

    def closing(self, results: Sequence[Generation]) -> list[dict[str, Any]]:
        """The chunk behind the last token."""
        if not self.asked.usage:
            return []
        return [self.head | {"object": self.chunk, "choices": [], "usage": self.usage(results)}]


class ChatAnswer(Answer):
    """The answer to a conversation, as `/v1/chat/completions` gives it."""

    kind, prefix, chunk = "chat.completion", "chatcmpl", "chat.completion.chunk"

    def __init__(self, engine: Engine, asked: Asked, model: str):
        super().__init__(engine, asked, model)
        self._texts: dict[int, ToolText] = {}  # of choices that may call tools

    def parted(self, number: int, text: str, end: bool) -> dict[str, Any]:
        """What a choice says and calls with a text behind what it has written."""
        if self.asked.offer is None:
            return {"content": text} if text else {}
        if number not in self._texts:
            self._texts[number] = self.asked.offer.text()
        said, calls = self._texts[number].push(text, end)
        return ({"content": said} if said else {}) | ({"tool_calls": calls} if calls else {})

    def content(self, result: Generation, number: int) -> dict[str, Any]:
        parted = self.parted(number, result.text, end=True)
        calls = [{k: v for k, v in call.items() if k != "index"} for call in parted.pop("tool_calls", ())]
        message = {"role": "assistant", "content": None if calls else "", "refusal": None} | parted
        if calls:
            message["tool_calls"] = calls
        found = {"message": message, "logprobs": None}
        if self.asked.logprobs:
            rows = result.token_ids, result.raw_logprobs, result.top_logprobs or [{}] * result.n_new
            found["logprobs"] = self.logprobs((), *rows)
        return found

    def logprobs(self, texts, ids, chosen, top, start: int = 0) -> dict[str, Any]:
        rows = zip(ids, chosen, top, strict=True)
        content = [
            self._entry(i, p) | {"top_logprobs": [self._entry(*pair) for pair in best.items()]}
            for i, p, best in rows
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.shown(token)
        return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode())}

    def opening(self) -> list[dict[str, Any]]:
        first = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
        return [self.part(i, first) for i in range(len(self.asked.requests))]

    def delta(self, number: int, event: Event, logprobs: Any) -> dict[str, Any]:
        return {"delta": self.parted(number, event.text, event.finish is not None), "logprobs": logprobs}

    def finish(self, result: Generation, number: int) -> str:
        found, text = super().finish(result, number), self._texts.get(number)
        called = text is not None and text.calls and not self.asked.offer.named
        return "tool_calls" if called and found == "stop" else found


def sent(content: dict[str, Any]) -> bytes:
    """Content as a server-sent event."""
    return b"data: " + encoded(content) + b"\n\n"


def mean_logprob(result: Generation) -> float:
    """Log-probability per token, by which OpenAI's API chooses the best of several."""
    return result.cumulative_logprob / max(1, result.n_new)


def finite(value: float | None) -> float | None:
    """A log-probability that JSON can hold."""
    return None if value is None else LEAST if math.isnan(value) else max(value, LEAST)
