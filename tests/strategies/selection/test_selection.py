"""Selection: votes, risks and certainties by hand, on the samples that `generate` would give."""

from collections import Counter

import pytest
from helpers import assert_nothing_leaked, recorded, tiny_llama

from handloom import Engine, ParameterError, SamplingParams, laws
from handloom.loop.generation import Generation
from handloom.strategies import bayes_risk, chain_of_thought, deep_confidence, self_consistency
from handloom.strategies.selection.bayes_risk import token_f1
from handloom.strategies.selection.confidence import confidence
from handloom.strategies.selection.self_consistency import lead

PROMPTS = [[5, 9, 17], [40], [3, 3, 8, 21, 60, 2, 11]]
WARM = {"temperature": 1.2, "seed": 7, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_llama(), slots=4)


def parity(generation):
    return sum(generation.token_ids) % 3


def test_the_majority_wins(engine):
    samples = engine.generate(PROMPTS, n=15, **WARM)
    for early in (False, True):
        results = self_consistency(engine, PROMPTS, answer=parity, n=15, early=early, **WARM)
        for i, result in enumerate(results):
            group = samples[15 * i : 15 * i + 15]
            votes = Counter(map(parity, group))
            assert votes[result.extra["answer"]] == max(votes.values())
            if not early:
                assert result.extra["votes"] == votes
                best = max(
                    (s for s in group if parity(s) == result.extra["answer"]),
                    key=lambda s: s.cumulative_logprob / s.n_new,
                )
                assert result.token_ids == best.token_ids
    assert_nothing_leaked(engine)


def test_sampling_ends_when_the_vote_is_decided(engine):
    """All agree: after 8 of 15 the others cannot change it. The four that run then are cancelled."""
    with recorded(engine.model) as passes:
        (result,) = self_consistency(engine, PROMPTS[:1], answer=lambda g: "yes", n=15, **WARM)
    assert result.extra["votes"] == {"yes": result.extra["samples"]}
    assert result.extra["samples"] == 8
    assert sum(passes.steps) <= 8 * 5 + 4
    (none,) = self_consistency(engine, PROMPTS[:1], answer=lambda g: None, n=5, **WARM)
    assert (none.extra["answer"], none.extra["votes"]) == (None, {})


def test_leads_by_hand():
    assert lead(["a", "b", "a", None]) == 1
    assert lead(["a"]) == 1
    assert lead([None]) == lead([]) == 0


def test_minimum_bayes_risk_by_hand(engine):
    samples = engine.generate(PROMPTS, n=6, **WARM)
    results = bayes_risk(engine, PROMPTS, n=6, **WARM)
    for i, result in enumerate(results):
        group = samples[6 * i : 6 * i + 6]
        gains = [sum(token_f1(h, r) for r in group) / 6 for h in group]
        assert result.token_ids == group[gains.index(max(gains))].token_ids
        assert result.extra["utility"] == pytest.approx(max(gains))
    last = bayes_risk(engine, PROMPTS, n=6, utility=lambda h, r: h.sample, **WARM)
    assert [r.sample for r in last] == [5, 5, 5]


def test_f1_by_hand():
    one, other = Generation(request=0, token_ids=[1, 2, 2, 3]), Generation(request=0, token_ids=[2, 2, 5])
    assert token_f1(one, other) == pytest.approx(2 * 2 / 7)
    assert token_f1(one, one) == 1
    assert token_f1(Generation(request=0), Generation(request=0)) == 1


def test_chain_of_thought_by_its_definition(engine):
    results = chain_of_thought(engine, PROMPTS, k=4, max_new_tokens=5, aggregate=False)
    for prompt, result in zip(PROMPTS, results, strict=True):
        found = []
        for first in engine.prefill([prompt]).logits[0].topk(4).indices.tolist():
            rest = engine.generate([[*prompt, first]], max_new_tokens=4)[0].token_ids
            gaps = []
            for at in range(5):
                p = engine.prefill([prompt + [first, *rest][:at]]).logits[0].softmax(-1).topk(2).values
                gaps.append(float(p[0] - p[1]))
            found.append((sum(gaps) / 5, [first, *rest]))
        assert result.token_ids == max(found)[1]
        assert result.extra["delta"] == pytest.approx(max(found)[0], abs=1e-4)
    greedy = engine.generate(PROMPTS, max_new_tokens=5)
    assert [r.token_ids for r in chain_of_thought(engine, PROMPTS, k=1, max_new_tokens=5)] == [
        r.token_ids for r in greedy
    ]


def test_equal_answers_of_paths_add_up(engine):
    (result,) = chain_of_thought(
        engine,
        PROMPTS[:1],
        k=5,
        answer=lambda path: (path.token_ids[-1] % 2, slice(-1, None)),
        max_new_tokens=4,
    )
    assert result.extra["answers"][result.extra["answer"]] == max(result.extra["answers"].values())
    assert result.extra["delta"] == result.extra["gaps"][-1]


def test_confidence_by_hand():
    values = [4.0, 1.0, 3.0, 2.0]
    assert confidence(values, "mean", 2) == 2.5
    assert confidence(values, "lowest", 2) == 2.0
    assert confidence(values, "tail", 2) == 2.5
    assert confidence(values, "tail", 9) == 2.5
    assert confidence([float(i) for i in range(40)], "bottom", 1) == 1.5  # the lowest four of forty windows


def test_confident_traces_vote(engine):
    traces = engine.generate(PROMPTS[:1], n=12, logprobs=5, **WARM)
    own = {t.sample: sum(-sum(top.values()) / 5 for top in t.top_logprobs) / t.n_new for t in traces}
    (result,) = deep_confidence(
        engine, PROMPTS[:1], answer=parity, n=12, keep=0.25, measure="mean", k=5, **WARM
    )
    best = sorted(own, key=own.get, reverse=True)[:3]
    votes = Counter()
    for sample in best:
        votes[parity(traces[sample])] += own[sample]
    assert result.extra["votes"] == pytest.approx(dict(votes), abs=1e-3)
    assert result.extra["answer"] == max(votes, key=votes.get)
    assert result.sample in best


def test_unsure_traces_are_cancelled_after_the_warm_up(engine):
    warm = WARM | {"max_new_tokens": 12}
    with recorded(engine.model) as whole:
        deep_confidence(engine, PROMPTS[:1], answer=parity, n=16, keep=0.3, window=2, **warm)
    with recorded(engine.model) as online:
        (result,) = deep_confidence(
            engine, PROMPTS[:1], answer=parity, n=16, keep=0.3, window=2, warmup=4, **warm
        )
    assert sum(online.steps) < 0.8 * sum(whole.steps)
    assert result.finish_reason == "length"
    assert_nothing_leaked(engine)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (self_consistency, {"answer": parity, "n": 5, "early": False, **WARM}),
        (bayes_risk, {"n": 4, **WARM}),
        (chain_of_thought, {"k": 3, "max_new_tokens": 5}),
        (deep_confidence, {"answer": parity, "n": 5, "keep": 0.6, **WARM}),
    ],
)
def test_batch_equals_solo(engine, strategy, options):
    laws.batch_equals_solo(strategy, engine, PROMPTS, SamplingParams(), **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: self_consistency(e, PROMPTS, answer=parity), "temperature > 0"),
        (lambda e: bayes_risk(e, PROMPTS), "temperature > 0"),
        (lambda e: chain_of_thought(e, PROMPTS, k=0), "k >= 1"),
        (lambda e: chain_of_thought(e, PROMPTS, temperature=1.0), "temperature 0"),
        (lambda e: deep_confidence(e, PROMPTS, answer=parity, keep=0), "DeepConf takes"),
    ],
)
def test_out_of_range_is_an_error(engine, call, message):
    with pytest.raises(ParameterError, match=message):
        call(engine)
