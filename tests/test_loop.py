"""The decode loop: slots, replacement, sharing, independence of rows, every way to end, and what it leaves."""

import dataclasses
import gc
import math
import random

import pytest
import torch
from architectures import ARCHITECTURES, greedy_reference, prompts_of
from helpers import (
    POISON,
    assert_nothing_leaked,
    forced,
    outcome,
    poisoned,
    recorded,
    spell,
    text_engine,
    tiny_llama,
)
from tiny_tokenizers import byte_level

from handloom import Engine, SamplingParams
from handloom.errors import HandloomError
from handloom.processors import BannedTokens, LogitBias, Temperature, TopK
from handloom.stopping import Stopper

PROMPTS = prompts_of([5, 17, 1, 40, 9, 23, 16, 33])


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture
def engine(model):
    engine = Engine(model, slots=3)
    yield engine
    assert_nothing_leaked(engine)


@pytest.fixture
def texts():
    engine = text_engine(slots=3)
    yield engine
    assert_nothing_leaked(engine)


@pytest.fixture(params=[False, True], ids=["plain", "graph"])
def either(request, model):
    """An engine whose step runs as it is, or as the one device program that a CUDA graph captures."""
    engine = Engine(model, slots=3, graph=request.param)
    yield engine
    assert_nothing_leaked(engine)


@pytest.fixture(params=[False, True], ids=["plain", "graph"])
def either_texts(request):
    engine = text_engine(slots=3, graph=request.param)
    yield engine
    assert_nothing_leaked(engine)


def ids_of(generations):
    return [g.token_ids for g in generations]


# Slots


def test_a_finished_row_is_replaced_at_once(engine):
    budgets = [2, 9, 4, 5, 1, 6, 3, 1]
    prompts = prompts_of([5, 17, 2, 40, 9, 23, 16, 33])
    params = [SamplingParams(max_new_tokens=n) for n in budgets]
    with recorded(engine.model) as passes:
        results = engine.generate(prompts, params)
    assert [g.n_new for g in results] == budgets
    assert ids_of(results) == greedy_reference(engine.model, prompts, budgets)
    assert passes.prompts == [len(p) for p in prompts]
    # A slot's requests draw in turn: 0 0 3 3 3 3 3 6 6 6 | 1 1 1 1 1 1 1 1 1 7 | 2 2 2 2 4 5 5 5 5 5 5. After
    # the tenth draw request 5 is alone, with one token to come.
    assert passes.steps == [3] * 9 + [1]


def test_the_batch_shrinks_when_nobody_waits(engine):
    with recorded(engine.model) as passes:
        engine.generate(PROMPTS[:3], [SamplingParams(max_new_tokens=n) for n in (2, 4, 6)])
    assert passes.steps == [1, 3, 2, 2, 1, 1]  # the first is the prompt of one token


def test_fixed_slots_always_decode_all_of_them(model):
    with recorded(model) as passes:
        engine = Engine(model, slots=4, fixed_slots=True)
        passes.shapes.clear()
        engine.generate(PROMPTS[0], max_new_tokens=4)
    assert passes.shapes == [(1, 5), (4, 1), (4, 1), (4, 1)]


def test_the_last_token_is_not_fed(engine):
    with recorded(engine.model) as passes:
        engine.generate(PROMPTS[0], max_new_tokens=1)
    assert passes.shapes == [(1, 5)]


def test_all_samples_of_a_prompt_come_from_one_prefill(engine):
    [prompt] = prompts_of([40])
    engine = Engine(engine.model, slots=4, prefix_cache=False)
    with recorded(engine.model) as passes:
        stream = engine.stream([prompt], n=4, temperature=1.0, seed=1, max_new_tokens=3)
        next(stream)
        assert engine.pool.in_use == 2 + 4  # two full blocks together, a tail of 8 tokens for each
        drawn = [event.generation.token_ids for event in stream if event.generation]
    assert passes.prompts == [40]
    assert passes.steps == [4, 4]
    assert len(drawn) == 4
    assert_nothing_leaked(engine)


def test_samples_that_wait_for_a_slot_need_no_second_prefill(engine):
    with recorded(engine.model) as passes:
        results = engine.generate(PROMPTS[3], n=7, temperature=1.0, seed=1, max_new_tokens=4)
    assert passes.prompts == [40]
    wide = Engine(engine.model, slots=7)
    assert ids_of(wide.generate(PROMPTS[3], n=7, temperature=1.0, seed=1, max_new_tokens=4)) == ids_of(
        results
    )
    assert [g.sample for g in results] == list(range(7))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "mistral_sw"])
@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_a_prompt_in_chunks_equals_one_pass(name, chunk):
    model = ARCHITECTURES[name]()
    whole = Engine(model, slots=2)
    engine = Engine(model, slots=2, prefill_chunk=chunk, prefix_cache=False)
    with recorded(model) as passes:
        state = engine.prefill(PROMPTS[3])
    assert passes.shapes == [(1, min(chunk, 40 - at)) for at in range(0, 40, chunk)]
    torch.testing.assert_close(state.logits, whole.prefill(PROMPTS[3]).logits, atol=1e-3, rtol=0)
    del state
    answers = engine.generate(PROMPTS, max_new_tokens=6)
    assert ids_of(answers) == ids_of(whole.generate(PROMPTS, max_new_tokens=6))
    assert_nothing_leaked(engine)


def test_a_recurrent_models_prompt_is_never_cut():
    model = ARCHITECTURES["jamba"]()
    engine = Engine(model, prefill_chunk=7)
    with recorded(model) as passes:
        engine.generate(PROMPTS[3], max_new_tokens=1)
    assert passes.shapes == [(1, 40)]


def test_a_shared_beginning_is_prefilled_once(engine):
    [start] = prompts_of([37])
    prompts = [[*start, 90 + i] for i in range(4)]
    expected = greedy_reference(engine.model, prompts, 5)
    with recorded(engine.model) as passes:
        results = engine.generate(prompts, max_new_tokens=5)
    assert ids_of(results) == expected
    assert passes.prompts == [38, 38 - 32, 38 - 32, 38 - 32]  # two blocks of 16 are known
    with recorded(engine.model) as passes:
        assert ids_of(engine.generate(prompts, max_new_tokens=5)) == expected
    assert passes.prompts == [6] * 4


def test_an_answer_is_known_when_the_conversation_goes_on(engine):
    first = engine.generate(PROMPTS[0], max_new_tokens=60)
    history = PROMPTS[0] + first.token_ids + [7, 8]
    with recorded(engine.model) as passes:
        again = engine.generate(history, max_new_tokens=5)
    assert passes.prompts == [67 - 64]
    assert [again.token_ids] == greedy_reference(engine.model, [history], 5)


def test_without_the_prefix_cache_everything_is_computed(model):
    engine = Engine(model, prefix_cache=False)
    with recorded(model) as passes:
        for _ in range(2):
            engine.generate(PROMPTS[3], max_new_tokens=2)
    assert passes.prompts == [40, 40]
    assert engine.pool.cached == 0


@pytest.mark.parametrize("name", ["jamba", "llama_dynamic_ntk"])
def test_prefixes_are_not_shared_where_cells_depend_on_more_than_their_past(name):
    model = ARCHITECTURES[name]()
    engine = Engine(model, max_length=128)
    prompts = [PROMPTS[3], PROMPTS[3] + PROMPTS[1]]
    assert ids_of(engine.generate(prompts, max_new_tokens=6)) == greedy_reference(model, prompts, 6)
    assert engine.pool.cached == 0


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
    "stop_token_ids": {"forced_tokens": forced("fox"), "stop_token_ids": spell("x")},
    "ignore_eos": {"forced_tokens": {1: 1}, "ignore_eos": True, "skip_special_tokens": False},
    "eos": {"forced_tokens": {3: 1}},
    "criteria": {"criteria": (lambda progress: len(progress.token_ids) == 5,)},
    "max_time": {"max_time": 1e6},
    "processors": {"processors": (lambda logits, context: logits.roll(1, -1),)},
    "logprobs": {"logprobs": 3},
    "prompt_logprobs": {"prompt_logprobs": 0},
    "seed": {"temperature": 1.0, "seed": 99},
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
    model = tiny_llama(vocab_size=len(tokenizer))
    params = [SamplingParams(**({"seed": 7, "max_new_tokens": 12} | fields)) for fields in MIXED.values()]
    rng = random.Random(3)
    prompts = [[rng.randrange(3, 360) for _ in range(rng.randrange(15, 25))] for _ in params]
    if given == "embeddings":
        prompts = [model.get_input_embeddings().weight.detach()[p] for p in prompts]
    alone = Engine(model, tokenizer, slots=1)
    expected = [alone.generate(p, own) for p, own in zip(prompts, params, strict=True)]
    together = Engine(model, tokenizer, slots=len(params)).generate(prompts, params)
    few = Engine(model, tokenizer, slots=5).generate(prompts, params)
    late = Engine(model, tokenizer, slots=5, graph=True).generate(prompts, params)
    plain = alone.generate(prompts, seed=7, max_new_tokens=12)
    for name, one, *others, off in zip(MIXED, expected, together, few, late, plain, strict=True):
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


# How requests end


def ends(generation):
    return generation.finish_reason, generation.stop_reason, generation.text, generation.n_new


def test_every_reason_in_one_batch(either_texts):
    said = {"forced_tokens": forced("the fox jumps")}
    cases = [
        ({"max_new_tokens": 3} | said, ("length", "max_new_tokens", "the", 3)),
        ({"max_length": 6} | said, ("length", "max_length", "the ", 4)),
        ({"forced_tokens": forced("the") | {3: 1}}, ("eos", 1, "the", 4)),
        ({"stop": ["x j", "zzz"]} | said, ("stop", "x j", "the fo", 9)),
        ({"stop": "x j", "include_stop": True} | said, ("stop", "x j", "the fox j", 9)),
        ({"stop_token_ids": spell("fj")} | said, ("stop", spell("f")[0], "the ", 5)),
        ({"criteria": [enough]} | said, ("stop", "enough", "the f", 5)),
        (
            {"criteria": [lambda p: "because" if p.text == "th" else None]} | said,
            ("stop", "because", "th", 2),
        ),
        ({"allowed_tokens": spell("a"), "banned_tokens": spell("b"), "processors": [nothing_left]}, None),
    ]
    results = either_texts.generate(
        [spell("ab")] * len(cases), [SamplingParams(**fields) for fields, _ in cases]
    )
    for generation, (fields, expected) in zip(results, cases, strict=True):
        if expected is not None:
            assert ends(generation) == expected, fields
    assert results[-1].finish_reason == "error"


def enough(progress):
    return len(progress.token_ids) == 5


def nothing_left(logits, context):
    return torch.full_like(logits, -math.inf)


def test_max_time_ends_a_row_and_no_other(either_texts):
    """A criterion makes time pass: 10 s with every token of the row it watches."""
    from handloom import request as module

    now = [0.0]

    def slow(progress):
        now[0] += 10.0
        return False

    class Clocked(Stopper):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, clock=lambda: now[0], **kwargs)

    said = {"forced_tokens": forced("the fox jumps"), "max_new_tokens": 9}
    params = [
        SamplingParams(max_time=35.0, criteria=[slow], **said),
        SamplingParams(**said),
        SamplingParams(max_time=1e6, **said),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Stopper", Clocked)
        results = either_texts.generate([spell("ab")] * 3, params)
    assert ends(results[0]) == ("time", "max_time", "the ", 4)
    assert [ends(g) for g in results[1:]] == [("length", "max_new_tokens", "the fox j", 9)] * 2


def test_a_criterion_that_raises_ends_its_row_alone(either_texts):
    def broken(progress):
        if len(progress.token_ids) == 3:
            raise KeyError("mine")
        return False

    expected = either_texts.generate([spell("ab"), spell("cd")], max_new_tokens=8)
    params = [SamplingParams(max_new_tokens=8, criteria=[broken]), SamplingParams(max_new_tokens=8)]
    failed, other = either_texts.generate([spell("ab"), spell("cd")], params)
    assert failed.finish_reason == "error"
    assert "request 0" in failed.error
    assert "KeyError" in failed.error
    assert "mine" in failed.error
    assert failed.token_ids == expected[0].token_ids[:3]
    assert len(failed.logprobs) == 3
    assert outcome(other)[:4] == outcome(expected[1])[:4]


# Rows that fail


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma2", "mixtral", "gpt_neo"])
def test_a_row_with_nan_logits_ends_alone(name):
    model = poisoned(ARCHITECTURES[name]())
    engine = Engine(model, slots=3, max_length=128)
    healthy = PROMPTS[:4]
    expected = engine.generate(healthy, max_new_tokens=12)
    at_prompt = [*PROMPTS[1], POISON]
    mid_way = SamplingParams(max_new_tokens=12, forced_tokens={3: POISON})
    plain = SamplingParams(max_new_tokens=12)
    prompts = [healthy[0], at_prompt, healthy[1], PROMPTS[4], healthy[2], healthy[3]]
    results = engine.generate(prompts, [plain, plain, plain, mid_way, plain, plain])
    for generation, good in zip([results[i] for i in (0, 2, 4, 5)], expected, strict=True):
        assert outcome(generation)[:4] == outcome(good)[:4]
        assert generation.logprobs == pytest.approx(good.logprobs, abs=1e-3)
    for index, tokens in ((1, 0), (3, 4)):
        assert results[index].finish_reason == "error"
        assert f"request {index}" in results[index].error
        assert "NaN" in results[index].error
        assert results[index].n_new == len(results[index].logprobs) == tokens
    # Blocks that held NaN are used again without harm.
    engine.pool.clear_prefixes()
    again = engine.generate(healthy, max_new_tokens=12)
    assert ids_of(again) == ids_of(expected)
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_processor_that_bans_everything_ends_its_row_alone(either, temperature):
    def late(logits, context):
        return logits.masked_fill((context.output_lengths >= 2)[:, None], -math.inf)

    plain = SamplingParams(max_new_tokens=6, temperature=temperature, seed=1)
    expected = either.generate(PROMPTS[:4], plain)
    params = [plain, plain.replace(processors=[nothing_left]), plain.replace(processors=[late]), plain]
    results = either.generate(PROMPTS[:4], params)
    assert [g.finish_reason for g in results] == ["length", "error", "error", "length"]
    assert [g.n_new for g in results] == [6, 0, 2, 6]
    assert "no token is left" in results[1].error
    assert results[2].token_ids == expected[2].token_ids[:2]
    assert outcome(results[0])[:4] == outcome(expected[0])[:4]
    assert outcome(results[3])[:4] == outcome(expected[3])[:4]


def test_a_processor_that_gives_nan_for_one_row_ends_that_row(either):
    def nan(logits, context):
        return logits * math.nan

    plain = SamplingParams(max_new_tokens=4, temperature=1.0, seed=1)
    expected = either.generate(PROMPTS[:2], plain)
    results = either.generate(PROMPTS[:2], [plain, plain.replace(processors=[nan])])
    assert outcome(results[0])[:4] == outcome(expected[0])[:4]
    assert results[1].finish_reason == "error"


def test_a_prefix_function_that_raises_or_allows_nothing_costs_nobody_else_a_result(either):
    def broken(sample, ids):
        raise KeyError("mine")

    plain = SamplingParams(max_new_tokens=4)
    expected = ids_of(either.generate(PROMPTS[:3], plain))
    params = [plain, plain.replace(prefix_fn=lambda sample, ids: []), plain.replace(prefix_fn=broken)]
    results = either.generate(PROMPTS[:3], params)
    assert results[0].token_ids == expected[0]
    assert [g.finish_reason for g in results[1:]] == ["error", "error"]
    assert "mine" in results[2].error


def test_running_out_of_memory_in_a_step_keeps_what_is_finished(either):
    def full(module, args, kwargs):
        given = kwargs["input_ids"]
        if given.shape == (3, 1) and len(steps) >= 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        steps.append(given.shape)

    steps = []
    budgets = [SamplingParams(max_new_tokens=n) for n in (2, 8, 8, 8)]
    expected = either.generate(PROMPTS[:4], budgets)
    handle = either.model.register_forward_pre_hook(full, with_kwargs=True)
    try:
        results = either.generate(PROMPTS[:4], budgets)
    finally:
        handle.remove()
    assert results[0].token_ids == expected[0].token_ids
    for generation, good in zip(results[1:], expected[1:], strict=True):
        if generation.finish_reason == "error":
            assert "memory" in generation.error
            assert "slots" in generation.error
            assert generation.token_ids == good.token_ids[: generation.n_new]
        else:
            assert generation.token_ids == good.token_ids


# Interruption


def interrupting(after):
    """A stopping criterion in which Ctrl-C arrives at token number `after`."""

    def criterion(progress):
        if len(progress.token_ids) == after:
            raise KeyboardInterrupt
        return False

    return criterion


@pytest.mark.parametrize("where", ["criterion", "processor", "forward"])
def test_ctrl_c_keeps_what_is_finished(engine, where):
    budgets = [SamplingParams(max_new_tokens=n) for n in (2, 20, 3, 20, 20)]
    expected = engine.generate(PROMPTS[:5], budgets)
    calls = []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return args[0] if where == "processor" else None

    handle = None
    if where == "criterion":
        budgets[1] = budgets[1].replace(criteria=[interrupting(8)])
    elif where == "processor":
        budgets[1] = budgets[1].replace(processors=[interrupt])
    else:
        handle = engine.model.register_forward_pre_hook(interrupt)
    results = engine.generate(PROMPTS[:5], budgets)
    if handle:
        handle.remove()
    assert len(results) == 5
    assert [outcome(results[i])[:4] for i in (0, 2)] == [outcome(expected[i])[:4] for i in (0, 2)]
    assert {results[i].finish_reason for i in (1, 3, 4)} == {"cancelled"}
    for generation, good in zip(results, expected, strict=True):
        assert generation.token_ids == good.token_ids[: generation.n_new]
        assert len(generation.logprobs) == len(generation.raw_logprobs) == generation.n_new
    assert results[1].n_new >= 3
    assert results[1].params == budgets[1]
    assert_nothing_leaked(engine)
    budgets[1] = SamplingParams(max_new_tokens=20)
    assert ids_of(engine.generate(PROMPTS[:5], budgets)) == ids_of(expected)


def test_ctrl_c_before_anything_is_finished_gives_cancelled_results(either):
    params = SamplingParams(max_new_tokens=5, criteria=[interrupting(1)])
    results = either.generate(PROMPTS[:5], params)
    assert [g.finish_reason for g in results] == ["cancelled"] * 5
    assert [g.request for g in results] == [0, 1, 2, 3, 4]
    assert results[4].prompt_token_ids == PROMPTS[4]
    assert either.generate(PROMPTS[0], params).finish_reason == "cancelled"


def test_any_other_exception_gives_every_block_back(either):
    def explode(logits, context):
        raise ZeroDivisionError

    params = [SamplingParams(max_new_tokens=5), SamplingParams(max_new_tokens=5, processors=[explode])]
    with pytest.raises(ZeroDivisionError):
        either.generate([PROMPTS[3], PROMPTS[3]], params)


# A bounded pool


def test_requests_wait_for_blocks(model):
    engine = Engine(model, slots=8, max_blocks=9, prefix_cache=False)
    prompts = prompts_of([20] * 6)
    expected = ids_of(Engine(model, slots=8).generate(prompts, max_new_tokens=20))
    high = 0
    results = {}
    for event in engine.stream(prompts, max_new_tokens=20):  # 39 cells are 3 blocks each: three at a time
        high = max(high, engine.pool.in_use)
        if event.generation:
            results[event.request] = event.generation
    assert [results[i].token_ids for i in range(6)] == expected
    assert {g.finish_reason for g in results.values()} == {"length"}
    assert 6 < high <= 9
    assert_nothing_leaked(engine)


def test_a_request_that_can_never_fit_ends_with_an_error_and_the_others_finish(model):
    engine = Engine(model, slots=4, max_blocks=6)
    prompts = prompts_of([20, 200, 20, 20])
    budgets = [SamplingParams(max_new_tokens=n) for n in (20, 5, 20, 150)]
    expected = ids_of(Engine(model).generate(prompts, budgets))
    results = engine.generate(prompts, budgets)
    assert [g.finish_reason for g in results] == ["length", "error", "length", "error"]
    assert ids_of(results)[0] == expected[0]
    assert ids_of(results)[2] == expected[2]
    assert results[1].token_ids == []
    # 6 blocks hold 96 tokens: 20 of the prompt, 76 of the answer, and the one that was drawn last
    assert 75 <= results[3].n_new <= 77
    assert results[3].token_ids == expected[3][: results[3].n_new]
    for i in (1, 3):
        assert f"request {i}" in results[i].error
        assert "max_blocks=6" in results[i].error
    assert_nothing_leaked(engine)


def test_a_request_that_fits_exactly_runs(model):
    engine = Engine(model, max_blocks=2)
    [prompt] = prompts_of([20])
    generation = engine.generate(prompt, max_new_tokens=12)  # 32 cells
    assert (generation.finish_reason, generation.n_new) == ("length", 12)


def test_a_high_token_limit_does_not_make_others_wait(model):
    """What a request may take is bounded by max_length, so an unlimited answer leaves room for neighbours."""
    engine = Engine(model, slots=2, max_blocks=8, max_length=64, prefix_cache=False)
    with recorded(model) as passes:
        engine.generate(prompts_of([20, 20]), max_new_tokens=10_000)
    assert passes.steps.count(2) >= 40


def test_states_that_hold_the_pool_make_a_request_fail_not_hang(model):
    engine = Engine(model, max_blocks=4, prefix_cache=False)
    state = engine.prefill(prompts_of([60])[0])
    generation = engine.generate(PROMPTS[0], max_new_tokens=3)
    assert generation.finish_reason == "error"
    assert "drop States" in generation.error
    del state
    assert engine.generate(PROMPTS[0], max_new_tokens=3).finish_reason == "length"
    assert_nothing_leaked(engine)


def test_kept_prefixes_give_way_to_requests(model):
    engine = Engine(model, slots=2, max_blocks=6)
    for seed in range(4):
        [prompt] = prompts_of([50], seed=seed)
        generation = engine.generate(prompt, max_new_tokens=40)
        assert [generation.token_ids] == greedy_reference(model, [prompt], 40)
        assert engine.pool.in_use + engine.pool.cached <= 6
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("n", [2, 5])
def test_samples_of_an_impossible_prompt_all_end_with_the_error(model, n):
    engine = Engine(model, slots=3, max_blocks=2)
    results = engine.generate(prompts_of([60, 10]), n=n, max_new_tokens=3)
    assert [g.finish_reason for g in results] == ["error"] * n + ["length"] * n
    assert_nothing_leaked(engine)


# Nothing grows


def test_a_thousand_requests_leave_nothing_behind(texts):
    rng = random.Random(0)
    reasons = set()

    def serve(count):
        prompts = [[rng.randrange(3, 360) for _ in range(rng.randrange(1, 40))] for _ in range(count)]
        params = [
            SamplingParams(
                max_new_tokens=rng.randrange(1, 4),
                temperature=rng.choice([0.0, 1.0]),
                top_k=rng.choice([0, 10]),
                repetition_penalty=rng.choice([1.0, 1.2]),
                stop=rng.choice([(), ("a",)]),
                logprobs=rng.choice([None, 1]),
            )
            for _ in prompts
        ]
        reasons.update(g.finish_reason for g in texts.generate(prompts, params))

    def alive():
        texts.pool.clear_prefixes()
        gc.collect()
        return len(gc.get_objects())

    serve(200)
    capacity, before = texts.pool.capacity, alive()
    serve(800)
    assert len(texts.pool._prefix) <= capacity
    assert alive() - before < 100  # one object kept for each request would make 800
    assert reasons >= {"length", "stop"}
    assert texts.pool.capacity == capacity
    assert len(texts.pool._tables) == 0


# What setting up costs


class Spy:
    """A tokenizer that counts the ids it decodes and notes any look at its vocabulary."""

    def __init__(self, tokenizer):
        self._tokenizer, self.decoded, self.vocabulary = tokenizer, 0, []

    def __len__(self):
        self.vocabulary.append("len")
        return len(self._tokenizer)

    def decode(self, ids, **kwargs):
        self.decoded += len(ids)
        return self._tokenizer.decode(ids, **kwargs)

    def __getattr__(self, name):
        self.vocabulary.append(name)
        return getattr(self._tokenizer, name)


LOOKS = {"get_vocab", "vocab", "convert_ids_to_tokens", "batch_decode", "convert_tokens_to_ids", "encode"}


def test_stop_strings_cost_no_pass_over_the_vocabulary():
    spy = Spy(byte_level())
    stopper = Stopper(SamplingParams(stop=["STOP", "halt", "\n\n"]), spy, {1}, spell("the quick brown fox"))
    assert not LOOKS & set(spy.vocabulary), spy.vocabulary
    assert spy.decoded <= 64 + 6 + 7
    used = spy.decoded
    for token in spell("hello there"):
        stopper.push(token)
    assert spy.decoded - used <= 11 * 2 * 40
    assert not LOOKS & set(spy.vocabulary), spy.vocabulary


def test_requests_are_checked_before_any_is_started(engine):
    with recorded(engine.model) as passes, pytest.raises(HandloomError, match="request 1"):
        engine.generate(PROMPTS[:2], [SamplingParams(), SamplingParams(banned_tokens=[101])])
    assert passes.shapes == []
