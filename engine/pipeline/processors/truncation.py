"""Truncation rules in the keep-form: a key, and a threshold, a count or a mass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...cache.transfer import upload
from ...kernels.noise.philox import log_reference
from ...kernels.sampling import rules
from ...kernels.sampling.reference import tail_free_threshold
from ...kernels.sampling.rules import Rule, Statistics
from ..forms import Context, Keep

SMALLEST = 1e-37  # below it, float32 loses precision


class TopK(Keep):
    """Keep the k most probable tokens (Fan et al. 2018, 1805.04833); ties with the k-th are kept.
    Off at 0.
    """

    name = "top_k"
    defaults = {"top_k": 0}

    def on(self, settings: dict[str, Any]) -> bool:
        return settings["top_k"] > 0

    def pack(self, rows, context):
        counts = [row["top_k"] if self.on(row) else 1 for row in rows]
        return {"top_k": upload(counts, context.device, None)[:, None]}

    def count(self, context: Context) -> Tensor:
        return context.values.top_k


class TopP(Keep):
    """Nucleus: the smallest set with probability >= p (Holtzman et al. 2019, 1904.09751). Off at 1."""

    name = "top_p"
    defaults = {"top_p": 1.0}

    def on(self, settings: dict[str, Any]) -> bool:
        return settings["top_p"] < 1.0

    def mass(self, context: Context) -> Tensor:
        return context.values.top_p


class MinP(Keep):
    """Keep p >= min_p * max p (Nguyen et al. 2024, 2407.01082). Off at 0."""

    name = "min_p"
    defaults = {"min_p": 0.0}
    device = "min_p_threshold"

    def level(self, statistics: Statistics, share: Tensor) -> Tensor:
        return statistics.maximum + log_reference(share.clamp(SMALLEST, 1.0))


class Typical(Keep):
    """Locally typical sampling (Meister et al. 2022, 2202.00666): mass p of the tokens whose surprise is
    nearest to the entropy, key = -|-log p - H|. Off at 1. May drop the most likely token.
    """

    name = "typical"
    defaults = {"typical_p": 1.0}
    keeps_argmax = False

    def on(self, settings: dict[str, Any]) -> bool:
        return settings["typical_p"] < 1.0

    def share(self, context: Context) -> Tensor:
        """The mass to keep, [B, 1]."""
        return context.values.typical_p

    def known(self, context: Context) -> Rule:
        return rules.typical(self.share(context)[:, 0])

    def ranking(self, logits: Tensor, context: Context) -> Tensor:
        logp = logits.log_softmax(-1)
        entropy = -(logp.exp() * logp).nansum(-1, keepdim=True)
        return -(logp + entropy).abs()


class Epsilon(Keep):
    """Keep p >= epsilon (Hewitt et al. 2022, 2210.15191). Off at 0."""

    name = "epsilon"
    defaults = {"epsilon_cutoff": 0.0}
    device = "epsilon_threshold"

    def level(self, statistics: Statistics, epsilon: Tensor) -> Tensor:
        return statistics.log_mass + epsilon.clamp(min=SMALLEST).log()


class Eta(Keep):
    """Keep p >= min(eta, sqrt(eta) * exp(-H)) (Hewitt et al. 2022, 2210.15191). Off at 0."""

    name = "eta"
    defaults = {"eta_cutoff": 0.0}
    device = "eta_threshold"

    def level(self, statistics: Statistics, eta: Tensor) -> Tensor:
        eta = eta.clamp(min=SMALLEST).log()
        return statistics.log_mass + torch.minimum(eta, 0.5 * eta - statistics.entropy)


class TopA(Keep):
    """Keep p >= a * (max p)^2 (RWKV, 2022). Off at 0."""

    name = "top_a"
    defaults = {"top_a": 0.0}
    device = "top_a_threshold"

    def level(self, statistics: Statistics, a: Tensor) -> Tensor:
        return a.clamp(min=SMALLEST).log() + 2 * statistics.maximum - statistics.log_mass


class TailFree(Keep):
    """Tail-free sampling (Bricken 2019): keep sorted tokens while the normalised |second difference| of p
    sums to at most z. Off at 1. The first token is kept and, as in text-generation-webui, the very last is
    not.
    """

    name = "tfs"
    defaults = {"tfs": 1.0}

    def on(self, settings: dict[str, Any]) -> bool:
        return settings["tfs"] < 1.0

    def rule(self, context: Context) -> Rule:
        z, on = context.values.tfs, context.values.rows_on
        return rules.tail_free((z if on is None else torch.where(on, z, 1.0))[:, 0])

    def threshold(self, logits: Tensor, context: Context) -> Tensor:
        return tail_free_threshold(logits, context.values.tfs)


class TopNSigma(Keep):
    """Keep logits within n standard deviations of the maximum (Tang et al. 2024, 2411.07641). Off at 0.

    The deviation (divisor: their number) is over the tokens that are not excluded.
    """

    name = "top_n_sigma"
    defaults = {"top_n_sigma": 0.0}
    device = "top_n_sigma_threshold"
    scale_free = True

    def level(self, statistics: Statistics, n: Tensor) -> Tensor:
        return statistics.maximum - n * statistics.deviation


class TopH(Keep):
    """Grow the sorted set while its entropy stays within alpha * H(p) (2509.02510). Off at 0.

    rule "paper": entropy of the kept set renormalised to 1, over the whole vocabulary.
    rule "code" (the authors' code and Hugging Face): the partial sum -p log p, unnormalised, over the 100
    most probable tokens renormalised; so at most 100 tokens are kept.
    """

    name = "top_h"
    defaults = {"top_h": 0.0, "top_h_rule": "paper"}

    def pack(self, rows, context):
        values = {"top_h": [[row["top_h"]] for row in rows]}
        values["code"] = [[float(row["top_h_rule"] == "code")] for row in rows]
        return {name: upload(column, context.device, None) for name, column in values.items()}

    def known(self, context: Context) -> Rule:
        v = context.values
        alpha = v.top_h if v.rows_on is None else torch.where(v.rows_on, v.top_h, 0.0)
        return rules.top_h(alpha[:, 0], v.code[:, 0])

    def ranking(self, logits: Tensor, context: Context) -> None:
        return None  # transformers' has no least number either


class PLess(Keep):
    """p-less (2509.23234): keep p >= sum p^2; "norm": p >= (V * sum p^2 - 1) / (V - 1). Off at False."""

    name = "p_less"
    defaults = {"p_less": False}
    device = "p_less_threshold"

    def pack(self, rows, context):
        modes = {False: 0.0, True: 1.0, "norm": float(context.vocab_size)}  # what `level` is told
        packed = upload([[modes[row["p_less"]]] for row in rows], context.device, None)
        return {"p_less": packed}

    def level(self, statistics: Statistics, vocab: Tensor) -> Tensor:
        least = statistics.collision
        least = torch.where(vocab > 1, (vocab * least - 1) / (vocab - 1), least)
        return statistics.log_mass + least.clamp(min=SMALLEST).log()
