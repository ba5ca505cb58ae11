"""Rows that fail, interruptions, and a pool that is too small: nothing else is lost."""

import math

import pytest
import torch
from architectures import ARCHITECTURES, greedy_reference, prompts_of
from helpers import (
    POISON,
    assert_nothing_leaked,
    nothing_left,
    outcome,
    poisoned,
    recorded,
)

from handloom import Engine, SamplingParams

PROMPTS = prompts_of([5, 17, 1, 40, 9, 23, 16, 33])


def ids_of(generations):
    return [g.token_ids for g in generations]


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
    def explode(module, inputs):
        passes.append(1)
        if len(passes) == 3:  # in the middle of decoding
            raise ZeroDivisionError

    passes = []
    handle = either.model.register_forward_pre_hook(explode)
    try:
        with pytest.raises(ZeroDivisionError):
            either.generate([PROMPTS[3], PROMPTS[3]], max_new_tokens=5)
    finally:
        handle.remove()


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
