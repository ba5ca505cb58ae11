"""Prompts computed together: the rows and tokens of prompts computed alone, whom a pass takes, and what it costs."""

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, prompts_of
from helpers import POISON, assert_nothing_leaked, outcome, poisoned, recorded, tiny_llama

from handloom import Engine, SamplingParams
from handloom.forward.filling import Filling, advance
from handloom.forward.passes import Pass
from handloom.forward.programs.programs import bucket
from handloom.loop import prefill as prefilling
from handloom.running import PASS

LENGTHS = [7, 3, 11, 1, 20, 9, 33, 2]


@pytest.fixture
def passes(monkeypatch):
    """[tokens of each row] of every packed pass, probes and passes of one prompt left out"""
    found, original = [], Pass.forward

    def counted(self, feed, *given, **named):
        if feed.offsets is not None and len(feed.offsets) > 2:
            found.append(np.diff(feed.offsets).tolist())
            assert feed.positions.shape == (1, feed.offsets[-1])  # nothing is padded
        return original(self, feed, *given, **named)

    monkeypatch.setattr(Pass, "forward", counted)
    return found


def packed(engine, prompts):
    """The fillings of prompts that were computed in passes of the engine's own width."""
    fillings = [Filling(prompt) for prompt in prompts]
    while left := [filling for filling in fillings if filling.left]:
        advance(engine.runner, left, engine.prefill_chunk)
    return fillings


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


@pytest.mark.parametrize("chunk", [512, 16])
@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gpt_oss", "gpt2", "mistral_sw", "mixtral", "deepseek_v3"]
)
def test_rows_and_logits_of_a_pass_are_those_of_each_prompt(name, chunk, passes):
    engine, prompts = Engine(ARCHITECTURES[name](), max_length=64, prefill_chunk=chunk), prompts_of(LENGTHS)
    fillings = packed(engine, prompts)
    pieces = {512: [LENGTHS], 16: [[7, 3, 6], [5, 1, 10], [10, 6], [3, 13], [4, 2]]}  # and 16 of the 33 alone
    assert passes == (pieces[chunk] if engine.runner.packs else [])
    for prompt, filling in zip(prompts, fillings, strict=True):
        fresh, out = Engine(engine.model, max_length=64).runner.prefill(prompt)
        row, have, want = filling.row(), filling.output().logits[0, -1], out.logits[0, -1]
        assert (have - want).abs().max() <= 1e-5 * want.std().clamp_min(1)
        assert (row.length, row.prompt_length, row.history.tolist()) == (len(prompt), len(prompt), prompt)
        assert len(row.table) == len(fresh.table)


def test_the_output_layer_sees_the_last_token_of_each_row_alone():
    engine, shapes = Engine(tiny_llama(), max_length=64), []
    hook = engine.model.lm_head.register_forward_hook(
        lambda layer, inputs, out: shapes.append(tuple(out.shape))
    )
    packed(engine, prompts_of([4, 9, 1]))
    hook.remove()
    assert shapes == [(1, 3, engine.vocab_size)]
    assert not engine.model.lm_head._forward_pre_hooks


def test_a_model_that_cannot_pick_the_last_tokens_is_right_all_the_same():
    engine, prompts = Engine(tiny_llama(), max_length=64), prompts_of([4, 9, 1])
    want = [filling.output().logits for filling in packed(engine, prompts)]
    other = Engine(engine.model, max_length=64)
    other.runner._arguments.discard("logits_to_keep")
    have = [filling.output().logits for filling in packed(other, prompts)]
    torch.testing.assert_close(have, want, atol=1e-6, rtol=0)


def test_prompts_with_log_probabilities_or_embeddings_go_alone(passes):
    engine = Engine(tiny_llama(), slots=8, max_length=200)
    prompts = prompts_of([5, 90, 6, 7])
    params = [SamplingParams(max_new_tokens=2, prompt_logprobs=0 if i == 2 else None) for i in range(4)]
    answers = engine.generate(prompts, params)
    assert passes == [[5, 90]]
    assert [len(a.prompt_logprobs or ()) for a in answers] == [0, 0, 6, 0]
    table = engine.model.get_input_embeddings().weight.detach()
    mixed = engine.generate([prompts[0], table[prompts[1]], prompts[3]], max_new_tokens=2)
    assert passes == [[5, 90]]
    assert [a.token_ids for a in mixed] == [answers[i].token_ids for i in (0, 1, 3)]


def test_a_pass_ends_at_the_budget_in_the_middle_of_a_prompt(passes):
    engine = Engine(tiny_llama(), slots=8, max_length=100, prefill_chunk=64)
    engine.generate(prompts_of([40] * 3 + [48] + [3] * 2), max_new_tokens=2)
    assert passes == [[40, 24], [16, 40, 8], [40, 3, 3]]


def test_a_batch_with_fixed_slots_computes_every_prompt_alone(passes):
    model, prompts = tiny_llama(), prompts_of([5, 6, 70, 7])
    engine = Engine(model, slots=4, fixed_slots=True, max_length=100, prefill_chunk=32)
    together = engine.generate(prompts, max_new_tokens=3)
    assert passes == []
    for prompt, answer in zip(prompts, together, strict=True):  # to the last bit
        assert outcome(engine.generate(prompt, max_new_tokens=3)) == outcome(answer)


def test_one_prompt_alone_and_replaced_rows_need_no_common_pass(passes):
    engine = Engine(tiny_llama(), slots=2, max_length=64)
    engine.generate(prompts_of([5]), max_new_tokens=3)
    assert passes == []
    engine.generate(prompts_of([5, 6, 7, 8]), [SamplingParams(max_new_tokens=n) for n in (2, 9, 3, 4)])
    assert passes == [[5, 6]]


def test_decoding_goes_on_between_the_pieces_of_a_long_prompt():
    engine = Engine(tiny_llama(), slots=2, max_length=200, prefill_chunk=16)
    with recorded(engine.model) as seen:
        engine.generate(prompts_of([5, 60]), [SamplingParams(max_new_tokens=n) for n in (8, 2)])
    # the first token of the short prompt comes after one pass, and one token of it after every further one
    assert seen.shapes[:8] == [(1, 16), (2, 1), (1, 16), (2, 1), (1, 16), (2, 1), (1, 16), (2, 1)]


def test_prompts_in_one_pass_share_the_blocks_with_which_they_begin(passes):
    engine = Engine(tiny_llama(), slots=4, max_length=64, block_size=4)
    [start] = prompts_of([11])
    prompts = [[*start, 90 + i] for i in range(3)]
    fillings = packed(engine, prompts)
    assert passes == [[12, 4, 4]]
    tables = [filling.row().table.blocks for filling in fillings]
    assert len({blocks[:2] for blocks in tables}) == 1
    assert len({blocks[2] for blocks in tables}) == 3
    for prompt, filling in zip(prompts, fillings, strict=True):
        want = Engine(engine.model, max_length=64).runner.prefill(prompt)[1].logits
        torch.testing.assert_close(filling.output().logits, want, atol=1e-4, rtol=0)


def test_a_pass_that_fails_leaves_no_prefix_behind_that_was_never_computed():
    engine, prompts = Engine(tiny_llama(), slots=4, max_length=64, block_size=4), prompts_of([9, 9])
    prompts[1][:8] = prompts[0][:8]

    def fail(*arguments):
        raise RuntimeError("no")

    handle = engine.model.lm_head.register_forward_hook(fail)
    fillings = [Filling(prompt) for prompt in prompts]
    with pytest.raises(RuntimeError, match="no"):
        advance(engine.runner, fillings, 100)
    handle.remove()
    assert [(filling.table, filling.done) for filling in fillings] == [(None, 0)] * 2
    assert engine.pool.match(prompts[0]) == ()
    assert_nothing_leaked(engine)


def ragged(count=192):
    """Prompts of 32 to 512 tokens and answers of 12 to 96."""
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 100, n).tolist() for n in random.integers(32, 513, count)]
    return prompts, [SamplingParams(max_new_tokens=int(n)) for n in random.integers(12, 97, count)]


def test_the_ragged_workload_takes_few_passes_with_little_padding(monkeypatch):
    """What the loop does on CUDA: 192 requests through 64 slots, some 52,000 prompt tokens."""
    monkeypatch.setitem(prefilling.PATIENCE, "cpu", prefilling.PATIENCE["cuda"])
    model = tiny_llama(
        num_hidden_layers=1, hidden_size=16, intermediate_size=16, max_position_embeddings=1024
    )
    engine = Engine(model, slots=64, prefill_chunk=PASS["cuda"])
    prompts, params = ragged()
    with recorded(engine.model) as seen:
        answers = engine.generate(prompts, params)
    assert [a.n_new for a in answers] == [p.max_new_tokens for p in params]
    fed, steps = sum(seen.prompts), len(seen.steps)
    assert len(seen.prompts) <= 35
    assert fed == sum(map(len, prompts))  # nothing is padded, and in a recorded pass this much at most:
    assert sum(bucket(tokens, 8) for tokens in seen.prompts) <= 1.15 * fed
    assert max(seen.prompts) <= PASS["cuda"]
    assert steps <= 1.25 * sum(p.max_new_tokens for p in params) / 64 + 96  # slots are seldom idle for it
    assert_nothing_leaked(engine)


def test_equal_prompts_are_computed_once_and_shared_blocks_stay_shared(passes):
    engine = Engine(tiny_llama(), slots=8, max_length=64, block_size=4)
    first, second, third = prompts_of([6, 9, 3])
    engine.generate([first, second, first, [*second[:4], 1, 2, 3], third], max_new_tokens=2)
    assert passes == [[6, 9, 3, 3]]  # first once; four tokens of the other are known from `second`
    params = [SamplingParams(max_new_tokens=5, temperature=1.0, seed=seed) for seed in (1, 2, 1, 2)]
    answers = [a.token_ids for a in engine.generate([first] * 4, params)]
    assert answers[:2] == answers[2:]
    assert answers[0] != answers[1]
    assert len(passes) == 1  # equal prompts alone are one prompt, and need no common pass
    assert_nothing_leaked(engine)


def test_samples_of_one_prompt_count_as_one(passes):
    engine = Engine(tiny_llama(), slots=8, max_length=64)
    answers = engine.generate(prompts_of([5, 9]), max_new_tokens=4, n=3, temperature=1.0, seed=4)
    assert passes == [[5, 9]]
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
