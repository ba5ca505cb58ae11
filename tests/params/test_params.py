"""SamplingParams: what every field accepts and refuses, and how the value behaves."""

import copy
import dataclasses
import inspect
import json
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import SynthIDTextWatermarkingConfig, WatermarkingConfig

from handloom import SamplingParams
from handloom.errors import ParameterError

FIELDS = [field.name for field in dataclasses.fields(SamplingParams)]
NAN, INF = float("nan"), float("inf")
SYNTHID = SynthIDTextWatermarkingConfig(ngram_len=2, keys=[3, 1]).to_dict() | {"keys": (3, 1)}

# field -> values at and inside its borders, values just outside of them; by hand, from the documentation
NUMBERS = {
    "max_new_tokens": ([1, 256, 2**31 - 1], [0, -1, 2**31]),
    "min_new_tokens": ([0, 256], [-1]),
    "max_length": ([1, 4096], [0, -1]),
    "temperature": ([0, 1e-6, 0.7, 2, 1e6], [-0.1, 1e-7, 1e39]),
    "seed": ([0, 2**63 - 1], [-2, 2**63]),
    "n": ([1, 64], [0, -1]),
    "top_k": ([0, 1, 50], [-2]),
    "top_p": ([1e-9, 0.9, 1], [0, -0.1, 1.0001, 1e-320]),
    "min_p": ([0, 0.05, 1], [-0.01, 1.01]),
    "typical_p": ([0.2, 1], [0, 1.01]),
    "epsilon_cutoff": ([0, 3e-4, 0.99], [1, -1e-9]),
    "eta_cutoff": ([0, 3e-4, 0.99], [1, -1e-9]),
    "top_a": ([0, 0.2, 1], [-0.1, 1.1]),
    "tfs": ([0.95, 1], [0, 1.1]),
    "top_n_sigma": ([0, 1, 2.5], [-0.5, -2]),
    "top_h": ([0, 0.4, 1], [-0.1, 1.1]),
    "xtc_probability": ([0, 0.5, 1], [-0.1, 1.1]),
    "xtc_threshold": ([0, 0.1, 1], [-0.1, 1.1]),
    "dynatemp_range": ([0], [-0.1]),
    "dynatemp_exponent": ([0, 1, 2], [-0.1]),
    "smoothing_factor": ([0, 0.3, 10], [-0.1]),
    "smoothing_curve": ([1, 4.5], [0.99, 0]),
    "edt_theta": ([0, 0.1], [-0.1]),
    "edt_base": ([0.8, 1], [0, 1.1]),
    "mirostat": ([0, 1, 2], [3, -1]),
    "mirostat_tau": ([0, 5], [-0.1]),
    "mirostat_eta": ([0, 0.1, 1], [-0.1, 1.1]),
    "adaptive_target": ([0, 0.5, 1], [-0.5, 1.1]),
    "adaptive_decay": ([0, 0.99], [-0.1, 1]),
    "repetition_penalty": ([0.5, 1, 1.3], [0, -1]),
    "presence_penalty": ([-2, 0, 2.5], [1e39]),
    "frequency_penalty": ([-2, 0, 2.5], [-1e39]),
    "penalty_window": ([0, 64], [-2]),
    "dry_multiplier": ([0, 0.8], [-0.1]),
    "dry_base": ([1, 1.75], [0.99]),
    "dry_allowed_length": ([0, 2], [-1]),
    "dry_window": ([0, 64], [-2]),
    "no_repeat_ngram_size": ([0, 3], [-1]),
    "max_time": ([0.1, 60], [0, -1]),
    "logprobs": ([0, 20], [-1]),
    "prompt_logprobs": ([0, 20], [-1]),
}
INTEGERS = {
    *("max_new_tokens", "min_new_tokens", "max_length", "seed", "n", "top_k", "mirostat", "penalty_window"),
    *("dry_allowed_length", "dry_window", "no_repeat_ngram_size", "logprobs", "prompt_logprobs"),
}

# The other fields: (value, normal form), and values that must be refused.
OTHERS = {
    "top_h_rule": ([("code", "code")], ["Paper", "", 0, ["code"]]),
    "p_less": ([(True, True), ("norm", "norm"), (np.True_, True)], [1, 0, "no", 0.5]),
    "penalty_scope": ([("output", "output")], ["context", 1, True]),
    "dry_breakers": ([("\n", ("\n",)), ([13, ":", 13], (13, ":"))], ["", [-1], [1.5], [True], 5, {"a": 1}]),
    "logit_bias": (
        [({5: 1}, {5: 1.0}), ({"5": -2.5}, {5: -2.5}), ([[5, 1], ("a", 2)], {5: 1.0, "a": 2.0})],
        [
            {-1: 1},
            {5: INF},
            {5: NAN},
            {5: True},
            {5: "1"},
            {"": 1.0},
            {1.5: 1},
            [5, 1],
            [[5]],
            5,
            "5:1",
            {True: 1},
        ],
    ),
    "sequence_bias": (
        [({(1, 2): 3}, {(1, 2): 3.0}), ([[[1, 2], 3], [[4], -1.0]], {(1, 2): 3.0, (4,): -1.0})],
        [{(): 1.0}, {(1, -2): 1.0}, {(1,): INF}, {5: 1.0}, {"ab": 1.0}, [[1, 2, 3]], 7],
    ),
    "banned_tokens": (
        [([3, 1, 3], (3, 1)), (np.array([4, 2]), (4, 2))],
        [5, [-1], [1.0], [True], ["a"], "12", [2**31]],
    ),
    "bad_words": (
        [("no", ("no",)), ([[1, 2], "x", [1, 2]], ((1, 2), "x"))],
        ["", [1, 2], [[]], [[-1]], [[True]], [["a"]], {1: 2}, 5, [None]],
    ),
    "allowed_tokens": (
        [([2, 1], (2, 1)), (torch.tensor([7]), (7,))],
        [[], [-1], ["a"], 3, torch.zeros(1, 2)],
    ),
    "suppress_first": ([({9}, (9,))], [[-1], "9", 9]),
    "forced_tokens": (
        [({0: 5}, {0: 5}), ({"2": 7}, {2: 7})],
        [{-1: 5}, {0: -5}, {0: 1.5}, {"a": 1}, [1, 2], {0: True}],
    ),
    "exponential_decay": (
        [([5, 1.1], (5, 1.1)), ((0, 2), (0, 2.0))],
        [5, (5,), (-1, 1.1), (5, 0), (5, NAN), (1.5, 2)],
    ),
    "prefix_fn": ([(max, max)], [5, "f", [max]]),
    "watermarking_config": (
        [({"keys": [3, 1], "ngram_len": 2}, SYNTHID), ({}, WatermarkingConfig().to_dict())],
        [5, "lefthash", {"bais": 1.0}, {"greenlist_ratio": 2.0}, {"keys": [1]}],
    ),
    "stop": ([("x", ("x",)), (["a", "b", "a"], ("a", "b"))], ["", ["a", ""], [1], 5, {"a": 1}, b"x"]),
    "stop_token_ids": ([(range(2, 4), (2, 3))], [[-1], [1.5], 7, "7"]),
    "eos_token_ids": ([([2, 2, 1], (2, 1)), ([], ())], [[-1], 7, "7"]),
    "ignore_eos": ([(True, True), (np.True_, True), (torch.tensor(True), True)], [1, 0, "yes", 0.0]),
    "include_stop": ([(True, True)], [1, "no"]),
    "skip_special_tokens": ([(False, False)], [0, "False"]),
    "criteria": ([(max, (max,)), ([max, min], (max, min))], [5, ["f"], int, [[max]]]),
    "order": ([("top_k", ("top_k",)), (["top_p", "top_k"], ("top_p", "top_k"))], [5, [""], [1]]),
    "profile": ([("hf", "hf")], ["HF", "sglang", 1]),
    "processors": ([([max], (max,))], [5, ["temperature"], int, {"a": max}]),
}


def test_the_tables_of_this_file_cover_every_field():
    assert sorted([*NUMBERS, *OTHERS]) == sorted(FIELDS)


@pytest.mark.parametrize("name", NUMBERS)
def test_number_inside_its_range_is_kept_with_its_type(name):
    for value in NUMBERS[name][0]:
        kept = getattr(SamplingParams(**{name: value}), name)
        assert kept == value
        assert type(kept) is (int if name in INTEGERS else float)


@pytest.mark.parametrize("name", NUMBERS)
def test_number_outside_its_range_is_refused_by_name_and_value(name):
    for value in NUMBERS[name][1]:
        with pytest.raises(
            ParameterError, match=rf"^{name}={re.escape(repr(value))} is not valid: expected "
        ):
            SamplingParams(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value",
    [
        True,
        False,
        NAN,
        INF,
        -INF,
        10**400,
        "1",
        "",
        b"1",
        [1],
        (1,),
        {1: 1},
        1j,
        frozenset(),
        np.array([1]),
        np.bool_(1),
    ],
    ids=repr,
)
def test_what_is_not_a_finite_number_is_refused(name, value):
    with pytest.raises(ParameterError, match=rf"^{name}=.* is not valid: expected "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", sorted(INTEGERS))
@pytest.mark.parametrize("value", [1.0, 1.5, np.float32(1), torch.tensor(1.0)], ids=repr)
def test_float_is_not_an_integer(name, value):
    with pytest.raises(ParameterError, match=f"^{name}="):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("name", OTHERS)
def test_other_value_is_brought_to_its_normal_form(name):
    for value, expected in OTHERS[name][0]:
        kept = getattr(SamplingParams(**{name: value}), name)
        assert kept == expected
        assert type(kept) is type(expected) or isinstance(kept, dict)


@pytest.mark.parametrize("name", OTHERS)
def test_other_value_that_makes_no_sense_is_refused(name):
    for value in OTHERS[name][1]:
        with pytest.raises(ParameterError, match=rf"^{name}=.* is not valid: expected |^{name} gives"):
            SamplingParams(**{name: value})


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=2),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.integers() | st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(name=st.sampled_from(FIELDS), value=junk)
def test_any_value_of_any_field_is_kept_valid_or_refused_with_the_fields_name(name, value):
    message = None
    try:
        params = SamplingParams(**{name: value})
    except ParameterError as error:
        message = str(error)
    if message is not None:
        assert name in message
        return
    # what was kept is a fixed point: reading it again, also out of JSON, gives the same value
    assert SamplingParams(**{name: getattr(params, name)}) == params
    assert SamplingParams.from_dict(json.loads(json.dumps(params.to_dict()))) == params
    assert isinstance(hash(params), int)


@given(name=st.text(max_size=12))
def test_any_unknown_name_is_refused(name):
    with pytest.raises(ParameterError, match="sampling parameter"):
        SamplingParams(**{f"{name}!": 1})


def test_default_is_greedy_256_tokens_and_nothing_hidden():
    params = SamplingParams()
    assert (params.temperature, params.greedy, params.max_new_tokens) == (0.0, True, 256)
    assert (params.top_k, params.top_p, params.repetition_penalty, params.profile) == (0, 1.0, 1.0, "default")
    assert repr(params) == "SamplingParams()"
    assert not SamplingParams(temperature=0.1).greedy


def test_none_means_the_default_of_any_field():
    assert SamplingParams(**dict.fromkeys(FIELDS)) == SamplingParams()


@pytest.mark.parametrize(
    ("name", "value", "off"),
    [
        ("top_k", -1, 0),
        ("top_n_sigma", -1, 0),
        ("adaptive_target", -1.0, 0),
        ("penalty_window", -1, 0),
        ("seed", -1, None),
    ],
)
def test_other_engines_off_values_become_ours(name, value, off):
    assert getattr(SamplingParams(**{name: value}), name) == off


@pytest.mark.parametrize(
    "scalar", [np.float64(0.5), np.float32(0.5), torch.tensor(0.5), np.array(0.5)], ids=repr
)
def test_array_scalars_are_floats(scalar):
    assert type(SamplingParams(top_p=scalar).top_p) is float
    assert SamplingParams(top_p=scalar).top_p == 0.5


@pytest.mark.parametrize("scalar", [np.int64(7), np.uint8(7), torch.tensor(7), np.array(7)], ids=repr)
def test_array_scalars_are_ints(scalar):
    assert type(SamplingParams(top_k=scalar, stop_token_ids=[scalar]).stop_token_ids[0]) is int
    assert SamplingParams(top_k=scalar).top_k == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens=9 is more than max_new_tokens=8"),
        ({"temperature": 0.5, "dynatemp_range": 0.6}, "dynatemp_range=0.6 is more than temperature=0.5"),
        ({"allowed_tokens": [1, 2], "banned_tokens": [2, 1, 3]}, "is in banned_tokens"),
        ({"logit_bias": [[5, 1.0], ["5", 2.0]]}, "logit_bias gives 5 two values: 1.0 and 2.0"),
        ({"do_sample": False, "temperature": 0.7}, "do_sample=False asks for greedy"),
        ({"do_sample": True, "temperature": 0}, "do_sample=True asks for sampling"),
    ],
)
def test_contradiction_is_an_error(settings, message):
    with pytest.raises(ParameterError, match=message):
        SamplingParams(**settings)


def test_fields_that_agree_at_the_border_are_accepted():
    assert SamplingParams(min_new_tokens=8, max_new_tokens=8).min_new_tokens == 8
    assert SamplingParams(temperature=0.5, dynatemp_range=0.5).dynatemp_range == 0.5
    assert SamplingParams(allowed_tokens=[1, 2], banned_tokens=[2]).allowed_tokens == (1, 2)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("tempature", "temperature"),
        ("TopP", "top_p"),
        ("max_new_token", "max_new_tokens"),
        ("repetition_penality", "repetition_penalty"),
        ("repeat_penality", "repeat_penalty"),
        ("stop_token_id", "stop_token_ids"),
    ],
)
def test_unknown_name_names_the_nearest_one(name, nearest):
    with pytest.raises(
        ParameterError, match=f"unknown sampling parameter '{name}'; did you mean '{nearest}'"
    ):
        SamplingParams(**{name: 1})


def test_value_is_frozen_hashable_and_equal_by_content():
    params = SamplingParams(logit_bias={5: 1.0}, forced_tokens={0: 3}, stop=["a"])
    twin = SamplingParams(forced_tokens={0: 3}, stop=("a",), logit_bias={"5": 1})
    assert params == twin
    assert hash(params) == hash(twin)
    assert len({params, twin, SamplingParams()}) == 2
    assert params != SamplingParams(logit_bias={5: 1.5}, forced_tokens={0: 3}, stop=["a"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3
    with pytest.raises(TypeError, match="read-only"):
        params.logit_bias[5] = 2.0
    with pytest.raises(TypeError, match="read-only"):
        params.logit_bias.update({6: 2.0})


def test_what_the_caller_passed_in_can_change_without_changing_the_value():
    bias, stop = {5: 1.0}, ["a"]
    params = SamplingParams(logit_bias=bias, stop=stop)
    bias[6] = 2.0
    stop.append("b")
    assert params.logit_bias == {5: 1.0}
    assert params.stop == ("a",)


class Unhashable:
    __hash__ = None

    def apply(self, logits, context):
        return logits


def test_processors_and_functions_count_for_equality_and_not_for_the_hash():
    rule = Unhashable()
    params = SamplingParams(processors=[rule])
    assert hash(params) == hash(SamplingParams())
    assert params != SamplingParams()
    assert params == SamplingParams(processors=rule)


def test_pickle_and_deepcopy_give_an_equal_value():
    params = SamplingParams(temperature=0.7, logit_bias={5: 1.0}, sequence_bias={(1, 2): 3.0}, stop="x")
    assert pickle.loads(pickle.dumps(params)) == params
    assert copy.deepcopy(params) == params
    assert dataclasses.replace(params, temperature=0.0) == params.replace(temperature=0.0)


def test_replace_takes_aliases_and_none_and_leaves_the_rest():
    params = SamplingParams(temperature=0.7, top_k=40, stop="x")
    changed = params.replace(max_tokens=9, top_k=None)
    assert repr(changed) == "SamplingParams(max_new_tokens=9, temperature=0.7, stop=('x',))"
    assert params.top_k == 40
    with pytest.raises(ParameterError, match="top_p=2 "):
        params.replace(top_p=2)
    with pytest.raises(ParameterError, match="min_new_tokens=300 is more than max_new_tokens=256"):
        params.replace(min_tokens=300)


def test_replace_switches_the_mode():
    params = SamplingParams(temperature=0.7)
    assert params.replace(do_sample=False).temperature == 0.0
    assert params.replace(do_sample=True).temperature == 0.7
    assert SamplingParams().replace(do_sample=True).temperature == 1.0


def test_replace_adds_bans_that_a_bias_holds_to_those_already_there():
    params = SamplingParams(banned_tokens=[1]).replace(logit_bias=[[2, False], [3, 1.5]])
    assert params.banned_tokens == (1, 2)
    assert params.logit_bias == {3: 1.5}


def test_repr_shows_what_differs_from_the_default_and_can_be_evaluated():
    params = SamplingParams(temp=0.8, top_p=1.0, logit_bias={5: 1}, bad_words=["x", [1]], p_less="norm")
    assert repr(params) == (
        "SamplingParams(temperature=0.8, p_less='norm', logit_bias={5: 1.0}, bad_words=('x', (1,)))"
    )
    assert eval(repr(params)) == params


def test_to_dict_survives_json_and_names_callables():
    params = SamplingParams(
        temperature=0.5,
        logit_bias={5: 1.0},
        sequence_bias={(1, 2): 3.0},
        forced_tokens={0: 4},
        bad_words=[[1], "x"],
        exponential_decay=(3, 1.5),
        seed=2**63 - 1,
    )
    record = json.loads(json.dumps(params.to_dict()))
    assert SamplingParams.from_dict(record) == params
    assert set(record) == set(FIELDS)
    assert params.to_dict(defaults=False)["sequence_bias"] == [[[1, 2], 3.0]]
    assert set(SamplingParams(top_k=3).to_dict(defaults=False)) == {"top_k"}
    named = SamplingParams(criteria=[len], processors=Unhashable()).to_dict(defaults=False)
    assert named == {"criteria": ["len"], "processors": ["Unhashable"]}
    with pytest.raises(ParameterError, match="criteria='len'"):
        SamplingParams.from_dict(named)


def test_signature_lists_every_field_with_its_default():
    shown = inspect.signature(SamplingParams).parameters
    assert [name for name in shown if name != "aliases"] == FIELDS
    assert all(shown[name].default == getattr(SamplingParams(), name) for name in FIELDS)
    with pytest.raises(TypeError):
        SamplingParams(0.7)


def test_docstring_documents_every_field():
    documented = re.findall(r"^        (\w+): ", SamplingParams.__doc__, flags=re.MULTILINE)
    assert sorted(documented) == sorted(FIELDS)


class LetterTokenizer:
    """A letter's token is its code point; " x" is one token, 1000 + ord(x), as in byte-level BPE."""

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        ids = []
        for letter in text:
            if ids and ids[-1] == ord(" ") and letter.isalpha():
                ids[-1] = 1000 + ord(letter)
            else:
                ids.append(ord(letter))
        return ids


def test_resolve_turns_strings_into_token_ids():
    params = SamplingParams(
        bad_words=["no", [5, 6], " x", "\n"], dry_breakers=[":", 13], logit_bias={"ab": 2, 7: 1}, stop="end"
    )
    resolved = params.resolve(LetterTokenizer())
    n, o, x = map(ord, "nox")
    assert resolved.bad_words == ((n, o), (1000 + n, o), (5, 6), (x,), (1000 + x,), (10,))
    assert resolved.dry_breakers == (ord(":"), 13)
    assert resolved.logit_bias == {ord("a"): 2.0, ord("b"): 2.0, 7: 1.0}
    assert resolved.stop == ("end",)
    assert resolved.resolve(None) is resolved


def test_resolve_without_a_tokenizer_or_with_a_clash_is_an_error():
    with pytest.raises(ParameterError, match="string 'no' needs a tokenizer"):
        SamplingParams(bad_words="no").resolve(None)
    with pytest.raises(ParameterError, match=r"token 97 two values: 1\.0 and 2\.0"):
        SamplingParams(logit_bias={97: 1, "a": 2}).resolve(LetterTokenizer())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("banned_tokens", [100]),
        ("allowed_tokens", [3, 100]),
        ("suppress_first", [100]),
        ("stop_token_ids", [100]),
        ("dry_breakers", ["a", 100]),
        ("logit_bias", {100: 1.0}),
        ("bad_words", ["a", [1, 100]]),
        ("sequence_bias", {(100, 1): 1.0}),
        ("forced_tokens", {100: 100}),
    ],
)
def test_token_ids_beyond_the_vocabulary_are_named(name, value):
    params = SamplingParams(**{name: value})
    params.check_vocabulary(101)
    with pytest.raises(ParameterError, match=f"{name}: token id 100 is not valid: expected 0 to 99"):
        params.check_vocabulary(100)


def test_banning_the_whole_vocabulary_is_an_error():
    SamplingParams(banned_tokens=range(9)).check_vocabulary(10)
    with pytest.raises(ParameterError, match="whole vocabulary"):
        SamplingParams(banned_tokens=range(10)).check_vocabulary(10)
