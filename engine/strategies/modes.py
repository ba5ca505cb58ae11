"""Modes: the strategy that the fields of a transformers GenerationConfig ask for."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

from ..engine import Engine
from ..errors import ParameterError
from ..loop.generation import Event, Generation, Results
from ..loop.intake import encoded, one_params
from ..params.aliases import MODES
from ..params.reading import asks
from ..params.sampling_params import SamplingParams
from .acceleration.drafting.itself import early_exit
from .acceleration.drafting.texts import prompt_lookup
from .acceleration.speculative import speculative
from .degeneration.contrastive import contrastive_search
from .guidance.classifier_free import classifier_free_guidance
from .guidance.dola import dola
from .search.beam import beam_search
from .search.constrained import constrained_beam_search
from .search.diverse import diverse_beam_search

BEAMS = ("num_beams", "length_penalty", "early_stopping", "num_return_sequences")
GROUPS = ("num_beam_groups", "diversity_penalty")
REPOSITORIES = {
    "group-beam-search": "diverse_beam_search"
}  # of transformers-community, named otherwise than here
KEPT: WeakKeyDictionary[Engine, tuple[tuple, Engine]] = (
    WeakKeyDictionary()
)  # the last draft made for an engine


def generate(engine: Engine, prompts, config=None, **settings) -> Generation | list[Generation]:
    """Decode as a transformers GenerationConfig says, modes that transformers moved to remote code among them.

    penalty_alpha with top_k: contrastive search. dola_layers: DoLa. num_beams: beam search; with num_beam_groups
    diverse, with constraints or force_words_ids constrained. guidance_scale, negative_prompt_ids: classifier-free
    guidance. assistant_model (an Engine or a model), assistant_early_exit, prompt_lookup_num_tokens: speculative
    decoding. custom_generate: a strategy by its name (or its repository's), or a function such as `decode` helps to
    write, with its own arguments beside it. None of them: `Engine.generate`, which leads here where it is given one.

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


@dataclass(frozen=True)
class Mode:
    """A strategy with what it is to be called with."""

    engine: Engine
    strategy: Callable
    params: Any
    options: Mapping[str, Any]

    def results(self, prompts) -> Generation | Results:
        """As `Engine.generate` returns them."""
        given, single = encoded(self.engine, prompts)
        found = Results(self.strategy(self.engine, given, self.params, **self.options))
        return found[0] if single and len(found) == 1 else found

    def events(self, prompts) -> Iterator[Event]:
        """Every token as it comes, where the strategy can stream; else each result when all are there."""
        if self.strategy is Engine.generate:
            return self.engine.stream(prompts, self.params, **self.options)
        call = partial(self.strategy, self.engine, prompts, self.params, **self.options)
        if "stream" in inspect.signature(self.strategy).parameters:
            return iter(call(stream=True))
        return (
            Event(r.request, r.sample, None, r.text, finish=r.finish_reason, generation=r) for r in call()
        )


def routed(engine: Engine, params, defaults: str, overrides: Mapping[str, Any]) -> Mode:
    """What arguments of `Engine.generate` ask for.

    Raises:
        ParameterError: fields of two modes, one that nobody knows, or prompts that ask for different ones.
    """
    several = isinstance(params, list | tuple)
    asked = [spoken(engine, item, defaults, overrides) for item in (params if several else [params])]
    given = [{**fields(base), **named} for base, named in asked]
    strategy, options, rest = mode(engine, given[0])
    own = {*MODES, *given[0]} - set(rest)
    for other in given[1:]:
        if any(other.get(name) != given[0].get(name) for name in own):
            raise ParameterError(
                f"params: one asks for {strategy.__name__}, another for something else; one call runs one strategy"
            )
    found = []
    for base, named in asked:
        named = {name: value for name, value in named.items() if name not in own}
        if hasattr(base, "to_diff_dict"):
            base = copy.copy(base)
            vars(base).update(dict.fromkeys(own & vars(base).keys()))
        found.append(one_params(engine, base, False, named))
    return Mode(engine, strategy, found if several else found[0], options)


def spoken(engine: Engine, item, defaults: str, overrides: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What the parameters of a prompt start from, and what is said beside it; `one_params` takes both."""
    if item is not None and not isinstance(item, Mapping):
        return item, {**overrides}
    named = {**(item or {}), **overrides}
    if defaults != "model":
        return None, named
    return engine.model.generation_config, {"eos_token_ids": None, **named}


def fields(config) -> dict[str, Any]:
    """The fields of a GenerationConfig or a mapping that say something."""
    if not isinstance(config, Mapping) and not hasattr(config, "to_diff_dict"):
        return {}
    given = config if isinstance(config, Mapping) else config.to_diff_dict()
    return {name: value for name, value in given.items() if value is not None}


def mode(engine: Engine, given: Mapping[str, Any]) -> tuple[Callable, dict, dict]:
    """The strategy of some fields, its options, and the fields that are for every strategy."""
    rest = {name: value for name, value in given.items() if name not in MODES or asks(name, value)}
    take = rest.pop
    found: list[tuple[Callable, dict]] = []
    if take("penalty_alpha", 0) and not rest.get("do_sample"):
        found.append((contrastive_search, {"alpha": given["penalty_alpha"], "k": take("top_k", 50)}))
    if (layers := take("dola_layers", None)) is not None:
        found.append((dola, {"layers": layers, "rule": "code"}))
    beams = {name: take(name) for name in BEAMS if name in rest} if "num_beams" in rest else {}
    groups = {name: take(name) for name in GROUPS if name in rest} if "num_beam_groups" in rest else {}
    words = [take(name) for name in ("constraints", "force_words_ids") if name in rest]
    if groups:
        found.append((diverse_beam_search, beams | groups))
    elif words:
        found.append(
            (constrained_beam_search, beams | {"constraints": [phrases(c) for each in words for c in each]})
        )
    elif beams:
        found.append((beam_search, beams | {"renormalize_logits": take("renormalize_logits", None)}))
    if (scale := take("guidance_scale", None)) is not None:
        negative = take("negative_prompt_ids", rest.pop("negative_prompt", None))
        negative = negative.tolist() if hasattr(negative, "tolist") else negative
        found.append((classifier_free_guidance, {"guidance_scale": scale, "negative_prompts": negative}))
    found += speculation(engine, rest)
    if (asked := take("custom_generate", None)) is not None:
        found = custom(asked, rest, found)
    if len(found) > 1:
        names = ", ".join(strategy.__name__ for strategy, _ in found)
        raise ParameterError(f"the config asks for {names}; set the fields of one of them")
    strategy, options = found[0] if found else (Engine.generate, {})
    return strategy, options, rest


def custom(asked, rest: dict[str, Any], found: list) -> list[tuple[Callable, dict]]:
    """The strategy that is named, with the arguments that are its own, and what was found beside it."""
    name = asked if callable(asked) else asked.rpartition("/")[2]
    name = REPOSITORIES.get(name, name)
    strategy = name if callable(name) else import_module(__package__).named(name.replace("-", "_"))
    own = {each: rest.pop(each) for each in own_options(strategy) if each in rest}
    fields = next((options for other, options in found if other is strategy), {})
    return [(strategy, fields | own), *(each for each in found if each[0] is not strategy)]


def own_options(strategy: Callable) -> list[str]:
    """Names of the arguments that a strategy takes beside prompts and parameters."""
    known = inspect.signature(strategy).parameters.values()
    return [each.name for each in known if each.kind is each.KEYWORD_ONLY and each.name != "stream"]


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
        parts = tuple(map(id, engine.model.modules()))
        drafts.append((kept(engine, (layers, *parts), partial(early_exit, engine, layers)), count))
    if (model := rest.pop("assistant_model", None)) is not None:
        make = partial(Engine, model, slots=engine.slots)
        drafts.append((model if hasattr(model, "prefill") else kept(engine, (id(model),), make), count))
    return [(speculative, {"draft": draft, "num_draft": most or 5}) for draft, most in drafts]


def kept(engine: Engine, key: tuple, make: Callable[[], Engine]) -> Engine:
    """A draft of this engine's, made once: the last one is kept, with its model, as long as the engine is."""
    if KEPT.get(engine, ((),))[0] != key:
        KEPT[engine] = key, make()
    return KEPT[engine][1]
