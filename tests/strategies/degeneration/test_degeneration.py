"""Degeneration: adaptive contrastive search, FSD and CNTP against cache-free readings of their definitions."""

import itertools
import math
from statistics import median

import pytest
import torch
from helpers import assert_nothing_leaked, text_engine, tiny_llama

from handloom import Engine, ParameterError, SamplingParams, laws
from handloom.laws import naive
from handloom.strategies import adaptive_contrastive_search, cautious, frustratingly_simple, rollout
from handloom.strategies.degeneration.cautious import TRIAL, punctuation
from handloom.strategies.degeneration.simple import NGrams
from handloom.strategies.kit.requests import Requests

PROMPTS = [[5, 9, 17], [40], [3, 3, 8, 21, 60, 2, 11]]


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_llama())


@torch.no_grad()
def adaptive_by_definition(model, prompt, count, q):
    """arXiv 2407.18698, recomputing every sequence from nothing for every candidate."""

    def entropy(p):
        return float(-(p * p.log()).sum())

    def sigmoid(x):
        return math.exp(x) / (1 + math.exp(x))

    ids, whole, few = list(prompt), [], []
    for _ in range(count):
        p = model(torch.tensor([ids]), use_cache=False).logits[0, -1].softmax(-1)
        h = entropy(p)
        k = round(10 * sigmoid(q * math.atanh((h - median(whole)) / math.log(len(p))) if whole else 0.0) + 5)
        best, candidates = p.topk(k)
        small = entropy(best / best.sum())
        alpha = sigmoid(q * math.atanh((small - median(few)) / math.log(k)) if few else 0.0)
        whole.append(h)
        few.append(small)
        scores = {}
        for v in candidates.tolist():
            hidden = model(
                torch.tensor([[*ids, v]]), use_cache=False, output_hidden_states=True
            ).hidden_states[-1][0]
            cosines = torch.cosine_similarity(hidden[-1:], hidden[:-1])
            scores[v] = (1 - alpha) * float(p[v]) - alpha * float(cosines.max())
        ids.append(max(scores, key=scores.get))
    return ids[len(prompt) :]


@pytest.mark.parametrize("q", [1.0, 8.0])
def test_adaptive_contrastive_search_is_its_definition(engine, q):
    results = adaptive_contrastive_search(engine, PROMPTS, q=q, max_new_tokens=5)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.token_ids == adaptive_by_definition(engine.model, prompt, 5, q)
        assert (result.extra["k"][0], result.extra["alpha"][0]) == (10, 0.5)
        assert len(set(result.extra["alpha"])) > 1
    assert_nothing_leaked(engine)


def test_n_grams_by_hand():
    """1 2 3 1 2 -> after (1, 2): 3 once; after (2,): 3 once; unigrams 1 1 2 2 3. beta .9: weights .9, .09, .01."""
    model = NGrams(3, 0.9)
    model.read([1, 2, 3])
    model.read([1, 2, 3, 1, 2])
    assert model.weights == pytest.approx({3: 0.9, 2: 0.09, 1: 0.01})
    assert model.probability(3) == pytest.approx(0.9 + 0.09 + 0.01 / 5)
    assert model.probability(1) == pytest.approx(0.01 * 2 / 5)
    assert model.probability(7) == 0
    # the authors' code: count / (total + 1), and what was not seen leaves its weight to the shorter ones
    assert model.penalty(3) == pytest.approx(0.9 / 2 + 0.1 * 0.9 / 2 + 0.01 / 5)
    assert model.penalty(1) == pytest.approx(2 / 5)
    assert NGrams(3, 0.9).penalty(1) == 0
    alone = NGrams(1, 0.9)
    alone.read([4])
    assert (alone.probability(4), alone.weights) == (1.0, {1: 1.0})


def test_frustratingly_simple_by_its_definition(engine):
    (result,) = frustratingly_simple(
        engine, [[7, 70, 7, 70]], k=5, alpha=0.5, n=2, beta=0.8, max_new_tokens=8
    )
    ids = [7, 70, 7, 70]
    for token in result.token_ids:
        best, candidates = naive.next_logits(engine.model, [ids])[0].softmax(-1).topk(5)
        after = [b for a, b in itertools.pairwise(ids) if a == ids[-1]]
        scores = {}
        for p, v in zip(best.tolist(), candidates.tolist(), strict=True):
            bigram = after.count(v) / len(after) if after else 0.0
            scores[v] = 0.5 * p - 0.5 * (0.8 * bigram + 0.2 * ids.count(v) / len(ids))
        assert token == max(scores, key=scores.get)
        ids.append(token)


def test_they_become_greedy_search(engine):
    plain = [r.token_ids for r in engine.generate(PROMPTS, max_new_tokens=8)]
    for limit in ({"alpha": 0.0}, {"k": 1}):
        assert [
            r.token_ids for r in frustratingly_simple(engine, PROMPTS, max_new_tokens=8, **limit)
        ] == plain
    same = frustratingly_simple(engine, PROMPTS, rule="code", alpha=0.0, max_new_tokens=8)
    assert [r.token_ids for r in same] == plain
    echo = [[7, 70] * 6]
    apart = frustratingly_simple(engine, echo, k=20, alpha=0.9, max_new_tokens=30)
    assert apart[0].token_ids != engine.generate(echo, max_new_tokens=30)[0].token_ids


def test_one_trial_is_sampling(engine):
    warm = {"temperature": 1.1, "top_p": 0.9, "seed": 3, "max_new_tokens": 8, "n": 2}
    plain = engine.generate(PROMPTS, **warm)
    assert [r.token_ids for r in cautious(engine, PROMPTS, marks=[1], most_trials=1, **warm)] == [
        r.token_ids for r in plain
    ]
    sure = cautious(engine, PROMPTS, marks=[1], low=50, high=60, **warm)  # never unsure
    assert [r.token_ids for r in sure] == [r.token_ids for r in plain]


def test_cautious_takes_the_most_probable_trial(engine):
    """The trials of one step, replayed by hand: streams apart, up to a mark, the best mean log-probability."""
    marks = set(range(0, 101, 4))
    params = SamplingParams(temperature=1.0, seed=9, max_new_tokens=6)
    (result,) = cautious(engine, [[5, 9, 17]], params, marks=marks, most_trials=4, low=0.0, high=0.1)
    state, requests = Requests.start(engine, [[5, 9, 17]], params)
    walks = []
    for stream in (0, TRIAL + 1, TRIAL + 2, TRIAL + 3):
        walks += rollout(engine, state, requests, [6], streams=stream, until=lambda _, token: token in marks)
    best = max(walks, key=lambda walk: sum(walk.logprobs) / len(walk.logprobs))
    assert result.token_ids[: len(best.tokens)] == best.tokens
    assert result.extra["trials"][0] == (0, 4)
    assert result.logprobs[: len(best.tokens)] == pytest.approx(best.logprobs, abs=1e-4)
    assert len({tuple(walk.tokens) for walk in walks}) > 1


def test_the_number_of_trials_follows_the_entropy(engine):
    """N = floor(1 + 9 (H - 1.5) / 2.0) from 1 to 10, H in nats of the pipeline's law: the authors' code."""
    asked = {"temperature": 0.7, "seed": 4, "max_new_tokens": 8}
    (result,) = cautious(engine, [[5, 9, 17]], marks=range(101), low=1.5, high=3.5, **asked)
    told, text = dict(result.extra["trials"]), [5, 9, 17]
    for position, token in enumerate(result.token_ids):
        law = (naive.next_logits(engine.model, [text])[0] / 0.7).softmax(-1)
        share = (float(-(law * law.log()).sum()) - 1.5) / 2.0
        assert told.get(position, 1) == int(1 + 9 * min(max(share, 0.0), 1.0))
        text.append(token)
    assert len(set(told.values())) > 2


def test_a_rollout_is_generate(engine):
    params = SamplingParams(temperature=1.0, seed=9, max_new_tokens=20, stop_token_ids=list(range(0, 101, 5)))
    state, requests = Requests.start(engine, PROMPTS, params)
    for walk, plain in zip(
        rollout(engine, state, requests, [20, 3, 0]), engine.generate(PROMPTS, params), strict=True
    ):
        assert plain.token_ids[: len(walk.tokens)] == walk.tokens
        assert plain.raw_logprobs[: len(walk.tokens)] == pytest.approx(walk.raw_logprobs, abs=1e-4)
        assert walk.ended == (bool(walk.tokens) and walk.tokens[-1] % 5 == 0)
    assert state.tokens == PROMPTS


def test_marks_are_tokens_with_punctuation():
    engine = text_engine()
    marks = punctuation(engine)
    assert set(engine.encode(".")) <= marks
    assert not set(engine.encode("tree")) & marks


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (adaptive_contrastive_search, {}),
        (frustratingly_simple, {}),
        (cautious, {"marks": list(range(0, 101, 3)), "temperature": 1.0, "seed": 2, "low": 0.0, "high": 8.0}),
    ],
)
def test_batch_equals_solo(engine, strategy, options):
    params = [
        SamplingParams(max_new_tokens=5),
        SamplingParams(max_new_tokens=8, repetition_penalty=1.5),
        SamplingParams(max_new_tokens=6, stop_token_ids=[2, 5, 8]),
    ]
    laws.batch_equals_solo(strategy, engine, PROMPTS, params, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: adaptive_contrastive_search(e, PROMPTS, q=0), "q > 0"),
        (lambda e: frustratingly_simple(e, PROMPTS, alpha=2), "FSD takes"),
        (lambda e: frustratingly_simple(e, PROMPTS, rule="x"), "FSD takes"),
        (lambda e: cautious(e, PROMPTS, marks=[1], low=2, high=1), "CNTP takes"),
        (lambda e: cautious(e, PROMPTS), "needs marks"),
    ],
)
def test_out_of_range_is_an_error(engine, call, message):
    with pytest.raises(ParameterError, match=message):
        call(engine)
