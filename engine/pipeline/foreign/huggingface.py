"""A Hugging Face `LogitsProcessor` as a member of a pipeline; needs nothing of transformers."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ParameterError
from ..forms import Context, Processor, committed

SHARED = ("Tokenizer", "PreTrained", "Config")  # parts of class names of what a copy shares with its original


def is_huggingface(rule: Any, kind: str = "LogitsProcessor") -> bool:
    """True for a class of transformers' `kind`, a list of them, or anything called as `rule(input_ids, scores)`."""
    if any(kind in base.__name__ for base in type(rule).__mro__):
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


class Instances:
    """A rule instance per row, and whether it is the row's own; one that is not is copied before it is called.

    Immutable, but for what the loop does to instances that nobody else can reach (`Context.exclusive`).
    """

    def __init__(self, rules: Sequence[Any], own: Sequence[bool]):
        self.rules, self.own = list(rules), list(own)

    def select(self, index: Sequence[int]) -> Instances:
        """The instances of chosen rows; the forks of a repeated row share one that is nobody's own."""
        count = Counter(index)
        return Instances([self.rules[i] for i in index], [self.own[i] and count[i] == 1 for i in index])

    def put(self, row: int, other: Instances) -> Instances:
        """These instances with one row's replaced."""
        rules, own = list(self.rules), list(self.own)
        rules[row], own[row] = other.rules[0], other.own[0]
        return Instances(rules, own)


class HFProcessor(Processor):
    """Any Hugging Face `LogitsProcessor` (or `(input_ids, scores)` function) at its place in a pipeline.

    Every row has an instance of its own, deep-copied before the row's first token (tokenizers and models are
    shared). It is called at every step with the row's full ids [1, T] int64, one longer each time, and a float32
    copy of its scores [1, V] that it may write to. What a call changes in the instance counts only once the row's
    token is accepted: rows that fork go on with copies, and a rewound row with the instance of that time. That
    takes a copy a row and step; `Engine.generate` and `stream`, which never go back, make none but the first.
    Not speculative-safe. Positions that were given as embeddings are left out of the ids.
    """

    kind = "opaque"
    needs_history = True
    speculative_safe = False
    before_temperature = True

    def __init__(self, rule: Any):
        super().__init__()
        self.rule = rule
        self.name = getattr(rule, "__name__", type(rule).__name__)

    def start(self, context: Context) -> Instances:
        rows = len(context.values.flags)
        return Instances([self.rule] * rows, [False] * rows)

    def apply(self, logits: Tensor, context: Context) -> Tensor:
        if context.lengths is None or context.tokens is None:
            raise ParameterError(f"{self.name} reads token ids: give a Context with tokens and lengths")
        result, history, memory = logits.clone(), context.history, context.memory
        rules, own = list(memory.rules), list(memory.own)
        for row, length in enumerate(context.lengths.tolist()):
            if not context.values.flags[row]:
                continue
            if not (context.exclusive and own[row]):
                rules[row], own[row] = fork(rules[row]), True
            ids = history[row, :length]
            scores = rules[row](ids[ids >= 0][None].clone(), logits[row : row + 1].clone())
            if tuple(scores.shape) != (1, logits.shape[1]):
                raise ParameterError(
                    f"{self.name} returned shape {tuple(scores.shape)} for (1, {logits.shape[1]})"
                )
            result[row] = scores[0]
        context.note(Instances(rules, own))
        return result

    def accept(self, memory: Instances, tokens: Tensor, context: Context) -> Instances:
        return committed(self, context)

    def __repr__(self) -> str:
        return f"HFProcessor({self.name})"
