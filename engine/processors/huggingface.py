"""A Hugging Face `LogitsProcessor` as a member of a pipeline; needs nothing of transformers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from handloom.errors import ParameterError
from handloom.processors.base import Context, Processor, committed

SHARED = ("Tokenizer", "PreTrained", "Config")  # parts of class names of what a copy shares with its original


def is_huggingface(rule: Any) -> bool:
    """True for a LogitsProcessor, a LogitsProcessorList, or anything called as `rule(input_ids, scores)`."""
    if any("LogitsProcessor" in base.__name__ for base in type(rule).__mro__):
        return True
    if not callable(rule):
        return False
    try:
        names = list(inspect.signature(rule).parameters)
    except (TypeError, ValueError):  # a callable without a readable signature
        return False
    return names[:2] == ["input_ids", "scores"]


def fork(rule: Any) -> Any:
    """A deep copy of a rule; tokenizers, models and their configurations are shared, not copied."""
    memo: dict[int, Any] = {}
    _share(rule, memo, depth=3)
    return copy.deepcopy(rule, memo)


def _share(value: Any, memo: dict[int, Any], depth: int) -> None:
    """Register with `memo` what a deep copy of `value` must not copy."""
    if isinstance(value, torch.nn.Module) or any(
        mark in base.__name__ for base in type(value).__mro__ for mark in SHARED
    ):
        memo[id(value)] = value
    elif depth:
        if isinstance(value, (list, tuple)):
            parts = value
        else:
            parts = value.values() if isinstance(value, dict) else getattr(value, "__dict__", {}).values()
        for part in list(parts):
            _share(part, memo, depth - 1)


class PerRow:
    """One rule instance per row, None where a row has none; immutable, like every processor memory."""

    def __init__(self, rules: Sequence[Any]):
        self.rules = list(rules)

    def select(self, index: Sequence[int]) -> PerRow:
        """The instances of chosen rows; forks share one until `apply`, which copies before it calls."""
        return PerRow([self.rules[i] for i in index])

    def put(self, row: int, other: PerRow) -> PerRow:
        """These instances with one row's replaced."""
        return PerRow([*self.rules[:row], other.rules[0], *self.rules[row + 1 :]])


class HFProcessor(Processor):
    """Any Hugging Face `LogitsProcessor` (or `(input_ids, scores)` function) at its place in a pipeline.

    Every row has an instance of its own, deep-copied at the row's start (tokenizers and models are shared).
    It is called at every step with the row's full ids [1, T] int64, one longer each time, and a float32 copy
    of its scores [1, V] that it may write to. What a call changes in the instance counts only once the row's
    token is
    accepted: rows that fork go on with copies, and a rewound row with the instance of that time. Not
    speculative-safe. Positions that were given as embeddings are left out of the ids.
    """

    kind = "opaque"
    needs_history = True
    speculative_safe = False
    before_temperature = True

    def __init__(self, rule: Any):
        super().__init__()
        self.rule = rule
        self.name = getattr(rule, "__name__", type(rule).__name__)

    def start(self, context: Context) -> PerRow:
        return PerRow(
            [fork(self.rule) for _ in range(context.lengths.shape[0] if context.lengths is not None else 1)]
        )

    def apply(self, logits: Tensor, context: Context) -> Tensor:
        if context.lengths is None or context.tokens is None:
            raise ParameterError(f"{self.name} reads token ids: give a Context with tokens and lengths")
        result, history = logits.clone(), context.history
        moved = list(context.memory.rules)
        for row, length in enumerate(context.lengths.tolist()):
            if not context.values.flags[row]:
                continue
            ids = history[row, :length]
            moved[row] = fork(moved[row])
            scores = moved[row](ids[ids >= 0][None].clone(), logits[row : row + 1].clone())
            if tuple(scores.shape) != (1, logits.shape[1]):
                raise ParameterError(
                    f"{self.name} returned shape {tuple(scores.shape)} for (1, {logits.shape[1]})"
                )
            result[row] = scores[0]
        context.note(PerRow(moved))
        return result

    def accept(self, memory: PerRow, tokens: Tensor, context: Context) -> PerRow:
        return committed(self, context)

    def __repr__(self) -> str:
        return f"HFProcessor({self.name})"
