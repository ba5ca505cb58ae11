"""The inspector's steps: the engine's own tokens from any prefix, whatever the pipeline remembers of it."""

import json

import pytest
from served import chat_engine

from handloom.errors import HandloomError
from handloom.experiments.analysis.trace import PAGE
from handloom.serve.inspector import steps
from handloom.serve.protocol.refusals import Refusal
from handloom.serve.worker import Aside

KINDS = {
    "stateless": {"temperature": 1.5, "top_k": 5, "repetition_penalty": 1.3},
    "remembers": {"temperature": 1.0, "mirostat": 2},
    "greedy": {},
}


def asked(engine, tell=lambda *told: None, **body):
    question = steps.read(engine, {"prompt": "the quick", "steps": 8, **body})
    return steps.answer(Aside(tell), engine, question)


@pytest.mark.parametrize("kind", KINDS)
def test_any_prefix_goes_on_as_the_whole_does(kind):
    engine, params = chat_engine(slots=2), KINDS[kind] | {"seed": 3}
    whole = asked(engine, params=params)
    tokens = engine.generate("the quick", max_new_tokens=8, **params).token_ids
    assert whole["output_ids"] == tokens
    judged = asked(engine, params=params, steps=0, prompt_logprobs=True)["prompt_logprobs"]
    assert judged[1:] == pytest.approx(
        engine.generate("the quick", max_new_tokens=1, prompt_logprobs=0).prompt_logprobs[1:], rel=1e-3
    )
    assert asked(engine, params=params, output_ids=tokens[:5], steps=3)["output_ids"] == tokens
    again = asked(engine, params=params, output_ids=tokens, first=0, steps=0)
    for one, other in zip(again["steps"], whole["steps"], strict=True):
        assert (one["token"], one["drawn"], one["greedy"]) == (other["token"], None, other["greedy"])
        assert [s["kept"] for s in one["stages"]] == [s["kept"] for s in other["stages"]]
        for a, b in zip(one["stages"], other["stages"], strict=True):
            assert a["probabilities"][:3] == pytest.approx(b["probabilities"][:3], abs=1e-4)
    engine.pool.check()
    assert engine.pool.in_use == 0


def test_a_chosen_token_is_told_apart_from_the_drawn_one():
    engine = chat_engine(slots=2)
    whole = asked(engine, params=KINDS["stateless"])
    other = next(i for i in whole["steps"][2]["candidates"] if i != whole["output_ids"][2])
    branch = asked(
        engine, params=KINDS["stateless"], output_ids=[*whole["output_ids"][:2], other], first=2, steps=1
    )
    assert (branch["steps"][0]["token"], branch["steps"][0]["drawn"]) == (other, whole["output_ids"][2])
    assert len(branch["steps"]) == 2
    assert branch["active"] == ["repetition_penalty", "temperature", "top_k"]
    moved = asked(
        engine,
        params={**KINDS["stateless"], "order": ["top_k", "temperature", "repetition_penalty"]},
        steps=1,
    )
    assert [stage["name"] for stage in moved["steps"][0]["stages"][1:]] == moved["active"]
    assert any("runs after the truncation rule top_k" in text for text in moved["warnings"])


def test_a_strategy_draws_the_steps():
    from handloom.strategies import beam_search

    engine = chat_engine(slots=2)
    prefix = asked(engine, params={}, steps=2)
    strategy = {"name": "beam_search", "num_beams": 3}
    found = asked(engine, params={}, output_ids=prefix["output_ids"], strategy=strategy, steps=4)
    ids = [*prefix["prompt_ids"], *prefix["output_ids"]]
    assert found["output_ids"][2:] == beam_search(engine, [ids], num_beams=3, max_new_tokens=4)[0].token_ids
    assert [step["token"] for step in found["steps"]] == found["output_ids"][2:]
    assert all(
        step["drawn"] in (None, step["greedy"]) for step in found["steps"]
    )  # what the loop would have said
    with pytest.raises(Refusal, match="strategy beam_search: beams is not among"):
        asked(engine, strategy={"name": "beam_search", "beams": 3})


def test_one_step_is_small_and_its_end_is_told():
    engine = chat_engine(slots=2)
    params = {
        "temperature": 1.0,
        "top_p": 0.99,
        "min_p": 0.001,
        "top_k": 300,
        "dry_multiplier": 1,
        "typical_p": 0.99,
    }
    step = asked(engine, params=params, steps=1, candidates=64)
    whole = sum(file.stat().st_size for file in PAGE.iterdir()) + len(json.dumps(step))
    assert whole < 100_000  # bytes: the page, and all that it asks to show a step
    ended = asked(engine, params={"stop_token_ids": list(range(engine.vocab_size))})
    assert ended["finish"] == "stop"
    assert len(ended["steps"]) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"steps": -1}, "steps=-1 is not valid"),
        ({"output_ids": [99999]}, "output_ids must be"),
        ({"first": 1}, "first=1"),
        ({"params": {"tempo": 1}}, "unknown sampling parameter 'tempo'"),
        ({"whatever": 1}, "unknown field 'whatever'"),
        ({"prompt": ""}, "prompt 0 is empty"),
        ({"output_ids": [5] * 600}, "leave no room"),
    ],
)
def test_what_is_wrong_is_named(body, message):
    with pytest.raises((Refusal, HandloomError), match=message):
        asked(chat_engine(slots=1), **body)
