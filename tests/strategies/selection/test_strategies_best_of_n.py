"""Best of n: one prefill, n samples, the best by log-probability or reward."""

import pytest
from helpers import assert_nothing_leaked, recorded, text_engine, tiny_llama

from handloom import Engine, ParameterError, SamplingParams, laws
from handloom.strategies import best_of_n

PROMPTS = [[5, 9, 17], [40], [3, 3, 8, 21, 60, 2, 11]]
WARM = {"temperature": 1.2, "seed": 7, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_llama(), slots=4)


def test_it_picks_the_most_probable_of_the_samples_of_generate(engine):
    samples = engine.generate(PROMPTS, n=5, **WARM)
    best = best_of_n(engine, PROMPTS, n=5, **WARM)
    assert [result.request for result in best] == [0, 1, 2]
    for i, result in enumerate(best):
        group = samples[5 * i : 5 * i + 5]
        assert len({tuple(sample.token_ids) for sample in group}) > 1
        assert result.cumulative_logprob == max(sample.cumulative_logprob for sample in group)
        assert result.token_ids == group[result.sample].token_ids


def test_score_sees_the_generation(engine):
    best = best_of_n(engine, PROMPTS, n=5, score=lambda generation: generation.sample == 3, **WARM)
    assert [result.sample for result in best] == [3, 3, 3]


def test_reward_sees_the_text():
    engine = text_engine()
    samples = engine.generate("The tree", n=6, **WARM)
    (best,) = best_of_n(engine, "The tree", n=6, reward=lambda text: -text.count("e") + len(text), **WARM)
    assert best.text == max((s.text for s in samples), key=lambda text: -text.count("e") + len(text))


def test_the_earliest_wins_ties_and_failures_lose(engine):
    best = best_of_n(engine, PROMPTS, n=4, score=lambda generation: 0.0, **WARM)
    assert [result.sample for result in best] == [0, 0, 0]


def test_each_prompt_is_prefilled_once(engine):
    with recorded(engine.model) as passes:
        best_of_n(engine, [[61, 62, 63, 64, 65]], n=4, **WARM)
    assert passes.prompts == [5]
    assert_nothing_leaked(engine)


def test_batch_equals_solo(engine):
    laws.batch_equals_solo(best_of_n, engine, PROMPTS, SamplingParams(**WARM), n=3)


def test_arguments_that_make_no_sense(engine):
    with pytest.raises(ParameterError, match="temperature"):
        best_of_n(engine, PROMPTS)
    with pytest.raises(ParameterError, match="not both"):
        best_of_n(engine, PROMPTS, reward=len, score=lambda generation: 0.0, **WARM)
