"""Chains: the processors of other engines, with their order, scopes and edge rules; what profiles are made of.

Each is tested against the engine itself: `hf` against the installed transformers, the others against results
that the engine of the version in `tested_against` gave, for the same logits, parameters and texts.

In every profile, tokens that tie with the last kept one are kept too. The other engines cut such ties by the
order of an unstable sort, so that their set is a subset of ours and the surplus lies at the threshold;
Hugging Face's and vLLM's top-k keep them as well. Off values are turned into handloom's when parameters are
read (`SamplingParams.from_dict`). Rules that an engine lacks are errors under its profile, not silently
dropped; constraints on single tokens are offered under each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ParameterError
from ..kernels.sampling.rules import MASS_SHARE
from . import processors as rules
from .forms import NEG_INF, Context, Processor

HIDDEN = -2  # no token of the history, and not the -1 that pads tables of sequences


class ZeroFilledTopNSigma(rules.TopNSigma):
    """Top-n-sigma as text-generation-webui has it: unbiased deviation, with excluded tokens counted
    as logit 0.
    """

    name = "top_n_sigma"
    level = None

    def threshold(self, logits: Tensor, context: Context) -> Tensor:
        deviation = torch.where(logits == NEG_INF, 0.0, logits).std(-1, keepdim=True)
        return logits.amax(-1, keepdim=True) - context.values.top_n_sigma * deviation


class WarmTemperature(rules.Temperature):
    """Temperature as vLLM has it: what lies between 0 and .01 counts as .01."""

    name = "temperature"

    def pack(self, rows: list[dict[str, Any]], context: Context) -> dict[str, Any]:
        return {field: value.clamp(min=0.01) for field, value in super().pack(rows, context).items()}


class OutputBadWords(rules.BadWords):
    """Bad words as vLLM has them: the beginning of a word counts in the output alone, not in the prompt."""

    name = "bad_words"

    def listed(self, context: Context) -> Tensor:
        output = copy.copy(context)
        cells = torch.arange(context.history.shape[1], device=context.history.device)
        output.tokens = context.history.masked_fill(cells < context.prompt_lengths[:, None], HIDDEN)
        return super().listed(output)


class ListedXTC(rules.XTC):
    """XTC that leaves word of how many candidates it took from the list, see `ListedDynamicTemperature`."""

    name = "xtc"

    def apply(self, logits: Tensor, context: Context) -> Tensor:
        left = super().apply(logits, context)
        context.cache["dropped by xtc"] = (left != logits).sum(-1, keepdim=True)
        return left


class ListedDynamicTemperature(rules.DynamicTemperature):
    """Dynamic temperature as llama.cpp has it: n is the length of its list of candidates.

    Top-k, typical, top-p, min-p and XTC shorten that list; bans and top-n-sigma leave excluded tokens in it.
    """

    name = "dynatemp"
    defaults = rules.DynamicTemperature.defaults | {"top_k": 0, "typical_p": 1.0, "top_p": 1.0, "min_p": 0.0}

    def candidates(self, logits: Tensor, context: Context) -> Tensor:
        v, left = context.values, (logits > NEG_INF).sum(-1, keepdim=True)
        vocab = logits.shape[-1]
        listed = torch.where(v.top_k > 0, v.top_k, vocab).clamp(max=vocab)
        listed = listed - context.cache.get("dropped by xtc", 0)
        shortened = (v.typical_p < 1) | (v.top_p < 1) | (v.min_p > 0)
        return torch.where(shortened, left, torch.maximum(left, listed))[:, 0]


class StrictTypical(rules.Typical):
    """Typical as llama.cpp has it: a set of exactly the mass asked for is not enough."""

    name = "typical"

    def share(self, context: Context) -> Tensor:
        return context.values.typical_p / MASS_SHARE**2


class ForcingPrefix(rules.PrefixFunction):
    """A prefix function as transformers has it: where all it allows is excluded already, it is forced, with score 0.

    Of the beams of one prompt none is forced while another has a token left.
    """

    name = "prefix_fn"

    def edit(self, logits: Tensor, context: Context) -> Tensor:
        left, answers = logits.clone(), self.answers(context)
        for row, allowed in enumerate(answers):
            if allowed is not None:
                kept = left[row, allowed]
                left[row] = NEG_INF
                left[row, allowed] = kept
        dead = (left == NEG_INF).all(-1).unflatten(0, (-1, context.beams)).all(-1)
        for row in dead.repeat_interleave(context.beams).nonzero().flatten().tolist():
            if answers[row]:
                left[row, answers[row]] = 0.0
        return left


def counting_prompt(penalty: Processor) -> Processor:
    """A penalty whose "auto" scope is the whole text, prompt included."""
    penalty.auto_scope = "all"
    return penalty


def constraints() -> list[Processor]:
    """What llama.cpp and text-generation-webui apply before all penalties and filters."""
    return [
        rules.LogitBias(),
        rules.SequenceBias(),
        rules.AllowedTokens(),
        rules.BannedTokens(),
        rules.BadWords(),
        rules.PrefixFunction(),
        rules.SuppressFirst(),
        rules.MinNewTokens(),
        rules.ForcedTokens(),
    ]


class Chain(NamedTuple):
    """Another engine's processors, in order.

    tested_against: the engine, and the version of it. before, after: its processors; a request's own ones stand
    between them, whatever they are, if `own_between`. chain_when_greedy: as for `Pipeline`.
    """

    name: str
    tested_against: str
    before: list[Processor]
    after: list[Processor]
    own_between: bool = True
    chain_when_greedy: bool = False


def hf(params: Any) -> Chain:
    """transformers 5.23.0: a request's own processors come right before the temperature."""
    before = [
        rules.LogitBias(),
        rules.SequenceBias(),
        rules.RepetitionPenalty(),
        rules.NoRepeatNGram(),
        rules.BadWords(spare_eos=True),
        rules.MinNewTokens(),
        ForcingPrefix(),
        rules.ForcedTokens(),
        rules.ExponentialDecay(),
        rules.AllowedTokens(),
        rules.BannedTokens(),
        rules.SuppressFirst(),
    ]
    after = [
        rules.Temperature(),
        rules.TopH(top_h_rule="code"),
        rules.TopK(),
        rules.TopP(),
        rules.MinP(),
        rules.Typical(),
        rules.Epsilon(),
        rules.Eta(),
        rules.TransformersWatermark(),
    ]
    return Chain("hf", "transformers 5.23.0", before, after)


def vllm(params: Any) -> Chain:
    """vLLM 0.33.0: min-p before top-k and top-p; presence, frequency and bad words see the output alone."""
    before = [
        rules.AllowedTokens(),
        rules.BannedTokens(),
        OutputBadWords(),
        rules.SequenceBias(),
        rules.PrefixFunction(),
        rules.SuppressFirst(),
        rules.MinNewTokens(),
        rules.LogitBias(),
        rules.ForcedTokens(),
    ]
    after = [
        rules.RepetitionPenalty(),
        rules.FrequencyPenalty(),
        rules.PresencePenalty(),
        WarmTemperature(),
        rules.MinP(),
        rules.TopK(),
        rules.TopP(),
    ]
    return Chain("vllm", "vLLM 0.33.0", before, after)


def llamacpp(params: Any) -> Chain:
    """llama.cpp b11549: temperature last, penalties over the whole text, the chain runs for greedy rows too.

    With mirostat, only biases and the temperature run before it, as there. Two accidents of its arithmetic
    are not copied: typical after top-n-sigma (its entropy is NaN there) and the count of mirostat 1 beyond
    the largest int32.
    """
    chain = [
        rules.RepetitionPenalty(),
        counting_prompt(rules.FrequencyPenalty()),
        counting_prompt(rules.PresencePenalty()),
        rules.DRY(),
        rules.TopNSigma(),
        rules.TopK(),
        StrictTypical(),
        rules.TopP(),
        rules.MinP(),
        ListedXTC(),
        rules.Temperature(),
        ListedDynamicTemperature(),
        rules.AdaptiveP(),
    ]
    if getattr(params, "mirostat", 0):
        chain = [rules.Temperature(), rules.Mirostat()]
    options = {"own_between": False, "chain_when_greedy": True}
    return Chain("llamacpp", "llama.cpp b11549", constraints(), chain, **options)


def textgen(params: Any) -> Chain:
    """text-generation-webui 4.7.3, its presets' order: penalties over the whole text, temperature first.

    There, XTC spares the newline token besides the end tokens; here, only a tokenizer could tell which that is.
    """
    before = [*constraints(), rules.ExponentialDecay()]
    after = [
        rules.RepetitionPenalty(),
        counting_prompt(rules.PresencePenalty()),
        counting_prompt(rules.FrequencyPenalty()),
        rules.DRY(),
        ZeroFilledTopNSigma(),
        rules.Temperature(),
        rules.DynamicTemperature(),
        rules.Smoothing(),
        rules.TopK(),
        rules.TopP(),
        rules.Typical(),
        rules.Epsilon(),
        rules.Eta(),
        rules.TailFree(),
        rules.TopA(),
        rules.MinP(),
        rules.AdaptiveP(),
        rules.Mirostat(),
        rules.XTC(xtc_guard="eos"),
        rules.NoRepeatNGram(),
    ]
    return Chain("textgen", "text-generation-webui 4.7.3", before, after)


CHAINS: dict[str, Callable[[Any], Chain]] = {
    "hf": hf,
    "vllm": vllm,
    "llamacpp": llamacpp,
    "textgen": textgen,
}


def chain_of(name: str, params: Any = None) -> Chain:
    """New processors of the engine `name`; `params` matter where its chain depends on the request.

    Raises ParameterError for an unknown name.
    """
    if name not in CHAINS:
        raise ParameterError(f"profile={name!r} is unknown; choose one of default, {', '.join(CHAINS)}")
    return CHAINS[name](params)
