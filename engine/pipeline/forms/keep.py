"""Keeps: truncation rules, by a threshold, a count or a mass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ParameterError
from ...kernels.sampling.reference import statistics, truncate
from ...kernels.sampling.rules import MASS_SHARE, Rule, Statistics
from .context import Context
from .processor import NEG_INF, Processor, is_ours

LIMITS = ("level", "threshold", "count", "mass", "known")


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
    largest key is always kept; but a limit of NaN keeps nothing, and ends its row. `device`: for a `level`, the same
    as a Triton function (see `kernels.rules.Rule`).
    """

    kind = "keep"
    leaves_off_rows = True
    keeps_argmax = True
    sampling_only = True
    scale_free = False  # True: whatever positive number a row is divided by, it keeps the same tokens
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

        def level(statistics: Statistics, value: Tensor) -> Tensor:
            return torch.where(value == off, NEG_INF, self.level(statistics, value))

        level.__name__ = self.name
        return level

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

    def ranking(self, logits: Tensor, context: Context) -> Tensor | None:
        """By what `context.least` tokens are spared, [B, V], larger is better; None: it spares none."""
        return self.key(logits, context)

    def apply(self, logits: Tensor, context: Context) -> Tensor:
        left = self.truncated(logits, context)
        ranking = None if context.least is None else self.ranking(logits, context)
        if ranking is None:
            return left
        return torch.where(ranking >= count_threshold(ranking, context.least), logits, left)

    def truncated(self, logits: Tensor, context: Context) -> Tensor:
        """The logits [B, V] with everything but the kept tokens excluded."""
        if self.limit == "known":
            return truncate(logits, (self.rule(context),))
        key = self.key(logits, context)
        threshold = self.cut(logits, key, context)
        if context.values.rows_on is not None:
            threshold = torch.where(context.values.rows_on, threshold, NEG_INF)
        if not is_ours(self):
            suspects = context.cache.setdefault("suspects", [])
            suspects.append(
                (f"processor {self.name!r} gave NaN as its {self.limit}", threshold[:, 0].isnan())
            )
        return logits.masked_fill(~(key >= threshold), NEG_INF)


def count_threshold(key: Tensor, count: Tensor) -> Tensor:
    """The count-th largest key of every row, [B, 1]; counts are cut to 1 ... V."""
    place = count.clamp(1, key.shape[-1]) - 1
    if key.device.type == "cpu":
        return key.topk(int(place.max()) + 1, dim=-1).values.gather(-1, place)
    return key.sort(dim=-1, descending=True).values.gather(
        -1, place
    )  # reading max(count) would stop the device


def mass_threshold(logits: Tensor, key: Tensor, mass: Tensor) -> Tensor:
    """The smallest key that must be kept so that the kept probability reaches `mass`, [B, 1]; NaN for a mass of NaN.

    A token is kept iff the probability of all larger keys is below mass * MASS_SHARE, summed in float64: the
    share absorbs what float32 cannot tell apart, so that .3 + .5 reaches .8.
    """
    ordered, order = key.sort(dim=-1, descending=True)
    weights = ordered if key is logits else logits.gather(-1, order)
    weights = (weights - logits.amax(-1, keepdim=True)).double().exp()
    above = weights.cumsum(-1) - weights
    needed = above < mass.double() * MASS_SHARE * weights.sum(-1, keepdim=True)
    last = ordered.gather(-1, (needed.sum(-1, keepdim=True) - 1).clamp(min=0))
    return last.where(~mass.isnan(), torch.nan)
