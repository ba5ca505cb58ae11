"""Prompts computed together: the rows and tokens of prompts computed alone, whom a pass takes, and what it costs."""

import pytest
import torch
from architectures import ARCHITECTURES, prompts_of
from helpers import POISON, assert_nothing_leaked, outcome, poisoned, tiny_llama

from handloom import Engine, SamplingParams
from handloom.forward.model import Model
from handloom.loop import prefill as prefilling

LENGTHS = [7, 3, 11, 1, 20, 9, 33, 2]


@pytest.fixture
def passes(monkeypatch):
    """[(rows, tokens of the widest row) of every pass that took prompts together]"""
    found, original = [], Model.prefill_together

    def counted(self, prompts, rooms):
        found.append((len(prompts), max(map(len, prompts))))
        return original(self, prompts, rooms)

    monkeypatch.setattr(Model, "prefill_together", counted)
    return found


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gpt_oss", "gpt2", "mixtral", "mistral_sw", "bloom", "phi"]
)
def test_answers_are_those_of_prompts_computed_alone(passes, name):
    model, prompts = ARCHITECTURES[name](), prompts_of(LENGTHS)
    params = [SamplingParams(max_new_tokens=6, temperature=float(i % 2), seed=i) for i in range(len(prompts))]
    engine = Engine(model, slots=4, max_length=64)
    answers = engine.generate(prompts, params)
    assert passes != [] or engine.capabilities.path != "attention"
    alone = [
        Engine(model, slots=1, max_length=64).generate(p, q) for p, q in zip(prompts, params, strict=True)
    ]
    assert [a.token_ids for a in answers] == [a.token_ids for a in alone]
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "gpt2"])
def test_rows_and_logits_of_a_pass_are_those_of_each_prompt(name):
    engine, prompts = Engine(ARCHITECTURES[name](), max_length=64), prompts_of(LENGTHS)
    rows, logits = engine.runner.prefill_together(prompts, [0] * len(prompts))
    for prompt, row, have in zip(prompts, rows, logits, strict=True):
        fresh, out = Engine(engine.model, max_length=64).runner.prefill(prompt)
        want = out.logits[0, -1]
        assert (have - want).abs().max() <= 1e-5 * want.std().clamp_min(1)
        assert (row.length, row.prompt_length, row.history.tolist()) == (len(prompt), len(prompt), prompt)
        assert len(row.table) == len(fresh.table)


def test_the_output_layer_sees_the_last_token_of_each_row_alone():
    engine, shapes = Engine(tiny_llama(), max_length=64), []
    hook = engine.model.lm_head.register_forward_hook(
        lambda layer, inputs, out: shapes.append(tuple(out.shape))
    )
    engine.runner.prefill_together(prompts_of([4, 9, 1]), [0, 0, 0])
    hook.remove()
    assert shapes == [(3, 1, engine.vocab_size)]
    assert not engine.model.lm_head._forward_pre_hooks


def test_a_model_that_hides_its_output_layer_is_right_all_the_same(monkeypatch):
    engine, prompts = Engine(tiny_llama(), max_length=64), prompts_of([4, 9, 1])
    want = engine.runner.prefill_together(prompts, [0, 0, 0])[1]
    monkeypatch.setattr(type(engine.model), "get_output_embeddings", lambda self: None)
    have = Engine(engine.model, max_length=64).runner.prefill_together(prompts, [0, 0, 0])[1]
    assert torch.allclose(have, want, atol=1e-6)


def test_long_prompts_and_those_with_log_probabilities_go_alone(passes):
    engine = Engine(tiny_llama(), slots=8, max_length=200)
    prompts = prompts_of([5, prefilling.SHORT + 1, 6, 7])
    params = [SamplingParams(max_new_tokens=2, prompt_logprobs=0 if i == 2 else None) for i in range(4)]
    answers = engine.generate(prompts, params)
    assert passes == [(2, 7)]
    assert [len(a.prompt_logprobs or ()) for a in answers] == [0, 0, 6, 0]


def test_a_pass_ends_where_padding_would_make_it_too_wide(passes):
    engine = Engine(tiny_llama(), slots=8, max_length=100)
    engine.generate(prompts_of([40] * 5 + [48] + [3] * 2), max_new_tokens=2)
    # 6 x 48 are more than 256; what is left goes alone, as there is no other round of admission
    assert passes == [(5, 40)]


def test_a_batch_with_fixed_slots_computes_every_prompt_alone(passes):
    engine = Engine(tiny_llama(), slots=4, fixed_slots=True, max_length=64)
    engine.generate(prompts_of([5, 6, 7]), max_new_tokens=3)
    assert passes == []


def test_one_prompt_alone_and_replaced_rows_need_no_common_pass(passes):
    engine = Engine(tiny_llama(), slots=2, max_length=64)
    engine.generate(prompts_of([5]), max_new_tokens=3)
    assert passes == []
    engine.generate(prompts_of([5, 6, 7, 8]), [SamplingParams(max_new_tokens=n) for n in (2, 9, 3, 4)])
    assert passes == [(2, 6)]


def test_equal_prompts_are_computed_once_and_shared_blocks_stay_shared(passes):
    engine = Engine(tiny_llama(), slots=8, max_length=64, block_size=4)
    first, second, third = prompts_of([6, 9, 3])
    engine.generate([first, second, first, [*second[:4], 1, 2, 3], third], max_new_tokens=2)
    assert passes == [(3, 9)]  # first twice; the one that shares a block with `second` waits for it
    params = [SamplingParams(max_new_tokens=5, temperature=1.0, seed=seed) for seed in (1, 2, 1, 2)]
    answers = [a.token_ids for a in engine.generate([first] * 4, params)]
    assert answers[:2] == answers[2:]
    assert answers[0] != answers[1]
    assert len(passes) == 1  # equal prompts alone are one prompt, and need no common pass
    assert_nothing_leaked(engine)


def test_samples_of_one_prompt_count_as_one(passes):
    engine = Engine(tiny_llama(), slots=8, max_length=64)
    answers = engine.generate(prompts_of([5, 9]), max_new_tokens=4, n=3, temperature=1.0, seed=4)
    assert passes == [(2, 9)]
    alone = [Engine(engine.model, max_length=64).generate(p, max_new_tokens=4, n=3, temperature=1.0, seed=4)
             for p in prompts_of([5, 9])]  # fmt: skip
    assert [a.token_ids for a in answers] == [a.token_ids for group in alone for a in group]


def test_a_pool_too_small_for_all_of_them_serves_them_one_by_one(passes):
    prompts = prompts_of([15, 14, 13, 12])
    engine = Engine(tiny_llama(), slots=4, max_length=32, block_size=4, max_blocks=14)
    answers = engine.generate(prompts, max_new_tokens=8)
    assert [a.finish_reason for a in answers] == ["length"] * 4
    roomy = Engine(engine.model, slots=4, max_length=32).generate(prompts, max_new_tokens=8)
    assert [a.token_ids for a in answers] == [a.token_ids for a in roomy]
    assert_nothing_leaked(engine)


def test_a_pass_that_runs_out_of_blocks_leaves_none_behind(monkeypatch):
    engine = Engine(tiny_llama(), slots=4, max_length=32, block_size=4, max_blocks=9)
    before = engine.pool.in_use
    monkeypatch.setattr("handloom.loop.loop.fits", lambda *arguments: True)
    answers = engine.generate(prompts_of([20, 20, 20]), max_new_tokens=4)
    assert "length" in {a.finish_reason for a in answers}
    assert engine.pool.in_use == before
    engine.pool.check()


def test_closing_the_stream_gives_the_blocks_of_waiting_prompts_back():
    engine = Engine(tiny_llama(), slots=4, max_length=64)
    events = engine.stream(prompts_of([5, 6, 7, 8]), max_new_tokens=9)
    next(events)
    events.close()
    assert_nothing_leaked(engine)


def test_one_poisoned_prompt_does_not_reach_its_neighbours():
    model, prompts = poisoned(tiny_llama()), prompts_of([5, 6, 7])
    engine = Engine(model, slots=3, max_length=64)
    bad = [[*prompts[0], POISON], prompts[1], prompts[2]]
    good = engine.generate(prompts[1:], max_new_tokens=4)
    assert [outcome(a) for a in engine.generate(bad, max_new_tokens=4)[1:]] == [outcome(a) for a in good]
