"""One sequence at one moment: its tokens and the blocks that hold its keys and values."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from .pool import Table

EMBEDDING = -1  # stands in a history for a position that was given as an embedding


class History:
    """A list of token ids that is appended to by sharing: O(1) at the tip, a copy where a sibling went on already."""

    __slots__ = ("_buffer", "_length")

    def __init__(self, tokens=(), *, _buffer: list[int] | None = None, _length: int = 0):
        self._buffer = list(tokens) if _buffer is None else _buffer
        self._length = len(self._buffer) if _buffer is None else _length

    def __len__(self) -> int:
        return self._length

    def __iter__(self):
        return iter(self._buffer[: self._length])

    def extended(self, tokens) -> History:
        """This history with `tokens` behind it."""
        buffer = self._buffer if len(self._buffer) == self._length else self._buffer[: self._length]
        buffer.extend(tokens)
        return History(_buffer=buffer, _length=len(buffer))

    def cut(self, length: int) -> History:
        """The first `length` tokens."""
        return History(_buffer=self._buffer, _length=length)

    def tolist(self) -> list[int]:
        """A list of its own."""
        return self._buffer[: self._length]


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence as a value: the first `length` cells of `table` are its own.

    Args:
        table: blocks with its keys and values; none of a model that keeps a cache of its own.
        history: its token ids.
        prompt_length: how many of them were the prompt.
        session: what a model outside the pool keeps for it (see `SoloModel`).
    """

    table: Table
    history: History = field(default_factory=History)
    prompt_length: int = 0
    session: Any = None

    @property
    def length(self) -> int:
        """Tokens that were fed."""
        return len(self.history)

    def cut(self, length: int) -> Row:
        """The same sequence, `length` tokens long; its later cells are forgotten, not cleared."""
        return replace(self, history=self.history.cut(length), prompt_length=min(self.prompt_length, length))
