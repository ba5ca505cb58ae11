"""The forms a processor can take: opaque, edit, keep; and the step context that each of them reads."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import ParameterError
from ..kernels.sampling.reference import statistics, truncate
from ..kernels.sampling.rules import MASS_SHARE, Rule, Statistics, unpack_mask

NEG_INF = float("-inf")
LIMITS = ("level", "threshold", "count", "mass", "known")


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
        must give up on a row leaves it without a token and says why in `cache["failures"][row]`.
    exclusive: nobody goes back to the memory of an earlier step, so that it may be changed where it lies.
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
    exclusive: bool = False
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

    @property
    def output_lengths(self) -> Tensor:
        """[B] int64: how many tokens each row has generated so far."""
        return self.lengths - self.prompt_lengths

    def view(self, key: Any, values: Any, memory: Any) -> Context:
        """The same step as one processor sees it: its own values, memory and notes."""
        other = copy.copy(self)
        other.key, other.values, other.memory = key, values, memory
        return other

    def note(self, value: Any) -> None:
        """Leave `value` for the `accept` that follows this `apply`."""
        self.notes[self.key] = value

    def noted(self) -> Any:
        """What `apply` left in this step, or None."""
        return self.notes.get(self.key)


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
            packed[field] = torch.tensor(column, dtype=kind, device=context.device)
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
    values.rows_on = None if all(flags) else torch.tensor(flags, device=context.device)[:, None]
    return values


def guarded(processor: Processor, logits: Tensor, context: Context) -> Tensor:
    """Apply `processor`; rows for which it is off come back bit-identical whatever the rule returns."""
    result = processor.apply(logits, context)
    if not isinstance(result, Tensor) or result.shape != logits.shape:
        got = list(result.shape) if isinstance(result, Tensor) else repr(result)
        raise ParameterError(
            f"processor {processor.name!r} must return logits of shape {list(logits.shape)}, got {got}"
        )
    rows_on = context.values.rows_on
    if rows_on is None or isinstance(processor, (Edit, Keep)) or result is logits:
        return result
    return torch.where(rows_on, result, logits)


class Edit(Processor):
    """A rule that changes logits one by one. In one of three forms it runs in the fused sampler; write

      sparse     listed(context) -> [B, N] int64: ids whose logits may change, `vocab_size` where there is none;
                 change(values, ids, context) -> [B, N]: their new logits. Equal ids must get equal values.
      mask       mask(context) -> [B, ceil(V / 32)] int32: a clear bit id % 32 of word id // 32 excludes a token.
      pointwise  point(logits, ids, value) -> logits: each logit alone, from its id [V] and the rule's first
                 parameter [B, 1]; the off value must give back the same bits, and -inf stays -inf in any case.
                 `device`: the same as a Triton function (logit, id, value) -> logit, for CUDA.

    or, for anything else, `edit(logits, context)`, which runs in torch. A rule may be sparse and a mask; the mask
    acts first. Parameters are `context.values.<field>`, each [B, 1]; rows that are off are handled here.

    Where the defaults are too slow, a sparse rule may replace `write`, and a mask `exclude`: both change a private
    buffer in place, and then have to leave rows alone that are off. `identity_when_off = True` says that the off
    value gives back the same bits, which saves a selection.
    """

    kind = "edit"
    identity_when_off = False
    listed = mask = point = None
    device: Any = None

    @functools.cached_property
    def form(self) -> str:
        """ "sparse", "mask", "sparse mask", "pointwise", or "dense" for an edit in none of these forms."""
        own = type(self)
        if own.edit is not Edit.edit or own.apply is not Edit.apply:
            return "dense"
        if self.point is not None:
            return "pointwise"
        names = ("sparse", self.listed), ("mask", self.mask)
        return " ".join(name for name, method in names if method is not None) or "dense"

    @functools.cached_property
    def in_place(self) -> bool:
        """Whether the edit can be made in a buffer of its caller."""
        return self.form not in ("dense", "pointwise")

    def unfused(self, device_type: str = "cpu", rows: Sequence[dict] = ()) -> str:
        """Why this edit cannot run in the fused sampler; empty when it can. rows: settings of the rows in use."""
        if self.form == "pointwise":
            return "" if device_type == "cpu" or self.device is not None else "it has no device function"
        if self.in_place:
            return ""
        formless = self.listed is None and self.mask is None and self.point is None
        return "it is neither sparse, a mask, nor pointwise" if formless else "it has an edit() of its own"

    def change(self, values: Tensor, ids: Tensor, context: Context) -> Tensor:
        """New logits [B, N] of the tokens ids [B, N] from their logits; a sparse edit defines it, or `write`."""
        raise NotImplementedError(
            f"{type(self).__name__} lists tokens, and defines neither change() nor write()"
        )

    def write(self, buffer: Tensor, ids: Tensor, context: Context) -> None:
        """Make a sparse edit in `buffer` [B, V + 1], in which only the logits of `ids` may be read or written.

        ids: what `listed` gave; its entries of V stand for the last column, which nobody reads.
        """
        rows_on = context.values.rows_on
        if rows_on is not None and not self.identity_when_off:
            ids = torch.where(rows_on, ids, buffer.shape[1] - 1)
        buffer.scatter_(1, ids, self.change(buffer.gather(1, ids), ids, context))

    def exclude(self, buffer: Tensor, context: Context) -> None:
        """Set what the mask excludes to -inf in `buffer` [B, V + 1]."""
        allowed = unpack_mask(self.bits(context), buffer.shape[1] - 1)
        buffer[:, :-1].masked_fill_(~allowed, NEG_INF)

    def bits(self, context: Context) -> Tensor:
        """The mask with all bits set in rows that are off."""
        mask, rows_on = self.mask(context), context.values.rows_on
        return mask if rows_on is None or self.identity_when_off else torch.where(rows_on, mask, -1)

    def edit_in_place(self, buffer: Tensor, context: Context) -> None:
        """Make a sparse or mask edit in `buffer` [B, V + 1] of logits and one column to spare."""
        if self.mask is not None:
            self.exclude(buffer, context)
        if self.listed is not None:
            self.write(buffer, self.listed(context), context)

    def edit(self, logits: Tensor, context: Context) -> Tensor:
        """Edited logits [B, V] float32; a rule that replaces it runs in torch."""
        if self.point is not None:
            ids = torch.arange(logits.shape[1], device=logits.device)
            edited = self.point(logits, ids, getattr(context.values, self.fields[0]))
            return torch.where(logits == NEG_INF, logits, edited)
        if self.listed is None and self.mask is None:
            raise NotImplementedError(f"{type(self).__name__} defines no edit()")
        buffer = torch.nn.functional.pad(logits, (0, 1))
        self.edit_in_place(buffer, context)
        return buffer[:, :-1]

    def apply(self, logits: Tensor, context: Context) -> Tensor:
        result = self.edit(logits, context)
        rows_on = context.values.rows_on
        if rows_on is None or self.identity_when_off or self.in_place:
            return result
        return torch.where(rows_on, result, logits)


class Keep(Processor):
    """A truncation rule: keep the tokens whose key is at or above a threshold; everything else becomes -inf.

    Write exactly one of
      level(statistics, value) -> [B]        threshold of the logit, from `kernels.rules.Statistics` of the row and
                                             `parameter`, all [B]; it runs in the fused sampler
      threshold(logits, context) -> [B, 1]   the threshold itself, in units of the key
      count(context) -> [B, 1] int64 >= 1    keep the count largest keys; ties with the last one are kept
      mass(context) -> [B, 1]                keep the largest keys until their probability reaches mass; ties kept
      known(context) -> Rule                 a rule of `kernels.rules`, parameters [B], off in rows that are off
    and, where the key is not the logit, key(logits, context) -> [B, V], larger is better. The token with the
    largest key is always kept. `device`: for a `level`, the same as a Triton function (see `kernels.rules.Rule`).
    """

    kind = "keep"
    keeps_argmax = True
    sampling_only = True
    level = threshold = count = mass = known = None
    device: Any = None

    def key(self, logits: Tensor, context: Context) -> Tensor:
        """What tokens are ranked by, [B, V] float32; the logit by default."""
        return logits

    @property
    def limit(self) -> str:
        """Which limit the rule declares: "level", "threshold", "count", "mass" or "known"."""
        found = [name for name in LIMITS if getattr(self, name) is not None]
        if len(found) != 1:
            raise ParameterError(
                f"{self.name} must define exactly one of {', '.join(LIMITS)}; it has {found}"
            )
        return found[0]

    def parameter(self, context: Context) -> Tensor:
        """What `level` gets as its value, [B, 1]; above 0 in rows that are on. By default the first parameter."""
        return getattr(context.values, self.fields[0])

    def unfused(self, device_type: str = "cpu", rows: Sequence[dict] = ()) -> str:
        """Why this rule cannot run in the fused sampler; empty when it can. rows: settings of the rows in use."""
        if type(self).apply is not Keep.apply:
            return "it has an apply() of its own"
        if type(self).key is not Keep.key:
            return "its key is not the logit"
        if device_type != "cpu" and self.limit == "level" and self.device is None:
            return "it has no device function"
        return "its threshold needs more than row statistics" if self.limit == "threshold" else ""

    def rule(self, context: Context) -> Rule:
        """This rule for `kernels.sample`, one parameter a row and its off value where it is off."""
        on, limit = context.values.rows_on, self.limit
        if limit == "known":
            return self.known(context)
        if limit == "level":
            off = float(self.defaults[self.fields[0]])
            value = self.parameter(context)
        else:
            off, value = (0.0, self.count(context)) if limit == "count" else (1.0, self.mass(context))
        value = value.to(torch.float32)
        parameter = (value if on is None else torch.where(on, value, off))[:, 0]
        if limit != "level":
            return Rule(limit, parameter)

        return Rule("value", parameter, self._level_or_off, self.device)

    @functools.cached_property
    def _level_or_off(self) -> Callable[[Statistics, Tensor], Tensor]:
        """`level`, with -inf for rows at the off value; one function a processor, as captured
        graphs compare it.
        """
        off = float(self.defaults[self.fields[0]])
        return lambda statistics, value: torch.where(value == off, NEG_INF, self.level(statistics, value))

    def cut(self, logits: Tensor, key: Tensor, context: Context) -> Tensor:
        """The threshold of every row in units of the key, [B, 1]."""
        limit = self.limit
        if limit == "level":
            rule = self.rule(context)
            level = rule.threshold(statistics(logits), rule.parameter)[:, None]
            return torch.minimum(level, key.amax(-1, keepdim=True))
        if limit == "threshold":
            return torch.minimum(self.threshold(logits, context), key.amax(-1, keepdim=True))
        if limit == "count":
            return count_threshold(key, self.count(context))
        return mass_threshold(logits, key, self.mass(context))

    def apply(self, logits: Tensor, context: Context) -> Tensor:
        if self.limit == "known":
            return truncate(logits, (self.rule(context),))
        key = self.key(logits, context)
        threshold = self.cut(logits, key, context)
        if context.values.rows_on is not None:
            threshold = torch.where(context.values.rows_on, threshold, NEG_INF)
        return logits.masked_fill(key < threshold, NEG_INF)


def count_threshold(key: Tensor, count: Tensor) -> Tensor:
    """The count-th largest key of every row, [B, 1]; counts are cut to 1 ... V."""
    place = count.clamp(1, key.shape[-1]) - 1
    if key.device.type == "cpu":
        return key.topk(int(place.max()) + 1, dim=-1).values.gather(-1, place)
    return key.sort(dim=-1, descending=True).values.gather(
        -1, place
    )  # reading max(count) would stop the device


def mass_threshold(logits: Tensor, key: Tensor, mass: Tensor) -> Tensor:
    """The smallest key that must be kept so that the kept probability reaches `mass`, [B, 1].

    A token is kept iff the probability of all larger keys is below mass * MASS_SHARE, summed in float64: the
    share absorbs what float32 cannot tell apart, so that .3 + .5 reaches .8.
    """
    ordered, order = key.sort(dim=-1, descending=True)
    weights = ordered if key is logits else logits.gather(-1, order)
    weights = (weights - logits.amax(-1, keepdim=True)).double().exp()
    above = weights.cumsum(-1) - weights
    needed = above < mass.double() * MASS_SHARE * weights.sum(-1, keepdim=True)
    return ordered.gather(-1, (needed.sum(-1, keepdim=True) - 1).clamp(min=0))


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
