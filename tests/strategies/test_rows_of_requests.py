"""Requests: whether forks share their noise, and times that were measured."""

import time

import pytest
import torch
from architectures import prompts_of
from helpers import tiny_llama

from handloom import Engine
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
