"""Comparisons: exact zeros with itself, numbers by hand, common noise."""

import pytest
from helpers import text_engine

from handloom import ParameterError
from handloom.experiments.analysis.compare import (
    compare,
    compare_records,
    equal_share,
    first_difference,
    marked,
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
    with pytest.raises(ParameterError, match="several models"):
        compare_records([*RECORDS, RECORDS[0] | {"model": "n"}], ["tokens"])
    with pytest.raises(ParameterError, match="no sample 5 of prompt 'p'"):
        compare_records(RECORDS, ["tokens"]).text("b", "p", 5)


def test_a_setting_against_itself_is_exactly_zero_and_noise_is_shared():
    engine = text_engine(slots=3)
    prompts = ["the cat", "a dog", "x y z"]
    shared = {"temperature": 1.0, "max_new_tokens": 6, "ignore_eos": True}
    same = {"one": {"top_p": 0.9}, "two": {"top_p": 0.9}}
    found = compare(engine, prompts, same, ["logprob", "diversity", "tokens"], samples=2, params=shared)
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
