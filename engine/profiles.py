"""Profiles: pipelines with the order, scopes and edge rules of other engines.

In every profile, tokens that tie with the last kept one are kept too. The other engines cut such ties by the
order of an unstable sort, so that their set is a subset of ours and the surplus lies at the threshold;
Hugging Face's and vLLM's top-k keep them as well. Off values are turned into handloom's when parameters are
read (`SamplingParams.from_dict`). Rules that an engine lacks are errors under its profile, not silently
dropped; constraints on single tokens are offered under each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from handloom import processors as rules
from handloom.errors import ParameterError
from handloom.pipeline import Pipeline
from handloom.processors.base import NEG_INF, Context, Processor


class ZeroFilledTopNSigma(rules.TopNSigma):
    """Top-n-sigma as text-generation-webui has it: unbiased deviation, with excluded tokens counted
    as logit 0.
    """

    level = None

    def threshold(self, logits: Tensor, context: Context) -> Tensor:
        deviation = torch.where(logits == NEG_INF, 0.0, logits).std(-1, keepdim=True)
        return logits.amax(-1, keepdim=True) - context.values.top_n_sigma * deviation


def counting_prompt(penalty: Processor) -> Processor:
    """A penalty whose "auto" scope is the whole text, prompt included."""
    penalty.auto_scope = "all"
    return penalty


def hf(params: Any) -> Pipeline:
    """transformers 5.23.0: a request's own processors come right before the temperature."""
    before = [
        rules.LogitBias(),
        rules.SequenceBias(),
        rules.RepetitionPenalty(),
        rules.NoRepeatNGram(),
        rules.BadWords(spare_eos=True),
        rules.MinNewTokens(),
        rules.PrefixFunction(),
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
    ]
    return Pipeline(
        [*before, *after],
        name="hf",
        tested_against="transformers 5.23.0",
        own_place=len(before),
        own_all_here=True,
    )


def vllm(params: Any) -> Pipeline:
    """vLLM 0.33: min-p before top-k and top-p; presence and frequency count the output alone."""
    before = [
        rules.AllowedTokens(),
        rules.BannedTokens(),
        rules.BadWords(),
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
        rules.Temperature(),
        rules.MinP(),
        rules.TopK(),
        rules.TopP(),
    ]
    return Pipeline(
        [*before, *after], name="vllm", tested_against="hand-computed tables of vLLM 0.33's rules",
        own_place=len(before), own_all_here=True,
    )  # fmt: skip


def llamacpp(params: Any) -> Pipeline:
    """llama.cpp (late 2025): temperature last, penalties over the whole text, the chain runs for greedy rows
    too.

    With mirostat, only biases and the temperature run before it, as there.
    """
    before = [
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
    chain = [
        rules.RepetitionPenalty(),
        counting_prompt(rules.FrequencyPenalty()),
        counting_prompt(rules.PresencePenalty()),
        rules.DRY(),
        rules.TopNSigma(),
        rules.TopK(),
        rules.Typical(),
        rules.TopP(),
        rules.MinP(),
        rules.XTC(),
        rules.Temperature(),
        rules.DynamicTemperature(),
        rules.AdaptiveP(),
    ]
    if getattr(params, "mirostat", 0):
        chain = [rules.Temperature(), rules.DynamicTemperature(), rules.Mirostat()]
    return Pipeline(
        [*before, *chain], name="llamacpp", tested_against="hand-computed tables of llama.cpp's rules",
        chain_when_greedy=True,
    )  # fmt: skip


def textgen(params: Any) -> Pipeline:
    """text-generation-webui, its presets' order: penalties over the whole text, temperature first."""
    before = [
        rules.LogitBias(),
        rules.SequenceBias(),
        rules.AllowedTokens(),
        rules.BannedTokens(),
        rules.BadWords(),
        rules.PrefixFunction(),
        rules.SuppressFirst(),
        rules.MinNewTokens(),
        rules.ForcedTokens(),
        rules.ExponentialDecay(),
    ]
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
    return Pipeline(
        [*before, *after], name="textgen",
        tested_against="hand-computed tables of text-generation-webui's rules",
        own_place=len(before), own_all_here=True,
    )  # fmt: skip


PROFILES: dict[str, Callable[[Any], Pipeline]] = {
    "hf": hf,
    "vllm": vllm,
    "llamacpp": llamacpp,
    "textgen": textgen,
}


def profile(name: str, params: Any = None) -> Pipeline:
    """A new pipeline of the profile `name`; `params` matter where an engine's chain depends on the request.

    Raises ParameterError for an unknown name.
    """
    if name == "default":
        return Pipeline.default()
    if name not in PROFILES:
        raise ParameterError(f"profile={name!r} is unknown; choose one of default, {', '.join(PROFILES)}")
    return PROFILES[name](params)
