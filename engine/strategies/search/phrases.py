"""Phrases: what a sequence must still say, and how far it has come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...errors import ParameterError

Alternatives = tuple[tuple[int, ...], ...]  # phrases of token ids, any of which will do


def spelled(engine, phrase):
    """Token ids of a phrase, or of a list of phrases, that may be texts."""
    if not isinstance(phrase, str):
        return [spelled(engine, each) if isinstance(each, str) else each for each in phrase]
    if engine.tokenizer is None:
        raise ParameterError(
            f"constraint {phrase!r} is no phrase of token ids, and no tokenizer is here to make it one"
        )
    return engine.tokenizer(phrase, add_special_tokens=False)["input_ids"]


@dataclass(frozen=True)
class Progress:
    """A sequence's progress through constraints: at most one is under way, and a break starts it over.

    wanted: the constraints. pending: numbers of those not begun. current: number and tokens of the one under way.
    """

    wanted: tuple[Alternatives, ...]
    pending: tuple[int, ...]
    current: tuple[int, tuple[int, ...]] | None = None

    @classmethod
    def start(cls, constraints: Sequence) -> Progress:
        """Nothing said yet. A constraint is a phrase (token ids), or a list of phrases, any of which will do.

        Raises:
            ParameterError: something else, or an alternative that begins like another one of its list.
        """
        wanted = []
        for given in constraints:
            phrases = given if given and not isinstance(given[0], int) else [given]
            phrases = tuple(tuple(phrase) for phrase in phrases)
            if not all(phrase and all(isinstance(t, int) and t >= 0 for t in phrase) for phrase in phrases):
                raise ParameterError(
                    f"constraint {given!r} is no phrase of token ids, or list of such phrases"
                )
            if any(a != b and b[: len(a)] == a for a in phrases for b in phrases):
                raise ParameterError(f"constraint {given!r}: a phrase is the beginning of another one")
            wanted.append(phrases)
        if not wanted:
            raise ParameterError("constraints are empty: give at least one phrase")
        return cls(tuple(wanted), tuple(range(len(wanted))))

    @property
    def complete(self) -> bool:
        """Whether everything has been said."""
        return not self.pending and self.current is None

    @property
    def bank(self) -> int:
        """How much has been said: a constraint counts as many points as the longest phrase has tokens."""
        longest, under_way = max(map(self._size, range(len(self.wanted)))), self.current is not None
        done = len(self.wanted) - len(self.pending) - under_way
        missing = self._size(self.current[0]) - len(self.current[1]) if under_way else longest
        return done * longest + longest - missing

    def next(self) -> list[int]:
        """Tokens that bring it on."""
        if self.current is not None:
            return self._after(*self.current)
        return [token for number in self.pending for token in self._after(number, ())]

    def add(self, token: int) -> Progress:
        """Progress after one more token."""
        if self.current is not None:
            number, said = self.current
            if token not in self._after(number, said):
                return replace(self, current=None, pending=(*self.pending, number))
            return self._said(number, (*said, token), self.pending)
        for number in self.pending:
            if token in self._after(number, ()):
                return self._said(number, (token,), tuple(n for n in self.pending if n != number))
        return self

    def _said(self, number: int, said: tuple[int, ...], pending: tuple[int, ...]) -> Progress:
        return Progress(self.wanted, pending, None if said in self.wanted[number] else (number, said))

    def _after(self, number: int, said: tuple[int, ...]) -> list[int]:
        at = len(said)
        return list(dict.fromkeys(p[at] for p in self.wanted[number] if len(p) > at and p[:at] == said))

    def _size(self, number: int) -> int:
        return max(map(len, self.wanted[number]))
