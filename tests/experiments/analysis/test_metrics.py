"""Metrics on records by hand."""

import gzip
import math

import pytest

from handloom.errors import ParameterError
from handloom.experiments.analysis import metrics
from handloom.experiments.analysis.metrics import METRICS, Metric, find


def record(tokens=(), text="", **more):
    return {"token_ids": list(tokens), "text": text, "finish_reason": "length", **more}


def value(name, *records):
    return METRICS[name].of(records)


def test_repetition_and_diversity_by_hand():
    one = record([1, 2, 1, 2, 1, 3])  # bigrams 12 21 12 21 13: three of five are new
    assert value("rep_2", one) == [pytest.approx(2 / 5)]
    assert value("rep_3", one) == [pytest.approx(1 / 4)]  # 121 212 121 213
    assert value("rep_4", one) == [0.0]  # 1212 2121 1213
    assert value("diversity", one) == [pytest.approx(3 / 5 * 3 / 4)]
    assert value("rep_2", record([1])) == []


def test_distinct_counts_over_all_samples_of_a_prompt():
    assert value("distinct_1", record([1, 2]), record([2, 3])) == [3 / 4]
    assert value("distinct_2", record([1, 2, 3]), record([1, 2, 4])) == [3 / 4]
    assert value("distinct_4", record([1]), record([2])) == []


def test_likelihoods_by_hand():
    one = record([1, 2], raw_logprobs=[-1.0, -3.0], logprobs=[-0.5, -0.5])
    assert value("logprob", one) == [-2.0]
    assert value("surprisal", one) == [2.0]
    assert value("perplexity", one) == [pytest.approx(math.exp(2))]
    assert value("processed_logprob", one) == [-0.5]
    assert value("perplexity", record([])) == []


def test_compression_is_that_of_gzip():
    text = "again and again " * 40
    assert value("compression", record(text=text)) == [len(text) / len(gzip.compress(text.encode(), mtime=0))]
    assert (
        value("compression", record(text=text))[0] > 10 > 2 > value("compression", record(text="abc xyz"))[0]
    )


def test_answers():
    assert metrics.numeric_answer("12 apples, so 1,234.50 in all.") == 1234.5
    assert metrics.numeric_answer("none") is None
    right = [
        record(text="it is 7", target="x 7"),
        record(text="8", target="x 7"),
        record(text="7", target="x 7"),
    ]
    assert value("numeric_match", *right) == [1.0, 0.0, 1.0]
    assert value("exact_match", record(text=" 7\n", target=7), record(text="7")) == [1.0]
    graded = [record(correct=c) for c in (True, False, False, False, True)]
    assert value("pass_1", *graded) == [pytest.approx(2 / 5)]
    assert value("pass_5", *graded) == [1.0]
    assert value("pass_10", *graded) == []
    assert value("majority_5", *right) == []
    assert value("majority_5", *right, *right) == [
        pytest.approx(1.0)
    ]  # 4 of 6 are right: any five are 3 to 2


def test_embedding_diversity_by_hand():
    vectors = [[1, 0], [0, 2], [-3, 0]]
    assert value("embedding_diversity", *(record(embedding=v) for v in vectors)) == [
        pytest.approx((1 + 2 + 1) / 3)
    ]
    assert value("embedding_diversity", record(embedding=[1, 0])) == []


def test_self_bleu_of_equal_texts_is_full_and_of_foreign_ones_low():
    pytest.importorskip("sacrebleu")
    same = [record(text="the cat sat on the mat today")] * 3
    other = [record(text=t) for t in ("the cat sat on the mat today", "why would anyone ever go there", "no")]
    assert value("self_bleu", *same) == [pytest.approx(100)]
    assert value("self_bleu", *other)[0] < 10
    assert value("self_bleu", same[0]) == []


def test_failed_samples_and_missing_fields_are_left_out():
    failed = record([1, 1, 1]) | {"finish_reason": "error"}
    assert value("rep_1", failed, record([1, 1])) == [0.5]
    assert value("distinct_1", failed) == []
    assert value("tokens_per_second", record(time={"tokens_per_second": 0.0}), record()) == []
    assert value("acceptance", record(extra={"acceptance": 0.5}), record()) == [0.5]


def test_metrics_are_found_by_name_or_made_of_functions():
    def length(record):
        return len(record["text"])

    own, group = find([length, Metric("pairs", len, group=True)])
    assert own.name == "length"
    assert own.of([record(text="abc")]) == [3.0]
    assert group.of([record(), record()]) == [2.0]
    with pytest.raises(ParameterError, match="'perplexty': expected one of tokens, logprob"):
        find(["perplexty"])
