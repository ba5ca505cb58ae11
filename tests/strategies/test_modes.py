"""Modes: what a GenerationConfig or a name asks for is the strategy, with the tokens of transformers."""

import copy
import gc
import weakref

import pytest
import torch
from helpers import text_engine, tiny_llama
from transformers import GenerationConfig

from handloom import Engine, ParameterError, SamplingParams, strategies
from handloom.cli.options import spelled, strategy_events
from handloom.strategies import generate, named
from handloom.strategies.modes import KEPT, mode

PROMPTS = [[5, 9, 17], [40], [3, 3, 8, 21, 60, 2, 11]]


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_llama(num_hidden_layers=3))


def ids(results):
    return [result.token_ids for result in results]


# fields -> the strategy, and its options
CASES = [
    ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search", {"k": 4, "alpha": 0.6}),
    ({"dola_layers": [0, 1]}, "dola", {"layers": [0, 1], "rule": "code"}),
    (
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
        "diverse_beam_search",
        {"num_beams": 4, "diversity_penalty": 1.0},
    ),
    (
        {"num_beams": 3, "force_words_ids": [[30, 31]]},
        "constrained_beam_search",
        {"num_beams": 3, "constraints": [[30, 31]]},
    ),
    ({"num_beams": 3, "length_penalty": 0.5}, "beam_search", {"num_beams": 3, "length_penalty": 0.5}),
    ({"guidance_scale": 2.0}, "classifier_free_guidance", {"guidance_scale": 2.0}),
    ({"prompt_lookup_num_tokens": 3}, "speculative", {"num_draft": 3}),
    ({"assistant_early_exit": 1}, "speculative", {}),
    ({"assistant_model": tiny_llama(num_hidden_layers=1), "num_assistant_tokens": 2}, "speculative", {}),
]


@pytest.mark.parametrize(("config", "name", "options"), CASES, ids=[name for _, name, _ in CASES])
def test_a_config_leads_to_its_strategy(engine, config, name, options):
    direct = named(name)(engine, PROMPTS, max_new_tokens=7, **options)
    assert mode(engine, config)[0] is named(name)
    assert ids(generate(engine, PROMPTS, max_new_tokens=7, **config)) == ids(direct)


@pytest.mark.parametrize(("config", "name", "options"), CASES, ids=[name for _, name, _ in CASES])
def test_engine_generate_leads_to_it(engine, config, name, options):
    """From a dict, single arguments or a GenerationConfig; one prompt gives one result."""
    direct = ids(named(name)(engine, PROMPTS, max_new_tokens=7, **options))
    assert ids(engine.generate(PROMPTS, {"max_new_tokens": 7, **config})) == direct
    assert engine.generate(PROMPTS[0], SamplingParams(max_new_tokens=7), **config).token_ids == direct[0]
    if "assistant_model" not in config:
        given = GenerationConfig(max_new_tokens=7, **config)
        events = engine.stream(PROMPTS, [given] * 3)
        assert ids(sorted((e.generation for e in events if e.generation), key=lambda g: g.request)) == direct


def test_defaults_of_the_model_lead_to_it_too(engine):
    other = copy.copy(engine)
    other.model = copy.copy(engine.model)
    other.model.generation_config = GenerationConfig(num_beams=3, repetition_penalty=1.5, max_new_tokens=3)
    direct = strategies.beam_search(engine, PROMPTS, num_beams=3, repetition_penalty=1.5, max_new_tokens=6)
    assert ids(other.generate(PROMPTS, defaults="model", max_new_tokens=6)) == ids(direct)


def test_what_is_for_every_strategy_stays_with_its_prompt(engine):
    params = [{"max_new_tokens": count, "num_beams": 2} for count in (3, 5, 4)]
    assert [r.n_new for r in engine.generate(PROMPTS, params)] == [3, 5, 4]
    with pytest.raises(ParameterError, match="one asks for beam_search, another"):
        engine.generate(PROMPTS, [*params[:2], {"num_beams": 3}])
    with pytest.raises(ParameterError, match="did you mean 'temperature'"):
        engine.generate(PROMPTS, num_beams=2, temprature=1)
    with pytest.raises(ParameterError, match=r"params=3\.5 is not SamplingParams"):
        engine.generate(PROMPTS, 3.5, num_beams=2)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "length_penalty": 0.3, "early_stopping": True, "num_return_sequences": 2},
        {"guidance_scale": 3.0},
        {"prompt_lookup_num_tokens": 4},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ],
)
def test_the_object_of_transformers_gives_its_tokens(engine, options):
    """Each prompt alone there, all of them at once here."""
    config = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0, **options)
    theirs = []
    for prompt in PROMPTS:
        found = engine.model.generate(torch.tensor([prompt]), generation_config=config)
        theirs += found[:, len(prompt) :].tolist()
    assert ids(generate(engine, PROMPTS, config)) == theirs


def test_an_assistant_gives_the_tokens_of_transformers(engine):
    """Greedy, with a repetition penalty; there one prompt at a time. A tree of drafts gives them too."""
    assistant = tiny_llama(num_hidden_layers=1)
    settings = {"max_new_tokens": 8, "repetition_penalty": 1.5}
    theirs = []
    for prompt in PROMPTS:
        found = engine.model.generate(
            torch.tensor([prompt]), assistant_model=assistant, do_sample=False, pad_token_id=0, **settings
        )
        theirs += found[:, len(prompt) :].tolist()
    assert ids(engine.generate(PROMPTS, assistant_model=assistant, **settings)) == theirs
    tree = {"draft": Engine(assistant), "num_draft": (2, 2)}
    assert ids(strategies.speculative(engine, PROMPTS, **tree, **settings)) == theirs


def test_a_draft_that_is_asked_for_again_is_made_once(engine):
    """An assistant's engine, and the first layers', are kept until another one is asked for, or the engine is gone."""
    assistants = [tiny_llama(num_hidden_layers=1) for _ in range(2)]
    asked = [{"assistant_model": a} for a in (*assistants[:1] * 2, assistants[1])] + [
        {"assistant_early_exit": 1}
    ] * 2
    drafts = [mode(engine, each)[1]["draft"] for each in asked]
    assert drafts[0] is drafts[1]
    assert [d.model for d in drafts[1:3]] == assistants
    assert drafts[3] is drafts[4]
    own = Engine(engine.model)
    mode(own, asked[0])
    assert KEPT[own][1] is not KEPT[engine][1]
    watch = weakref.ref(KEPT[own][1])
    del own
    gc.collect()
    assert watch() is None
    layers, engine.model.model.layers = engine.model.model.layers, copy.deepcopy(engine.model.model.layers)
    assert mode(engine, asked[3])[1]["draft"] is not drafts[3]  # the model's layers are others now
    engine.model.model.layers = layers


def test_a_strategy_by_name_or_as_a_function(engine):
    """`custom_generate` of `Engine.generate`: ours by name, as transformers calls them, or a function."""
    direct = ids(strategies.contrastive_search(engine, PROMPTS, k=3, alpha=0.3, max_new_tokens=5))
    for name in (
        "contrastive_search",
        "transformers-community/contrastive-search",
        strategies.contrastive_search,
    ):
        asked = {"custom_generate": name, "max_new_tokens": 5}
        assert ids(engine.generate(PROMPTS, k=3, alpha=0.3, **asked)) == direct
        assert ids(engine.generate(PROMPTS, {"penalty_alpha": 0.3, "top_k": 3, **asked})) == direct
    groups = {
        "custom_generate": "transformers-community/group-beam-search",
        "num_beams": 4,
        "num_beam_groups": 2,
    }
    direct = ids(
        strategies.diverse_beam_search(engine, PROMPTS, num_beams=4, num_beam_groups=2, max_new_tokens=5)
    )
    assert ids(engine.generate(PROMPTS, max_new_tokens=5, **groups)) == direct
    with pytest.raises(ParameterError, match="did you mean 'dola'"):
        engine.generate(PROMPTS, custom_generate="dolla")
    with pytest.raises(ParameterError, match="contrastive_search, dola"):
        engine.generate(PROMPTS, custom_generate="contrastive_search", dola_layers="low")
    with pytest.raises(ParameterError, match="unknown sampling parameter 'beta'"):
        engine.generate(PROMPTS, custom_generate="dola", beta=3)


def test_phrases_may_be_texts():
    engine = text_engine()
    asked = {"num_beams": 4, "max_new_tokens": 6}
    spelled = [engine.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("to", "be", "or")]
    by_ids = strategies.constrained_beam_search(engine, ["a"], constraints=[spelled[0], spelled[1:]], **asked)
    by_text = engine.generate(["a"], force_words_ids=["to", ["be", "or"]], **asked)
    assert ids(by_text) == ids(by_ids)
    assert "to" in by_text[0].text


def test_two_modes_are_refused(engine):
    with pytest.raises(ParameterError, match="contrastive_search, dola"):
        generate(engine, PROMPTS, penalty_alpha=0.6, top_k=4, dola_layers="low")
    with pytest.raises(ParameterError, match="no_such"):
        generate(engine, PROMPTS, no_such_field=3)


def test_what_says_nothing_is_plain_decoding(engine):
    given = {
        "num_beams": 1,
        "penalty_alpha": 0.0,
        "guidance_scale": 1,
        "num_beam_groups": 1,
        "max_new_tokens": 3,
    }
    strategy, options, _ = mode(engine, given)
    assert (strategy, options) == (Engine.generate, {})


def test_a_strategy_from_the_command_line(engine):
    """What `handloom --strategy contrastive_search -O alpha=0.3` runs: an Event a token; of beams, one a result."""
    run = strategy_events("contrastive_search", ("alpha=0.3", "k=3"))
    events = list(run(engine, PROMPTS[:1], SamplingParams(max_new_tokens=5)))
    direct = strategies.contrastive_search(engine, PROMPTS[:1], alpha=0.3, k=3, max_new_tokens=5)
    assert [event.token_id for event in events] == direct[0].token_ids
    assert [events[-1].generation.token_ids] == ids(direct)
    assert [event.finish for event in events] == [None] * 4 + ["length"]
    run = strategy_events("beam_search", ("num_beams=3", "num_return_sequences=2"))
    events = list(run(engine, PROMPTS, SamplingParams(max_new_tokens=5)))
    direct = strategies.beam_search(engine, PROMPTS, num_beams=3, num_return_sequences=2, max_new_tokens=5)
    assert [event.generation.token_ids for event in events] == ids(direct)
    assert [(event.request, event.sample) for event in events] == [(i, j) for i in range(3) for j in range(2)]
    for name, options, message in (
        ("contrastive_search", ("beta=1",), "takes name=value of k, alpha"),
        (None, ("k=1",), "name one with --strategy"),
        ("beams", (), "strategy='beams' is not known"),
    ):
        with pytest.raises(ParameterError, match=message):
            strategy_events(name, options)


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (
            "hi --strategy contrastive_search --alpha 0.6 --k=4",
            "hi --strategy contrastive_search -O alpha=0.6 -O k=4",
        ),
        ("--n 4 --strategy=smc --temperature 1", "-O n=4 --strategy=smc --temperature 1"),
        ("--strategy beam_search --num-beams 3 --top-k 5", "--strategy beam_search -O num_beams=3 --top-k 5"),
        ("hi --alpha 3", "hi --alpha 3"),
        ("--strategy no_such --alpha 3", "--strategy no_such --alpha 3"),
    ],
)
def test_options_of_a_strategy_are_options_of_the_command(given, read):
    assert spelled(given.split()) == read.split()


def test_strategies_by_name():
    assert named("contrastive_search") is strategies.contrastive_search
    assert named("smc") is strategies.smc
    with pytest.raises(ParameterError, match="did you mean 'contrastive_search'"):
        named("contrastive_serach")
    with pytest.raises(ParameterError, match="known are"):
        named("GreenList")
