"""The decode loop: slots, replacement, sharing, every way to end, and what it leaves."""

import gc
import random

import pytest
import torch
from architectures import ARCHITECTURES, greedy_reference, prompts_of
from helpers import (
    assert_nothing_leaked,
    forced,
    nothing_left,
    outcome,
    recorded,
    spell,
)
from tiny_tokenizers import byte_level

from handloom import Engine, SamplingParams
from handloom.errors import HandloomError
from handloom.loop.stopping import Stopper

PROMPTS = prompts_of([5, 17, 1, 40, 9, 23, 16, 33])


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
    # the first three prompts in one pass without padding, the others as slots become free
    assert passes.shapes[0] == (1, 5 + 17 + 2)
    assert passes.prompts == [24, 40, 9, 23, 16, 33]
    # A slot's requests draw in turn: 0 0 3 3 3 3 3 6 6 6 | 1 1 1 1 1 1 1 1 1 7 | 2 2 2 2 4 5 5 5 5 5 5. After
    # the tenth draw request 5 is alone, with one token to come.
    assert passes.steps == [3] * 9 + [1]


def test_the_batch_shrinks_when_nobody_waits(engine):
    with recorded(engine.model) as passes:
        engine.generate(PROMPTS[:3], [SamplingParams(max_new_tokens=n) for n in (2, 4, 6)])
    assert passes.steps == [3, 2, 2, 1, 1]


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
    # two blocks of 16 are known, to those in the same pass too; there are three slots
    assert passes.prompts == [38 + 2 * (38 - 32), 38 - 32]
    with recorded(engine.model) as passes:
        assert ids_of(engine.generate(prompts, max_new_tokens=5)) == expected
    assert passes.prompts == [3 * 6, 6]


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


def test_max_time_ends_a_row_and_no_other(either_texts):
    """A criterion makes time pass: 10 s with every token of the row it watches."""
    from handloom.loop import request as module

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
    assert len(texts.pool.prefixes.blocks) <= capacity
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
