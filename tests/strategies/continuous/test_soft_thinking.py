"""Continuous inputs: embeddings in place of tokens, against passes without a cache over embeddings."""

import pytest
import torch
from architectures import ARCHITECTURES
from helpers import assert_nothing_leaked, tiny_llama

from handloom import CapabilityError, Engine, HandloomError, ParameterError, SamplingParams, laws
from handloom.strategies import mixture_of_inputs, soft_thinking

PROMPTS = [[5, 9, 17], [40], [3, 3, 8, 21, 60, 2, 11]]


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_llama())


@pytest.mark.parametrize("name", ["llama", "gemma2", "mamba", "gpt2", "falcon_h1"])
def test_a_tokens_own_embedding_is_the_token(name):
    engine = Engine(ARCHITECTURES[name]())
    state, tokens = engine.prefill(PROMPTS), [1, 2, 3]
    with torch.no_grad():
        embeddings = engine.model.get_input_embeddings()(torch.tensor(tokens))
    fed, plain = engine.step(state, tokens, embeddings=embeddings), engine.step(state, tokens)
    torch.testing.assert_close(fed.logits, plain.logits, rtol=0, atol=1e-4)
    assert fed.tokens == plain.tokens


def test_embeddings_that_do_not_fit(engine):
    state = engine.prefill(PROMPTS)
    with pytest.raises(HandloomError, match="for 3 tokens"):
        engine.step(state, [1, 2, 3], embeddings=torch.zeros(2, 32))
    alone = Engine(ARCHITECTURES["recurrent_gemma"]()) if "recurrent_gemma" in ARCHITECTURES else None
    if alone is not None:
        with pytest.raises(CapabilityError, match="embeddings cannot be fed"):
            alone.step(alone.prefill([[1]]), [1], embeddings=torch.zeros(1, 32))


@torch.no_grad()
def soft_by_definition(model, prompt, count, k, temperature):
    """arXiv 2505.15778 without a cache: top-k, a temperature, and the expected embedding behind."""
    words = model.get_input_embeddings()
    inputs, told = words(torch.tensor([prompt])), []
    for _ in range(count):
        logits = model(inputs_embeds=inputs, use_cache=False).logits[0, -1] / temperature
        best, ids = logits.topk(k)
        told.append(int(ids[0]))
        inputs = torch.cat([inputs, (best.softmax(-1) @ words.weight[ids])[None, None]], 1)
    return told


def test_soft_thinking_is_its_definition(engine):
    asked = SamplingParams(temperature=0.8, top_k=7, max_new_tokens=8)
    for prompt, result in zip(PROMPTS, soft_thinking(engine, PROMPTS, asked), strict=True):
        assert result.token_ids == soft_by_definition(engine.model, prompt, 8, 7, 0.8)
        assert result.extra == {"thought": 8}
    assert_nothing_leaked(engine)


def test_a_thought_ends_and_decoding_goes_on(engine):
    """The thought's second token is its end: from there on the same prefix is decoded as usual."""
    asked = {"temperature": 0.8, "top_k": 7, "seed": 4, "max_new_tokens": 8}
    (whole,) = soft_thinking(engine, PROMPTS[:1], **asked)
    end = whole.token_ids[1]
    (result,) = soft_thinking(engine, PROMPTS[:1], end=end, **asked)
    assert result.token_ids[:2] == whole.token_ids[:2]
    assert result.extra["thought"] == 2
    assert result.token_ids != whole.token_ids
    (cut,) = soft_thinking(engine, PROMPTS[:1], end=99, most=2, **asked)
    assert (cut.token_ids[:3], cut.extra["thought"]) == ([*whole.token_ids[:2], 99], 3)
    (cold,) = soft_thinking(engine, PROMPTS[:1], end=99, stop_entropy=50.0, stop_length=4, **asked)
    assert (cold.token_ids[3], cold.extra["thought"]) == (99, 4)


def test_mixtures_by_their_definition(engine):
    (result,) = mixture_of_inputs(engine, [[5, 9]], temperature=1.0, seed=3, beta=0.5, max_new_tokens=6)
    words = engine.model.get_input_embeddings()
    with torch.no_grad():
        inputs = words(torch.tensor([[5, 9]]))
        for token, logprob in zip(result.token_ids, result.logprobs, strict=True):
            p = engine.model(inputs_embeds=inputs, use_cache=False).logits[0, -1].softmax(-1)
            assert float(p[token].log()) == pytest.approx(logprob, abs=1e-3)
            share = float(-(p * p.log()).sum()) / torch.tensor(101.0).log()
            mixture = share * p
            mixture[token] += 0.5 + 1 - share
            inputs = torch.cat([inputs, (mixture / 1.5 @ words.weight)[None, None]], 1)


def test_settings_that_change_nothing(engine):
    greedy = [r.token_ids for r in engine.generate(PROMPTS, max_new_tokens=8)]
    only = {"temperature": 1.0, "top_k": 1, "max_new_tokens": 8}
    assert [r.token_ids for r in soft_thinking(engine, PROMPTS, **only)] == greedy
    assert [r.token_ids for r in mixture_of_inputs(engine, PROMPTS, **only)] == greedy
    warm = {"temperature": 1.0, "seed": 2, "max_new_tokens": 8}
    plain = [r.token_ids for r in engine.generate(PROMPTS, **warm)]
    assert [r.token_ids for r in mixture_of_inputs(engine, PROMPTS, beta=1e9, **warm)] == plain
    assert [r.token_ids for r in mixture_of_inputs(engine, PROMPTS, beta=0.0, **warm)] != plain


@pytest.mark.parametrize("strategy", [soft_thinking, mixture_of_inputs])
def test_batch_equals_solo(engine, strategy):
    params = [SamplingParams(max_new_tokens=n, temperature=1.0, top_p=0.9, seed=n) for n in (5, 9, 7)]
    laws.batch_equals_solo(strategy, engine, PROMPTS, params)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: soft_thinking(e, PROMPTS, stop_length=0), "stop_length and most >= 1"),
        (lambda e: mixture_of_inputs(e, PROMPTS, beta=-1), "beta >= 0"),
    ],
)
def test_out_of_range_is_an_error(engine, call, message):
    with pytest.raises(ParameterError, match=message):
        call(engine)
