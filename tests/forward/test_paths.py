"""Every way to run a model offers the same operations with the same results."""

import pytest
import torch
from architectures import ARCHITECTURES, prompts_of
from helpers import (
    POISON,
    assert_nothing_leaked,
    full_logits,
)

from handloom import Engine, SamplingParams

PROMPTS = prompts_of([5, 17, 1, 9])


PATHS = {"bloom": "mask", "gpt_neo": "rows", "jamba": "attention", "mamba": "mask", "recurrent_gemma": "solo"}
LOOSE = {"atol": 2e-3, "rtol": 0}


@pytest.fixture(scope="module", params=PATHS)
def other_path(request):
    engine = Engine(ARCHITECTURES[request.param](), slots=2, max_length=128)
    assert engine.capabilities.path == PATHS[request.param]
    return engine


def test_scores_on_every_path(other_path):
    prompts, tokens = PROMPTS[:2], [[3, 4, 5], [6, 7]]
    state = other_path.prefill(prompts)
    for _ in range(2):  # a score leaves nothing behind
        scores = other_path.score(state, tokens)
        for row, (prompt, new) in enumerate(zip(prompts, tokens, strict=True)):
            logp = full_logits(other_path.model, prompt + new)[len(prompt) - 1 : -1].log_softmax(-1)
            torch.testing.assert_close(scores[row, : len(new)], logp[range(len(new)), new], **LOOSE)
    assert scores[1, 2] == 0


def test_hidden_states_on_every_path(other_path):
    prompts = PROMPTS[:2]
    state = other_path.prefill(prompts, hidden=True)
    longer = other_path.extend(state, [[3, 4], [5]], hidden=True)
    for row, new in enumerate(([3, 4], [5])):
        ids = torch.tensor([prompts[row] + new])
        with torch.no_grad():
            want = other_path.model(ids, output_hidden_states=True, use_cache=False).hidden_states
        n = len(prompts[row])
        for layer in (0, -1):
            torch.testing.assert_close(state.hidden(layer)[row, :n], want[layer][0, :n], **LOOSE)
            torch.testing.assert_close(longer.hidden(layer)[row, : len(new)], want[layer][0, n:], **LOOSE)


def test_embeddings_on_every_path(other_path):
    table = other_path.model.get_input_embeddings()
    with torch.no_grad():
        embeddings = [table(torch.tensor(p)) for p in PROMPTS[:2]]
    by_ids = other_path.generate(PROMPTS[:2], max_new_tokens=8)
    by_embeddings = other_path.generate(embeddings, max_new_tokens=8)
    assert [g.token_ids for g in by_embeddings] == [g.token_ids for g in by_ids]


def test_prompt_logprobs_and_samples_on_every_path(other_path):
    settings = {"n": 3, "temperature": 1.0, "seed": 4, "max_new_tokens": 5}
    results = other_path.generate([PROMPTS[1]], prompt_logprobs=0, **settings)
    logp = full_logits(other_path.model, PROMPTS[1])[:-1].log_softmax(-1)
    assert results[0].prompt_logprobs[1:] == pytest.approx(logp[range(16), PROMPTS[1][1:]].tolist(), abs=2e-3)
    assert len({tuple(g.token_ids) for g in results}) == 3
    assert [g.token_ids for g in other_path.generate([PROMPTS[1]], **settings)] == [
        g.token_ids for g in results
    ]


def test_an_old_state_goes_on_on_every_path(other_path):
    old = other_path.prefill(PROMPTS[:2])
    state = old
    for token in range(3, 23):
        state = other_path.step(state, [token, token + 30])
    other_path.generate(PROMPTS[2:], max_new_tokens=4)
    again = other_path.step(old, [9, 10])
    for row, token in enumerate((9, 10)):
        expected = full_logits(other_path.model, [*PROMPTS[row], token])[-1]
        torch.testing.assert_close(again.logits[row], expected, **LOOSE)
    whole = [*PROMPTS[0], *range(3, 23)]
    torch.testing.assert_close(state.logits[0], full_logits(other_path.model, whole)[-1], **LOOSE)
    del old, state, again
    assert_nothing_leaked(other_path)


def test_a_stream_and_a_generation_may_interleave_on_every_path(other_path):
    expected = other_path.generate(PROMPTS[0], max_new_tokens=6).token_ids
    stream = other_path.stream(PROMPTS[0], max_new_tokens=6)
    tokens = [next(stream).token_id, next(stream).token_id]
    other_path.generate(PROMPTS[1], max_new_tokens=3)
    assert tokens + [event.token_id for event in stream] == expected
    assert_nothing_leaked(other_path)


def test_a_row_with_nan_ends_alone_on_every_path(other_path):
    embedding = other_path.model.get_input_embeddings().weight
    plain = SamplingParams(max_new_tokens=8, banned_tokens=[POISON])
    expected = other_path.generate(PROMPTS, plain)
    before = embedding[POISON].clone()
    with torch.no_grad():
        embedding[POISON] = float("nan")
    try:
        spoilt = plain.replace(forced_tokens={2: POISON}, banned_tokens=[])
        results = other_path.generate([PROMPTS[3], *PROMPTS], [spoilt, *[plain] * 4])
    finally:
        with torch.no_grad():
            embedding[POISON] = before
    assert results[0].finish_reason == "error"
    assert "NaN" in results[0].error
    assert [g.token_ids for g in results[1:]] == [g.token_ids for g in expected]
    other_path.pool.clear_prefixes()
    assert_nothing_leaked(other_path)
