"""What a processor may read about one decode step."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


@dataclasses.dataclass
class Context:
    """Everything a processor may read about one decode step of B rows.

    tokens: [B, T] int64 history (prompt and output), -1 beyond a row's length and at embedding positions; may
        be given as a function without arguments, which is called the first time a processor asks for history.
    lengths, prompt_lengths: [B] int64. `positions` is `lengths`: the absolute position of the token drawn
    now. seeds, streams: [B] int64, the keys of the draw's noise.
    params: one `SamplingParams` or None per row.
    values: parameters of the processor that is running, one attribute per field, [B, 1].
    memory: memory of the processor that is running, or None.
    notes: what `apply` leaves for the `accept` of the same step (same Context).
    cache: what several processors of one step share, such as the history once it is built. A processor that
        must give up on a row leaves it without a token and says why by `fail(row, reason)`.
    forgiving: a processor that raises ends the rows for which it is on, and says why there; otherwise it raises.
    exclusive: nobody goes back to the memory of an earlier step, so that it may be changed where it lies.
    beams: so many rows that follow each other are beams of one prompt. least: [B, 1] int64, how many tokens a
        truncation rule leaves at any rate (a beam needs one that goes on); None: one.
    """

    tokens: Any = None
    lengths: Tensor | None = None
    prompt_lengths: Tensor | None = None
    seeds: Tensor | None = None
    streams: Tensor | None = None
    params: Sequence[Any] | None = None
    vocab_size: int | None = None
    device: Any = None
    eos_token_ids: frozenset[int] = frozenset()
    values: Any = None
    memory: Any = None
    notes: dict = dataclasses.field(default_factory=dict)
    cache: dict = dataclasses.field(default_factory=dict)
    forgiving: bool = False
    exclusive: bool = False
    beams: int = 1
    least: Tensor | None = None
    key: Any = None

    @property
    def positions(self) -> Tensor:
        """[B] int64: absolute position of the token that is drawn in this step."""
        return self.lengths

    @property
    def history(self) -> Tensor:
        """[B, T] int64: the token history, built on first use."""
        if not callable(self.tokens):
            return self.tokens
        if "history" not in self.cache:
            self.cache["history"] = self.tokens()
        return self.cache["history"]

    def ends(self, settings: Mapping[str, Any]) -> list[int]:
        """The end-of-sequence ids of a row with these settings: its own `eos_token_ids`, or the model's."""
        own = settings["eos_token_ids"]
        ids = self.eos_token_ids if own is None else own
        return sorted(i for i in ids if i < self.vocab_size)

    @property
    def output_lengths(self) -> Tensor:
        """[B] int64: how many tokens each row has generated so far."""
        return self.lengths - self.prompt_lengths

    def view(self, key: Any, values: Any, memory: Any) -> Context:
        """The same step as one processor sees it: its own values, memory and notes."""
        other = copy.copy(self)
        other.key, other.values, other.memory = key, values, memory
        return other

    def fail(self, row: int, reason: str) -> None:
        """Say why a row is left without a token; the first reason counts."""
        self.cache.setdefault("failures", {}).setdefault(row, reason)

    @property
    def failures(self) -> Failures:
        """Why processors left rows of this step without a token."""
        return Failures(self.cache.get("failures", {}), self.cache.get("suspects", ()))

    def spoiled(self, logprobs: Tensor) -> Tensor:
        """Log-probabilities [B] with NaN for rows whose processors' memory could not follow the token."""
        for rows in self.cache.get("lost", ()):
            logprobs = logprobs.masked_fill(rows, float("nan"))
        return logprobs

    def note(self, value: Any) -> None:
        """Leave `value` for the `accept` that follows this `apply`."""
        self.notes[self.key] = value

    def noted(self) -> Any:
        """What `apply` left in this step, or None."""
        return self.notes.get(self.key)


@dataclasses.dataclass
class Failures:
    """Why rows of a step have no token: told ones by row, and suspicions [B] bool, read only where one is asked for."""

    told: dict[int, str] = dataclasses.field(default_factory=dict)
    suspects: Sequence[tuple[str, Tensor]] = ()

    def get(self, row: int, default: str | None = None) -> str | None:
        """The reason of a row, or `default` where no processor has one."""
        if row in self.told:
            return self.told[row]
        return next((text for text, rows in self.suspects if rows[row]), default)
