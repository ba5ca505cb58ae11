"""strategies: plain functions over State values, written with public primitives alone.

A strategy is any callable `strategy(engine, prompts, params=None, **options)` that returns (or yields) its
results in the order of the prompts, each a `Generation` or a list of token ids. `Engine.generate` is one.
There is nothing to subclass and nothing to register, and `handloom.laws` checks yours as it checks these.

For instance: greedy decoding that takes the second-best token wherever the model hesitates.

    import torch

    def second_thoughts(engine, prompts, params=None, *, gap=0.1, max_new_tokens=32):
        state = engine.prefill(prompts)
        for _ in range(max_new_tokens):
            probs, ids = state.logits.softmax(-1).topk(2)           # [B, 2]
            torn = probs[:, 0] - probs[:, 1] < gap
            tokens = torch.where(torn, ids[:, 1], ids[:, 0])        # [B]
            state = engine.step(state, tokens)
        return state.new_tokens

    second_thoughts(engine, ["The sky is", "Two plus two is"])
    laws.batch_equals_solo(second_thoughts, engine, [[1, 2, 3], [4, 5]])

States are values: an older one can be continued at any time (rewind), or twice (branch); `state.select`
forks, reorders and drops rows. `Requests` adds what `SamplingParams` asks for: processors, noise, stopping.
"""

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from ..errors import ParameterError
from .acceleration.drafting.itself import JacobiDraft, early_exit
from .acceleration.drafting.texts import SuffixDraft, prompt_lookup
from .acceleration.speculative import speculative
from .acceleration.verify import Speculation
from .continuous.soft_thinking import mixture_of_inputs, soft_thinking
from .degeneration.adaptive import adaptive_contrastive_search
from .degeneration.cautious import cautious
from .degeneration.contrastive import contrastive_search
from .degeneration.simple import frustratingly_simple
from .guidance.classifier_free import classifier_free_guidance, context_aware
from .guidance.contrastive_decoding import contrastive_decoding
from .guidance.dola import dola
from .guidance.ensemble import ensemble
from .guidance.experts import experts
from .guidance.scored import scored
from .inference.aligned import grammar_aligned
from .inference.antislop import antislop
from .inference.power import power_sampling, power_smc
from .inference.rejection import weighted_rejection
from .inference.smc import smc
from .inference.tree_search import tree_search
from .kit.decode import Decoding, Now, decode
from .kit.requests import Requests
from .kit.rollout import Walk, rollout
from .modes import generate
from .search.arithmetic import arithmetic_sampling
from .search.beam import beam_search
from .search.constrained import constrained_beam_search
from .search.diverse import diverse_beam_search
from .search.lookahead import lookahead
from .search.stochastic import stochastic_beam
from .selection.bayes_risk import bayes_risk
from .selection.best_of_n import best_of_n
from .selection.chain_of_thought import chain_of_thought
from .selection.confidence import deep_confidence
from .selection.self_consistency import self_consistency
from .watermark.exponential import detect_exponential, exponential_watermark
from .watermark.green_list import GreenList
from .watermark.tournament import Tournament
from .watermark.unigram import Unigram

__all__ = [
    "Decoding",
    "GreenList",
    "JacobiDraft",
    "Now",
    "Requests",
    "Speculation",
    "SuffixDraft",
    "Tournament",
    "Unigram",
    "Walk",
    "adaptive_contrastive_search",
    "antislop",
    "arithmetic_sampling",
    "bayes_risk",
    "beam_search",
    "best_of_n",
    "cautious",
    "chain_of_thought",
    "classifier_free_guidance",
    "constrained_beam_search",
    "context_aware",
    "contrastive_decoding",
    "contrastive_search",
    "decode",
    "deep_confidence",
    "detect_exponential",
    "diverse_beam_search",
    "dola",
    "early_exit",
    "ensemble",
    "experts",
    "exponential_watermark",
    "frustratingly_simple",
    "generate",
    "grammar_aligned",
    "lookahead",
    "mixture_of_inputs",
    "named",
    "power_sampling",
    "power_smc",
    "prompt_lookup",
    "rollout",
    "scored",
    "self_consistency",
    "smc",
    "soft_thinking",
    "speculative",
    "stochastic_beam",
    "tree_search",
    "weighted_rejection",
]


def named(name: str) -> Callable[..., Any]:
    """The strategy of this name, `generate` among them.

    Raises:
        ParameterError: there is none; the message names the nearest.
    """
    known = {
        each: globals()[each]
        for each in __all__
        if inspect.isfunction(globals()[each])
        and list(inspect.signature(globals()[each]).parameters)[:2] == ["engine", "prompts"]
    }
    if name not in known:
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        raise ParameterError(f"strategy={name!r} is not known; {hint}")
    return known[name]
