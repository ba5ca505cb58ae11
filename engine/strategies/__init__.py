"""Decoding strategies: plain functions over State values, written with public primitives alone.

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

from .acceleration.drafting import prompt_lookup
from .acceleration.speculative import Speculation, speculative
from .degeneration.contrastive import contrastive_search
from .guidance.classifier_free import classifier_free_guidance, context_aware
from .guidance.contrastive_decoding import contrastive_decoding
from .guidance.dola import dola
from .guidance.ensemble import ensemble
from .guidance.experts import experts
from .guidance.scored import scored
from .kit.decode import Decoding, Now, decode
from .kit.requests import Requests
from .search.arithmetic import arithmetic_sampling
from .search.beam import beam_search
from .search.constrained import constrained_beam_search
from .search.diverse import diverse_beam_search
from .search.lookahead import lookahead
from .search.stochastic import stochastic_beam
from .selection.best_of_n import best_of_n

__all__ = [
    "Decoding",
    "Now",
    "Requests",
    "Speculation",
    "arithmetic_sampling",
    "beam_search",
    "best_of_n",
    "classifier_free_guidance",
    "constrained_beam_search",
    "context_aware",
    "contrastive_decoding",
    "contrastive_search",
    "decode",
    "diverse_beam_search",
    "dola",
    "ensemble",
    "experts",
    "lookahead",
    "prompt_lookup",
    "scored",
    "speculative",
    "stochastic_beam",
]
