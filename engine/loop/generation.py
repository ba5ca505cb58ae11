"""Results: what a request produced, and the events that report it while it runs."""

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, SupportsIndex, overload

PREVIEW = 200  # characters of text in a repr
ROW = 72  # characters of text in a row of `Results`


@dataclass(frozen=True, slots=True)
class Timings:
    """Where a request's time went, in seconds.

    Args:
        queued: from submission to admission.
        prefill: from admission to the end of the prompt's forward passes.
        first_token: from submission to the first output token.
        decode: from the first output token to the last.
        total: from submission to the end.
        tokens_per_second: output tokens after the first, per second of `decode`; 0 where there are none.
    """

    queued: float = 0.0
    prefill: float = 0.0
    first_token: float = 0.0
    decode: float = 0.0
    total: float = 0.0
    tokens_per_second: float = 0.0

    @classmethod
    def between(
        cls, submitted: float, admitted: float, prefilled: float, first: float, finished: float, n_new: int
    ) -> "Timings":
        """Return the timings between moments of one clock, for a request of `n_new` output tokens."""
        decode = finished - first
        rate = (n_new - 1) / decode if n_new > 1 and decode > 0 else 0.0
        return cls(
            queued=admitted - submitted,
            prefill=prefilled - admitted,
            first_token=first - submitted,
            decode=decode,
            total=finished - submitted,
            tokens_per_second=rate,
        )


@dataclass(kw_only=True, repr=False)
class Generation:
    """The finished output of one sample of one request.

    Args:
        request: index of the prompt in the call.
        sample: index among the request's `n` samples.
        prompt_token_ids: prompt tokens; -1 where the prompt was embeddings.
        token_ids: output tokens, the EOS or stop token included.
        text: output text, cut at a stop string unless `include_stop`.
        finish_reason: "eos", "stop", "length", "time", "cancelled" or "error".
        stop_reason: which EOS or stop token id, stop string, limit or criterion it was.
        logprobs: log-probability (nats) of each output token after the pipeline, as it was drawn.
        raw_logprobs: the same under the model's own distribution.
        top_logprobs: per output token the most probable ids and their log-probabilities, if asked for.
        prompt_logprobs: log-probability of each prompt token given those before it (None for the first), if
            asked for.
        prompt_top_logprobs: the most probable ids at each of its positions, as many as were asked for; strategies leave
            it out.
        error: what went wrong, where `finish_reason` is "error".
        timings: where the time went.
        seed: seed of the draws; the same seed and prompt give the same output.
        params: the request's SamplingParams.
        token_texts: the text that each output token added; joins to `text`.
        extra: what a strategy tells beside it: weights, acceptance, scores of beams, branches.
    """

    request: int
    sample: int = 0
    prompt_token_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    logprobs: list[float] = field(default_factory=list)
    raw_logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] | None = None
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[dict[int, float] | None] | None = None
    error: str | None = None
    timings: Timings = field(default_factory=Timings)
    seed: int | None = None
    params: Any = None
    token_texts: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def n_new(self) -> int:
        """Number of output tokens."""
        return len(self.token_ids)

    @property
    def cumulative_logprob(self) -> float:
        """Sum of `logprobs`."""
        return math.fsum(self.logprobs)

    def __str__(self) -> str:
        return self.text

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= PREVIEW else self.text[: PREVIEW - 1] + "…"
        lines = [f"Generation({self._summary()})", f"  {text!r}"]
        if self.error is not None:
            lines.append(f"  error: {' '.join(self.error.split())}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """Show the text with each token coloured by its probability and its numbers in a tooltip."""
        return _render(self)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON types; NaN and infinite numbers become None, callables their name."""
        record = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return record | {"n_new": self.n_new, "cumulative_logprob": _plain(self.cumulative_logprob)}

    def _summary(self) -> str:
        """Return the facts of the repr's first line."""
        where = f"request {self.request}" + (f", sample {self.sample}" if self.sample else "")
        reason = f"{self.finish_reason}" + (
            f" ({self.stop_reason!r})" if self.stop_reason is not None else ""
        )
        parts = [where, f"{self.n_new} token{'s' if self.n_new != 1 else ''}", f"finish: {reason}"]
        if self.logprobs:
            parts.append(f"log p = {self.cumulative_logprob:.2f}")
        if self.timings.tokens_per_second:
            parts.append(f"{self.timings.tokens_per_second:.1f} tokens/s")
        return ", ".join(parts)


class Event(NamedTuple):
    """One step of one running sample, as `stream()` yields it.

    Args:
        request: index of the prompt in the call.
        sample: index among the request's `n` samples.
        token_id: the token drawn, or None where the request ended without one.
        text: text that became final; the texts of all events join to the generation's text.
        logprob: log-probability (nats) of the token after the pipeline.
        raw_logprob: the same under the model's own distribution.
        finish: the finish reason on the last event, else None.
        generation: the finished result on the last event, else None.
    """

    request: int
    sample: int
    token_id: int | None
    text: str
    logprob: float | None = None
    raw_logprob: float | None = None
    finish: str | None = None
    generation: Generation | None = None


def _plain(value: Any) -> Any:
    """Return `value` in JSON types."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k if isinstance(k, str) else str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(v) for v in value), key=repr)
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return getattr(value, "__qualname__", None) or repr(value)


class Results(list[Generation]):
    """A list of Generations that shows one row a result, in a terminal and in a notebook."""

    @overload
    def __getitem__(self, index: SupportsIndex) -> Generation: ...

    @overload
    def __getitem__(self, index: slice) -> "Results": ...

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return Results(found) if isinstance(index, slice) else found

    def _rows(self) -> list[tuple[str, str, str, str]]:
        """(prompt and sample, how it ended, tokens, text or error) of each."""
        several = any(result.sample for result in self)
        return [
            (
                f"{result.request}.{result.sample}" if several else f"{result.request}",
                f"{result.finish_reason}",
                f"{result.n_new}",
                _shortened(result.text if result.error is None else result.error),
            )
            for result in self
        ]

    def __repr__(self) -> str:
        head, rows = ("prompt", "finish", "tokens", "text"), self._rows()
        wide = [max(map(len, column)) for column in zip(head, *rows, strict=True)][:3]
        return "\n".join(
            f"{name:>{wide[0]}}  {finish:<{wide[1]}}  {tokens:>{wide[2]}}  {text}"
            for name, finish, tokens, text in (head, *rows)
        )

    def _repr_html_(self) -> str:
        """A table of them; a cell of text tells all of it in its tooltip."""
        rows = [
            "".join(f"<td>{html.escape(cell)}</td>" for cell in (name, finish, tokens))
            + f'<td style="text-align:left" title="{html.escape(result.text, quote=True)}">{html.escape(text)}</td>'
            for result, (name, finish, tokens, text) in zip(self, self._rows(), strict=True)
        ]
        head = "".join(f"<th>{name}</th>" for name in ("prompt", "finish", "tokens", "text"))
        return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _shortened(text: str) -> str:
    """A text in one line of at most `ROW` characters."""
    shown = repr(text)
    return shown if len(shown) <= ROW else shown[: ROW - 1] + "…"


def _render(generation: Generation) -> str:
    """Return the HTML of a generation."""
    # Without texts per token (no tokenizer) the ids stand for them.
    texts = generation.token_texts or [f"{i} " for i in generation.token_ids]
    spans = [_span(generation, at, text) for at, text in enumerate(texts)]
    error = f'<div style="color:#b00">{html.escape(generation.error)}</div>' if generation.error else ""
    return (
        f'<div><div style="font-size:85%;opacity:.7">{html.escape(generation._summary())}</div>{error}'
        f'<div style="white-space:pre-wrap;font-family:monospace">{"".join(spans)}</div></div>'
    )


def _span(generation: Generation, at: int, text: str) -> str:
    """Return the coloured span of output token `at`."""
    raw = _get(generation.raw_logprobs, at)
    drawn = _get(generation.logprobs, at)
    shown = raw if raw is not None else drawn
    lines = [f"{text!r}  id {_get(generation.token_ids, at)}"]
    if raw is not None:
        lines.append(f"p = {_percent(raw)} (model)")
    if drawn is not None:
        lines.append(f"p = {_percent(drawn)} (as drawn)")
    top = _get(generation.top_logprobs or [], at)
    if top:
        lines.append("top: " + ", ".join(f"{i}: {_percent(p)}" for i, p in top.items()))
    title = html.escape("\n".join(lines), quote=True).replace("\n", "&#10;")
    body = html.escape(text).replace("\n", '<span style="opacity:.5">↵</span>\n')
    # A token that completes no character, or is hidden, still gets a sliver to point at.
    sliver = "" if text else "padding-left:3px;"
    return f'<span title="{title}" style="{sliver}background:{_colour(shown)}">{body}</span>'


def _colour(logprob: float | None) -> str:
    """Return a background from red (probability 0) over yellow to green (1); grey where it is unknown."""
    if logprob is None or math.isnan(logprob):
        return "rgba(128,128,128,.25)"
    return f"hsla({round(120 * math.exp(min(logprob, 0.0)))},80%,50%,.35)"


def _percent(logprob: float) -> str:
    return "unknown" if math.isnan(logprob) else f"{100 * math.exp(min(logprob, 0.0)):.3g}%"


def _get(values: list, at: int) -> Any:
    return values[at] if at < len(values) else None
