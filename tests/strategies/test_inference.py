"""Inference: weights are unbiased, chains and tries tend to their target, on models small enough to enumerate."""

import itertools
import math
from collections import Counter

import pytest
import torch
from helpers import assert_nothing_leaked, text_engine, tiny_llama

from handloom import Engine, ParameterError, SamplingParams, laws
from handloom.strategies import (
    antislop,
    grammar_aligned,
    power_sampling,
    power_smc,
    smc,
    tree_search,
    weighted_rejection,
)
from handloom.strategies.inference.rejection import first_allowed
from handloom.strategies.kit.particles import effective, log_mean, normalised, systematic

V, PROMPT = 5, [1, 2]
WARM = SamplingParams(temperature=1.2, max_new_tokens=2)


@pytest.fixture(scope="module")
def tiny():
    return Engine(tiny_llama(vocab_size=V), slots=64)


@pytest.fixture(scope="module")
def law(tiny):
    return laws.sequence_law(tiny, PROMPT, WARM)


def many(count, start=0):
    return [PROMPT] * count, [WARM.replace(seed=start + i) for i in range(count)]


def groups(results, n):
    return [results[i : i + n] for i in range(0, len(results), n)]


def unbiased(found, exact):
    """Means of estimates within five standard errors: false alarms below one in 10^6."""
    estimates = torch.tensor(found, dtype=torch.float64)
    return abs(float(estimates.mean()) - exact) < 5 * float(estimates.std()) / math.sqrt(len(found)) + 1e-9


# -- particles by hand


def test_particles_by_hand():
    assert normalised([0.0, math.log(3), -math.inf]) == pytest.approx([0.25, 0.75, 0])
    assert normalised([-math.inf] * 2) == [0.5, 0.5]
    assert log_mean([math.log(2), math.log(4)]) == pytest.approx(math.log(3))
    assert log_mean([-math.inf]) == -math.inf
    assert effective([1.0] * 4) == pytest.approx(4)
    assert effective([0.0, -math.inf]) == pytest.approx(1)
    assert systematic([0.5, 0.25, 0.25], 0.1) == [0, 0, 1]  # 0.03, 0.37, 0.70
    assert systematic([0.0, 1.0], 0.0) == [1, 1]
    for u in (0.0, 0.3, 0.99):
        assert systematic([0.25] * 4, u) == [0, 1, 2, 3]


# -- sequential Monte Carlo


def favour(texts, ended):
    """log psi: how much token 3 and an even sum are wanted; a rough guess before the end."""
    return [
        0.9 * text.count(3) + (0.7 * (sum(text) % 2 == 0) if end else 0.0)
        for text, end in zip(texts, ended, strict=True)
    ]


@pytest.mark.parametrize("threshold", [0.0, 0.95, 1.0])
def test_smc_is_unbiased(tiny, law, threshold):
    """evidence * sum_i w_i f(y_i) has the mean sum_y p(y) psi(y) f(y), resampled or not."""
    results = groups(smc(tiny, *many(150), n=4, twist=favour, threshold=threshold), 4)
    psi = {y: p * math.exp(favour([list(y)], [True])[0]) for y, p in law.items()}
    for f in (lambda y: 1.0, lambda y: float(y[0] == 3), lambda y: float(y[1])):
        found = [
            math.exp(group[0].extra["log_evidence"]) * sum(r.extra["weight"] * f(r.token_ids) for r in group)
            for group in results
        ]
        assert unbiased(found, sum(p * f(y) for y, p in psi.items()))
    for group in results:
        assert sum(r.extra["weight"] for r in group) == pytest.approx(1)
        assert len({r.extra["resampled"] for r in group}) == 1
    assert (max(group[0].extra["resampled"] for group in results) > 0) == (threshold > 0)
    assert_nothing_leaked(tiny)


def test_power_smc_is_unbiased(tiny, law):
    results = groups(power_smc(tiny, *many(150), n=4, alpha=2.5, threshold=0.9), 4)
    for f in (lambda y: 1.0, lambda y: float(y[0] == 3)):
        found = [
            math.exp(group[0].extra["log_evidence"]) * sum(r.extra["weight"] * f(r.token_ids) for r in group)
            for group in results
        ]
        assert unbiased(found, sum(p**2.5 * f(y) for y, p in law.items()))


def test_one_particle_is_a_sample(tiny):
    laws.exact_distribution(smc, tiny, PROMPT, WARM, draws=400, batch=400, samples=False, n=1)


def test_excluded_sequences_have_no_weight(tiny):
    """Particles that end with an excluded text weigh nothing, and are not resampled from."""

    def only_three(texts, ended):
        return [0.0 if text[0] == 3 else -math.inf for text in texts]

    for group in groups(smc(tiny, *many(20), n=6, twist=only_three), 6):
        for result in group:
            assert (
                result.extra["weight"] == 0
                or result.token_ids[0] == 3
                or math.isinf(result.extra["log_evidence"])
            )


def test_finished_particles_stay_among_the_others(tiny):
    """Stop tokens end particles early; the estimate of the evidence stays unbiased."""
    params = [WARM.replace(seed=i, stop_token_ids=[3], max_new_tokens=3) for i in range(120)]
    results = groups(smc(tiny, [PROMPT] * 120, params, n=4, twist=favour, threshold=1.0), 4)
    exact = laws.sequence_law(tiny, PROMPT, params[0])
    total = sum(p * math.exp(favour([list(y)], [True])[0]) for y, p in exact.items())
    assert unbiased([math.exp(group[0].extra["log_evidence"]) for group in results], total)
    assert {r.finish_reason for group in results for r in group} == {"stop", "length"}


# -- weighted rejection


@pytest.mark.parametrize("checks", [1, 2])
def test_weights_of_rejection_are_exact(checks):
    """Over all orders of four tokens, each with its probability: the mean of weight [token] is p(token) if allowed."""
    p, allowed, means = [0.4, 0.3, 0.2, 0.1], {1, 3}, Counter()
    for order in itertools.permutations(range(4)):
        chance, left = 1.0, 1.0
        for token in order:
            chance, left = chance * p[token] / left, left - p[token]
        token, weight = first_allowed(list(order), p, allowed.__contains__, checks)
        means[token] += chance * weight
    assert means[1] == pytest.approx(0.3)
    assert means[3] == pytest.approx(0.1)
    assert set(means) == {1, 3}
    assert first_allowed([0, 2], p, allowed.__contains__, checks) == (-1, 0.0)


def odd_after_even(text, token):
    return token != 4 and (not text or (text[-1] + token) % 2 == 1)


def test_weighted_rejection_is_unbiased(tiny, law):
    results = groups(weighted_rejection(tiny, *many(150), allowed=odd_after_even, n=4, threshold=0.9), 4)
    fine = {y: p for y, p in law.items() if all(odd_after_even(y[:i], y[i]) for i in range(2))}
    for f in (lambda y: 1.0, lambda y: float(y[0] == 3)):
        found = [
            math.exp(group[0].extra["log_evidence"]) * sum(r.extra["weight"] * f(r.token_ids) for r in group)
            for group in results
        ]
        assert unbiased(found, sum(p * f(y) for y, p in fine.items()))
    assert all(tuple(r.token_ids) in fine for group in results for r in group)


# -- power sampling


def test_power_sampling_tends_to_the_power(tiny, law):
    """After 12 moves of whole texts; the proposal alone has another law, which the same test tells apart."""
    alpha, count = 3.0, 400
    total = sum(p**alpha for p in law.values())
    wanted = {y: p**alpha / total for y, p in law.items()}
    found = power_sampling(tiny, *many(count), alpha=alpha, blocks=1, moves=12)
    assert laws.chi_square(Counter(tuple(r.token_ids) for r in found), wanted, count) > 1e-6
    assert 0 < sum(r.extra["accepted"] for r in found) < sum(r.extra["moves"] for r in found) == 12 * count
    one = {a: sum(p for y, p in law.items() if y[0] == a) for a in range(V)}
    local = dict.fromkeys(law, 1.0)
    for y in law:
        second = sum((law[y[0], b] / one[y[0]]) ** alpha for b in range(V))
        local[y] = (
            one[y[0]] ** alpha / sum(q**alpha for q in one.values()) * (law[y] / one[y[0]]) ** alpha / second
        )
    first = power_sampling(tiny, *many(count), alpha=alpha, blocks=1, moves=0)
    assert laws.chi_square(Counter(tuple(r.token_ids) for r in first), local, count) > 1e-6
    assert max(abs(local[y] - wanted[y]) for y in law) > 0.02


def test_power_one_is_sampling_and_every_move_is_taken(tiny, law):
    found = power_sampling(tiny, *many(300), alpha=1.0, blocks=2, moves=2)
    assert laws.chi_square(Counter(tuple(r.token_ids) for r in found), law, 300) > 1e-6
    assert all(r.extra["accepted"] == r.extra["moves"] == 4 for r in found)


def test_texts_of_different_length(tiny):
    """A stop token ends texts early; the lengths enter the acceptance. 400 draws after 12 moves."""
    params = [WARM.replace(seed=i, stop_token_ids=[3], max_new_tokens=2) for i in range(400)]
    law = laws.sequence_law(tiny, PROMPT, params[0])
    total = sum(p**2 for p in law.values())
    found = power_sampling(tiny, [PROMPT] * 400, params, alpha=2.0, blocks=1, moves=12)
    wanted = {y: p**2 / total for y, p in law.items()}
    assert laws.chi_square(Counter(tuple(r.token_ids) for r in found), wanted, 400) > 1e-6


# -- grammars


def trap(text):
    """After 0 or 1 anything goes, after 2 hardly anything: masking alone begins with 2 far too often."""
    if not text:
        return [0, 1, 2]
    return [4] if text[0] == 2 else list(range(V))


def test_grammar_aligned_tends_to_the_conditional(tiny, law):
    fine = {y: p for y, p in law.items() if y[0] in trap([]) and y[1] in trap(list(y[:1]))}
    mass = sum(fine.values())
    found = grammar_aligned(tiny, *many(120), allowed=trap, iterations=12)
    counts = Counter(tuple(r.token_ids) for r in found)
    assert laws.chi_square(counts, {y: p / mass for y, p in fine.items()}, 120) > 1e-6
    assert sum(abs(r.extra["mass"] - mass) < 1e-4 for r in found) > 60  # most have seen every beginning
    assert all(r.extra["mass"] >= mass - 1e-4 for r in found)
    (masked,) = grammar_aligned(tiny, *many(1), allowed=trap, iterations=1)
    assert masked.extra["mass"] >= mass


def test_beginnings_that_cannot_end_are_left(tiny):
    """After a 0 nothing may follow: once tried, it is never begun again."""

    def blind(text):
        return [0, 3] if not text else ([] if text[0] == 0 else [1])

    found = grammar_aligned(tiny, *many(20), allowed=blind, iterations=8)
    assert {tuple(r.token_ids) for r in found} == {(3, 1)}


# -- taken back


def test_a_phrase_is_taken_back_to_its_first_token():
    engine = text_engine()
    (plain,) = engine.generate(["The tree"], max_new_tokens=12)
    slop = plain.text[4:7]
    (ours,) = antislop(engine, ["The tree"], phrases=[slop.upper()], max_new_tokens=12)
    assert slop.lower() not in ours.text.lower()
    assert ours.n_new == 12
    (start, said), *_ = ours.extra["rewinds"]
    assert slop.lower() in said.lower()
    state = engine.prefill(["The tree"])
    for token in plain.token_ids[:start]:
        state = engine.step(state, [token])
    assert ours.token_ids[:start] == plain.token_ids[:start]
    if all(place != start for place, _ in ours.extra["rewinds"][1:]):
        assert ours.token_ids[start] == int(state.logits[0].topk(2).indices[1])
    del state
    assert_nothing_leaked(engine)


def test_nothing_banned_is_generate_and_patterns_count():
    engine = text_engine()
    asked = {"temperature": 1.0, "seed": 5, "max_new_tokens": 10, "n": 2, "mirostat": 2}
    plain = engine.generate(["The tree", "a"], **asked)
    assert [r.token_ids for r in antislop(engine, ["The tree", "a"], **asked)] == [r.token_ids for r in plain]
    for result in antislop(
        engine, ["The tree", "a"], patterns=["[aeiou]{2}", "x."], most_rewinds=500, **asked
    ):
        assert result.finish_reason == "length"
        assert not any(a in "aeiou" and b in "aeiou" for a, b in itertools.pairwise(result.text))
    (kept,) = antislop(engine, ["a"], patterns=["."], most_rewinds=3, max_new_tokens=4)
    assert (len(kept.extra["rewinds"]), kept.n_new) == (3, 4)


def test_rewinds_of_a_batch_are_those_of_each_prompt():
    """Rows go back at different times, and with them the memory of mirostat and of the penalties."""
    engine = text_engine()
    params = [
        SamplingParams(temperature=1.0, seed=5, max_new_tokens=n, mirostat=2, repetition_penalty=1.2)
        for n in (9, 6, 8)
    ]
    options = {"patterns": ["[aeiou]"], "strength": 3.0, "most_rewinds": 9}
    laws.batch_equals_solo(antislop, engine, ["The tree", "a", "Once"], params, **options)
    found = antislop(engine, ["The tree", "a", "Once"], params, **options)
    assert len({len(r.extra["rewinds"]) for r in found}) > 1
    assert_nothing_leaked(engine)


# -- tree search


def test_tree_search_finds_what_the_value_wants(tiny):
    """Worth 1 only if 4 is followed by 0, though neither is probable."""

    def worth(texts):
        return [float(text[:2] == [4, 0]) for text in texts]

    (result,) = tree_search(tiny, [PROMPT], value=worth, simulations=120, c=0.5, max_new_tokens=2)
    assert result.token_ids == [4, 0]
    assert result.extra["values"][1] == 1.0


def test_tree_search_without_a_value_is_greedy(tiny):
    plain = tiny.generate([PROMPT, [3]], max_new_tokens=4)
    for count in (1, 8):
        ours = tree_search(
            tiny, [PROMPT, [3]], value=lambda texts: [0.0] * len(texts), simulations=count, max_new_tokens=4
        )
        assert [r.token_ids for r in ours] == [r.token_ids for r in plain]
    assert_nothing_leaked(tiny)


def test_tree_search_by_hand(tiny):
    """Three walks at the root: the best prior first, then by Q + c p sqrt(N) / (1 + n), visits decide."""
    p = (tiny.prefill([PROMPT]).logits[0] / 2.0).softmax(-1).tolist()
    value, c = [0.1, 0.9, 0.2, 0.3, 0.4], 3.0
    visits, total = [0] * V, [0.0] * V
    for walk in range(4):
        scores = [
            (total[v] / visits[v] if visits[v] else 0) + c * p[v] * math.sqrt(walk) / (1 + visits[v])
            for v in range(V)
        ]
        best = max(range(V), key=scores.__getitem__) if walk else max(range(V), key=p.__getitem__)
        visits[best] += 1
        total[best] += value[best]
    (ours,) = tree_search(
        tiny, [PROMPT], value=lambda texts: [value[t[0]] for t in texts], simulations=4, max_new_tokens=1
    )
    assert visits[ours.token_ids[0]] == max(visits)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (smc, {"n": 3, "twist": favour, "temperature": 1.0, "seed": 3, "threshold": 1.0}),
        (power_smc, {"n": 3, "temperature": 1.0, "seed": 3, "threshold": 1.0}),
        (power_sampling, {"blocks": 2, "moves": 2, "temperature": 1.0, "seed": 3}),
        (weighted_rejection, {"n": 2, "allowed": odd_after_even, "temperature": 1.0, "seed": 3}),
        (grammar_aligned, {"allowed": trap, "iterations": 3, "temperature": 1.0, "seed": 3}),
        (tree_search, {"value": lambda texts: [sum(t) % 3 / 2 for t in texts], "simulations": 5}),
    ],
)
def test_batch_equals_solo(tiny, strategy, options):
    params = [SamplingParams(max_new_tokens=n) for n in (2, 4, 3)]
    laws.batch_equals_solo(strategy, tiny, [[1, 2], [3], [0, 4, 2]], params, **options)
    assert_nothing_leaked(tiny)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: smc(e, [PROMPT]), "temperature > 0"),
        (lambda e: smc(e, [PROMPT], temperature=1.0, n=0), "n >= 1"),
        (lambda e: power_sampling(e, [PROMPT]), "temperature > 0"),
        (lambda e: power_sampling(e, [PROMPT], temperature=1.0, mirostat=2), "mirostat, which has memory"),
        (lambda e: weighted_rejection(e, [PROMPT], allowed=odd_after_even, checks=0), "checks >= 1"),
        (lambda e: grammar_aligned(e, [PROMPT], allowed=trap), "temperature > 0"),
        (lambda e: antislop(e, [PROMPT]), "no tokenizer"),
        (lambda e: tree_search(e, [PROMPT], value=len, simulations=0), "simulations >= 1"),
    ],
)
def test_out_of_range_is_an_error(tiny, call, message):
    with pytest.raises(ParameterError, match=message):
        call(tiny)
