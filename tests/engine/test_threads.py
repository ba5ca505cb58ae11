"""Several threads: one thing at a time in an engine, and the user's model beside it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from architectures import ARCHITECTURES, prompts_of
from helpers import assert_nothing_leaked, full_logits, tiny_llama

from handloom import Engine, running
from handloom.errors import HandloomError
from handloom.strategies import beam_search

PROMPTS = prompts_of([5, 17, 1, 40, 9, 23])
PARAMS = {"max_new_tokens": 8, "temperature": 1.0, "seed": 3}


def test_threads_that_share_an_engine_get_what_each_would_get_alone():
    engine = Engine(tiny_llama(), slots=3, block_size=4)

    def generate(prompt):
        return engine.generate([prompt, PROMPTS[0]], **PARAMS)[0].token_ids

    def stream(prompt):
        return [event.token_id for event in engine.stream(prompt, **PARAMS)]

    def states(prompt):
        state = engine.prefill(prompt)
        for _ in range(4):
            state = engine.step(state, state.logits.argmax(-1))
        return state.new_tokens

    def strategy(prompt):
        return beam_search(engine, [prompt], num_beams=2, max_new_tokens=4)[0].token_ids

    jobs = [(job, prompt) for prompt in PROMPTS for job in (generate, stream, states, strategy)]
    wanted = [job(prompt) for job, prompt in jobs]
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(lambda pair: pair[0](pair[1]), 2 * jobs))
    assert got == 2 * wanted
    assert_nothing_leaked(engine)


def test_a_path_is_committed_in_the_engines_turn():
    """Cells move: not beside a run of another thread, and not from inside one."""
    engine = Engine(tiny_llama(), slots=2, block_size=4)
    tree = engine.tree_step(engine.prefill(PROMPTS[0]), [[3, 4, 5]], [[-1, -1, 1]])
    kept = threading.Thread(target=lambda: tree.keep_path([[1, 2]]))
    with engine._turn("test"):
        kept.start()
        kept.join(0.1)
        assert kept.is_alive()
    kept.join(10)
    assert not kept.is_alive()

    def inside(logits, context):
        tree.keep_path([[1, 2]])
        return logits

    with engine._turn("test"), pytest.raises(HandloomError, match="keep_path was called from inside a run"):
        inside(None, None)
    answer = engine.generate(PROMPTS[1], max_new_tokens=3, processors=[inside])
    assert answer.finish_reason == "error"
    assert "keep_path was called from inside a run" in answer.error


@pytest.mark.parametrize("name", ["llama", "bloom", "llama_dynamic_ntk", "mamba2"])
def test_the_model_answers_in_another_thread_while_the_engine_runs(name):
    model = ARCHITECTURES[name]()
    engine = Engine(model, slots=2, max_length=128)
    answers = [g.token_ids for g in engine.generate(PROMPTS, max_new_tokens=12)]
    wanted = full_logits(model, PROMPTS[1])
    done, wrong, calls = threading.Event(), [], 0

    def ask():
        nonlocal calls
        while not done.is_set() or calls < 5:
            calls += 1
            if not torch.equal(full_logits(model, PROMPTS[1]), wanted):
                wrong.append(calls)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for _ in range(2):
            assert [g.token_ids for g in engine.generate(PROMPTS, max_new_tokens=12)] == answers
    finally:
        done.set()
        asking.join()
    assert calls >= 5
    assert not wrong


def test_an_engine_works_on_its_models_device_and_leaves_the_callers_current(monkeypatch):
    """As for a model on the second of two devices: streams, events and Triton's launches belong to the current one."""
    second = running.current(torch.device("cuda", 1))
    assert (type(second), second.idx) == (torch.cuda.device, 1)
    where, seen, model = ["the caller's"], [], tiny_llama()

    @contextmanager
    def entered(device):
        where.append(device)
        yield
        where.pop()

    monkeypatch.setattr(running, "current", entered)
    hook = model.model.embed_tokens.register_forward_hook(lambda *_: seen.append(where[-1]))
    engine = Engine(model, slots=2)  # which checks itself
    assert seen
    state = engine.prefill(PROMPTS[:2])
    engine.step(state, [3, 4]), engine.extend(state, [[3, 4], [5]]), engine.score(state, [[3, 4], [5]])
    engine.tree_step(state, [[3, 4]] * 2, [-1, -1])
    engine.generate(PROMPTS[:2], max_new_tokens=2)
    for _ in engine.stream(PROMPTS[:3], max_new_tokens=3):
        assert where == ["the caller's"]  # between two events
    hook.remove()
    assert len(seen) >= 12
    assert set(seen) == {engine.device}


def test_a_run_inside_a_run_of_the_same_engine_says_so_and_another_engine_helps():
    engine = Engine(tiny_llama())
    other = Engine(engine.model, max_length=64)

    def asks(engine):
        def guide(logits, context):
            return logits + engine.generate([5, 6], max_new_tokens=1).token_ids[0] * 0

        return guide

    for result in engine.generate(PROMPTS[:2], max_new_tokens=2, processors=[asks(engine)]):
        assert result.finish_reason == "error"
        assert "generate was called from inside a run of the same Engine" in result.error
    fine = engine.generate(PROMPTS[0], max_new_tokens=2, processors=[asks(other)])
    assert fine.token_ids == engine.generate(PROMPTS[0], max_new_tokens=2).token_ids

    def asking(progress):
        engine.prefill([5])

    result = engine.generate(PROMPTS[0], max_new_tokens=2, criteria=[asking])
    assert "prefill was called from inside a run" in result.error
    model_hook = engine.model.register_forward_pre_hook(lambda *args: engine.prefill([5]))
    with pytest.raises(HandloomError, match="prefill was called from inside a run"):
        engine.prefill([6])
    model_hook.remove()
    assert_nothing_leaked(engine)


def test_between_the_events_of_a_stream_others_may_go():
    engine = Engine(tiny_llama(), slots=2)
    wanted = engine.generate(PROMPTS[1], **PARAMS).token_ids
    stream, tokens = engine.stream(PROMPTS[1], **PARAMS), []
    for event in stream:
        tokens.append(event.token_id)
        assert engine.generate(PROMPTS[0], max_new_tokens=2).n_new == 2
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(engine.generate, PROMPTS[0], max_new_tokens=1).result(60).n_new == 1
    assert tokens == wanted
    forgotten = engine.stream(PROMPTS[1], **PARAMS)
    next(forgotten)
    del forgotten
    assert_nothing_leaked(engine)


def test_states_dropped_by_other_threads_give_their_blocks_back():
    engine = Engine(tiny_llama(), block_size=2)
    with ThreadPoolExecutor(3) as threads:
        for _ in range(10):
            states = [engine.prefill(prompt) for prompt in PROMPTS]
            drops = [threads.submit(states.pop) for _ in PROMPTS]
            engine.generate(PROMPTS[0], max_new_tokens=6)
            for drop in drops:
                drop.result()
            del drops, drop
    assert_nothing_leaked(engine)
