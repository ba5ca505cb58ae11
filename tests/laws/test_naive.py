"""The cache-free twin: equal to transformers, equal to the engine, and really without a cache."""

import pytest
import torch
from helpers import poisoned, recorded, text_engine, tiny_llama

from handloom import Engine, SamplingParams
from handloom.laws import naive

PROMPTS = [[5, 9, 17], [40], [3, 3, 8, 21, 60, 2, 11]]
MIXED = [
    SamplingParams(max_new_tokens=9, repetition_penalty=1.3),
    SamplingParams(max_new_tokens=6, temperature=0.9, top_p=0.8, seed=4, n=2),
    SamplingParams(max_new_tokens=12, temperature=1.2, mirostat=2, mirostat_tau=2.0, seed=9),
]


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_llama(), slots=2)


def test_greedy_equals_transformers(engine):
    for prompt, result in zip(PROMPTS, naive.generate(engine, PROMPTS, max_new_tokens=8), strict=True):
        theirs = engine.model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        assert result.token_ids == theirs[0, len(prompt) :].tolist()
        assert (result.finish_reason, result.stop_reason) == ("length", "max_new_tokens")


def test_every_parameter_means_what_it_means_in_the_loop(engine):
    ours, theirs = naive.generate(engine, PROMPTS, MIXED), engine.generate(PROMPTS, MIXED)
    assert [(r.request, r.sample) for r in ours] == [(0, 0), (1, 0), (1, 1), (2, 0)]
    assert [r.token_ids for r in ours] == [r.token_ids for r in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one.raw_logprobs == pytest.approx(other.raw_logprobs, abs=1e-4)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_each_token_costs_a_pass_over_the_whole_sequence(engine):
    with recorded(engine.model) as passes:
        naive.generate(engine, [PROMPTS[0]], max_new_tokens=4)
    assert passes.shapes == [(1, 3), (1, 4), (1, 5), (1, 6)]


def test_logprobs_by_hand(engine):
    (result,) = naive.generate(engine, [PROMPTS[0]], max_new_tokens=1, temperature=0.5, seed=1)
    logits = naive.next_logits(engine.model, [PROMPTS[0]])[0]
    token = result.token_ids[0]
    assert result.raw_logprobs[0] == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-5)
    assert result.logprobs[0] == pytest.approx(float((logits / 0.5).log_softmax(-1)[token]), abs=1e-5)


def test_embeddings_stand_for_their_ids(engine):
    embeddings = engine.model.get_input_embeddings()(torch.tensor(PROMPTS[2])).detach()
    (by_id,) = naive.generate(engine, [PROMPTS[2]], max_new_tokens=5)
    (by_vector,) = naive.generate(engine, [embeddings], max_new_tokens=5)
    assert by_vector.token_ids == by_id.token_ids
    assert by_vector.prompt_token_ids == [-1] * len(PROMPTS[2])


def test_stop_string_and_text_equal_the_loop():
    engine = text_engine()
    plain = naive.generate(engine, ["The tree"], max_new_tokens=12)[0]
    stop = plain.text[3:6]
    ours = naive.generate(engine, ["The tree"], max_new_tokens=12, stop=[stop])[0]
    theirs = engine.generate("The tree", max_new_tokens=12, stop=[stop])
    assert ours.text == theirs.text == plain.text[: plain.text.index(stop)]
    assert (ours.finish_reason, ours.stop_reason) == ("stop", stop)


def test_nan_logits_end_the_row_with_an_error():
    engine = Engine(poisoned(tiny_llama()))
    good, bad = naive.generate(engine, [[5, 9], [5, 100]], max_new_tokens=3)
    assert good.finish_reason == "length"
    assert (bad.finish_reason, bad.token_ids) == ("error", [])
    assert "NaN" in bad.error
