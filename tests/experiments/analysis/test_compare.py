"""Comparisons: exact zeros with itself, numbers by hand, common noise."""

import pytest
from helpers import text_engine

from handloom import ParameterError
from handloom.experiments.analysis.compare import (
    by_model,
    compare,
    compare_records,
    equal_share,
    first_difference,
    marked,
    read_sides,
)


def record(setting, prompt, sample, tokens, **more):
    base = {"setting": setting, "prompt_id": prompt, "sample": sample, "token_ids": tokens, "model": "m"}
    return base | {"text": " ".join(map(str, tokens)), "finish_reason": "length"} | more


RECORDS = [
    record("a", "p", 0, [1, 2, 3], correct=True),
    record("a", "p", 1, [1, 2], correct=False),
    record("a", "q", 0, [5, 5, 5, 5], correct=False),
    record("b", "p", 0, [1, 9, 3, 4], correct=True),
    record("b", "p", 1, [1, 2], correct=True),
    record("b", "q", 0, [5, 5, 5, 6], correct=True),
    record("b", "q", 1, [7], correct=True),  # without a partner
]


def test_numbers_by_hand():
    found = compare_records(RECORDS, ["tokens", "rep_1"])
    (pair,) = found.pairs
    assert (found.baseline, pair.name, pair.samples) == ("a", "b", 3)
    assert pair.diverged == [1, None, 3]
    assert pair.equal.value == pytest.approx(((2 / 4 + 1) / 2 + 3 / 4) / 2)
    assert found.values["a"]["tokens"].value == pytest.approx((2.5 + 4) / 2)
    assert pair.differences["tokens"].value == pytest.approx(((3 - 2.5) + (2.5 - 4)) / 2)
    assert pair.p_value == pytest.approx(0.5)  # two discordant samples, both for b
    assert "b against a, 3 samples in pairs: first differ at step 3 (median)" in str(found)
    assert found.text("b", "p") == "1 {-2-}{+9+} 3{+4+}" or found.text("b", "p") == "1 {-2-}{+9+} 3 {+4+}"


def test_the_sign_of_the_first_diverging_step_by_hand():
    logps = {"a": [-1.0, -2.0, -1.0, -1.0], "b": [-1.0, -0.5, -9.0, -3.0]}
    told = [r | {"raw_logprobs": logps[r["setting"]][: len(r["token_ids"])]} for r in RECORDS]
    (pair,) = compare_records(told, ["tokens"]).pairs
    assert (pair.likelier, pair.unlikelier, pair.sign_p) == (
        1,
        1,
        1.0,
    )  # -0.5 over -2 at step 1, -3 under -1 at 3
    assert (pair.parted.value, pair.parted.n) == (2.0, 2)
    assert "its token is likelier in 1 and less likely in 1 samples, sign test p = 1" in str(
        compare_records(told, ["tokens"])
    )
    assert compare_records(RECORDS, ["tokens"]).pairs[0].sign_p is None


def test_records_of_several_models_are_named_after_them():
    both = by_model([*RECORDS, *(r | {"model": "n"} for r in RECORDS if r["setting"] == "a")])
    assert list(compare_records(both, ["tokens"]).values) == ["m a", "m b", "n a"]
    assert by_model(RECORDS) == RECORDS


def test_files_of_settings_and_plans_are_drawn_and_compared(tmp_path):
    engine = text_engine(slots=3)
    (tmp_path / "p.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "a dog"}\n')
    wanted = {"cold": "temperature: 0.7", "beams": "{strategy: beam_search, num_beams: 2}"}
    for name, text in wanted.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    options = {
        "model": "m",
        "prompts": str(tmp_path / "p.jsonl"),
        "samples": 2,
        "params": {"max_new_tokens": 4},
    }
    files = [tmp_path / f"{name}.yaml" for name in wanted]
    records, _ = read_sides(files, options, load=lambda **_: engine)
    (pair,) = compare_records(records, ["tokens"]).pairs
    assert (pair.name, pair.samples) == ("beams", 4)
    with pytest.raises(ParameterError, match="cold, beams are settings, and model and prompts must be named"):
        read_sides(files, {})
    plan = "{model: m, prompts: p.jsonl, metrics: [tokens], params: {max_new_tokens: 3, temperature: %s}}"
    for name, value in (("one", 0.5), ("two", 1.5)):
        (tmp_path / f"{name}.yaml").write_text(plan % value)
    plans = [tmp_path / "one.yaml", tmp_path / "two.yaml"]
    records, metrics = read_sides(plans, {}, load=lambda **_: engine)
    assert ({r["setting"] for r in records}, metrics) == ({"one default", "two default"}, ["tokens"])
    again = read_sides([path.with_suffix(".jsonl") for path in plans], {})[0]
    assert again == records
    with pytest.raises(ParameterError, match="compare: model: for files of settings alone"):
        read_sides(plans, {"model": "m"}, load=lambda **_: engine)


def test_helpers_by_hand():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert equal_share([], []) == 1.0
    assert equal_share([1], [1, 2]) == 0.5
    assert marked("a b c", "a x c") == "a {-b-}{+x+} c"


def test_bad_comparisons_say_what_is_wrong():
    with pytest.raises(ParameterError, match="'c' and another are needed; the records have a, b"):
        compare_records(RECORDS, ["tokens"], baseline="c")
    with pytest.raises(ParameterError, match="and another are needed"):
        compare_records(RECORDS[:3], ["tokens"])
    with pytest.raises(ParameterError, match="'b' and the baseline share no sample of a prompt"):
        compare_records([RECORDS[2], RECORDS[3]], ["tokens"])
    with pytest.raises(ParameterError, match="several models"):
        compare_records([*RECORDS, RECORDS[0] | {"model": "n"}], ["tokens"])
    with pytest.raises(ParameterError, match="no sample 5 of prompt 'p'"):
        compare_records(RECORDS, ["tokens"]).text("b", "p", 5)


def test_a_setting_against_itself_is_exactly_zero_and_noise_is_shared():
    engine = text_engine(slots=3)
    prompts = ["the cat", "a dog", "x y z"]
    shared = {"temperature": 1.0, "max_new_tokens": 6, "ignore_eos": True}
    same = {"one": {"top_p": 0.9}, "two": {"top_p": 0.9}}
    found = engine.compare(prompts, same, ["logprob", "diversity", "tokens"], samples=2, params=shared)
    (pair,) = found.pairs
    assert pair.diverged == [None] * 6
    assert all((d.value, d.low, d.high) == (0.0, 0.0, 0.0) for d in pair.differences.values())
    close = {"one": {"top_p": 0.9}, "two": {"top_p": 0.95}}
    near = compare(engine, prompts, close, ["logprob"], samples=2, params=shared).pairs[0]
    assert near.equal.value > 0.5  # independent draws of 101 tokens agree far less often


def test_common_noise_halves_the_interval_of_two_temperatures():
    engine = text_engine(slots=8)
    prompts = [f"{words} number {i}" for i in range(4) for words in ("the cat", "a dog", "x y", "fox")]
    shared = {"max_new_tokens": 6, "ignore_eos": True}
    settings = {"cold": {"temperature": 1.0}, "hot": {"temperature": 1.05}}

    def drawn(seed):
        return compare(engine, prompts, settings, samples=6, seed=seed, params=shared).records

    def width(records):
        found = compare_records(records, ["logprob"]).pairs[0].differences["logprob"]
        return found.high - found.low

    first, second = drawn(0), drawn(1)
    apart = [r for r in first if r["setting"] == "cold"] + [r for r in second if r["setting"] == "hot"]
    assert width(apart) > 2 * width(first)
