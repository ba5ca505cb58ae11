"""Rules that reshape the distribution: temperature and its entropy-driven kin, and quadratic smoothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...cache.transfer import upload
from ...kernels.sampling.reference import scale, temperatures
from ...kernels.sampling.rules import dynamic_temperature, entropy_temperature
from ..forms import NEG_INF, Context, Edit


class Temperature(Edit):
    """logit' = logit / T (Ackley et al. 1985). T = 0 makes the row greedy.

    Off at 1. Steps aside for rows that use `dynatemp_range` or `edt_theta`, which set the temperature
    themselves.
    """

    name = "temperature"
    defaults = {"temperature": 1.0, "dynatemp_range": 0.0, "edt_theta": 0.0}
    gives_way_to = ("dynatemp_range", "edt_theta")  # read, but of no effect without the rule that divides
    keeps_argmax = True
    sampling_only = True
    identity_when_off = True

    def on(self, settings: dict[str, Any]) -> bool:
        if "temperature" not in self.explicit and (settings["dynatemp_range"] or settings["edt_theta"]):
            return False
        return settings["temperature"] not in (0.0, 1.0)

    def pack(self, rows, context):
        values = [[row["temperature"] if self.on(row) else 1.0] for row in rows]
        return {"temperature": upload(values, context.device, torch.float32)}

    def edit(self, logits: Tensor, context: Context) -> Tensor:
        return logits / context.values.temperature


class AdaptiveTemperature(Edit):
    """A temperature that follows a row's entropy; it runs in the fused sampler, where `adaptive` says how."""

    keeps_argmax = True
    sampling_only = True

    def adaptive(self, context: Context) -> Tensor:
        """float32 [4, B], as `kernels.sample` takes it; for rows that are on."""
        raise NotImplementedError

    def candidates(self, logits: Tensor, context: Context) -> Tensor | None:
        """The number of tokens [B] that the most entropy is of; None: those that are not excluded."""
        return None

    def unfused(self, device_type: str = "cpu", rows: Sequence[dict] = ()) -> str:
        own = type(self)
        if own.edit is not AdaptiveTemperature.edit or own.apply is not Edit.apply:
            return "it has an edit() of its own"
        counts = own.candidates is not AdaptiveTemperature.candidates
        return "it counts its candidates in its own way" if counts else ""

    def edit(self, logits: Tensor, context: Context) -> Tensor:
        one = torch.ones(len(logits), device=logits.device)
        return scale(
            logits, temperatures(logits, one, self.adaptive(context), self.candidates(logits, context))
        )


class DynamicTemperature(AdaptiveTemperature):
    """Temperature from the row's entropy (kalomaze; llama.cpp): T = low + (high - low) * (H / ln n)^exponent.

    low, high = max(0, temperature -+ dynatemp_range); n = number of tokens that are not excluded. Off at
    range 0.
    """

    name = "dynatemp"
    defaults = {"dynatemp_range": 0.0, "dynatemp_exponent": 1.0, "temperature": 1.0}

    def adaptive(self, context: Context) -> Tensor:
        v = context.values
        return dynamic_temperature(v.temperature[:, 0], v.dynatemp_range[:, 0], v.dynatemp_exponent[:, 0])


class EDT(AdaptiveTemperature):
    """Entropy-based dynamic temperature (2403.14541): T = temperature * base^(theta / H). Off at theta 0."""

    name = "edt"
    defaults = {"edt_theta": 0.0, "edt_base": 0.8, "temperature": 1.0}

    def adaptive(self, context: Context) -> Tensor:
        v = context.values
        return entropy_temperature(v.temperature[:, 0], v.edt_base[:, 0], v.edt_theta[:, 0])


FARTHEST = -1e12  # its cube is a float32, which that of a finite mask such as finfo.min is not


class Smoothing(Edit):
    """Quadratic smoothing (kalomaze; text-generation-webui): with d = logit - max, k = (3-c)/2, s = (c-1)/2,
    logit' = max - k*f*d^2 + s*f*d^3. f = smoothing_factor, c = smoothing_curve. Off at factor 0.

    Per row; text-generation-webui takes the maximum over the whole batch.
    """

    name = "smoothing"
    defaults = {"smoothing_factor": 0.0, "smoothing_curve": 1.0}
    keeps_argmax = True
    sampling_only = True

    def edit(self, logits: Tensor, context: Context) -> Tensor:
        factor, curve = context.values.smoothing_factor, context.values.smoothing_curve
        top = logits.amax(-1, keepdim=True)
        d = (logits - top).clamp(min=FARTHEST)
        smoothed = top - (3 - curve) / 2 * factor * d**2 + (curve - 1) / 2 * factor * d**3
        return smoothed.masked_fill(logits == NEG_INF, NEG_INF)
