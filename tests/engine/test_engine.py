"""Engine: States against plain forward passes, their errors, and the model it leaves behind."""

import gc
import logging

import pytest
import torch
from architectures import ARCHITECTURES, prompts_of
from helpers import (
    POISON,
    assert_nothing_leaked,
    full_logits,
    poisoned,
    recorded,
    spell,
    tiny_llama,
)
from transformers import AttentionInterface

from handloom import Engine
from handloom.errors import CapabilityError, HandloomError, ModelError, ParameterError, PromptError

PROMPTS = prompts_of([5, 17, 1, 9])
TOLERANCE = {"atol": 1e-4, "rtol": 0}  # fp32 rounding of logits of size 10


# States


def test_prefill_of_ragged_prompts_equals_each_alone_in_a_plain_forward(engine):
    state = engine.prefill(PROMPTS)
    assert len(state) == 4
    assert state.lengths.tolist() == state.prompt_lengths.tolist() == [5, 17, 1, 9]
    assert state.tokens == PROMPTS
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(state.logits[row], full_logits(engine.model, prompt)[-1], **TOLERANCE)


def test_step_and_extend_append_and_say_what_follows_each_token(engine):
    state = engine.step(engine.prefill(PROMPTS[:2]), torch.tensor([7, 8]))
    longer = engine.extend(state, torch.tensor([[9, 10, 11], [12, 13, 99]]), counts=torch.tensor([3, 2]))
    whole = [[*PROMPTS[0], 7, 9, 10, 11], [*PROMPTS[1], 8, 12, 13]]
    assert longer.tokens == whole
    assert longer.new_tokens == [[7, 9, 10, 11], [8, 12, 13]]
    assert longer.prompt_lengths.tolist() == [5, 17]
    for row, (ids, fed) in enumerate(zip(whole, (3, 2), strict=True)):
        expected = full_logits(engine.model, ids)[-fed:]
        torch.testing.assert_close(longer.all_logits[row, :fed], expected, **TOLERANCE)
        torch.testing.assert_close(longer.logits[row], expected[-1], **TOLERANCE)


@pytest.mark.parametrize("given", ["tensor", "lists", "counts"])
def test_score_equals_log_softmax_of_a_full_forward_and_keeps_nothing(engine, given):
    prompts, tokens = PROMPTS[:3], [[3, 4, 5], [6], [7, 8]]
    state = engine.prefill(prompts)
    before, in_use = state.logits.clone(), engine.pool.in_use
    if given == "lists":
        scores = engine.score(state, tokens)
    else:
        padded = torch.tensor([[3, 4, 5], [6, 99, 99], [7, 8, 99]])
        counts = torch.tensor([3, 1, 2])
        scores = engine.score(state, padded, counts) if given == "counts" else engine.score(state, padded)
        tokens = tokens if given == "counts" else padded.tolist()
    assert scores.shape == (3, 3)
    assert scores.dtype == torch.float32
    for row, (prompt, new) in enumerate(zip(prompts, tokens, strict=True)):
        logp = full_logits(engine.model, prompt + new)[len(prompt) - 1 : -1].log_softmax(-1)
        expected = logp[range(len(new)), new]
        torch.testing.assert_close(scores[row, : len(new)], expected, **TOLERANCE)
        assert scores[row, len(new) :].tolist() == [0.0] * (3 - len(new))
    assert state.tokens == prompts
    assert torch.equal(state.logits, before)
    assert engine.pool.in_use == in_use


def test_hidden_states_equal_transformers(engine):
    with torch.no_grad():
        expected = [
            engine.model(torch.tensor([[*p, 7, 8]]), output_hidden_states=True, use_cache=False).hidden_states
            for p in PROMPTS
        ]
    state = engine.prefill(PROMPTS, hidden=True)
    stepped = engine.step(state, [7] * 4, hidden=True)
    extended = engine.extend(state, [[7, 8], [7], [7, 8], [7]], hidden=True)
    for layer in (-1, 0, 1, 2):
        for row, prompt in enumerate(PROMPTS):
            want = expected[row][layer][0]
            n = len(prompt)
            torch.testing.assert_close(state.hidden(layer)[row, :n], want[:n], **TOLERANCE)
            assert not state.hidden(layer)[row, n:].any()
            torch.testing.assert_close(stepped.hidden(layer)[row, 0], want[n], **TOLERANCE)
            fed = 2 - row % 2
            torch.testing.assert_close(extended.hidden(layer)[row, :fed], want[n : n + fed], **TOLERANCE)
            assert not extended.hidden(layer)[row, fed:].any()
    assert state.hidden().shape == (4, 17, 32)
    kept = extended.select([0, 2]).keep([1, 2])
    assert not kept.hidden()[0, 1:].any()
    torch.testing.assert_close(kept.hidden()[1], extended.hidden()[2])


def test_hidden_states_of_a_prompt_in_chunks():
    model, [prompt] = tiny_llama(), prompts_of([29])
    engine = Engine(model, prefill_chunk=8)
    with torch.no_grad():
        expected = model(torch.tensor([prompt]), output_hidden_states=True, use_cache=False).hidden_states[-1]
    torch.testing.assert_close(engine.prefill(prompt, hidden=True).hidden(), expected, **TOLERANCE)


def test_embeddings_give_what_their_ids_give(engine):
    table = engine.model.get_input_embeddings().weight.detach()
    embeddings = [table[p] for p in PROMPTS]
    state, same = engine.prefill(PROMPTS), engine.prefill(embeddings=embeddings)
    torch.testing.assert_close(same.logits, state.logits, **TOLERANCE)
    assert same.tokens == [[-1] * len(p) for p in PROMPTS]
    after, same_after = engine.step(state, [4, 5, 6, 7]), engine.step(same, [4, 5, 6, 7])
    torch.testing.assert_close(same_after.logits, after.logits, **TOLERANCE)

    settings = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    by_ids = engine.generate(PROMPTS, **settings)
    by_embeddings = engine.generate(embeddings, **settings)
    assert [g.token_ids for g in by_embeddings] == [g.token_ids for g in by_ids]
    assert by_embeddings[0].prompt_token_ids == [-1] * 5


def test_embeddings_in_another_dtype_take_the_models():
    engine = Engine(tiny_llama(torch.bfloat16))
    embeddings = engine.model.get_input_embeddings().weight.detach()[PROMPTS[1]].float()
    expected = engine.generate(PROMPTS[1], max_new_tokens=6)
    assert engine.generate(embeddings, max_new_tokens=6).token_ids == expected.token_ids


def test_an_old_state_continues_as_if_nothing_had_happened_after_thousands_of_steps():
    engine = Engine(tiny_llama(num_hidden_layers=1, max_position_embeddings=2048))
    prompt = PROMPTS[1]
    old = engine.prefill(prompt)
    middle = engine.step(old, [5])
    expected = [engine.step(old, [9]).logits, engine.step(middle, [9]).logits]
    state, ids = old, []
    for _ in range(2000):
        ids.append(int(state.logits.argmax()))
        state = engine.step(state, ids[-1:])
    assert engine.pool.in_use <= -(-(17 + 2000) // 16) + 3
    assert torch.equal(engine.step(old, [9]).logits, expected[0])
    assert torch.equal(engine.step(middle, [9]).logits, expected[1])
    assert state.tokens == [prompt + ids]
    far = full_logits(engine.model, prompt + ids)[-1]
    torch.testing.assert_close(state.logits[0], far, atol=1e-3, rtol=0)
    del old, middle, state
    assert_nothing_leaked(engine)


def test_select_accepts_numbers_masks_and_tensors(engine):
    state = engine.prefill(PROMPTS)
    for index, rows in (
        ([3, 0, 0], [3, 0, 0]),
        (torch.tensor([True, False, True, False]), [0, 2]),
        (torch.tensor([-1]), [3]),
        ((1,), [1]),
    ):
        picked = state.select(index)
        assert picked.tokens == [PROMPTS[i] for i in rows]
        assert torch.equal(picked.logits, state.logits[rows])


def test_several_models_in_lockstep(engine):
    other = Engine(tiny_llama(num_hidden_layers=1), slots=2)
    mine, theirs = engine.prefill(PROMPTS[:2]), other.prefill(PROMPTS[:2])
    ids = [list(p) for p in PROMPTS[:2]]
    for _ in range(6):
        mixed = mine.logits.log_softmax(-1) + theirs.logits.log_softmax(-1)
        expected = torch.stack(
            [sum(full_logits(m, row)[-1].log_softmax(-1) for m in (engine.model, other.model)) for row in ids]
        )
        torch.testing.assert_close(mixed, expected, atol=1e-3, rtol=0)
        tokens = mixed.argmax(-1)
        mine, theirs = engine.step(mine, tokens), other.step(theirs, tokens)
        for row, token in zip(ids, tokens.tolist(), strict=True):
            row.append(token)
    del mine, theirs
    assert_nothing_leaked(other)


@pytest.mark.parametrize("name", ["llama", "bloom", "gemma2", "gpt_neo"])
def test_a_branch_with_nan_does_not_reach_its_sibling(name):
    model = poisoned(ARCHITECTURES[name]())
    engine = Engine(model, max_length=128)
    prompts = PROMPTS[:2]
    state = engine.prefill(prompts)
    spoilt = engine.extend(state, [[POISON] * 4] * 2)
    assert spoilt.logits.isnan().all()
    sound = engine.step(state, [4, 5])
    longer = engine.extend(sound, [[6, 7], [8]])
    for row, (first, rest) in enumerate((([4], [6, 7]), ([5], [8]))):
        expected = full_logits(model, prompts[row] + first + rest)
        torch.testing.assert_close(sound.logits[row], expected[len(prompts[row])], atol=1e-3, rtol=0)
        torch.testing.assert_close(longer.logits[row], expected[-1], atol=1e-3, rtol=0)
    del state, spoilt, sound, longer
    assert_nothing_leaked(engine)


# Errors of States


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda e, s: e.step(s, [1]), r"1 rows of tokens for a State of 2 rows"),
        (lambda e, s: e.step(s, [1, 101]), r"row 1: token id 101 is not in 0\.\.100"),
        (lambda e, s: e.step(s, [-1, 1]), r"row 0: token id -1"),
        (lambda e, s: e.step(s, torch.tensor([1.0, 2.0])), r"token id|integer"),
        (lambda e, s: e.extend(s, [[1], []]), r"row 1 is given no token"),
        (lambda e, s: e.extend(s, [1, 2]), r"row 0"),
        (lambda e, s: e.extend(s, torch.ones(2, 3, dtype=torch.long), counts=[3, 0]), r"row 1"),
        (lambda e, s: e.extend(s, torch.ones(2, 3, dtype=torch.long), counts=[3, 4]), r"row 1.*4.*1\.\.3"),
        (lambda e, s: e.extend(s, torch.ones(2, 3, dtype=torch.long), counts=[-1, 3]), r"row 0.*-1.*1\.\.3"),
        (lambda e, s: e.extend(s, torch.ones(2, 3, dtype=torch.long), counts=[3]), r"1 counts?"),
        (lambda e, s: e.extend(s, [[1] * 252, [1]]), r"row 0 would have 257 tokens.*max_length=256"),
        (lambda e, s: e.score(s, [[1]]), r"1 rows of tokens for a State of 2 rows"),
        (lambda e, s: s.select([2]), r"row 2 is not in a State of 2 rows"),
        (lambda e, s: s.select([0.5]), r"row"),
        (lambda e, s: s.select(torch.tensor([True, False, True])), r"2 rows"),
        (lambda e, s: s.keep([1, 1]), r"keep needs a State made by extend"),
        (lambda e, s: e.step(s, [1, 1]).keep([1, 1]), r"keep needs a State made by extend"),
        (lambda e, s: e.extend(s, [[1, 2], [1]]).keep([-1, 1]), r"row 0 was extended by 2.*count -1.*0\.\.2"),
        (lambda e, s: e.extend(s, [[1, 2], [1]]).keep([1, 2]), r"row 1 was extended by 1.*count 2"),
        (lambda e, s: e.extend(s, [[1, 2], [1]]).keep([1]), r"1 counts"),
        (lambda e, s: e.extend(s, [[1, 2], [1]]).keep([1, 1]).keep([2, 1]), r"row 0 was extended by 1"),
        (lambda e, s: s.hidden(), r"hidden=True"),
        (lambda e, s: e.prefill(), r"prompts or embeddings"),
        (lambda e, s: e.prefill([1], embeddings=torch.ones(1, 32)), r"prompts or embeddings"),
        (lambda e, s: e.prefill(embeddings=torch.ones(2, 31)), r"size 31.*32"),
    ],
)
def test_misuse_says_what_is_wrong_and_harms_nothing(engine, act, message):
    state = engine.prefill(PROMPTS[:2])
    with pytest.raises(HandloomError, match=message):
        act(engine, state)
    after = engine.step(state, [7, 8])
    for row, token in enumerate((7, 8)):
        expected = full_logits(engine.model, [*PROMPTS[row], token])[-1]
        torch.testing.assert_close(after.logits[row], expected, **TOLERANCE)


def test_the_last_position_can_be_used_and_no_further(engine):
    state = engine.prefill(prompts_of([250])[0])
    full = engine.extend(state, [[1] * 6])
    assert full.lengths.tolist() == [256]
    with pytest.raises(CapabilityError, match=r"257 tokens, more than max_length=256"):
        engine.step(full, [1])


def test_scoring_reaches_the_last_position_too(engine):
    [prompt] = prompts_of([255])
    logp = engine.score(engine.prefill(prompt), [[7]])
    expected = full_logits(engine.model, prompt)[-1].log_softmax(-1)[7]
    torch.testing.assert_close(logp[0, 0], expected, **TOLERANCE)


# The model it was given


REPRESENTATIVES = ["llama", "gpt2", "bloom", "mistral_sw", "llama_dynamic_ntk", "phi3_longrope", "jamba"]


@pytest.mark.parametrize("name", REPRESENTATIVES)
def test_the_model_answers_as_before_beside_an_engine(name):
    model = ARCHITECTURES[name]()
    model.generation_config.pad_token_id = 0
    long, short = prompts_of([41, 20])
    ids = torch.tensor([long, [0] * 21 + short])
    mask = torch.tensor([[1] * 41, [0] * 21 + [1] * 20])
    attention = model.config._attn_implementation

    def theirs():
        given = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        out = model.generate(ids, **given, return_dict_in_generate=True, output_logits=True)
        return out.sequences.tolist(), torch.stack(out.logits)

    theirs()  # dynamic rotations remember the longest text: from the second call on it is always the same one
    before, logits = theirs()
    engine = Engine(model, slots=2, max_length=128)
    assert theirs()[0] == before
    answers = [g.token_ids for g in engine.generate([long, short], max_new_tokens=8)]
    state = engine.prefill(short)
    again, logits_again = theirs()
    assert again == before
    assert torch.equal(logits_again, logits)
    assert model.config._attn_implementation == attention
    assert [g.token_ids for g in engine.generate([long, short], max_new_tokens=8)] == answers
    after = engine.step(state, [7])
    torch.testing.assert_close(after.logits[0], full_logits(model, [*short, 7])[-1], atol=1e-3, rtol=0)
    del state, after
    assert_nothing_leaked(engine)


def test_a_generation_that_fails_half_way_leaves_the_model_as_it_was(engine):
    def explode(logits, context):
        raise RuntimeError("mine")

    attention = engine.model.config._attn_implementation
    for result in engine.generate([PROMPTS[0], PROMPTS[1]], max_new_tokens=3, processors=[explode]):
        assert result.error.endswith("processor 'explode' raised RuntimeError: mine")
    assert engine.model.config._attn_implementation == attention


@pytest.mark.parametrize("name", ["llama", "bloom", "jamba"])
def test_two_engines_on_one_model_do_not_meet(name):
    model = ARCHITECTURES[name]()
    one, two = Engine(model, slots=2), Engine(model, slots=3, block_size=4)
    expected = [g.token_ids for g in one.generate(PROMPTS, max_new_tokens=9)]
    first, second = one.stream(PROMPTS, max_new_tokens=9), two.stream(PROMPTS, max_new_tokens=9)
    found = {}
    streams = [first, second]
    while streams:  # token by token in turn
        for stream in list(streams):
            event = next(stream, None)
            if event is None:
                streams.remove(stream)
            elif event.generation:
                found[stream is first, event.request] = event.generation.token_ids
    assert [found[True, i] for i in range(4)] == expected
    assert [found[False, i] for i in range(4)] == expected
    assert_nothing_leaked(one)
    assert_nothing_leaked(two)


@pytest.mark.parametrize("name", ["llama", "llama_dynamic_ntk"])
def test_engines_come_and_go_without_a_trace(name):
    model = ARCHITECTURES[name]()

    def traces():
        gc.collect()
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        return len(AttentionInterface._global_mapping), hooks

    before = traces()
    for _ in range(3):
        Engine(model).generate([5, 6], max_new_tokens=2)
    assert traces() == before


def test_a_model_in_training_mode_stays_there_and_is_run_in_evaluation():
    model = tiny_llama(attention_dropout=0.9)
    expected = Engine(model).generate([5, 6], max_new_tokens=8).token_ids
    model.train()
    engine = Engine(model)
    assert model.training
    assert engine.generate([5, 6], max_new_tokens=8).token_ids == expected


def test_no_gradients_are_kept(engine):
    state = engine.step(engine.prefill([5, 6]), [7])
    assert not state.logits.requires_grad
    assert not engine.score(state, [[5, 6]]).requires_grad


def test_a_model_that_cannot_be_batched_says_so_once_and_is_right(caplog):
    model = ARCHITECTURES["recurrent_gemma"]()
    with caplog.at_level(logging.WARNING, logger="handloom"):
        engine = Engine(model, slots=4)
        engine.generate(PROMPTS, max_new_tokens=3)
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("handloom")]
    assert len(lines) == 1
    assert "one sequence at a time" in lines[0]
    assert engine.slots == 1
    assert not engine.capabilities.ragged
    assert engine.capabilities.ragged.reason in lines[0]


def test_a_model_that_cannot_run_is_an_error_that_says_why():
    model = tiny_llama()
    model.model.layers[0].mlp.gate_proj = torch.nn.Linear(31, 48)
    with pytest.raises(ModelError, match="LlamaForCausalLM fails on a plain forward pass"):
        Engine(model)


def test_without_the_self_check_the_rules_decide_and_it_costs_one_pass_a_row(engine):
    model = tiny_llama()
    with recorded(model) as passes:
        unchecked = Engine(model, self_check=False)
    assert len(passes.shapes) <= 2
    answers = [e.generate(PROMPTS[1], max_new_tokens=20).token_ids for e in (unchecked, engine)]
    assert answers[0] == answers[1]


# Its own arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, r"slots=0"),
        ({"slots": 2.5}, r"slots=2\.5"),
        ({"slots": True}, r"slots=True"),
        ({"block_size": 0}, r"block_size=0"),
        ({"prefill_chunk": -1}, r"prefill_chunk=-1"),
        ({"max_blocks": 0}, r"max_blocks=0"),
        ({"max_blocks": "all"}, r"max_blocks='all'"),
        ({"max_length": 1}, r"max_length=1"),
        ({"max_length": "long"}, r"max_length='long'"),
    ],
)
def test_arguments_out_of_range_are_named(options, message):
    with pytest.raises(ParameterError, match=message):
        Engine(tiny_llama(), **options)


def test_max_length_beyond_learned_positions_is_refused_and_beyond_trained_ones_warned_of(caplog):
    with pytest.raises(ParameterError, match=r"max_length=300.*256 positions"):
        Engine(ARCHITECTURES["gpt2"](), max_length=300)
    with caplog.at_level(logging.WARNING, logger="handloom"):
        assert Engine(tiny_llama(), max_length=300).max_length == 300
    assert "256" in caplog.text


def test_max_length_bounds_prompt_and_output():
    engine = Engine(tiny_llama(), max_length=20)
    generation = engine.generate(PROMPTS[1], max_new_tokens=50)
    assert (generation.n_new, generation.stop_reason) == (3, "max_length")
    with pytest.raises(PromptError, match=r"prompt 1 has 20 tokens.*max_length=20.*at most 19"):
        engine.generate([[5], [5] * 20])


def test_a_request_max_length_that_its_prompt_fills_is_refused(engine):
    with pytest.raises(
        ParameterError, match=r"request 1: max_length=9 counts the prompt, which has 17 tokens"
    ):
        engine.generate(PROMPTS[:2], max_length=9)


def test_buckets_shrink_with_the_requests_unless_fixed():
    engine = Engine(tiny_llama(), slots=8)
    assert [engine.bucket(n) for n in (0, 1, 3, 8, 20)] == [1, 1, 3, 8, 8]
    assert Engine(tiny_llama(), slots=8, fixed_slots=True).bucket(1) == 8


def test_repr_says_what_was_loaded(texts):
    shown = repr(texts)
    for part in ("LlamaForCausalLM", "vocab=360", "slots=3", "max_length=256", "float32", "cpu", "attention"):
        assert part in shown


def test_spelling_helper_matches_the_tokenizer(texts):
    assert texts.decode(spell("the fox. STOP")) == "the fox. STOP"


def test_requests_are_those_that_generate_runs(engine):
    asked = engine.requests([1, 2], n=3, seed=7, temperature=1.0, max_new_tokens=4)
    told = [(r.index, r.sample, r.seed, list(r.prompt.ids)) for r in asked]
    assert told == [(0, 0, 7, [1, 2]), (0, 1, 7, [1, 2]), (0, 2, 7, [1, 2])]
    assert asked[0].prefilled is asked[2].prefilled
    with pytest.raises(ParameterError, match="request 1: max_length=2 counts the prompt"):
        engine.requests([[1], [1, 2]], max_length=2)
