"""Processors: what all of them share, and those made of a plain function or of an object."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ...cache.transfer import upload
from ...errors import ParameterError
from .context import Context

NEG_INF = float("-inf")
OURS = __name__.split(".")[0] + "."


class Processor:
    """A rule from logits to logits with parameters per row; subclass it and write `apply` for an opaque rule.

    `defaults` maps each parameter to its off value; a rule is off for a row whose first parameter has its off
    value. Constructed with values (a scalar, or one value per row) it uses those; constructed without, it
    reads the fields of the same names from each row's `SamplingParams`. `Edit` and `Keep` are the forms that
    can be fused.

    keeps_argmax: the rule never changes which token is the most likely one.
    speculative_safe: the result depends only on the history and parameters, so drafts can be verified in one
    pass.
    needs_history: reads `context.history`.
    sampling_only: skipped for greedy rows (as Hugging Face and vLLM do).
    before_temperature: where a request's own processors are put in a pipeline: before the temperature, or at
    the end.
    """

    name = ""
    kind = "opaque"
    defaults: Mapping[str, Any] = {}
    fields: tuple[str, ...] = ()
    keeps_argmax = False
    speculative_safe = True
    needs_history = False
    sampling_only = False
    before_temperature = False
    leaves_off_rows = False  # `apply` itself gives rows back as they were for which the rule is off
    source = ""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.fields = tuple(cls.defaults)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    def __init__(self, *values: Any, **named: Any):
        if len(values) > len(self.fields):
            raise ParameterError(
                f"{self.name} takes {len(self.fields)} values {self.fields}, got {len(values)}"
            )
        given = dict(zip(self.fields, values, strict=False))
        for field, value in named.items():
            if field not in self.fields:
                raise ParameterError(
                    f"{self.name} has no parameter {field!r}; it has {', '.join(self.fields)}"
                )
            if field in given:
                raise ParameterError(f"{self.name} got {field!r} twice")
            given[field] = value
        self.explicit = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in given.items()}

    def settings(self, params: Any = None, row: int = 0) -> dict[str, Any]:
        """Values of one row: explicit ones first, then its `SamplingParams`', then the off values."""
        result = {}
        for field, off in self.defaults.items():
            if field in self.explicit:
                value = self.explicit[field]
                if self.per_row(field) and row >= len(value):
                    raise ParameterError(
                        f"{self.name}: {field} has {len(value)} values, there is a row {row}"
                    )
                result[field] = value[row] if self.per_row(field) else value
            elif params is not None:
                result[field] = getattr(params, field, off)
            else:
                result[field] = off
        return result

    def per_row(self, field: str) -> bool:
        """True when `field` was given explicitly as a list with one value per row."""
        return isinstance(self.explicit.get(field), list) and not isinstance(
            self.defaults[field], (tuple, list)
        )

    def on(self, settings: dict[str, Any]) -> bool:
        """False when these settings make the rule an identity."""
        if not self.fields:
            return True
        return settings[self.fields[0]] != self.defaults[self.fields[0]]

    def active(self, params: Any, row: int = 0) -> bool:
        """False when the rule is off (an identity) for a row with these `SamplingParams`."""
        return self.on(self.settings(params, row))

    def pack(self, rows: list[dict[str, Any]], context: Context) -> dict[str, Any]:
        """What `context.values` holds, from the settings of every row: by default one [B, 1] tensor a field.

        Of the context only device, vocab_size and eos_token_ids are set: packing happens when rows change.
        """
        packed = {}
        for field in self.fields:
            column = [[row[field]] for row in rows]
            kind = torch.float32 if any(isinstance(v[0], float) for v in column) else None
            packed[field] = upload(column, context.device, kind)
        return packed

    def apply(self, logits: Tensor, context: Context) -> Tensor:
        """New logits [B, V] float32 from `logits` [B, V] float32; pure, the input is never written to."""
        raise NotImplementedError(f"{type(self).__name__} defines no apply()")

    def start(self, context: Context) -> Any:
        """Memory for the rows of `context` (dict of tensors with leading dimension B, or `select`-able);
        None: none.
        """
        return None

    def accept(self, memory: Any, tokens: Tensor, context: Context) -> Any:
        """Memory after `tokens` [B] int64 were committed; pure. `context` is the one `apply` saw."""
        return memory

    def __call__(self, logits: Tensor, context: Context | None = None) -> Tensor:
        """Apply this one rule to `logits` [B, V]: the form for notebooks and tests; memory starts afresh."""
        context = copy.copy(context or Context())
        context.device, context.vocab_size = logits.device, logits.shape[1]
        rows = logits.shape[0]
        params = context.params or [None] * rows
        settings = [self.settings(params[i], i) for i in range(rows)]
        flags = [self.on(row) for row in settings]
        if not any(flags):
            return logits
        view = context.view(self, values_of(self, settings, flags, context), context.memory)
        if view.memory is None:
            view.memory = self.start(view)
        return guarded(self, logits, view)

    def __repr__(self) -> str:
        inner = ", ".join(f"{k}={v!r}" for k, v in self.explicit.items())
        return f"{self.name}({inner})"


def values_of(
    processor: Processor, settings: list[dict], flags: list[bool], context: Context
) -> SimpleNamespace:
    """The namespace that a processor reads as `context.values`; `rows_on` is [B, 1] bool, or None when all
    are on.
    """
    # A row for which the rule is off packs as off: its settings may be another request's, or explicit ones.
    packed = [own if on else dict(processor.defaults) for own, on in zip(settings, flags, strict=True)]
    values = SimpleNamespace(**processor.pack(packed, context))
    if processor.kind == "opaque":
        values.flags = flags
    values.rows_on = None if all(flags) else upload(flags, context.device, None)[:, None]
    return values


def guarded(processor: Processor, logits: Tensor, context: Context) -> Tensor:
    """Apply `processor`; rows for which it is off come back bit-identical whatever the rule returns."""
    if is_ours(processor):
        result = processor.apply(logits, context)
    else:
        result = _distrusted(processor, logits, context)
    if not isinstance(result, Tensor) or result.shape != logits.shape:
        got = list(result.shape) if isinstance(result, Tensor) else repr(result)
        raise ParameterError(
            f"processor {processor.name!r} must return logits of shape {list(logits.shape)}, got {got}"
        )
    rows_on = context.values.rows_on
    if rows_on is None or processor.leaves_off_rows or result is logits:
        return result
    return torch.where(rows_on, result, logits)


def is_ours(processor: Processor) -> bool:
    """Whether the processor's code is this library's."""
    return type(processor).__module__.startswith(OURS) and not isinstance(processor, Function | Adapted)


def _distrusted(processor: Processor, logits: Tensor, context: Context) -> Any:
    """What a processor of somebody else gives, who might write to its input, or return other things than logits."""
    given = logits.clone()
    version = given._version
    result = processor.apply(given, context)
    if given._version != version:
        raise ParameterError(
            f"processor {processor.name!r} wrote to the logits that it was given; it must return new ones: "
            "begin with logits = logits.clone()"
        )
    if result is given or not isinstance(result, Tensor) or result.shape != logits.shape:
        return logits if result is given else result
    if not result.is_floating_point():
        raise ParameterError(
            f"processor {processor.name!r} must return floating logits like the {logits.dtype} that it was given, "
            f"got {result.dtype}"
        )
    result = result.to(logits.dtype)
    for text, wrong in (("NaN", result.isnan() & ~logits.isnan()), ("+inf", result == float("inf"))):
        rows = wrong.any(-1)  # [B], not looked at by the host before a row has no token
        context.cache.setdefault("suspects", []).append(
            (f"processor {processor.name!r} returned {text}", rows)
        )
        result = result.masked_fill(rows[:, None], NEG_INF)
    return result


def committed(processor: Processor, context: Context) -> Any:
    """What `apply` noted in this step; raises ParameterError given another step's Context."""
    value = context.noted()
    if value is None:
        raise ParameterError(
            f"{processor.name}.accept needs the Context that its apply saw; give the same object"
        )
    return value


class Function(Processor):
    """A plain callable `(logits, context) -> logits` as an opaque processor."""

    speculative_safe = False

    def __init__(self, function: Callable[[Tensor, Context], Tensor]):
        super().__init__()
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def apply(self, logits: Tensor, context: Context) -> Tensor:
        return self.function(logits, context)


class Adapted(Processor):
    """A duck-typed processor: any object with `apply(logits, context)`; what else it defines is used, too."""

    def __init__(self, rule: Any):
        super().__init__()
        self.rule = rule
        self.name = getattr(rule, "name", type(rule).__name__)
        for attribute in ("kind", "keeps_argmax", "speculative_safe", "needs_history", "sampling_only"):
            setattr(self, attribute, getattr(rule, attribute, getattr(Processor, attribute)))
        self.before_temperature = getattr(rule, "before_temperature", False)

    def settings(self, params: Any = None, row: int = 0) -> dict[str, Any]:
        return {"on": self.rule.active(params) if hasattr(self.rule, "active") else True}

    def on(self, settings: dict[str, Any]) -> bool:
        return settings["on"]

    def apply(self, logits: Tensor, context: Context) -> Tensor:
        return self.rule.apply(logits, context)

    def start(self, context: Context) -> Any:
        return self.rule.start(context) if hasattr(self.rule, "start") else None

    def accept(self, memory: Any, tokens: Tensor, context: Context) -> Any:
        return self.rule.accept(memory, tokens, context) if hasattr(self.rule, "accept") else memory
