"""Rules with memory or randomness of their own: mirostat, adaptive-p, XTC. None of them samples
inside `apply`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...cache.transfer import upload
from ...errors import ParameterError
from ...kernels.sampling.reference import truncate
from ...kernels.sampling.rules import Rule, Statistics, xtc
from ..forms import NEG_INF, Context, Edit, Keep, committed

LN2 = math.log(2.0)
SMALLEST = 1e-37  # stands for parameters of 0 and below, which say "off" to the sampler


def token_logprob(logits: Tensor, tokens: Tensor, kept: Tensor | None = None) -> Tensor:
    """log p of tokens [B] under softmax(logits), or under what `kept` leaves of it, [B].

    A token outside `kept` (one that was forced from outside) still gets a finite value.
    """
    total = (logits if kept is None else kept).logsumexp(-1)
    return logits.gather(-1, tokens[:, None])[:, 0] - total


class Mirostat(Keep):
    """Feedback control of surprise (Basu et al. 2020, 2007.14966). Off at 0.

    Version 2 keeps -log2 p <= mu. Version 1 keeps the top k, with k from mu and a Zipf exponent fitted to the
    100 most probable tokens (as llama.cpp does). mu starts at 2 * tau; each committed token of surprise s (in
    bits, under the kept distribution) moves it by -eta * (s - tau).
    """

    name = "mirostat"
    defaults = {"mirostat": 0, "mirostat_tau": 5.0, "mirostat_eta": 0.1}
    speculative_safe = False
    device = "mirostat_threshold"
    fitted = 100

    def pack(self, rows, context):
        packed = super().pack(rows, context)
        return packed | {"first_version": any(row["mirostat"] == 1 for row in rows)}

    def start(self, context: Context) -> dict[str, Tensor]:
        return {"mu": 2 * context.values.mirostat_tau[:, 0].to(torch.float32)}

    def unfused(self, device_type: str = "cpu", rows: Sequence[dict] = ()) -> str:
        return "version 1 fits the most probable tokens" if any(row["mirostat"] == 1 for row in rows) else ""

    def parameter(self, context: Context) -> Tensor:
        """mu; one that fell to 0 or below keeps the most probable token alone, as the smallest number does."""
        return context.memory["mu"][:, None].clamp(min=SMALLEST)

    def level(self, statistics: Statistics, mu: Tensor) -> Tensor:
        return statistics.log_mass - mu * LN2

    def cut(self, logits: Tensor, key: Tensor, context: Context) -> Tensor:
        mu, top = context.memory["mu"][:, None], logits.amax(-1, keepdim=True)
        log_mass = top + (logits - top).double().exp().sum(-1, keepdim=True).log()  # as the sampler has it
        second = torch.minimum(log_mass.float() - self.parameter(context) * LN2, top)
        if not context.values.first_version:
            return second
        return torch.where(context.values.mirostat == 1, self.zipf_cut(logits, mu), second)

    def zipf_cut(self, logits: Tensor, mu: Tensor) -> Tensor:
        """Version 1: the k-th largest logit, [B, 1]."""
        vocab = logits.shape[-1]
        top = logits.topk(min(self.fitted, vocab), dim=-1).values
        rank = torch.arange(1, top.shape[-1], device=logits.device, dtype=torch.float32)
        step = ((rank + 1) / rank).log()
        drop = top[:, :-1] - top[:, 1:]
        valid = drop.isfinite()
        share = (step * valid * drop.masked_fill(~valid, 0.0)).sum(-1, keepdim=True)
        zipf = share / (step**2 * valid).sum(-1, keepdim=True).clamp(min=1e-9)
        epsilon = zipf - 1
        count = (epsilon * 2**mu / (1 - float(vocab) ** -epsilon)) ** (1 / zipf)
        count = count.nan_to_num(nan=1.0, posinf=vocab).clamp(1, vocab).long()
        return logits.sort(dim=-1, descending=True).values.gather(-1, count - 1)

    def apply(self, logits: Tensor, context: Context) -> Tensor:
        kept = super().apply(logits, context)
        context.note(lambda tokens: token_logprob(logits, tokens, kept))
        return kept

    def accept(self, memory: dict[str, Tensor], tokens: Tensor, context: Context) -> dict[str, Tensor]:
        surprise = -committed(self, context)(tokens) / LN2
        v = context.values
        moved = memory["mu"] - v.mirostat_eta[:, 0] * (surprise - v.mirostat_tau[:, 0])
        return {"mu": torch.where(moved.isfinite(), moved, memory["mu"])}


class AdaptiveP(Edit):
    """Steer the probability of chosen tokens to a target (llama.cpp #17927). Off at target 0.

    With weighted sum ws and weight tw of past probabilities (decay d): a = clamp(2 * target - ws / tw, 0, 1);
    x = |p - a| / 0.3; logit' = 5 - 10 * x^2 / (1 + x). Excluded tokens stay excluded.
    """

    name = "adaptive_p"
    defaults = {"adaptive_target": 0.0, "adaptive_decay": 0.9}
    speculative_safe = False
    sampling_only = True

    def on(self, settings):
        return settings["adaptive_target"] > 0.0

    def start(self, context: Context) -> dict[str, Tensor]:
        weight = 1 / (1 - context.values.adaptive_decay[:, 0].clamp(max=0.99))
        return {"sum": context.values.adaptive_target[:, 0] * weight, "weight": weight}

    def edit(self, logits: Tensor, context: Context) -> Tensor:
        target, memory = context.values.adaptive_target, context.memory
        aim = (2 * target - (memory["sum"] / memory["weight"])[:, None]).clamp(0.0, 1.0)
        context.note(logits)
        x = (logits.softmax(-1) - aim).abs() / 0.3
        return (5 - 10 * x**2 / (1 + x)).masked_fill(logits == NEG_INF, NEG_INF)

    def accept(self, memory: dict[str, Tensor], tokens: Tensor, context: Context) -> dict[str, Tensor]:
        probability = token_logprob(committed(self, context), tokens).exp().nan_to_num(0.0)
        decay = context.values.adaptive_decay[:, 0].clamp(max=0.99)
        return {"sum": probability + decay * memory["sum"], "weight": 1 + decay * memory["weight"]}


class XTC(Keep):
    """Exclude top choices (p-e-w 2024): with a probability, drop all tokens with p >= threshold but the least
    likely of them. Off at probability 0.

    The coin of a row is Philox noise of (seed, position, stream) at a reserved counter (`draw.coin`), so it is
    reproducible, row-independent, and independent of the draw. `xtc_guard`: ids that must not be dropped
    ("eos": every end id); where one would be, the row is left alone, as text-generation-webui does.
    """

    name = "xtc"
    defaults = {"xtc_probability": 0.0, "xtc_threshold": 0.1, "xtc_guard": (), "eos_token_ids": None}
    keeps_argmax = False

    def pack(self, rows, context):
        from .constraints import id_table

        def column(field):
            return upload([[float(row[field])] for row in rows], context.device, None)

        guards = [context.ends(row) if row["xtc_guard"] == "eos" else row["xtc_guard"] for row in rows]
        table = id_table([sorted(guard) for guard in guards], context.device, -1) if any(guards) else None
        return {"chance": column("xtc_probability"), "limit": column("xtc_threshold"), "guard": table}

    def unfused(self, device_type: str = "cpu", rows: Sequence[dict] = ()) -> str:
        guarded = any(row["xtc_guard"] for row in rows)
        return "xtc_guard spares tokens" if guarded else super().unfused(device_type, rows)

    def known(self, context: Context) -> Rule:
        v = context.values
        chance = v.chance if v.rows_on is None else torch.where(v.rows_on, v.chance, 0.0)
        return xtc(v.limit[:, 0], chance[:, 0])

    def truncated(self, logits: Tensor, context: Context) -> Tensor:
        left, guard = truncate(logits, (self.rule(context),), coin_key(context)), context.values.guard
        if guard is None:
            return left
        dropped = (left != logits).gather(-1, guard.clamp(min=0)) & (guard >= 0)
        return torch.where(dropped.any(-1, keepdim=True), logits, left)


def coin_key(context: Context) -> tuple[Tensor, Tensor, Tensor]:
    """(seeds, positions, streams), int64 [B] each, that a row's coin is tossed with."""
    if context.seeds is None or context.lengths is None:
        raise ParameterError(
            "XTC needs seeds and lengths in its Context: its coin is keyed by seed and position"
        )
    streams = torch.zeros_like(context.seeds) if context.streams is None else context.streams
    return context.seeds, context.positions, streams
