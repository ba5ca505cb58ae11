"""transformers' dialect: what a GenerationConfig means, attribute by attribute."""

import json
import warnings

import pytest
from transformers import GenerationConfig, SynthIDTextWatermarkingConfig, WatermarkingConfig

from handloom import SamplingParams
from handloom.errors import ParameterError
from handloom.params.aliases import UNLIMITED
from handloom.params.dialects import DIALECTS, HF_WITHOUT_EFFECT


def read(dialect, **settings):
    return SamplingParams.from_dict(settings, dialect=dialect)


def shown(dialect, **settings):
    """What a dialect's settings come to: the fields that differ from the default, but for the profile."""
    params = read(dialect, **settings)
    return params.replace(profile=None).to_dict(defaults=False)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"top_p": 0.9}),
        ({"max_length": 50}, {"max_length": 50, "max_new_tokens": UNLIMITED}),
        ({"max_length": 50, "max_new_tokens": 9}, {"max_new_tokens": 9}),
        ({"eos_token_id": 2}, {"eos_token_ids": [2]}),
        ({"eos_token_id": [2, 3], "pad_token_id": 2}, {"eos_token_ids": [2, 3]}),
        ({"do_sample": True, "top_h": 0.4}, {"temperature": 1.0, "top_h": 0.4, "top_h_rule": "code"}),
        ({"epsilon_cutoff": 3e-4, "eta_cutoff": 6e-4}, {"epsilon_cutoff": 3e-4, "eta_cutoff": 6e-4}),
        ({"sequence_bias": [[[1, 2], -1.5]]}, {"sequence_bias": [[[1, 2], -1.5]]}),
        ({"top_k": 50, "top_p": 0}, {"top_k": 50, "top_p": 1e-9}),
        ({"num_beams": 1, "length_penalty": 2.0, "use_cache": False}, {}),
    ],
)
def test_hf(settings, expected):
    assert shown("hf", **settings) == expected


def test_hf_config_object_and_mapping_read_the_same():
    settings = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "repetition_penalty": 1.1,
        "max_new_tokens": 40,
        "suppress_tokens": [1, 2],
        "begin_suppress_tokens": [3],
        "bad_words_ids": [[4, 5]],
        "sequence_bias": {(6, 7): 1.5},
        "stop_strings": ["x"],
        "num_return_sequences": 2,
        "eos_token_id": 9,
        "exponential_decay_length_penalty": (5, 1.1),
    }
    expected = SamplingParams(
        temperature=0.6,
        top_k=20,
        repetition_penalty=1.1,
        max_new_tokens=40,
        banned_tokens=[1, 2],
        suppress_first=[3],
        bad_words=[[4, 5]],
        sequence_bias={(6, 7): 1.5},
        stop="x",
        n=2,
        eos_token_ids=[9],
        exponential_decay=(5, 1.1),
        profile="hf",
    )
    assert SamplingParams.from_generation_config(GenerationConfig(**settings)) == expected
    assert SamplingParams.from_generation_config(settings) == expected
    written = json.loads(GenerationConfig(**settings).to_json_string())
    assert SamplingParams.from_generation_config(written) == expected


def test_hf_empty_config_is_greedy_without_top_k():
    params = SamplingParams.from_generation_config(GenerationConfig())
    assert params == SamplingParams(profile="hf")


def test_hf_temperature_without_do_sample_is_greedy_and_says_so():
    with pytest.warns(UserWarning, match=r"temperature=0\.6 has no effect without do_sample=True"):
        assert read("hf", temperature=0.6).greedy
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read("hf", temperature=0.6, do_sample=False).greedy
        assert read("hf", temperature=1.0).greedy


def test_hf_overrides_win_over_the_config():
    config = GenerationConfig(do_sample=True, temperature=0.6, top_k=20, max_new_tokens=40)
    change = SamplingParams.from_generation_config
    assert change(config, do_sample=False) == SamplingParams(top_k=20, max_new_tokens=40, profile="hf")
    assert change(config, temperature=0.9, max_tokens=7).to_dict(defaults=False) == {
        "max_new_tokens": 7,
        "temperature": 0.9,
        "top_k": 20,
        "profile": "hf",
    }
    assert change(GenerationConfig(temperature=0.6), temperature=0.9).temperature == 0.9
    with pytest.warns(UserWarning, match="has no effect"):
        assert change(GenerationConfig(temperature=0.6)).greedy
    assert change(GenerationConfig(temperature=0.6), do_sample=True).temperature == 0.6


def test_hf_eos_ids_of_the_config_stand_in_for_the_models_and_an_override_for_both():
    config = GenerationConfig(eos_token_id=[2, 3])
    params = SamplingParams.from_generation_config(config)
    assert (params.eos_token_ids, params.stop_token_ids) == ((2, 3), ())
    assert params.ends({7}) == {2, 3}
    assert SamplingParams.from_generation_config(config, eos_token_ids=[5]).ends({7}) == {5}
    assert SamplingParams.from_generation_config(config, eos_token_ids=None).ends({7}) == {7}
    assert SamplingParams.from_generation_config(GenerationConfig()).ends({7}) == {7}
    assert (
        params.replace(eos_token_id=[]).ends({7}) == params.replace(ignore_eos=True).ends({7}) == frozenset()
    )


def test_hf_strange_attributes_of_an_object_are_a_warning_and_of_a_mapping_an_error():
    config = GenerationConfig(do_sample=True)
    config.chat_format = "chatml"
    with pytest.warns(UserWarning, match="unknown settings, skipped: chat_format"):
        assert SamplingParams.from_generation_config(config).temperature == 1.0
    with pytest.raises(ParameterError, match="unknown sampling parameter 'chat_format'"):
        SamplingParams.from_generation_config({"chat_format": "chatml"})
    with pytest.raises(ParameterError, match="expected a GenerationConfig or a mapping, got int"):
        SamplingParams.from_generation_config(5)


@pytest.mark.parametrize("value", [-1, True, "2", [2, -1], [[2]], 1.5, {}])
def test_hf_eos_ids_that_make_no_sense_are_refused(value):
    with pytest.raises(ParameterError, match=r"^eos_token_id="):
        read("hf", eos_token_id=value)


def test_hf_beams_point_to_the_strategy():
    with pytest.raises(ParameterError, match=r"num_beams=4 .* handloom\.strategies\.beam"):
        SamplingParams.from_generation_config(GenerationConfig(num_beams=4))


def test_hf_every_attribute_of_a_generation_config_has_a_place():
    unknown = [
        name
        for name in vars(GenerationConfig())
        if not DIALECTS["hf"].knows(name, SamplingParams().to_dict())
    ]
    assert unknown == []


# Every field of transformers' GenerationConfig that is honoured: a value, and what it makes of the parameters.
HONOURED = {
    "max_length": (50, {"max_length": 50, "max_new_tokens": UNLIMITED}),
    "max_new_tokens": (9, {"max_new_tokens": 9}),
    "min_new_tokens": (2, {"min_new_tokens": 2}),
    "max_time": (2.5, {"max_time": 2.5}),
    "stop_strings": (["x"], {"stop": ["x"]}),
    "do_sample": (True, {"temperature": 1.0}),
    "temperature": (0.7, {"temperature": 0.7}),
    "top_k": (7, {"top_k": 7}),
    "top_p": (0.9, {"top_p": 0.9}),
    "min_p": (0.1, {"min_p": 0.1}),
    "top_h": (0.4, {"top_h": 0.4, "top_h_rule": "code"}),
    "typical_p": (0.9, {"typical_p": 0.9}),
    "epsilon_cutoff": (0.01, {"epsilon_cutoff": 0.01}),
    "eta_cutoff": (0.01, {"eta_cutoff": 0.01}),
    "repetition_penalty": (1.1, {"repetition_penalty": 1.1}),
    "no_repeat_ngram_size": (2, {"no_repeat_ngram_size": 2}),
    "bad_words_ids": ([[4, 5]], {"bad_words": [[4, 5]]}),
    "exponential_decay_length_penalty": ((5, 1.1), {"exponential_decay": [5, 1.1]}),
    "suppress_tokens": ([1], {"banned_tokens": [1]}),
    "begin_suppress_tokens": ([1], {"suppress_first": [1]}),
    "sequence_bias": ([[[6, 7], 1.5]], {"sequence_bias": [[[6, 7], 1.5]]}),
    "watermarking_config": (
        WatermarkingConfig(bias=3.0),
        {"watermarking_config": WatermarkingConfig(bias=3.0).to_dict()},
    ),
    "num_return_sequences": (2, {"n": 2}),
    "eos_token_id": ([2, 3], {"eos_token_ids": [2, 3]}),
}
# Every field that is refused, with a value that asks for something.
REFUSED = {
    "min_length": 5,
    "num_beams": 2,
    "use_mtp": True,
    "cache_implementation": "quantized",
    "encoder_repetition_penalty": 1.2,
    "forced_bos_token_id": 3,
    "forced_eos_token_id": 3,
    "remove_invalid_values": True,
    "token_healing": True,
    "guidance_scale": 1.5,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "encoder_no_repeat_ngram_size": 2,
    "is_assistant": True,
    "prompt_lookup_num_tokens": 3,
    "assistant_early_exit": 2,
    "speculation_type": "dflash",
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "diversity_penalty": 0.5,
    "num_beam_groups": 2,
    "constraints": [1],
    "force_words_ids": [[1]],
}


def test_hf_every_field_is_honoured_refused_or_in_the_table_of_those_without_effect():
    fields = {name for name in vars(GenerationConfig()) if name != "_mask_length"}
    places = [name for table in (HONOURED, REFUSED, HF_WITHOUT_EFFECT) for name in table if name in fields]
    assert sorted(places) == sorted(fields)
    assert all(HF_WITHOUT_EFFECT.values())


@pytest.mark.parametrize("name", HONOURED)
def test_hf_a_field_that_is_honoured(name):
    value, expected = HONOURED[name]
    sampling = {"do_sample": True} if name == "temperature" else {}
    assert shown("hf", **{name: value}, **sampling) == expected


@pytest.mark.parametrize("name", REFUSED)
def test_hf_a_field_that_is_refused_says_why(name):
    with pytest.raises(ParameterError, match=rf"^{name}=.*: .{{12}}"):
        read("hf", **{name: REFUSED[name]})


@pytest.mark.parametrize("name", HF_WITHOUT_EFFECT)
def test_hf_a_field_without_effect_changes_no_parameter(name):
    assert read("hf", **{name: 7}) == read("hf")


@pytest.mark.parametrize(
    "settings",
    [
        WatermarkingConfig(seeding_scheme="selfhash", greenlist_ratio=0.5),
        SynthIDTextWatermarkingConfig(ngram_len=3, keys=[4, 9, 2]),
    ],
)
def test_a_watermark_is_read_from_its_object_and_its_mapping_and_after_json(settings):
    params = SamplingParams(watermarking_config=settings)
    assert params == SamplingParams(watermarking_config=settings.to_dict())
    assert hash(params) == hash(SamplingParams(watermarking_config=settings))
    assert SamplingParams.from_dict(json.loads(json.dumps(params.to_dict()))) == params


@pytest.mark.parametrize(
    "value",
    [5, "lefthash", {"bais": 2.0}, {"seeding_scheme": "other"}, {"greenlist_ratio": 2}, {"keys": [1]}],
)
def test_a_watermark_that_makes_no_sense_is_refused_by_name(value):
    with pytest.raises(ParameterError, match=r"^watermarking_config="):
        SamplingParams(watermarking_config=value)
