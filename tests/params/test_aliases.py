"""The name table: every engine's spelling of a parameter, by hand, and what each dialect makes of it."""

import json
import warnings

import pytest
from hypothesis import given
from hypothesis import settings as run
from hypothesis import strategies as st

from handloom import SamplingParams
from handloom.errors import ParameterError
from handloom.params.aliases import ALIASES, ELSEWHERE, SPECIAL, UNLIMITED, ByRow
from handloom.params.dialects import DIALECTS


def read(dialect, **settings):
    return SamplingParams.from_dict(settings, dialect=dialect)


def shown(dialect, **settings):
    """What a dialect's settings come to: the fields that differ from the default, but for the profile."""
    params = read(dialect, **settings)
    return params.replace(profile=None).to_dict(defaults=False)


# (spelling, value) -> (field, value); these mean the same in the constructor and in every dialect
EVERYWHERE = [
    ("max_tokens", 9, "max_new_tokens", 9),
    ("max_completion_tokens", 9, "max_new_tokens", 9),
    ("max_gen_toks", 9, "max_new_tokens", 9),
    ("n_predict", 9, "max_new_tokens", 9),
    ("n_predict", -1, "max_new_tokens", 2**31 - 1),
    ("n_predict", -2, "max_new_tokens", 2**31 - 1),
    ("min_tokens", 9, "min_new_tokens", 9),
    ("num_return_sequences", 3, "n", 3),
    ("n_cmpl", 3, "n", 3),
    ("typ_p", 0.9, "typical_p", 0.9),
    ("tfs_z", 0.9, "tfs", 0.9),
    ("top_nsigma", 1.5, "top_n_sigma", 1.5),
    ("mirostat_mode", 2, "mirostat", 2),
    ("repeat_penalty", 1.1, "repetition_penalty", 1.1),
    ("dry_sequence_breakers", ["a", "b"], "dry_breakers", ("a", "b")),
    ("dry_sequence_breakers", r'"\n", ":", "\"", "*"', "dry_breakers", ("\n", ":", '"', "*")),
    ("suppress_tokens", [1, 2], "banned_tokens", (1, 2)),
    ("custom_token_bans", "1, 2", "banned_tokens", (1, 2)),
    ("custom_token_bans", "", "banned_tokens", ()),
    ("begin_suppress_tokens", [1, 2], "suppress_first", (1, 2)),
    ("bad_words_ids", [[1, 2], [3]], "bad_words", ((1, 2), (3,))),
    ("allowed_token_ids", [1, 2], "allowed_tokens", (1, 2)),
    ("exponential_decay_length_penalty", [5, 1.1], "exponential_decay", (5, 1.1)),
    ("prefix_allowed_tokens_fn", max, "prefix_fn", ByRow(max)),
    ("eos_token_id", 7, "eos_token_ids", (7,)),
    ("eos_token_id", [7, 9], "eos_token_ids", (7, 9)),
    ("stop_strings", "x", "stop", ("x",)),
    ("custom_stopping_strings", r'"\nYou:", "x"', "stop", ("\nYou:", "x")),
    ("custom_stopping_strings", "x", "stop", ("x",)),
    ("custom_stopping_strings", "", "stop", ()),
    ("ban_eos_token", True, "ignore_eos", True),
    ("include_stop_str_in_output", True, "include_stop", True),
    ("stopping_criteria", [max], "criteria", (max,)),
    ("n_probs", 5, "logprobs", 5),
    ("n_probs", 0, "logprobs", None),
    ("logits_processor", [max], "processors", (max,)),
    ("logits_processors", [max], "processors", (max,)),
    ("temp", 0.6, "temperature", 0.6),
    ("top_logprobs", 4, "logprobs", 4),
    ("repetition_penalty_range", 64, "penalty_window", 64),
    ("repeat_last_n", 64, "penalty_window", 64),
    ("repeat_last_n", -1, "penalty_window", 0),
    ("penalty_last_n", 64, "penalty_window", 64),
    ("dry_penalty_last_n", -1, "dry_window", 0),
    ("dry_penalty_last_n", 32, "dry_window", 32),
]


def test_the_table_of_this_file_covers_every_alias():
    assert {spelling for spelling, *_ in EVERYWHERE} == set(ALIASES)


@pytest.mark.parametrize(("spelling", "value", "field", "expected"), EVERYWHERE)
def test_alias_sets_its_field_in_the_constructor_and_in_every_dialect(spelling, value, field, expected):
    assert getattr(SamplingParams(**{spelling: value}), field) == expected
    for dialect in DIALECTS:
        settings = {"do_sample": True} if dialect == "hf" and field == "temperature" else {}
        assert getattr(read(dialect, **settings, **{spelling: value}), field) == expected, dialect


@pytest.mark.parametrize(("spelling", "value", "field", "expected"), EVERYWHERE)
def test_alias_with_none_is_absent(spelling, value, field, expected):
    assert SamplingParams(**{spelling: None}) == SamplingParams()


@pytest.mark.parametrize(
    ("first", "second", "field"),
    [
        ({"max_tokens": 5}, {"max_new_tokens": 6}, "max_new_tokens"),
        ({"max_tokens": 5}, {"n_predict": -1}, "max_new_tokens"),
        ({"temp": 0.5}, {"temperature": 0.6}, "temperature"),
        ({"stop": "a"}, {"stop_strings": ["a", "b"]}, "stop"),
        ({"ignore_eos": False}, {"ban_eos_token": True}, "ignore_eos"),
        ({"suppress_tokens": [1]}, {"custom_token_bans": "2"}, "banned_tokens"),
    ],
)
def test_two_spellings_that_disagree_are_an_error_in_either_order(first, second, field):
    for settings in (first | second, second | first):
        with pytest.raises(ParameterError, match=f"both set {field}, to different values"):
            SamplingParams(**settings)


def test_two_spellings_that_agree_are_fine():
    params = SamplingParams(
        max_tokens=5, max_new_tokens=5, stop="a", stop_strings=["a"], typ_p=None, typical_p=0.5
    )
    assert repr(params) == "SamplingParams(max_new_tokens=5, typical_p=0.5, stop=('a',))"


def test_out_of_range_alias_is_named_as_it_was_written():
    with pytest.raises(
        ParameterError, match=r"^max_tokens=0 is not valid: expected an integer of at least 1"
    ):
        SamplingParams(max_tokens=0)
    with pytest.raises(ParameterError, match=r"^custom_token_bans='1,x' is not valid"):
        SamplingParams(custom_token_bans="1,x")
    with pytest.raises(ParameterError, match=r"^custom_stopping_strings="):
        SamplingParams(custom_stopping_strings='"unclosed')
    with pytest.raises(ParameterError, match=r"^repeat_last_n=0 switches the penalty off in llama"):
        SamplingParams(repeat_last_n=0)


@pytest.mark.parametrize(
    ("settings", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": None}, 0.0),
        ({"do_sample": False}, 0.0),
        ({"do_sample": False, "temperature": 0}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.3}, 0.3),
        ({"temperature": 0.3}, 0.3),
    ],
)
def test_do_sample_is_another_spelling_of_the_temperature(settings, temperature):
    assert SamplingParams(**settings).temperature == temperature


@pytest.mark.parametrize("value", [0, 1, "true", 0.5])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_do_sample_must_be_a_bool(dialect, value):
    with pytest.raises(ParameterError, match=r"^do_sample=.* expected True or False"):
        read(dialect, do_sample=value)


def test_dynatemp_low_and_high_are_a_middle_and_a_range():
    params = SamplingParams(dynatemp_low=0.5, dynatemp_high=1.5, dynatemp_exponent=2)
    assert (params.temperature, params.dynatemp_range, params.dynatemp_exponent) == (1.0, 0.5, 2.0)
    assert SamplingParams(dynatemp_low=0.5, dynatemp_high=1.5, dynamic_temperature=False) == SamplingParams()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dynatemp_low": 0.5}, "go together"),
        ({"dynatemp_low": 1.5, "dynatemp_high": 0.5}, "expected 0 <= low <= high"),
        ({"dynatemp_low": -0.5, "dynatemp_high": 0.5}, "expected 0 <= low <= high"),
        ({"dynatemp_low": 0, "dynatemp_high": 0}, "high > 0"),
        ({"dynatemp_low": 0.5, "dynatemp_high": 1.5, "temperature": 0.9}, r"mean temperature=1\.0, not 0\.9"),
        ({"dynatemp_low": 0.5, "dynatemp_high": "1"}, "^dynatemp_high='1'"),
        ({"dynamic_temperature": True}, "needs dynatemp_low and dynatemp_high"),
        ({"dynamic_temperature": 1}, "^dynamic_temperature=1"),
    ],
)
def test_dynatemp_that_makes_no_sense_is_an_error(settings, message):
    with pytest.raises(ParameterError, match=message):
        SamplingParams(**settings)


def test_a_bias_of_false_is_a_ban_and_numerals_are_ids():
    params = SamplingParams(logit_bias=[[5, False], ["7", -1], [8, 2.5]], banned_tokens=[9])
    assert params.banned_tokens == (9, 5)
    assert params.logit_bias == {7: -1.0, 8: 2.5}
    assert SamplingParams(logit_bias={"5": False}).banned_tokens == (5,)
    with pytest.raises(ParameterError, match=r"cannot ban the text 'ab': write bad_words=\['ab'\]"):
        SamplingParams(logit_bias=[["ab", False]])


# What handloom does in another way: the value that asks for it, and what the message points to
POINTERS = [
    ("num_beams", 4, "handloom.strategies.beam"),
    ("use_beam_search", True, "handloom.strategies.beam"),
    ("penalty_alpha", 0.6, "handloom.strategies.contrastive"),
    ("prompt_lookup_num_tokens", 3, "handloom.strategies.speculative"),
    ("assistant_model", "draft", "handloom.strategies.speculative"),
    ("best_of", 4, "handloom.strategies.best_of_n"),
    ("guidance_scale", 1.5, "two States"),
    ("min_length", 5, "min_new_tokens"),
    ("encoder_repetition_penalty", 1.2, 'penalty_scope="prompt"'),
    ("forced_eos_token_id", 2, "forced_tokens"),
    ("sampler_priority", ["temperature", "top_k"], "Pipeline"),
    ("temperature_last", True, "Pipeline"),
    ("output_scores", True, "logprobs="),
    ("response_format", {"type": "json_object"}, "processors="),
    ("echo", True, "prompt_logprobs="),
]


@pytest.mark.parametrize(("name", "value", "pointer"), POINTERS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_is_done_elsewhere_says_where(dialect, name, value, pointer):
    with pytest.raises(ParameterError, match=f"^{name}=.*{pointer}"):
        read(dialect, **{name: value})


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_is_done_elsewhere_may_be_given_as_off(name):
    for neutral in (None, *ELSEWHERE[name][0]):
        assert SamplingParams(**{name: neutral}) == SamplingParams()


def test_best_of_as_many_as_asked_for_is_just_n():
    assert SamplingParams(n=4, best_of=4) == SamplingParams(n=4)
    assert SamplingParams(n=4).replace(best_of=4).n == 4


def test_names_that_do_not_concern_decoding_are_skipped_in_their_dialect_only():
    assert read("openai", model="m", messages=[], stream=True, temperature=0) == SamplingParams()
    assert read("llamacpp", prompt="p", cache_prompt=True, temp=0, profile="default") == SamplingParams()
    with pytest.raises(ParameterError, match="'stream': it does not concern decoding"):
        SamplingParams(stream=True)


def test_a_name_of_another_dialect_says_which():
    with pytest.raises(ParameterError, match="it is textgen's"):
        SamplingParams(auto_max_new_tokens=True)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_unknown_name_is_refused_in_every_dialect(dialect):
    with pytest.raises(
        ParameterError, match="unknown sampling parameter 'tempurature'; did you mean 'temperature'"
    ):
        read(dialect, tempurature=0.5)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_reads_handlooms_own_names_and_its_own_output(dialect):
    params = SamplingParams(
        temperature=0.7, top_k=5, edt_theta=0.1, logit_bias={3: 1.0}, profile="vllm", seed=4
    )
    settings = {"do_sample": True} | params.to_dict(defaults=False)
    assert SamplingParams.from_dict(settings, dialect) == params


def test_dialects_ask_for_their_engines_profile():
    profiles = {dialect: read(dialect).profile for dialect in DIALECTS}
    own = {name: name for name in ("hf", "vllm", "llamacpp", "textgen")}
    assert profiles == own | {"handloom": "default", "openai": "default"}
    assert read("vllm", profile="default").profile == "default"


def test_nothing_written_adds_nothing_but_the_mode():
    assert {dialect: shown(dialect) for dialect in DIALECTS} == {
        "handloom": {},
        "hf": {},
        "vllm": {"temperature": 1.0},
        "llamacpp": {"temperature": 0.8},
        "textgen": {"temperature": 1.0},
        "openai": {"temperature": 1.0},
    }


def test_dialect_must_be_known_and_the_settings_a_mapping():
    with pytest.raises(
        ParameterError, match="dialect='llama' is not valid: expected one of 'handloom', 'hf'"
    ):
        SamplingParams.from_dict({}, "llama")
    with pytest.raises(ParameterError, match="expected a mapping of parameters, got list"):
        SamplingParams.from_dict([("top_k", 1)])


# ---- the other engines


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0, "max_tokens": 5}, {"max_new_tokens": 5}),
        ({"top_k": -1, "top_p": 1.0, "temperature": 0.7}, {"temperature": 0.7}),
        ({"seed": None, "stop": "x", "detokenize": True}, {"temperature": 1.0, "stop": ["x"]}),
        (
            {"bad_words": ["no"], "min_tokens": 2},
            {"temperature": 1.0, "bad_words": ["no"], "min_new_tokens": 2},
        ),
        ({"presence_penalty": 0.5}, {"temperature": 1.0, "presence_penalty": 0.5}),
        ({"do_sample": False}, {}),
        ({"logprobs": 3, "prompt_logprobs": 1, "temperature": 0}, {"logprobs": 3, "prompt_logprobs": 1}),
    ],
)
def test_vllm(settings, expected):
    assert shown("vllm", **settings) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": -1.0}, {}),
        ({"temp": 0.0, "seed": -1, "top_k": -5}, {}),
        ({"temp": 0.0, "seed": 2**32 - 1}, {}),
        ({"temp": 0.5, "dynatemp_range": 0.2}, {"temperature": 0.5, "dynatemp_range": 0.2}),
        # [0.5 - 1, 0.5 + 1] is cut to [0, 1.5]: middle and half-width 0.75
        ({"temp": 0.5, "dynatemp_range": 1}, {"temperature": 0.75, "dynatemp_range": 0.75}),
        (
            {"temp": 0, "repeat_penalty": 1.1, "repeat_last_n": 64},
            {"repetition_penalty": 1.1, "penalty_window": 64},
        ),
        ({"temp": 0, "repeat_penalty": 1.1, "repeat_last_n": -1}, {"repetition_penalty": 1.1}),
        ({"temp": 0, "repeat_penalty": 1.1, "presence_penalty": 1, "repeat_last_n": 0}, {}),
        ({"temp": 0, "dry_multiplier": 0.8, "dry_penalty_last_n": 0}, {}),
        (
            {"temp": 0, "dry_multiplier": 0.8, "dry_penalty_last_n": 99},
            {"dry_multiplier": 0.8, "dry_window": 99},
        ),
        ({"temp": 0, "presence_penalty": 1}, {"presence_penalty": 1.0, "penalty_scope": "all"}),
        ({"temp": 0, "adaptive_target": -1, "top_n_sigma": -1}, {}),
        ({"temp": 0, "adaptive_target": 0.3}, {"adaptive_target": 0.3}),
        (
            {"temp": 0, "logit_bias": [[5, False], ["ab", 2]]},
            {"logit_bias": {"ab": 2.0}, "banned_tokens": [5]},
        ),
        (
            {"n_predict": -1, "ignore_eos": True},
            {"temperature": 0.8, "max_new_tokens": UNLIMITED, "ignore_eos": True},
        ),
    ],
)
def test_llamacpp(settings, expected):
    assert shown("llamacpp", **settings) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adaptive_target": 0.0}, "adaptive_target=0 is not valid"),
        (
            {"repeat_last_n": 64, "penalty_window": 32},
            "repeat_last_n=64 sets penalty_window, which was given as 32",
        ),
        ({"repeat_last_n": 1.5}, "^repeat_last_n=1.5 is not valid"),
        ({"samplers": ["top_k", "temperature"]}, "Pipeline"),
    ],
)
def test_llamacpp_errors(settings, message):
    with pytest.raises(ParameterError, match=message):
        read("llamacpp", **settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"do_sample": False, "temperature": 0.7}, {}),
        ({"temperature": 0.7}, {"temperature": 0.7}),
        ({"temperature": 0}, {}),
        (
            {"do_sample": False, "epsilon_cutoff": 3, "eta_cutoff": 6},
            {"epsilon_cutoff": 3e-4, "eta_cutoff": 6e-4},
        ),
        ({"do_sample": False, "seed": -1, "custom_token_bans": "1,2"}, {"banned_tokens": [1, 2]}),
        (
            {"do_sample": False, "max_new_tokens": 200, "auto_max_new_tokens": True},
            {"max_new_tokens": UNLIMITED},
        ),
        ({"do_sample": False, "max_new_tokens": 200, "auto_max_new_tokens": False}, {"max_new_tokens": 200}),
        ({"dynatemp_low": 1, "dynatemp_high": 1, "temperature": 0.7}, {"temperature": 0.7}),
        (
            {"dynamic_temperature": True, "dynatemp_low": 0.5, "dynatemp_high": 2.5, "temperature": 1},
            {"temperature": 1.5, "dynatemp_range": 1.0},
        ),
        (
            {
                "do_sample": False,
                "repetition_penalty": 1.2,
                "repetition_penalty_range": 128,
                "frequency_penalty": 0.5,
            },
            {
                "repetition_penalty": 1.2,
                "frequency_penalty": 0.5,
                "penalty_scope": "all",
                "penalty_window": 128,
                "dry_window": 128,
            },
        ),
        (
            {"mirostat_mode": 2, "mirostat_tau": 3, "truncation_length": 2048},
            {"temperature": 1.0, "mirostat": 2, "mirostat_tau": 3.0},
        ),
    ],
)
def test_textgen(settings, expected):
    assert shown("textgen", **settings) == expected


def test_textgen_two_temperatures_in_a_row_cannot_be_said():
    with pytest.raises(ParameterError, match=r"mean temperature=1\.5, not 0\.7"):
        read("textgen", dynamic_temperature=True, dynatemp_low=0.5, dynatemp_high=2.5, temperature=0.7)


def test_the_unit_of_the_cutoffs_is_smaller_in_textgen_only():
    for dialect in set(DIALECTS) - {"textgen"}:
        assert read(dialect, epsilon_cutoff=0.03).epsilon_cutoff == 0.03
        with pytest.raises(ParameterError, match="epsilon_cutoff=3 is not valid"):
            read(dialect, epsilon_cutoff=3)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0, "max_completion_tokens": 5}, {"max_new_tokens": 5}),
        ({"top_p": 0}, {"temperature": 1.0, "top_p": 1e-9}),
        ({"temperature": 0, "logit_bias": {"50256": -100}}, {"logit_bias": {50256: -100.0}}),
        ({"temperature": 0, "stop": ["a", "b"], "n": 2}, {"stop": ["a", "b"], "n": 2}),
        ({"temperature": 0, "logprobs": True, "top_logprobs": 5}, {"logprobs": 5}),
        ({"temperature": 0, "logprobs": True}, {"logprobs": 0}),
        ({"temperature": 0, "logprobs": False}, {}),
        ({"temperature": 0, "logprobs": 3}, {"logprobs": 3}),
        ({"temperature": 0, "response_format": {"type": "text"}, "best_of": 1}, {}),
    ],
)
def test_openai(settings, expected):
    assert shown("openai", **settings) == expected


def test_openai_top_logprobs_that_contradict_are_errors():
    with pytest.raises(ParameterError, match="top_logprobs=5 needs logprobs=True"):
        read("openai", logprobs=False, top_logprobs=5)
    with pytest.raises(ParameterError, match="logprobs=3 and top_logprobs=5"):
        read("openai", logprobs=3, top_logprobs=5)
    with pytest.raises(ParameterError, match=r"^logprobs=True is not valid"):
        SamplingParams(logprobs=True)


junk = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=5,
)
NAMES = sorted({*SamplingParams().to_dict(), *ALIASES, *ELSEWHERE, *SPECIAL})


@given(
    dialect=st.sampled_from(sorted(DIALECTS)),
    written=st.dictionaries(st.sampled_from(NAMES), junk, max_size=3),
    data=st.data(),
)
@run(max_examples=400)
def test_any_settings_in_any_dialect_are_read_or_refused_by_name(dialect, written, data):
    own = sorted(DIALECTS[dialect].special)
    if own:
        written[data.draw(st.sampled_from(own))] = data.draw(junk)
    message = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            params = SamplingParams.from_dict(written, dialect)
        except ParameterError as error:
            message = str(error)
    if message is None:
        assert SamplingParams.from_dict(json.loads(json.dumps(params.to_dict()))) == params
    else:
        assert any(name in message for name in written) or "dynatemp_range" in message
