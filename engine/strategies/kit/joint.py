"""Several sequences of States in lockstep: other models, or other prompts for the same one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...engine import Engine
from ...errors import ModelError
from ...state import State


@dataclass(frozen=True, eq=False)
class Joint:
    """States of several engines whose rows belong together; every operation goes to all of them.

    Args:
        engines: one per member; the same engine may stand twice.
        states: one State per member, with the same number of rows.

    For contrastive decoding the members are an expert and an amateur, for classifier-free guidance one model with
    and without its instruction, for an ensemble any models of one vocabulary.
    """

    engines: tuple[Engine, ...]
    states: tuple[State, ...]

    @classmethod
    def concat(cls, parts: Sequence[Joint]) -> Joint:
        """The rows of several Joints of the same engines, in order; see `State.concat`."""
        members = zip(*(part.states for part in parts), strict=True)
        return cls(parts[0].engines, tuple(State.concat(states) for states in members))

    def __len__(self) -> int:
        return len(self.states[0])

    @property
    def logits(self) -> tuple[torch.Tensor, ...]:
        """`[B, V]` float32 of each member."""
        return tuple(state.logits for state in self.states)

    @property
    def lengths(self) -> torch.Tensor:
        """`[B]` int64 lengths of the first member's rows, which the draw's positions follow."""
        return self.states[0].lengths

    @property
    def new_tokens(self) -> list[list[int]]:
        """Token ids of each row behind its prompt; the same for every member."""
        return self.states[0].new_tokens

    def step(self, tokens, *, hidden: bool = False) -> Joint:
        """All members after one more token per row, `tokens [B]`; those of one engine share a pass."""
        after: dict[int, State] = {}
        for engine in dict.fromkeys(self.engines):
            places = [place for place, each in enumerate(self.engines) if each is engine]
            together = State.concat([self.states[place] for place in places])
            together = engine.step(together, torch.as_tensor(tokens).repeat(len(places)), hidden=hidden)
            parts = torch.arange(len(together)).view(len(places), -1)
            after |= {p: together.select(part) for p, part in zip(places, parts, strict=True)}
        return self._with(after[place] for place in range(len(self.engines)))

    def extend(self, tokens, counts=None, *, hidden: bool = False) -> Joint:
        """All members after several more tokens per row; see `Engine.extend`."""
        return self._with(e.extend(s, tokens, counts, hidden=hidden) for e, s in self.members())

    def select(self, index) -> Joint:
        """Fork, reorder or drop rows of all members; see `State.select`."""
        return self._with(state.select(index) for state in self.states)

    def keep(self, counts) -> Joint:
        """Go back to a part of the last extension in all members; see `State.keep`."""
        return self._with(state.keep(counts) for state in self.states)

    def members(self) -> list[tuple[Engine, State]]:
        """Each member's engine and State."""
        return list(zip(self.engines, self.states, strict=True))

    def _with(self, states) -> Joint:
        return Joint(self.engines, tuple(states))


def join(engines: Sequence[Engine], prompts: Sequence) -> Joint:
    """Prefill rows that several engines decode in lockstep.

    Args:
        engines: at least one; a model may stand more than once.
        prompts: for each engine its prompts, the same number for all; see `Engine.generate`.

    Raises:
        ModelError: numbers of engines, prompts or rows, or the vocabularies, do not agree.
    """
    if not engines or len(engines) != len(prompts):
        raise ModelError(
            f"{len(engines)} engines for {len(prompts)} lists of prompts; give one list for each"
        )
    sizes = [engine.vocab_size for engine in engines]
    if len(set(sizes)) > 1:
        raise ModelError(f"models in lockstep must share a vocabulary; theirs have {sizes} tokens")
    states = tuple(engine.prefill(given) for engine, given in zip(engines, prompts, strict=True))
    rows = [len(state) for state in states]
    if len(set(rows)) > 1:
        raise ModelError(f"members must have the same number of rows; theirs have {rows}")
    return Joint(tuple(engines), states)
