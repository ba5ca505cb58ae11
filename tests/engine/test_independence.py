"""A row's tokens do not depend on what shares its batch; all parameters, seeds, and bits in fixed slots."""

import dataclasses
import random

import pytest
import torch
from architectures import prompts_of
from helpers import (
    assert_nothing_leaked,
    forced,
    outcome,
    spell,
    tiny_llama,
)
from tiny_tokenizers import byte_level

from handloom import Engine, ParameterError, SamplingParams
from handloom.pipeline.processors import BannedTokens, LogitBias, Temperature, TopK

PROMPTS = prompts_of([5, 17, 1, 40, 9, 23, 16, 33])


def ids_of(generations):
    return [g.token_ids for g in generations]


# Every parameter in one batch

MIXED = {
    "min_new_tokens": {"min_new_tokens": 9, "logit_bias": {1: 30.0}},
    "max_length": {"max_length": 26},
    "temperature": {"temperature": 0.8},
    "temperature_high": {"temperature": 3.0},
    "top_k": {"temperature": 1.5, "top_k": 4},
    "top_p": {"temperature": 1.5, "top_p": 0.7},
    "min_p": {"temperature": 1.5, "min_p": 0.2},
    "typical_p": {"temperature": 1.5, "typical_p": 0.6},
    "epsilon_cutoff": {"temperature": 1.5, "epsilon_cutoff": 0.02},
    "eta_cutoff": {"temperature": 1.5, "eta_cutoff": 0.02},
    "top_a": {"temperature": 1.5, "top_a": 0.3},
    "tfs": {"temperature": 1.5, "tfs": 0.7},
    "top_n_sigma": {"temperature": 1.5, "top_n_sigma": 1.0},
    "top_h": {"temperature": 1.5, "top_h": 0.5},
    "top_h_code": {"temperature": 1.5, "top_h": 0.5, "top_h_rule": "code"},
    "p_less": {"temperature": 1.5, "p_less": True},
    "p_less_norm": {"temperature": 1.5, "p_less": "norm"},
    "xtc": {"temperature": 1.5, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    "dynatemp": {"temperature": 1.5, "dynatemp_range": 1.0, "dynatemp_exponent": 0.5},
    "smoothing": {"temperature": 1.5, "smoothing_factor": 0.3, "smoothing_curve": 1.5},
    "edt": {"temperature": 1.5, "edt_theta": 0.5, "edt_base": 0.7},
    "mirostat1": {"temperature": 1.5, "mirostat": 1, "mirostat_tau": 3.0, "mirostat_eta": 0.3},
    "mirostat2": {"temperature": 1.5, "mirostat": 2, "mirostat_tau": 3.0, "mirostat_eta": 0.3},
    "adaptive": {"temperature": 1.5, "adaptive_target": 0.3, "adaptive_decay": 0.7},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "repetition_window": {"repetition_penalty": 1.5, "penalty_window": 3},
    "presence_penalty": {"presence_penalty": 2.0, "penalty_scope": "all"},
    "frequency_penalty": {"frequency_penalty": 1.0, "penalty_scope": "prompt"},
    "dry": {"dry_multiplier": 9.0, "dry_base": 2.0, "dry_allowed_length": 0, "dry_breakers": (7, "the")},
    "dry_window": {"dry_multiplier": 9.0, "dry_allowed_length": 0, "dry_window": 6},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "logit_bias": {"logit_bias": {5: 4.0, 300: 3.0}},
    "sequence_bias": {"sequence_bias": {(40,): 5.0, (40, 41): 50.0}},
    "banned_tokens": {"banned_tokens": tuple(range(0, 300, 2))},
    "bad_words": {"bad_words": ("the", (60, 61))},
    "allowed_tokens": {"allowed_tokens": tuple(range(30, 60)), "temperature": 1.0},
    "suppress_first": {"suppress_first": tuple(range(200))},
    "forced_tokens": {"forced_tokens": {0: 90, 4: 91}},
    "exponential_decay": {"exponential_decay": (2, 3.0)},
    "prefix_fn": {"prefix_fn": lambda sample, ids: [40 + len(ids) % 7, 60 + sample], "temperature": 1.0},
    "stop": {"forced_tokens": forced("the fox. STOP it"), "stop": ("STOP",)},
    "include_stop": {"forced_tokens": forced("the fox. STOP it"), "stop": ("STOP",), "include_stop": True},
    "watermarking_config": {"watermarking_config": {"keys": [5, 7, 11], "ngram_len": 3}, "temperature": 1.0},
    "eos_token_ids": {"forced_tokens": forced("fox"), "eos_token_ids": spell("x")},
    "stop_token_ids": {"forced_tokens": forced("fox"), "stop_token_ids": spell("x")},
    "ignore_eos": {"forced_tokens": {1: 1}, "ignore_eos": True, "skip_special_tokens": False},
    "eos": {"forced_tokens": {3: 1}},
    "criteria": {"criteria": (lambda progress: len(progress.token_ids) == 5,)},
    "max_time": {"max_time": 1e6},
    "processors": {"processors": (lambda logits, context: logits.roll(1, -1),)},
    "logprobs": {"logprobs": 3},
    "prompt_logprobs": {"prompt_logprobs": 0},
    "seed": {"temperature": 1.0, "seed": 99},
    "order": {"order": ("top_p", "temperature"), "temperature": 2.0, "top_p": 0.7},
    "hf": {"profile": "hf", "temperature": 1.5, "top_k": 10, "top_p": 0.9},
    "vllm": {"profile": "vllm", "temperature": 1.5, "min_p": 0.1, "presence_penalty": 1.0},
    "llamacpp": {"profile": "llamacpp", "temperature": 1.5, "top_k": 10, "min_p": 0.1},
    "textgen": {"profile": "textgen", "temperature": 1.5, "top_p": 0.9, "repetition_penalty": 1.2},
}
WITHOUT_A_CASE = {"n", "max_new_tokens", "profile"}


def test_the_mixed_batch_covers_every_field():
    named = {field for settings in MIXED.values() for field in settings}
    assert named | WITHOUT_A_CASE >= {f.name for f in dataclasses.fields(SamplingParams)} - {"n"}


@pytest.mark.parametrize("given", ["ids", "embeddings"])
def test_one_batch_of_all_parameters_equals_each_request_alone(given):
    tokenizer = byte_level()
    model = tiny_llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    params = [SamplingParams(**({"seed": 7, "max_new_tokens": 12} | fields)) for fields in MIXED.values()]
    rng = random.Random(3)
    prompts = [[rng.randrange(3, 360) for _ in range(rng.randrange(15, 25))] for _ in params]
    if given == "embeddings":
        prompts = [model.get_input_embeddings().weight.detach()[p] for p in prompts]
    alone = Engine(model, tokenizer, slots=1)
    expected = [alone.generate(p, own) for p, own in zip(prompts, params, strict=True)]
    together = Engine(model, tokenizer, slots=len(params)).generate(prompts, params)
    batches = [together, Engine(model, tokenizer, slots=5, graph=True).generate(prompts, params)]
    if given == "ids":
        batches.append(Engine(model, tokenizer, slots=5).generate(prompts, params))
    plain = alone.generate(prompts, seed=7, max_new_tokens=12)
    for name, one, *others, off in zip(MIXED, expected, *batches, plain, strict=True):
        assert one.finish_reason != "error", (name, one.error)
        for other in others:
            assert outcome(other)[:4] == outcome(one)[:4], name
            assert other.logprobs == pytest.approx(one.logprobs, abs=1e-3), name
            assert other.raw_logprobs == pytest.approx(one.raw_logprobs, abs=1e-3), name
        if name not in {"max_time", "logprobs", "prompt_logprobs"} and given == "ids":
            assert outcome(one)[:5] != outcome(off)[:5], f"{name} changes nothing here, so it tests nothing"


def test_parameters_of_one_row_do_not_touch_a_plain_neighbour(either_texts):
    prompt = PROMPTS[1]
    expected = either_texts.generate(prompt, max_new_tokens=12)
    for name, fields in MIXED.items():
        params = [
            SamplingParams(max_new_tokens=12),
            SamplingParams(**({"seed": 7, "max_new_tokens": 12} | fields)),
        ]
        beside = either_texts.generate([prompt, PROMPTS[0]], params)[0]
        assert outcome(beside)[:4] == outcome(expected)[:4], name
        assert beside.logprobs == pytest.approx(expected.logprobs, abs=1e-3), name


def test_own_built_in_processors_act_on_their_row_alone(either):
    plain = SamplingParams(max_new_tokens=6, temperature=1.0, seed=2)
    expected = either.generate(PROMPTS[:3], plain)
    for own in (LogitBias({5: 50.0}), Temperature(9.0), BannedTokens(list(range(60))), TopK(1)):
        biased = plain.replace(processors=[own])
        results = either.generate(PROMPTS[:3], [plain, biased, plain])
        assert [outcome(results[i])[:4] for i in (0, 2)] == [outcome(expected[i])[:4] for i in (0, 2)], own
        assert outcome(results[1])[:5] != outcome(expected[1])[:5], own


# Bits


def bits(generations):
    return [(g.token_ids, g.logprobs, g.raw_logprobs, g.finish_reason) for g in generations]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def fixed(request):
    model = tiny_llama(request.param, hidden_size=64, intermediate_size=96, num_attention_heads=8)
    return Engine(model, slots=4, fixed_slots=True)


SAMPLED = [
    SamplingParams(max_new_tokens=14, temperature=t, seed=i, top_k=k)
    for i, (t, k) in enumerate(
        [(0.0, 0), (1.0, 0), (2.0, 20), (0.0, 0), (1.3, 5), (0.7, 0), (1.0, 50), (0.0, 0)]
    )
]


def test_fixed_slots_give_the_same_bits_whatever_shares_the_batch(fixed):
    alone = [bits([fixed.generate(p, own)])[0] for p, own in zip(PROMPTS, SAMPLED, strict=True)]
    together = bits(fixed.generate(PROMPTS, SAMPLED))
    assert together == alone
    order = [6, 2, 7, 0, 3, 5, 1, 4]
    shuffled = fixed.generate([PROMPTS[i] for i in order], [SAMPLED[i] for i in order])
    assert bits(shuffled) == [alone[i] for i in order]
    crowded = fixed.generate([PROMPTS[0]] * 3 + [PROMPTS[1]], [SAMPLED[2]] * 3 + [SAMPLED[1]])
    assert bits(crowded)[3] == alone[1]
    assert_nothing_leaked(fixed)


def test_fixed_slots_give_the_same_bits_beside_a_neighbour_with_the_same_beginning(fixed):
    [start] = prompts_of([40], seed=11)
    prompt, settings = [*start, 9, 8, 7], SamplingParams(max_new_tokens=20, temperature=1.0, seed=4)
    alone = bits([fixed.generate(prompt, settings)])
    fixed.pool.clear_prefixes()
    beside = fixed.generate([[*start, 5], [*start[:20], 6], prompt], settings)
    assert bits(beside[2:]) == alone
    again = fixed.generate(prompt, settings)
    assert bits([again]) == alone
    short = start[:33]  # two whole blocks and one token
    fixed.pool.clear_prefixes()
    cold = bits([fixed.generate(short, settings)])
    assert bits([fixed.generate(short, settings)]) == cold


def test_fixed_slots_give_the_same_bits_after_a_conversation_that_begins_alike(fixed):
    settings = SamplingParams(max_new_tokens=20)
    first = fixed.generate(PROMPTS[3], max_new_tokens=30)
    longer = PROMPTS[3] + first.token_ids + [5]
    warm = bits([fixed.generate(longer, settings)])
    fixed.pool.clear_prefixes()
    assert bits([fixed.generate(longer, settings)]) == warm


def test_tokens_of_a_sampled_row_do_not_depend_on_the_number_of_slots(model):
    answers = [ids_of(Engine(model, slots=slots).generate(PROMPTS, SAMPLED)) for slots in (1, 2, 5, 8)]
    assert answers == [answers[0]] * 4


# Seeds


def test_a_seed_reproduces_and_another_differs(either):
    settings = {"temperature": 1.5, "max_new_tokens": 20}
    first = ids_of(either.generate(PROMPTS, seed=5, **settings))
    assert ids_of(either.generate(PROMPTS, seed=5, **settings)) == first
    assert ids_of(either.generate(PROMPTS, seed=6, **settings)) != first


def test_without_a_seed_each_request_draws_its_own_and_reports_it(either):
    results = either.generate([PROMPTS[0]] * 3, temperature=1.5, max_new_tokens=20)
    assert len({g.seed for g in results}) == 3
    assert len({tuple(g.token_ids) for g in results}) == 3
    for generation in results:
        again = either.generate(PROMPTS[0], temperature=1.5, max_new_tokens=20, seed=generation.seed)
        assert again.token_ids == generation.token_ids


def test_samples_of_a_request_differ_and_the_first_is_the_single_one(either):
    settings = {"temperature": 1.5, "max_new_tokens": 20, "seed": 5}
    samples = ids_of(either.generate(PROMPTS[0], n=5, **settings))
    assert len({tuple(s) for s in samples}) == 5
    assert either.generate(PROMPTS[0], **settings).token_ids == samples[0]
    assert ids_of(either.generate(PROMPTS[0], n=2, **settings)) == samples[:2]


def test_equal_requests_draw_equally(engine):
    results = engine.generate([PROMPTS[0], PROMPTS[1], PROMPTS[0]], temperature=1.5, seed=5, max_new_tokens=9)
    assert results[0].token_ids == results[2].token_ids


def test_one_seed_is_one_noise_and_a_base_gives_each_request_its_own():
    engine, prompt = Engine(tiny_llama()), PROMPTS[0]
    sampled = {"temperature": 3.0, "max_new_tokens": 10}
    same = engine.generate([prompt] * 3, seed=7, **sampled)
    assert len({tuple(g.token_ids) for g in same}) == 1
    own = engine.generate([prompt] * 3, seed="per-request:7", **sampled)
    assert len({tuple(g.token_ids) for g in own}) == len({g.seed for g in own}) == 3
    again = engine.generate([prompt] * 4, seed="per-request:7", **sampled)
    assert [g.token_ids for g in again[:3]] == [g.token_ids for g in own]
    alone = engine.generate(prompt, seed=own[2].seed, **sampled)  # what is told can be asked for
    assert alone.token_ids == own[2].token_ids
    other = engine.generate([prompt] * 3, seed="per-request:8", **sampled)
    assert not {g.seed for g in other} & {g.seed for g in own}


@pytest.mark.parametrize(
    "wrong", ["per-request", "per-request:", "per-request:-1", "per-row:7", "7", f"per-request:{2**63}"]
)
def test_a_base_that_is_none_is_refused(wrong):
    with pytest.raises(ParameterError, match=r'seed=.*"per-request:7"'):
        SamplingParams(seed=wrong)
