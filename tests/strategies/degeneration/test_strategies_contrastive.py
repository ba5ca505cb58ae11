"""Contrastive search against an independent, cache-free reading of its definition."""

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_nothing_leaked, poisoned, tiny_llama

from handloom import Engine, ParameterError, SamplingParams, laws
from handloom.strategies import contrastive_search

VECTORS = json.loads((Path(__file__).parents[1] / "transformers_4_49.json").read_text())
PROMPTS = [[5, 9, 17], [40], [3, 3, 8, 21, 60, 2, 11]]


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_llama())


@torch.no_grad()
def by_definition(model, prompt, count, k, alpha):
    """Equation 5 of arXiv 2202.06417, recomputing every sequence from nothing for every candidate."""
    ids = list(prompt)
    for _ in range(count):
        p = model(torch.tensor([ids]), use_cache=False).logits[0, -1].softmax(-1)
        best = None
        for v in p.topk(k).indices.tolist():
            hidden = model(
                torch.tensor([[*ids, v]]), use_cache=False, output_hidden_states=True
            ).hidden_states[-1][0]
            cosines = [float(torch.cosine_similarity(hidden[-1], h, dim=0)) for h in hidden[:-1]]
            score = (1 - alpha) * float(p[v]) - alpha * max(cosines)
            if best is None or score > best[0]:
                best = score, v
        ids.append(best[1])
    return ids[len(prompt) :]


@pytest.mark.parametrize(("k", "alpha"), [(4, 0.6), (3, 0.3), (6, 1.0)])
def test_equals_the_definition(engine, k, alpha):
    ours = contrastive_search(engine, PROMPTS, k=k, alpha=alpha, max_new_tokens=7)
    for prompt, result in zip(PROMPTS, ours, strict=True):
        assert result.token_ids == by_definition(engine.model, prompt, 7, k, alpha)
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("case", VECTORS["contrastive"], ids=lambda case: f"alpha {case['alpha']}")
def test_it_is_that_of_transformers(engine, case):
    results = contrastive_search(
        engine, [prompt for prompt, _ in case["runs"]], alpha=case["alpha"], k=case["k"], max_new_tokens=10
    )
    assert [r.token_ids for r in results] == [tokens for _, tokens in case["runs"]]


def test_it_differs_from_greedy_search_and_greedy_is_its_limit(engine):
    greedy = [r.token_ids for r in engine.generate(PROMPTS, max_new_tokens=7)]
    assert [r.token_ids for r in contrastive_search(engine, PROMPTS, max_new_tokens=7)] != greedy
    for limit in ({"alpha": 0.0}, {"k": 1}):
        assert [r.token_ids for r in contrastive_search(engine, PROMPTS, max_new_tokens=7, **limit)] == greedy


def test_batch_equals_solo(engine):
    params = [
        SamplingParams(max_new_tokens=3),
        SamplingParams(max_new_tokens=8, repetition_penalty=1.5),
        SamplingParams(max_new_tokens=6, stop_token_ids=[2, 5, 8, 11]),
    ]
    laws.batch_equals_solo(contrastive_search, engine, PROMPTS, params)


def test_logprobs_are_the_models_and_the_pipelines(engine):
    prompt = PROMPTS[0]
    (result,) = contrastive_search(engine, [prompt], max_new_tokens=1, logit_bias={5: 3.0})
    with torch.no_grad():
        logits = engine.model(torch.tensor([prompt]), use_cache=False).logits[0, -1]
    token = result.token_ids[0]
    assert result.raw_logprobs[0] == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-4)
    logits[5] += 3.0
    assert result.logprobs[0] == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-4)


def test_tokens_that_the_pipeline_excludes_are_never_taken(engine):
    """Only two tokens are allowed, so most candidates have probability 0, however unlike the past they are."""
    results = contrastive_search(engine, PROMPTS, k=6, alpha=1.0, max_new_tokens=6, allowed_tokens=[4, 8])
    assert {token for result in results for token in result.token_ids} <= {4, 8}


def test_k_larger_than_the_vocabulary():
    engine = Engine(tiny_llama(vocab_size=5))
    (result,) = contrastive_search(engine, [[1, 2]], k=50, max_new_tokens=4)
    assert result.token_ids == by_definition(engine.model, [1, 2], 4, 5, 0.6)


def test_nan_ends_its_row_alone():
    engine = Engine(poisoned(tiny_llama()))
    good, bad = contrastive_search(engine, [[5, 9], [5, 100]], max_new_tokens=4)
    assert (bad.finish_reason, bad.token_ids) == ("error", [])
    assert (good.finish_reason, good.n_new) == ("length", 4)


@pytest.mark.parametrize("options", [{"k": 0}, {"alpha": 1.5}, {"alpha": -0.1}])
def test_out_of_range_is_an_error(engine, options):
    with pytest.raises(ParameterError, match="contrastive search takes"):
        contrastive_search(engine, PROMPTS, **options)
