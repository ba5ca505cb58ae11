"""Speculative decoding: greedy and coupled equal plain decoding token for token, ratio has its exact law."""

import functools
import random

import pytest
import torch
from helpers import assert_nothing_leaked, poisoned, recorded, text_engine, tiny_llama

from handloom import Engine, ParameterError, SamplingParams, laws
from handloom.strategies import prompt_lookup, speculative
from handloom.strategies.acceleration import acceptance

PROMPTS = [[5, 9, 17, 5, 9], [40], [3, 3, 8, 21, 60, 2, 11, 3, 3], [7, 70, 7, 70]]


def wild(tokens, count):
    """Drafts that have nothing to do with the model."""
    return random.Random(len(tokens)).choices(range(101), k=count)


def tokens_of(results):
    return [result.token_ids for result in results]


# -- drafts


@pytest.mark.parametrize(
    ("tokens", "count", "max_ngram", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], 3, 3, [3, 4, 1]),  # the bigram 1 2 was followed by 3 4 1
        ([1, 2, 9, 5, 2, 8, 1, 2], 2, 3, [9, 5]),  # the bigram wins over the later 2
        ([1, 2, 9, 5, 2, 8, 1, 2], 2, 1, [8, 1]),  # single tokens: the latest 2 with two tokens behind it
        ([4, 4, 4, 4], 3, 3, [4]),  # the earliest, when none has three behind it
        ([1, 2, 3], 4, 3, []),
        ([6], 4, 3, []),
        ([1, 2, 3, 1], 0, 3, []),
    ],
)
def test_prompt_lookup_by_hand(tokens, count, max_ngram, expected):
    assert prompt_lookup(tokens, count, max_ngram) == expected


# -- the same tokens


@pytest.mark.parametrize("num_draft", [0, 1, 3, 6])
@pytest.mark.parametrize("source", ["lookup", "model", "self", "wild"])
@pytest.mark.parametrize("rule", ["ratio", "coupled"])
def test_greedy_equals_greedy(engine, draft, source, num_draft, rule):
    drafts = {"lookup": prompt_lookup, "model": draft, "self": engine, "wild": wild}[source]
    plain = engine.generate(PROMPTS, max_new_tokens=11)
    ours = speculative(engine, PROMPTS, draft=drafts, num_draft=num_draft, rule=rule, max_new_tokens=11)
    assert tokens_of(ours) == tokens_of(plain)
    for one, other in zip(ours, plain, strict=True):
        assert (one.finish_reason, one.stop_reason) == (other.finish_reason, other.stop_reason)
        assert one.raw_logprobs == pytest.approx(other.raw_logprobs, abs=1e-4)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert_nothing_leaked(engine)
    assert_nothing_leaked(draft)


EVERYTHING = [
    SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=1, max_new_tokens=14, n=2),
    SamplingParams(temperature=1.1, mirostat=2, mirostat_tau=2.0, seed=2, max_new_tokens=9),
    SamplingParams(repetition_penalty=1.4, no_repeat_ngram_size=2, max_new_tokens=12),
    SamplingParams(temperature=0.7, dry_multiplier=0.8, frequency_penalty=0.5, seed=3, max_new_tokens=10),
]


@pytest.mark.parametrize("source", ["lookup", "model", "wild"])
def test_coupled_equals_plain_sampling_with_the_same_seed(engine, draft, source):
    """Processors with memory (mirostat) advance by the accepted tokens of their own row alone."""
    drafts = {"lookup": prompt_lookup, "model": draft, "wild": wild}[source]
    plain = engine.generate(PROMPTS, EVERYTHING)
    ours = speculative(engine, PROMPTS, EVERYTHING, draft=drafts, rule="coupled")
    assert tokens_of(ours) == tokens_of(plain)
    assert [(r.request, r.sample) for r in ours] == [(0, 0), (0, 1), (1, 0), (2, 0), (3, 0)]
    for one, other in zip(ours, plain, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_batch_equals_solo(engine, draft):
    for rule in ("ratio", "coupled"):
        laws.batch_equals_solo(speculative, engine, PROMPTS, EVERYTHING, draft=draft, rule=rule)


def test_rows_accept_different_numbers_of_tokens(engine):
    """One row is always right, one never, one has nothing to draft."""
    answers = engine.generate(PROMPTS[:3], max_new_tokens=12)
    starts = [len(prompt) for prompt in PROMPTS[:3]]

    def draft(tokens, count):
        row = next(i for i, prompt in enumerate(PROMPTS) if tokens[: len(prompt)] == prompt)
        truth = answers[row].token_ids[len(tokens) - starts[row] :][:count]
        return (truth, [(token + 1) % 101 for token in truth], [])[row]

    ours = speculative(engine, PROMPTS[:3], draft=draft, num_draft=3, max_new_tokens=12)
    assert tokens_of(ours) == tokens_of(answers)
    # Row 0: 1 token from the prompt's pass, then 4 a pass; the last one drafts 2 for the 3 tokens left.
    # Row 1: a token a pass; 3 drafts in the first 8 of 11 passes, then 2, 1 and 0 for what is left.
    assert [(r.drafted, r.accepted, r.passes) for r in ours] == [(8, 8, 4), (27, 0, 12), (0, 0, 12)]
    assert ours[0].acceptance == 1.0
    assert ours[1].acceptance == 0.0
    assert ours[2].acceptance != ours[2].acceptance  # nothing drafted: not a number


def test_drafting_costs_one_pass_of_the_draft_a_token_and_one_of_the_model_a_round(engine):
    with recorded(engine.model) as passes:
        (result,) = speculative(engine, [PROMPTS[2]], draft=wild, num_draft=3, max_new_tokens=5)
    assert passes.shapes[0] == (1, len(PROMPTS[2]))
    assert len(passes.shapes) == result.passes
    assert all(width <= 4 for _, width in passes.shapes[1:])


# -- the law


def pair():
    models = [tiny_llama(vocab_size=6, eos_token_id=5, num_hidden_layers=layers) for layers in (2, 1)]
    return [Engine(model) for model in models]


LAWS = {
    "plain": {"temperature": 1.5},
    "truncated": {"temperature": 2.0, "top_k": 4, "top_p": 0.8, "repetition_penalty": 1.3},
    "memory": {"temperature": 2.0, "mirostat": 2, "mirostat_tau": 1.5, "frequency_penalty": 0.3},
}


@pytest.mark.parametrize("name", LAWS)
def test_ratio_has_the_exact_law(name):
    """A draft that differs from the target changes nothing. False alarms: 1e-6."""
    target, other = pair()
    params = SamplingParams(**LAWS[name], max_new_tokens=3)
    test = {"draws": 1200, "batch": 600}
    laws.lossless(speculative, target, [[1, 2, 3]], params, test=test, draft=other, num_draft=2)


def test_ratio_with_certain_drafts_has_the_exact_law():
    """Prompt lookup: the draft is certain, so it is accepted with the target's probability. False alarms: 1e-6."""
    target, _ = pair()
    params = SamplingParams(temperature=1.5, max_new_tokens=3)
    laws.exact_distribution(speculative, target, [1, 2, 1, 2, 1], params, draws=1200, batch=600, num_draft=2)


def test_a_wrong_rule_is_caught(monkeypatch):
    """The law test has teeth: accepting every draft token is noticed."""

    def always(processed, proposed, q, context, greedy, sources):
        chosen, _ = acceptance.ratio(processed, proposed, q, context, greedy, sources)
        return torch.where(proposed < 0, chosen[:, None], proposed)[:, 0], -(proposed < 0).long()[:, 0]

    monkeypatch.setitem(acceptance.RULES, "ratio", always)
    target, other = pair()
    with pytest.raises(AssertionError, match="exact_distribution"):
        laws.exact_distribution(
            speculative, target, [1, 2, 3], SamplingParams(temperature=1.5, max_new_tokens=3), draws=800,
            draft=other, num_draft=2,
        )  # fmt: skip


# -- ends


def test_ends_inside_an_accepted_block():
    engine = Engine(tiny_llama(vocab_size=13))
    prompts = [[1, 2, 3], [5], [7, 7, 8, 1, 0]]
    plain = engine.generate(prompts, max_new_tokens=12)
    stops = [result.token_ids[2] for result in plain]  # the third token, in the middle of a block of four
    params = [SamplingParams(max_new_tokens=12, stop_token_ids=[stop]) for stop in stops]
    ours = speculative(engine, prompts, params, draft=engine, num_draft=4)
    theirs = engine.generate(prompts, params)
    assert tokens_of(ours) == tokens_of(theirs)
    assert [(r.finish_reason, r.stop_reason) for r in ours] == [("stop", stop) for stop in stops]
    assert all(r.n_new <= 3 for r in ours)


def test_stop_strings_and_lengths_inside_a_block():
    engine = text_engine()
    prompts = ["The tree", "Once"]
    whole = engine.generate(prompts, max_new_tokens=12)
    stop = [result.text[4:6] for result in whole]
    params = [
        SamplingParams(max_new_tokens=12, stop=[stop[0]], min_new_tokens=1),
        SamplingParams(max_length=len(whole[1].prompt_token_ids) + 7),
    ]
    ours = speculative(engine, prompts, params, draft=engine, num_draft=5)
    theirs = engine.generate(prompts, params)
    assert [(r.text, r.token_ids, r.finish_reason, r.stop_reason) for r in ours] == [
        (r.text, r.token_ids, r.finish_reason, r.stop_reason) for r in theirs
    ]
    assert ours[0].finish_reason == "stop"
    assert ours[1].n_new == 7


def test_a_full_context_ends_the_row():
    engine = Engine(tiny_llama(), max_length=16)
    (ours,) = speculative(engine, [PROMPTS[2]], draft=wild, num_draft=5, max_new_tokens=50)
    assert ours.token_ids == engine.generate(PROMPTS[2], max_new_tokens=50).token_ids
    assert ours.finish_reason == "length"


def test_nan_ends_its_row_alone():
    engine = Engine(poisoned(tiny_llama()))
    good, bad = speculative(engine, [[5, 9], [5, 100]], max_new_tokens=6)
    assert (bad.finish_reason, bad.token_ids) == ("error", [])
    assert good.token_ids == engine.generate([5, 9], max_new_tokens=6).token_ids


# -- arguments


def test_a_function_with_its_own_settings_is_a_draft(engine):
    drafts = functools.partial(prompt_lookup, max_ngram=1)
    ours = speculative(engine, PROMPTS, draft=drafts, max_new_tokens=8)
    assert tokens_of(ours) == tokens_of(engine.generate(PROMPTS, max_new_tokens=8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "exact"}, "rule='exact'"),
        ({"num_draft": -1}, "num_draft=-1"),
        ({"logprobs": 2}, "logprobs"),
        ({"draft": Engine(tiny_llama(vocab_size=13))}, "13 tokens"),
    ],
)
def test_what_it_cannot_do_is_an_error(engine, options, message):
    with pytest.raises(ParameterError, match=message):
        speculative(engine, [[1, 2]], **options)
