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
from ...params.checks import watermarking
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


# What transformers' processors hold for each row of a batch.
PER_ROW = {
    "RepetitionPenaltyLogitsProcessor": "prompt_ignore_length",
    "EncoderRepetitionPenaltyLogitsProcessor": "encoder_input_ids",
    "EncoderNoRepeatNGramLogitsProcessor": "generated_ngrams",
}


def row_of(rule: Any, number: int) -> Any:
    """What row `number` of a batch needs of a rule that was made for the whole batch; any other rule as it is.

    A rule with a method `for_row(number)` answers itself; of transformers' own it is known what they hold.
    """
    if callable(getattr(rule, "for_row", None)):
        return rule.for_row(number)
    if isinstance(rule, list):
        return type(rule)([row_of(part, number) for part in rule])
    names = {base.__name__ for base in type(rule).__mro__}
    if "PrefixConstrainedLogitsProcessor" in names:
        own, asked = copy.copy(rule), rule._prefix_allowed_tokens_fn
        own._prefix_allowed_tokens_fn, own._num_beams = lambda _, ids: asked(number, ids), 1
        return own
    if "UnbatchedClassifierFreeGuidanceLogitsProcessor" in names:
        own, parts = copy.copy(rule), rule.unconditional_context.items()
        own.unconditional_context = {name: _part(rule, value, number) for name, value in parts}
        return own
    for name in PER_ROW.keys() & names:
        own = copy.copy(rule)
        setattr(own, PER_ROW[name], _part(rule, getattr(rule, PER_ROW[name]), number))
        if hasattr(rule, "batch_size"):
            own.batch_size = 1
        return own
    return rule


def _part(rule: Any, value: Any, number: int) -> Any:
    """The part of row `number` of a list or tensor over a batch; one row is everybody's."""
    if not isinstance(value, list | Tensor) or len(value) == 1:
        return value
    if number >= len(value):
        raise ParameterError(
            f"{type(rule).__name__} holds something for each of {len(value)} rows; there is a row {number}"
        )
    return value[number : number + 1]


def for_row(params: Any, number: int, count: int) -> Any:
    """The parameters of row `number` of a call of `count` rows, where they hold something for the whole batch."""
    changes: dict[str, Any] = {}
    if hasattr(params.prefix_fn, "for_row"):
        changes["prefix_fn"] = params.prefix_fn.for_row(number)
    rules = [rule.rule if type(rule) is HFProcessor else rule for rule in params.processors]
    theirs = [not hasattr(rule, "apply") and is_huggingface(rule) for rule in rules]
    if count > 1 and (any(theirs) or any(hasattr(rule, "for_row") for rule in rules)):
        changes["processors"] = [
            HFProcessor(row_of(rule, number), number, count) if foreign else row_of(rule, number)
            for rule, foreign in zip(rules, theirs, strict=True)
        ]
    return params.replace(**changes) if changes else params


class HFProcessor(Processor):
    """Any Hugging Face `LogitsProcessor` (or `(input_ids, scores)` function) at its place in a pipeline.

    Every row has an instance of its own, deep-copied before the row's first token (tokenizers and models are
    shared). It is called at every step with the row's full ids [1, T] int64, one longer each time, and a float32
    copy of its scores [1, V] that it may write to. What a call changes in the instance counts only once the row's
    token is accepted: rows that fork go on with copies, and a rewound row with the instance of that time. That
    takes a copy a row and step; `Engine.generate` and `stream`, which never go back, make none but the first.
    Not speculative-safe. Positions that were given as embeddings are left out of the ids.

    Processors that hold something for every row of a batch: of transformers' own each row has its part, and a
    method `for_row(number)` gives it for any other; scores that come back for all rows of the call (a bias [B, V])
    are read at this one's. Rows are counted in the order of the call, samples of one prompt together.
    """

    kind = "opaque"
    needs_history = True
    speculative_safe = False
    before_temperature = True

    def __init__(self, rule: Any, number: int = 0, count: int = 1):
        super().__init__()
        self.rule, self.number, self.count = rule, number, count
        self.name = getattr(rule, "__name__", type(rule).__name__)
        self.__qualname__ = self.name  # what a record of the parameters calls it

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
            shape = tuple(scores.shape)
            if shape not in ((1, logits.shape[1]), (self.count, logits.shape[1])):
                raise ParameterError(
                    f"{self.name} returned shape {shape} for (1, {logits.shape[1]}); one that holds something for "
                    "every row of a batch needs a method for_row(number) that gives the row's own"
                )
            result[row] = scores[self.number if shape[0] > 1 else 0]
        context.note(Instances(rules, own))
        return result

    def accept(self, memory: Instances, tokens: Tensor, context: Context) -> Instances:
        return committed(self, context)

    def __repr__(self) -> str:
        return f"HFProcessor({self.name})"


class TransformersWatermark(HFProcessor):
    """transformers' watermark: a green list (2301.10226) or SynthID, the same tokens as there. Off at None."""

    name = "watermarking_config"
    defaults = {"watermarking_config": None}
    before_temperature = False

    def __init__(self, *values: Any, **named: Any):
        Processor.__init__(self, *values, **named)
        self.number, self.count = 0, 1

    def pack(self, rows: list[dict[str, Any]], context: Context) -> dict[str, Any]:
        return {"settings": [row["watermarking_config"] for row in rows]}

    def start(self, context: Context) -> Instances:
        made = [
            None if own is None else watermarking(own).construct_processor(context.vocab_size, context.device)
            for own in context.values.settings
        ]
        return Instances(made, [False] * len(made))
