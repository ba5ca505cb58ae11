"""Modes: the strategy that the fields of a transformers GenerationConfig ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..engine import Engine
from ..errors import ParameterError
from ..loop.generation import Generation
from ..params.sampling_params import SamplingParams
from .acceleration.drafting import prompt_lookup
from .acceleration.early_exit import early_exit
from .acceleration.speculative import speculative
from .degeneration.contrastive import contrastive_search
from .guidance.classifier_free import classifier_free_guidance
from .guidance.dola import dola
from .search.beam import beam_search
from .search.constrained import constrained_beam_search
from .search.diverse import diverse_beam_search

BEAMS = ("num_beams", "length_penalty", "early_stopping", "num_return_sequences")


def generate(engine: Engine, prompts, config=None, **settings) -> Generation | list[Generation]:
    """Decode as a transformers GenerationConfig says, modes that transformers moved to remote code among them.

    penalty_alpha with top_k: contrastive search. dola_layers: DoLa. num_beams: beam search; with num_beam_groups
    diverse, with constraints or force_words_ids constrained. guidance_scale, negative_prompt_ids: classifier-free
    guidance. assistant_model (an Engine or a model), assistant_early_exit, prompt_lookup_num_tokens: speculative
    decoding. None of them: `Engine.generate`.

    Args:
        engine, prompts: as for `Engine.generate`.
        config: a GenerationConfig, or its fields as a mapping.
        settings: single fields, which win over the config's.

    Returns:
        What the strategy returns.

    Raises:
        ParameterError: fields of two modes, or one that nobody knows.
    """
    strategy, options, rest = mode(engine, {**fields(config), **settings})
    params = SamplingParams.from_generation_config(rest)
    return strategy(engine, prompts, params, **options)


def fields(config) -> dict[str, Any]:
    """The fields of a config that say something."""
    given = config if isinstance(config, Mapping) else {} if config is None else config.to_diff_dict()
    return {name: value for name, value in given.items() if value is not None}


def mode(engine: Engine, given: Mapping[str, Any]) -> tuple[Callable, dict, dict]:
    """The strategy of some fields, its options, and the fields that are for every strategy."""
    rest = dict(given)
    take = rest.pop
    found: list[tuple[Callable, dict]] = []
    if take("penalty_alpha", 0) and not rest.get("do_sample"):
        found.append((contrastive_search, {"alpha": given["penalty_alpha"], "k": take("top_k", 50)}))
    if (layers := take("dola_layers", None)) is not None:
        found.append((dola, {"layers": layers, "rule": "code"}))
    beams = {name: take(name) for name in BEAMS if name in rest} if rest.get("num_beams", 1) > 1 else {}
    groups = {name: take(name) for name in ("num_beam_groups", "diversity_penalty") if name in rest}
    words = [take(name) for name in ("constraints", "force_words_ids") if rest.get(name)]
    if groups.get("num_beam_groups", 1) > 1:
        found.append((diverse_beam_search, beams | groups))
    elif words:
        found.append(
            (constrained_beam_search, beams | {"constraints": [phrases(c) for each in words for c in each]})
        )
    elif beams:
        found.append((beam_search, beams))
    scale, negative = take("guidance_scale", 1) or 1, take("negative_prompt_ids", None)
    if scale != 1:
        negative = negative.tolist() if hasattr(negative, "tolist") else negative
        found.append((classifier_free_guidance, {"guidance_scale": scale, "negative_prompts": negative}))
    found += speculation(engine, rest)
    if len(found) > 1:
        names = ", ".join(strategy.__name__ for strategy, _ in found)
        raise ParameterError(f"the config asks for {names}; set the fields of one of them")
    strategy, options = found[0] if found else (Engine.generate, {})
    return strategy, options, rest


def phrases(constraint) -> list:
    """Token ids of a constraint: a list, or an object of transformers that held them."""
    return getattr(constraint, "token_ids", constraint)


def speculation(engine: Engine, rest: dict[str, Any]) -> list[tuple[Callable, dict]]:
    """Speculative decoding with the draft that the fields name."""
    count = rest.pop("num_assistant_tokens", None)
    ngram = rest.pop("max_matching_ngram_size", None) or 2
    drafts = []
    if (lookup := rest.pop("prompt_lookup_num_tokens", None)) is not None:
        drafts.append((lambda tokens, most: prompt_lookup(tokens, most, ngram), lookup))
    if (layers := rest.pop("assistant_early_exit", None)) is not None:
        drafts.append((early_exit(engine, layers), count))
    if (model := rest.pop("assistant_model", None)) is not None:
        drafts.append((model if hasattr(model, "prefill") else Engine(model, slots=engine.slots), count))
    return [(speculative, {"draft": draft, "num_draft": most or 5}) for draft, most in drafts]
