"""Search: diverse and constrained beams as transformers 4.49 had them, sequences without replacement, spread codes."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import assert_nothing_leaked, tiny_llama

from handloom import Engine, ParameterError, SamplingParams, laws
from handloom.strategies import (
    arithmetic_sampling,
    beam_search,
    constrained_beam_search,
    diverse_beam_search,
    lookahead,
    stochastic_beam,
)
from handloom.strategies.kit.beams import Candidate
from handloom.strategies.search.constrained import banked
from handloom.strategies.search.phrases import Progress

VECTORS = json.loads((Path(__file__).parents[1] / "transformers_4_49.json").read_text())
PROMPTS = [[5, 9, 17], [40], [3, 3, 8, 21, 60, 2, 11]]
FIELDS = {"plain": {}, "eos": {"eos_token_id": [7, 11, 13]}}


@pytest.fixture(scope="module")
def engines():
    return {name: Engine(tiny_llama(**fields)) for name, fields in FIELDS.items()}


@pytest.fixture(scope="module")
def engine(engines):
    return engines["plain"]


@pytest.fixture(scope="module")
def tiny():
    return Engine(tiny_llama(vocab_size=5), slots=64)


def ends(tokens, eos):
    """Up to the padding that transformers puts behind the end."""
    stops = [i for i, token in enumerate(tokens) if token in eos]
    return tokens[: stops[0] + 1] if stops else tokens


# -- against transformers


@pytest.mark.parametrize("case", VECTORS["groups"], ids=lambda case: f"{case['model']} {case['options']}")
def test_diverse_beams_are_those_of_transformers(engines, case):
    engine, options = engines[case["model"]], case["options"]
    results = diverse_beam_search(
        engine, PROMPTS, max_new_tokens=9, num_return_sequences=options["num_beams"], **options
    )
    wanted = [ends(row, engine.eos_token_ids) for _, rows in case["runs"] for row in rows]
    assert [r.token_ids for r in results] == wanted
    assert_nothing_leaked(engine)


@pytest.mark.parametrize(
    "case", VECTORS["constraints"], ids=lambda case: f"{case['model']} {case['options']}"
)
def test_constrained_beams_are_those_of_transformers(engines, case):
    engine, options = engines[case["model"]], dict(case["options"])
    results = constrained_beam_search(
        engine, PROMPTS, constraints=options.pop("force_words_ids"), max_new_tokens=9, **options
    )
    wanted = [ends(row, engine.eos_token_ids) for _, rows in case["runs"] for row in rows]
    assert [r.token_ids for r in results] == wanted
    assert_nothing_leaked(engine)


# -- degenerate settings, and each prompt for itself


def test_one_group_is_beam_search(engines):
    for engine in engines.values():
        plain = beam_search(engine, PROMPTS, num_beams=3, num_return_sequences=3, max_new_tokens=7)
        ours = diverse_beam_search(
            engine, PROMPTS, num_beams=3, num_beam_groups=1, num_return_sequences=3, max_new_tokens=7
        )
        assert [r.token_ids for r in ours] == [r.token_ids for r in plain]


def test_groups_without_penalty_are_equal(engine):
    alone = beam_search(engine, PROMPTS, num_beams=2, num_return_sequences=2, max_new_tokens=7)
    ours = diverse_beam_search(
        engine, PROMPTS, num_beams=6, num_beam_groups=3, diversity_penalty=0.0, num_return_sequences=6,
        max_new_tokens=7,
    )  # fmt: skip
    for i in range(len(PROMPTS)):
        group = {tuple(r.token_ids) for r in alone[2 * i : 2 * i + 2]}
        assert Counter(tuple(r.token_ids) for r in ours[6 * i : 6 * i + 6]) == dict.fromkeys(group, 3)


def test_phrases_that_the_best_beam_says_anyway_change_nothing(engine):
    plain = beam_search(engine, PROMPTS[:1], num_beams=3, max_new_tokens=6)
    for at in (0, 2, 4):
        word = plain[0].token_ids[at : at + 2]
        (ours,) = constrained_beam_search(
            engine, PROMPTS[:1], constraints=[word], num_beams=40, max_new_tokens=6
        )
        assert ours.extra["satisfied"]
        assert ours.cumulative_logprob >= plain[0].cumulative_logprob - 1e-4


def test_all_phrases_are_said_in_any_order(engine):
    results = constrained_beam_search(
        engine, PROMPTS, constraints=[[30, 31], [[44], [50, 51]], [60]], num_beams=5, num_return_sequences=5,
        max_new_tokens=12,
    )  # fmt: skip
    for result in results:
        text = result.token_ids
        pairs = list(itertools.pairwise(text))
        said = (30, 31) in pairs and 60 in text and (44 in text or (50, 51) in pairs)
        assert said == result.extra["satisfied"]
        assert sum(result.logprobs) / result.n_new == pytest.approx(result.extra["score"], abs=1e-4)
    for i in range(3):
        assert results[5 * i].extra["satisfied"]


def test_a_length_that_is_too_short_says_so(engine):
    (result,) = constrained_beam_search(engine, [[1, 2]], constraints=[[30, 31, 32]], max_new_tokens=2)
    assert result.n_new == 2
    assert not result.extra["satisfied"]


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (diverse_beam_search, {"num_return_sequences": 4}),
        (constrained_beam_search, {"constraints": [[30], [31]]}),
        (stochastic_beam, {"k": 3, "temperature": 1.2, "seed": 4}),
        (arithmetic_sampling, {"n": 3, "temperature": 1.2, "seed": 4}),
        (lookahead, {"heuristic": lambda texts: [float(sum(t) % 7) for t in texts], "depth": 2}),
    ],
)
def test_batch_equals_solo(engines, strategy, options):
    params = [
        SamplingParams(max_new_tokens=5),
        SamplingParams(max_new_tokens=8, repetition_penalty=1.5),
        SamplingParams(max_new_tokens=6, suppress_tokens=[1, 2, 3]),
    ]
    laws.batch_equals_solo(strategy, engines["eos"], PROMPTS, params, **options)
    assert_nothing_leaked(engines["eos"])


# -- by hand


def test_progress_by_hand():
    nothing = Progress.start([[1, 2], [[3], [4, 5, 6]]])
    assert (nothing.next(), nothing.bank, nothing.complete) == ([1, 3, 4], 0, False)
    began = nothing.add(4)
    assert (began.next(), began.bank) == ([5], 1)  # of three tokens, the longest phrase
    assert began.add(5).bank == 2
    broken = began.add(9)
    assert (broken.next(), broken.bank) == ([1, 3, 4], 0)
    short = nothing.add(1)
    assert (short.next(), short.bank) == ([2], 2)  # one token is missing, as of a phrase of three
    one = short.add(2)
    assert (one.next(), one.bank, one.complete) == ([3, 4], 3, False)
    assert one.add(3).complete
    assert one.add(3).add(77).complete
    assert one.add(3).bank == 6


def test_banks_by_hand():
    """Rows that have said nothing, and one of two words; tokens 1 and 2 are the words."""
    nothing = Progress.start([[1], [2]])
    beams = [
        Candidate(value, row, token, 0.0, 0.0)
        for value, row, token in [(-1.0, 0, 9), (-3.0, 1, 2), (-2.0, 0, 1), (-4.0, 2, 2), (-1.5, 0, 8)]
    ]
    order = banked(beams, [nothing, nothing.add(1), nothing.add(1)])
    assert [beams.index(each) for each in order] == [
        1,
        2,
        0,
        3,
        4,
    ]  # two words, one, none; then the second of each


# -- laws


SEEDS = 800


@pytest.fixture(scope="module")
def spread(tiny):
    """Three sequences without replacement for each of many seeds, and the law of all 25."""
    params = [SamplingParams(temperature=1.3, seed=i, max_new_tokens=2) for i in range(SEEDS)]
    results = stochastic_beam(tiny, [[1, 2]] * SEEDS, params, k=3)
    law = laws.sequence_law(tiny, [1, 2], params[0])
    return [results[3 * i : 3 * i + 3] for i in range(SEEDS)], law


def test_stochastic_beams_draw_without_replacement(spread):
    """Plackett-Luce: the first by its probability, the second among the others. False alarms: one in 10^6 each."""
    groups, law = spread
    first = Counter(tuple(group[0].token_ids) for group in groups)
    assert laws.chi_square(first, law, SEEDS) > 1e-6
    pairs = Counter(tuple(tuple(r.token_ids) for r in group[:2]) for group in groups)
    both = {(a, b): law[a] * law[b] / (1 - law[a]) for a in law for b in law if a != b}
    assert laws.chi_square(pairs, both, SEEDS) > 1e-6
    for group in groups:
        assert len({tuple(r.token_ids) for r in group}) == 3
        values = [r.extra["perturbed"] for r in group]
        assert values == sorted(values, reverse=True)


def test_their_weights_give_unbiased_estimates(spread):
    """The mean of sum_i w_i f(y_i) over 800 seeds, five standard errors: false alarms below one in 10^6."""
    groups, law = spread
    for f in (lambda y: 1.0, lambda y: float(y[0] == 3), lambda y: float(sum(y))):
        estimates = torch.tensor([sum(r.extra["weight"] * f(r.token_ids) for r in group) for group in groups])
        exact = sum(p * f(y) for y, p in law.items())
        assert abs(float(estimates.mean()) - exact) < 5 * float(estimates.std()) / math.sqrt(SEEDS)


def test_one_stochastic_beam_is_a_sample(tiny):
    laws.exact_distribution(
        stochastic_beam, tiny, [3], SamplingParams(temperature=0.8, top_k=4, max_new_tokens=2), draws=500,
        batch=500, samples=False, k=1,
    )  # fmt: skip


def test_more_beams_than_sequences(tiny):
    found = stochastic_beam(tiny, [[1]], k=9, temperature=1.0, seed=1, top_k=2, max_new_tokens=2)
    assert len({tuple(r.token_ids) for r in found}) == len(found) == 4
    assert sum(r.extra["weight"] for r in found) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("fresh", [None, 0.9])
def test_every_sample_of_arithmetic_sampling_has_the_law(tiny, monkeypatch, fresh):
    """Also where a code's digits are used up after almost every token, so that it is drawn anew."""
    if fresh is not None:
        monkeypatch.setattr("handloom.strategies.search.arithmetic.FRESH", fresh)

    def third(engine, prompts, params):
        return [r for r in arithmetic_sampling(engine, prompts, params, n=4) if r.sample == 2]

    laws.exact_distribution(
        third,
        tiny,
        [3],
        SamplingParams(temperature=1.2, max_new_tokens=2),
        draws=800,
        batch=400,
        samples=False,
    )


def test_codes_are_spread(tiny):
    """Each sequence comes as often as its probability says, give or take two of 200."""
    params = SamplingParams(temperature=1.2, seed=3, max_new_tokens=2)
    found = Counter(tuple(r.token_ids) for r in arithmetic_sampling(tiny, [[3]], params, n=200))
    for sequence, p in laws.sequence_law(tiny, [3], params).items():
        assert abs(found[sequence] - 200 * p) < 2


def test_lookahead_by_its_definition(engine):
    def heuristic(texts):
        return [3.0 * (max(text) % 5) for text in texts]

    (result,) = lookahead(engine, [[5, 9]], heuristic=heuristic, k=4, depth=3, weight=0.7, max_new_tokens=4)
    ids = []
    for token in result.token_ids:
        best, candidates = engine.prefill([[5, 9, *ids]]).logits[0].topk(4)
        values = []
        for value, v in zip(best.tolist(), candidates.tolist(), strict=True):
            rest = engine.generate([[5, 9, *ids, v]], max_new_tokens=3)[0].token_ids
            values.append((value + 0.7 * heuristic([[*ids, v, *rest]])[0], v))
        assert token == max(values)[1]
        ids.append(token)
    plain = lookahead(engine, PROMPTS, heuristic=heuristic, weight=0.0, max_new_tokens=5)
    assert [r.token_ids for r in plain] == [r.token_ids for r in engine.generate(PROMPTS, max_new_tokens=5)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: diverse_beam_search(e, PROMPTS, num_beams=5), "multiple of num_beam_groups"),
        (lambda e: diverse_beam_search(e, PROMPTS, stop=["x"]), "needs a tokenizer"),
        (lambda e: constrained_beam_search(e, PROMPTS, constraints=[]), "at least one phrase"),
        (lambda e: constrained_beam_search(e, PROMPTS, constraints=[["a"]]), "no phrase of token ids"),
        (lambda e: constrained_beam_search(e, PROMPTS, constraints=[[[1], [1, 2]]]), "beginning of another"),
        (lambda e: constrained_beam_search(e, PROMPTS, constraints=[[1]], num_beams=1), "num_beams >= 2"),
        (lambda e: stochastic_beam(e, PROMPTS), "temperature > 0"),
        (lambda e: stochastic_beam(e, PROMPTS, k=0, temperature=1.0), "k >= 1"),
        (lambda e: arithmetic_sampling(e, PROMPTS), "temperature > 0"),
        (lambda e: lookahead(e, PROMPTS, heuristic=len, k=0), "k >= 1"),
    ],
)
def test_out_of_range_is_an_error(engine, call, message):
    with pytest.raises(ParameterError, match=message):
        call(engine)
