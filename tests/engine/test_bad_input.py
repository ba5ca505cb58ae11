"""Fuzzed bad input: an error that names the value, or `finish_reason="error"` for that row; nothing else is lost."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from architectures import prompts_of
from helpers import POISON, assert_nothing_leaked, outcome, poisoned, text_engine, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import byte_level

from handloom import Engine, SamplingParams
from handloom.errors import HandloomError, ParameterError, PromptError

FIELDS = [field.name for field in dataclasses.fields(SamplingParams)]
USER_CODE = ("prefix_fn", "criteria", "processors")
GOOD = prompts_of([5, 17])


@pytest.fixture(scope="module")
def shared():
    return text_engine(slots=3, max_length=64)


@pytest.fixture
def engine(shared):
    yield shared
    assert_nothing_leaked(shared)


class Odd:
    """An object of a kind nobody expects, with an unhelpful repr."""

    def __repr__(self):
        return "<odd \x00>"


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-(2**63), 2**31, 2**63 - 1, 2**64, 10**40]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(max_size=8),
    st.binary(max_size=4),
    st.lists(st.one_of(st.integers(-3, 400), st.text(max_size=3), st.none(), st.floats()), max_size=4),
    st.lists(st.lists(st.integers(-3, 400), max_size=3), max_size=3),
    st.dictionaries(st.one_of(st.integers(-3, 400), st.text(max_size=2)), st.floats(), max_size=3),
    st.dictionaries(st.tuples(st.integers(0, 400)), st.integers(), max_size=2),
    st.tuples(st.integers(-2, 9), st.floats(-2, 9)),
    st.sampled_from(
        [Odd(), Odd, math, np.float64("nan"), np.arange(3), torch.tensor([1.5]), torch.zeros(0), print]
    ),
    st.complex_numbers(),
)


def refusal(act, kind=HandloomError) -> str | None:
    """The message with which `act` was refused, or None where it was not."""
    try:
        act()
    except kind as error:
        return str(error) or "an error without a message"
    return None


# Parameters


@pytest.mark.parametrize("field", FIELDS)
@settings(max_examples=60)
@given(value=JUNK)
def test_any_value_of_a_field_is_taken_or_refused_by_name(field, value):
    message = refusal(lambda: SamplingParams(**{field: value}))
    if message is not None:
        assert field in message
        return
    params = SamplingParams(**{field: value})
    repr(params)
    assert params.replace() == params
    params.to_dict()


@settings(max_examples=100)
@given(
    chosen=st.dictionaries(
        st.sampled_from([f for f in FIELDS if f not in USER_CODE]), JUNK, min_size=1, max_size=3
    )
)
def test_an_engine_refuses_or_serves_any_parameters_and_loses_no_neighbour(shared, chosen):
    """What passes the checks is decoded beside a plain request, whose answer must not move."""
    fields = {"max_new_tokens": 2} | chosen
    plain = SamplingParams(max_new_tokens=2)
    expected = shared.generate(GOOD[0], plain)
    results = []

    def serve():
        own = SamplingParams(**fields)
        own = own.replace(max_new_tokens=min(own.max_new_tokens, 3), n=min(own.n, 3))
        results.extend(shared.generate(GOOD, [plain, own]))

    if refusal(serve) is None:
        assert outcome(results[0])[:4] == outcome(expected)[:4]
        assert all(g.finish_reason in ("eos", "stop", "length", "time", "error") for g in results)
        assert all(g.error for g in results if g.finish_reason == "error")
    assert_nothing_leaked(shared)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("temprature", "temperature"),
        ("max_new_token", "max_new_tokens"),
        ("topk", "top_k"),
        ("repetition_penality", "repetition_penalty"),
        ("stops", "stop"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(engine, wrong, right):
    with pytest.raises(ParameterError, match=rf"{wrong}.*{right}"):
        engine.generate(GOOD, **{wrong: 1})


OUT_OF_VOCABULARY = {
    "logit_bias": {360: 1.0},
    "sequence_bias": {(5, 360): 1.0},
    "banned_tokens": [360],
    "bad_words": [[5, 360]],
    "allowed_tokens": [5, 360],
    "suppress_first": [360],
    "forced_tokens": {0: 360},
    "stop_token_ids": [360],
    "eos_token_ids": [360],
    "dry_breakers": [360],
}


@pytest.mark.parametrize("field", OUT_OF_VOCABULARY)
def test_ids_beyond_the_vocabulary_are_refused_with_field_id_and_range(engine, field):
    params = [SamplingParams(), SamplingParams(**{field: OUT_OF_VOCABULARY[field]})]
    with pytest.raises(ParameterError, match=rf"request 1: {field}.*360.*0 to 359"):
        engine.generate(GOOD, params)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"banned_tokens": range(360)}, "banned_tokens"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens=9"),
        ({"allowed_tokens": [5], "banned_tokens": [5]}, "allowed_tokens"),
        ({"max_new_tokens": 4, "max_tokens": 5}, "max_tokens"),
        ({"do_sample": False, "temperature": 0.7}, "temperature"),
    ],
)
def test_parameters_that_contradict_each_other(engine, fields, message):
    with pytest.raises(ParameterError, match=message):
        engine.generate(GOOD, **fields)


def test_a_stop_string_that_can_never_be_seen_is_refused(engine):
    with pytest.raises(
        ParameterError, match=r"stop='</s>!' holds the special token '</s>'.*skip_special_tokens"
    ):
        engine.generate(GOOD, stop=["</s>!"])
    engine.generate(GOOD, stop=["</s>!"], skip_special_tokens=False, max_new_tokens=1)
    engine.generate(GOOD, stop=["</s>", "s>!"], max_new_tokens=1)


def test_a_number_that_is_too_large_is_told_the_largest():
    with pytest.raises(
        ParameterError, match=r"max_new_tokens=2147483648 .* at least 1 and at most 2147483647"
    ):
        SamplingParams(max_new_tokens=2**31)
    with pytest.raises(
        ParameterError, match=r"max_new_tokens=0 is not valid: expected an integer of at least 1$"
    ):
        SamplingParams(max_new_tokens=0)


def test_a_path_instead_of_a_model_is_told_what_loads_it(tmp_path):
    for path in ("HuggingFaceTB/SmolLM2-135M", tmp_path):
        with pytest.raises(ParameterError, match=r"Engine\.from_pretrained\('.*'\) loads one"):
            Engine(path)


def test_a_list_of_params_must_fit_the_prompts(engine):
    for params in ([], [SamplingParams()], [SamplingParams()] * 3):
        with pytest.raises(ParameterError, match=rf"{len(params)} params for 2 prompts"):
            engine.generate(GOOD, params)
    with pytest.raises(ParameterError):
        engine.generate(GOOD, [SamplingParams(), "greedy"])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "result",
    [
        lambda logits: None,
        lambda logits: logits[:, :5],
        lambda logits: logits[:1],
        lambda logits: logits.argmax(-1),
        lambda logits: logits.tolist(),
    ],
    ids=["nothing", "narrow", "one row", "tokens", "list"],
)
def test_a_processor_that_returns_no_logits_is_named(engine, result, temperature):
    def homemade(logits, context):
        return result(logits)

    own = SamplingParams(max_new_tokens=3, temperature=temperature, seed=0, processors=[homemade])
    for params in ([own, own], [SamplingParams(max_new_tokens=3), own]):
        for asked, generation in zip(params, engine.generate(GOOD, params), strict=True):
            if asked is own:
                assert generation.finish_reason == "error"
                assert re.search(r"homemade.*360\]", generation.error)
            else:
                assert (generation.finish_reason, generation.n_new) == ("length", 3)


# Prompts


BAD_PROMPTS = [
    ("", "prompt 0 is empty"),
    ([], "empty list"),
    ([[]], "prompt 0 is empty"),
    ([[5], []], "prompt 1 is empty"),
    (["the", ""], "prompt 1 is empty"),
    ([[5], [360]], r"prompt 1: token id 360 at position 0.*0 to 359"),
    ([[5, -1]], r"prompt 0: token id -1 at position 1"),
    ([[5] * 64], r"prompt 0 has 64 tokens.*max_length=64"),
    (["the", "a" * 500], r"prompt 1 has \d+ tokens"),
    (None, "prompt 0 is"),
    (5, "prompt 0 is"),
    (5.0, "prompt 0 is"),
    (b"the", "decode it to str"),
    ([5, "the"], "mixes"),
    ([[5, None]], "element 1 is"),
    ([[5, 6.0]], "element 1 is"),
    ([[True, False]], "element 0 is"),
    ([Odd()], "prompt 0 is Odd"),
    ({"text": "the"}, "input_ids"),
    ({"role": "user", "content": "x"}, "input_ids"),
    ([{"role": "user"}], "content|template"),
    ("\ud800", "not valid Unicode"),
    (torch.zeros(3, 31), r"size 31.*32"),
    (torch.zeros(3), r"float32 tensor of shape \[3\]"),
    (torch.zeros(2, 3, 32), r"shape \[2, 3, 32\]"),
    (torch.zeros(0, 32), "prompt 0 is empty"),
    (torch.zeros(2, 3, dtype=torch.long), "without an attention_mask"),
    (torch.tensor([1, 2], dtype=torch.bool), "bool tensor"),
    ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, "without an attention_mask"),
    ({"input_ids": [[5, 6]], "attention_mask": [[0, 0]]}, "all padding"),
    ({"input_ids": [[5, 6, 7]], "attention_mask": [[1, 0, 1]]}, "hole at position 1"),
    ({"input_ids": [[5, 6]], "attention_mask": [[1]]}, "attention_mask has 1"),
    (np.array([b"the"]), "NumPy array of dtype"),
    ({5, 6}, "prompt 0 is set"),
]


@pytest.mark.parametrize(("prompts", "message"), BAD_PROMPTS, ids=range(len(BAD_PROMPTS)))
def test_a_bad_prompt_is_refused_by_everything_that_takes_prompts(engine, prompts, message):
    for act in (engine.generate, engine.stream, engine.prefill):
        if prompts is None and act == engine.prefill:
            continue
        with pytest.raises(PromptError, match=message):
            act(prompts)


class Column:
    """What `dataset["text"]` gives: neither a list nor a Sequence that is registered."""

    def __init__(self, values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __iter__(self):
        return iter(self.values)


TEXTS = ["the fox", "lazy dog"]
IDS = [[5, 6, 7], [8]]


@pytest.mark.parametrize(
    ("prompts", "same"),
    [
        (lambda: np.array(TEXTS), TEXTS),
        (lambda: np.array(TEXTS, dtype=object), TEXTS),
        (lambda: Column(TEXTS), TEXTS),
        (lambda: map(str.strip, TEXTS), TEXTS),
        (lambda: (text for text in TEXTS), TEXTS),
        (lambda: dict.fromkeys(TEXTS).keys(), TEXTS),
        (lambda: np.array(IDS, dtype=object), IDS),
        (lambda: [np.array(IDS[0]), (i for i in IDS[1])], IDS),
        (lambda: map(iter, IDS), IDS),
        (lambda: range(5, 8), IDS[0]),
        (lambda: (i for i in IDS[0]), IDS[0]),
    ],
)
def test_whatever_holds_prompts_in_order_is_a_list_of_them(engine, prompts, same):
    expected = engine.generate(same, max_new_tokens=2)
    results = engine.generate(prompts(), max_new_tokens=2)
    assert isinstance(results, list) == isinstance(expected, list)
    for result, wanted in zip(*(r if isinstance(r, list) else [r] for r in (results, expected)), strict=True):
        assert outcome(result) == outcome(wanted)
    each = [SamplingParams(max_new_tokens=n) for n in (1, 3)]
    if len(same) == 2:
        assert [r.n_new for r in engine.generate(prompts(), iter(each))] == [1, 3]


@pytest.mark.parametrize(
    "tokens",
    [np.array([7, 8]), [np.int64(7), 8], range(7, 9), lambda: map(int, "78"), lambda: (i for i in (7, 8))],
)
def test_tokens_of_a_step_may_come_in_any_order_keeping_form(engine, tokens):
    state = engine.prefill(GOOD)
    expected = engine.step(state, [7, 8])
    after = engine.step(state, tokens() if callable(tokens) else tokens)
    assert torch.equal(after.logits, expected.logits)
    assert after.new_tokens == [[7], [8]]
    longer = engine.extend(state, ([t, 9] for t in (7, 8)))
    assert torch.equal(longer.logits, engine.extend(state, np.array([[7, 9], [8, 9]])).logits)


@pytest.mark.parametrize("tokens", [5, "78", {7, 8}, {7: 8}, None, b"78"])
def test_tokens_that_have_no_order_are_refused(engine, tokens):
    with pytest.raises(HandloomError, match="tokens must be"):
        engine.step(engine.prefill(GOOD), tokens)


@pytest.mark.parametrize("tokens", [[], torch.tensor([]), np.array([])])
def test_no_rows_take_no_tokens(engine, tokens):
    nobody = engine.prefill(GOOD).select([])
    assert len(engine.step(nobody, tokens)) == 0


def test_a_layer_that_there_is_none_of_is_told_which_there_are(engine):
    state = engine.prefill(GOOD, hidden=True)
    count = len(state.hidden_states)
    for layer in (99, -count - 1, "last"):
        with pytest.raises(
            HandloomError, match=rf"layer={layer!r} is none of the {count} hidden states: -{count} to"
        ):
            state.hidden(layer)
    assert torch.equal(state.hidden(-count), state.hidden(0))


@settings(max_examples=200)
@given(
    prompt=st.one_of(JUNK, st.lists(JUNK, max_size=3), st.lists(st.integers(0, 359), min_size=1, max_size=9))
)
def test_any_object_as_a_prompt_is_served_or_refused(shared, prompt):
    results = []
    message = refusal(lambda: results.append(shared.generate(prompt, max_new_tokens=1)), PromptError)
    if message is None:
        assert results[0] if isinstance(results[0], list) else results[0].n_new == 1
    else:
        assert re.search("prompt|mask|ids|element", message)
    assert_nothing_leaked(shared)


def test_embeddings_of_nan_end_their_row_alone(engine):
    table = engine.model.get_input_embeddings().weight.detach()
    good = table[GOOD[0]]
    expected = engine.generate(good, max_new_tokens=3)
    results = engine.generate([good, torch.full((4, 32), math.nan), good], max_new_tokens=3)
    assert [g.finish_reason for g in results] == ["length", "error", "length"]
    assert [results[i].token_ids for i in (0, 2)] == [expected.token_ids] * 2
    assert "NaN" in results[1].error


def test_nothing_runs_when_one_of_many_prompts_is_bad(engine):
    seen = []
    handle = engine.model.register_forward_pre_hook(lambda *args: seen.append(1))
    with pytest.raises(PromptError, match="prompt 2"):
        engine.generate([*GOOD, [999]])
    handle.remove()
    assert seen == []


# Models


def test_a_model_of_nothing_but_nan():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    engine = Engine(model, slots=2)
    results = engine.generate(GOOD * 2, max_new_tokens=3, temperature=1.0)
    assert [g.finish_reason for g in results] == ["error"] * 4
    for index, generation in enumerate(results):
        assert f"request {index}" in generation.error
        assert "NaN" in generation.error
        assert generation.token_ids == []
        assert math.isnan(generation.cumulative_logprob) or generation.cumulative_logprob == 0
        assert "error" in repr(generation)
        assert generation._repr_html_()
        generation.to_dict()
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_logits(value):
    """+inf leaves no distribution, so the row ends; -inf excludes a token like a ban."""
    model = tiny_llama(attention_bias=False)
    engine = Engine(model)
    plain = engine.generate(GOOD[0], max_new_tokens=3)
    handle = model.register_forward_hook(
        lambda m, a, out: out.logits[..., plain.token_ids[0]].fill_(value) and None
    )
    generation = engine.generate(GOOD[0], max_new_tokens=3)
    sampled = engine.generate(GOOD[0], max_new_tokens=3, temperature=1.0, seed=0)
    handle.remove()
    if value > 0:
        assert generation.finish_reason == sampled.finish_reason == "error"
    else:
        assert generation.finish_reason == sampled.finish_reason == "length"
        assert plain.token_ids[0] not in generation.token_ids + sampled.token_ids
        assert math.isfinite(sampled.cumulative_logprob)
    assert_nothing_leaked(engine)


@settings(max_examples=25)
@given(
    poison=st.lists(st.booleans(), min_size=1, max_size=7),
    at=st.integers(0, 5),
    slots=st.integers(1, 4),
)
def test_rows_with_nan_never_reach_rows_without(poison, at, slots):
    engine = Engine(NAN_MODEL, slots=slots, block_size=4, self_check=False)
    prompts = prompts_of([3 + i for i in range(len(poison))], seed=at)
    prompts = [[t if t != POISON else 5 for t in p] for p in prompts]
    plain = SamplingParams(max_new_tokens=7, banned_tokens=[POISON])
    expected = [SOUND.generate(p, plain).token_ids for p in prompts]
    params = [
        SamplingParams(max_new_tokens=7, forced_tokens={at: POISON}) if bad else plain for bad in poison
    ]
    for generation, bad, tokens in zip(engine.generate(prompts, params), poison, expected, strict=True):
        assert generation.finish_reason == ("error" if bad else "length")
        if bad:
            assert 1 <= generation.n_new <= at + 1  # it may have drawn the token by itself
        else:
            assert generation.token_ids == tokens
    assert_nothing_leaked(engine)


NAN_MODEL = poisoned(tiny_llama())
SOUND = Engine(NAN_MODEL, slots=1, prefix_cache=False)


def test_a_tokenizer_smaller_than_the_model():
    """Padded vocabularies: ids that the tokenizer does not know are drawn and have no text."""
    tokenizer = byte_level()
    engine = Engine(tiny_llama(vocab_size=400), tokenizer)
    generation = engine.generate("the", forced_tokens={0: 50, 1: 399, 2: 51}, max_new_tokens=3)
    assert generation.token_ids == [50, 399, 51]
    assert generation.text == tokenizer.decode([50, 51])
    assert_nothing_leaked(engine)


def test_a_tokenizer_larger_than_the_model_is_caught_at_the_prompt():
    engine = Engine(tiny_llama(vocab_size=50), byte_level())
    with pytest.raises(PromptError, match=r"prompt 0: token id \d+ .*0 to 49"):
        engine.generate("the quick brown fox")
    with pytest.raises(ParameterError, match=r"bad_words.*0 to 49"):
        engine.generate([5], bad_words=["fox"])
