"""Requests: whether forks share their noise, and times that were measured."""

import time

import pytest
import torch
from architectures import prompts_of
from helpers import tiny_llama

from handloom import Engine, SamplingParams
from handloom.strategies import Requests, beam_search, contrastive_search, speculative

PROMPTS = prompts_of([7, 4])
SAMPLED = {"temperature": 2.0, "seed": 5, "max_new_tokens": 12}
PAUSE = 0.005


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_llama())


def texts(engine, state, requests, steps=12):
    for _ in range(steps):
        context = requests.at(state)
        tokens = requests.rows.sample(state.logits, context).tokens
        requests, state = requests.accept(tokens, context), engine.step(state, tokens)
    return [tuple(row) for row in state.new_tokens]


def test_forks_share_their_noise_unless_they_draw_anew(engine):
    state, requests = Requests.start(engine, PROMPTS, **SAMPLED)
    fan = [0, 0, 0, 1, 0, 0, 1]
    same = texts(engine, state.select(fan), requests.select(fan))
    assert len(set(same)) == 2
    anew = texts(engine, state.select(fan), requests.select(fan, fresh=True))
    assert len(set(anew)) == len(fan)
    assert not set(anew) & set(same)
    assert texts(engine, state.select(fan), requests.select(fan, fresh=True)) == anew
    alone = [0] * 5  # what a row draws does not depend on the other request's rows
    assert texts(engine, state.select(alone), requests.select(alone, fresh=True)) == [
        row for row, owner in zip(anew, fan, strict=True) if owner == 0
    ]


def test_drawing_anew_again_takes_other_noise(engine):
    state, requests = Requests.start(engine, PROMPTS[:1], **SAMPLED)
    found = set()
    for _ in range(5):
        requests = requests.select([0], fresh=True)
        found |= set(texts(engine, state, requests))
    assert len(found) == 5
    parted = requests.select([0, 0], fresh=True).select([1, 0, 1])
    assert parted.streams[0] == parted.streams[2] != parted.streams[1]


@pytest.mark.parametrize(
    "strategy",
    [
        lambda engine, **options: beam_search(
            engine, PROMPTS, num_beams=2, num_return_sequences=2, **options
        ),
        lambda engine, **options: contrastive_search(engine, PROMPTS, k=2, **options),
        lambda engine, **options: speculative(engine, PROMPTS, draft=lambda ids, count: [], **options),
    ],
    ids=["beam", "contrastive", "speculative"],
)
def test_times_are_measured(strategy):
    model = tiny_llama()
    model.model.layers[0].register_forward_hook(lambda *args: time.sleep(PAUSE))
    engine, start = Engine(model, self_check=False), time.monotonic()
    results = strategy(engine, max_new_tokens=6)
    wall = time.monotonic() - start
    for result in results:
        times = result.timings
        assert times.prefill >= PAUSE
        assert times.first_token >= times.queued + times.prefill
        assert times.decode >= 5 * PAUSE
        assert times.total == pytest.approx(times.first_token + times.decode)
        assert times.total <= wall
        assert times.tokens_per_second <= 1 / PAUSE
        assert torch.isfinite(torch.tensor(result.logprobs)).all()


def test_branches_go_on_as_rows_of_their_own():
    """Forks by different tokens, under a processor with memory: as the row itself would go on by each of them."""
    engine = Engine(tiny_llama())
    params = SamplingParams(temperature=1.2, mirostat=2, mirostat_tau=2.0, repetition_penalty=1.3, seed=3)
    state, requests = Requests.start(engine, [[5, 9, 17], [40]], params)
    forks, theirs = requests.branch(engine, state, [1, 0, 0], torch.tensor([7, 8, 70]))
    processed = theirs.rows.apply(forks.logits, theirs.at(forks))
    for i, (row, token) in enumerate([(1, 7), (0, 8), (0, 70)]):
        alone, own = state.select([row]), requests.select([row])
        context = own.at(alone)
        own.rows.apply(alone.logits, context)
        own, alone = own.accept(torch.tensor([token]), context), engine.step(alone, [token])
        torch.testing.assert_close(processed[i], own.rows.apply(alone.logits, own.at(alone))[0])
    assert forks.tokens == [[40, 7], [5, 9, 17, 8], [5, 9, 17, 70]]
