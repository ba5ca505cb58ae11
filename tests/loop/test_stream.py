"""Streams: events as they come, equal to what `generate` gives; closing early; nothing finished is lost."""

import inspect

import pytest
import torch
from architectures import ARCHITECTURES, prompts_of
from helpers import assert_nothing_leaked, forced, outcome, recorded, spell

from handloom import Engine, SamplingParams
from handloom.errors import HandloomError, ParameterError, PromptError
from handloom.loop.intake import Arrivals

PROMPTS = prompts_of([5, 17, 1, 9, 12, 30])
BUDGETS = [7, 2, 5, 9, 1, 4]
PARAMS = [SamplingParams(max_new_tokens=n, temperature=i % 2, seed=i) for i, n in enumerate(BUDGETS)]


def by_row(events):
    rows = {}
    for event in events:
        rows.setdefault((event.request, event.sample), []).append(event)
    return rows


def test_a_stream_holds_every_token_of_every_row_and_ends_with_the_result(either_texts):
    expected = either_texts.generate(PROMPTS, PARAMS)
    events = list(either_texts.stream(PROMPTS, PARAMS))
    rows = by_row(events)
    assert set(rows) == {(i, 0) for i in range(6)}
    for (index, _), row in rows.items():
        result = row[-1].generation
        assert outcome(result)[:4] == outcome(expected[index])[:4]
        assert [e.token_id for e in row] == result.token_ids
        assert "".join(e.text for e in row) == result.text
        assert [e.logprob for e in row] == result.logprobs
        assert [e.raw_logprob for e in row] == result.raw_logprobs
        assert [e.finish for e in row] == [None] * (len(row) - 1) + [result.finish_reason]
        assert [e.generation for e in row[:-1]] == [None] * (len(row) - 1)


def test_samples_have_streams_of_their_own(either_texts):
    settings = {"n": 3, "temperature": 1.0, "seed": 2, "max_new_tokens": 6}
    expected = either_texts.generate(PROMPTS[0], **settings)
    rows = by_row(either_texts.stream(PROMPTS[0], **settings))
    assert [[e.token_id for e in rows[0, s]] for s in range(3)] == [g.token_ids for g in expected]


def test_it_is_a_plain_generator_and_tokens_come_as_they_are_made(texts):
    stream = texts.stream(PROMPTS[0], max_new_tokens=5)
    assert inspect.isgenerator(stream)
    with recorded(texts.model) as passes:
        next(stream)
        assert passes.steps in ([], [1])  # at most the next step has been started
        next(stream)
        assert len(passes.steps) in (1, 2)
        assert len(list(stream)) == 3


def test_a_result_is_given_as_soon_as_its_row_ends(texts):
    finished = [e.request for e in texts.stream(PROMPTS, PARAMS) if e.generation]
    assert sorted(finished) == list(range(6))
    # Slots run 0: 7 tokens, 1: 2 tokens, 2: 5 tokens; then 3 replaces 1, 4 and 5 replace 2, in that order.
    assert finished == [1, 2, 4, 0, 5, 3]


def test_text_that_may_become_a_stop_string_is_held_back(either_texts):
    events = list(
        either_texts.stream("the", forced_tokens=forced("a STOq b STOP c"), stop="STOP", max_new_tokens=15)
    )
    assert [e.text for e in events] == ["a", " ", "", "", "", "STOq", " ", "b", " ", "", "", "", ""]
    assert events[-1].finish == "stop"
    assert events[-1].generation.text == "a STOq b "
    assert events[-1].generation.stop_reason == "STOP"


def test_bytes_of_a_character_are_held_back(either_texts):
    ids = either_texts.tokenizer.convert_tokens_to_ids(list("ðŁĺĢ")) + spell("!")  # the four bytes of 😀
    events = list(either_texts.stream("the", forced_tokens=forced(ids), max_new_tokens=5))
    assert [e.text for e in events] == ["", "", "", "😀", "!"]
    events = list(either_texts.stream("the", forced_tokens=forced(ids), max_new_tokens=3))
    assert "".join(e.text for e in events) == events[-1].generation.text == "�"


def test_errors_come_before_the_first_event(texts):
    with recorded(texts.model) as passes:
        with pytest.raises(PromptError):
            texts.stream([[5], []])
        with pytest.raises(ParameterError):
            texts.stream(PROMPTS, max_new_tokens=-1)
        with pytest.raises(ParameterError):
            texts.stream(PROMPTS, PARAMS[:2])
    assert passes.shapes == []


def test_a_row_that_fails_reports_it_in_its_last_event(either_texts):
    def nothing(logits, context):
        return torch.full_like(logits, -torch.inf)

    params = [SamplingParams(max_new_tokens=3), SamplingParams(max_new_tokens=3, processors=[nothing])]
    rows = by_row(either_texts.stream(PROMPTS[:2], params))
    [last] = rows[1, 0]
    assert (last.token_id, last.text, last.finish) == (None, "", "error")
    assert "no token is left" in last.generation.error
    assert rows[0, 0][-1].generation.n_new == 3


@pytest.mark.parametrize("after", [0, 1, 2, 8])
def test_closing_gives_everything_back(either_texts, after):
    stream = either_texts.stream(PROMPTS, max_new_tokens=20)
    for _ in range(after):
        next(stream)
    stream.close()
    assert list(stream) == []
    either_texts.pool.check()
    assert either_texts.pool.in_use == 0
    assert len(either_texts.generate(PROMPTS, PARAMS)) == 6


def test_a_dropped_stream_gives_everything_back(either_texts):
    for event in either_texts.stream(PROMPTS, max_new_tokens=20):
        if event.request == 1:
            break
    del event
    assert_nothing_leaked(either_texts)


def test_results_that_were_given_stay_when_a_stream_is_closed(texts):
    expected = texts.generate(PROMPTS, PARAMS)
    stream, results = texts.stream(PROMPTS, PARAMS), {}
    for event in stream:
        if event.generation:
            results[event.request] = event.generation
        if len(results) == 3:
            break
    stream.close()
    assert {i: outcome(g)[:4] for i, g in results.items()} == {i: outcome(expected[i])[:4] for i in (1, 2, 4)}


def test_ctrl_c_in_the_callers_loop_reaches_the_caller_and_frees_the_rows(either_texts):
    def read():
        for event in either_texts.stream(PROMPTS, max_new_tokens=20):
            if event.request == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read()
    assert_nothing_leaked(either_texts)


def test_streams_of_one_engine_may_be_interleaved(either_texts):
    expected = [either_texts.generate(p, max_new_tokens=6).token_ids for p in PROMPTS[:3]]
    streams = [either_texts.stream(p, max_new_tokens=6) for p in PROMPTS[:3]]
    found = [[] for _ in streams]
    for _ in range(6):
        for tokens, stream in zip(found, streams, strict=True):
            tokens.append(next(stream).token_id)
    assert found == expected
    assert [next(s, None) for s in streams] == [None] * 3


def test_states_can_be_used_while_a_stream_is_open(either_texts):
    expected = either_texts.generate(PROMPTS[0], max_new_tokens=6).token_ids
    stream = either_texts.stream(PROMPTS[0], max_new_tokens=6)
    tokens = [next(stream).token_id, next(stream).token_id]
    state = either_texts.step(either_texts.prefill(PROMPTS[1]), [7])
    other = either_texts.generate(PROMPTS[2], max_new_tokens=3).token_ids
    tokens += [event.token_id for event in stream]
    assert tokens == expected
    assert other == either_texts.generate(PROMPTS[2], max_new_tokens=3).token_ids
    del state


def test_chat_prompts_can_be_streamed(texts):
    texts.tokenizer = type(texts.tokenizer)(tokenizer_object=texts.tokenizer.backend_tokenizer)
    texts.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}:"
    ids = texts.chat_prompt("fox")
    assert ids == texts.encode("fox:")
    expected = texts.chat("fox", max_new_tokens=4)
    tokens = [e.token_id for e in texts.stream([{"role": "user", "content": "fox"}], max_new_tokens=4)]
    assert tokens == expected.token_ids


# -- requests that arrive while the loop runs


def arriving(engine, schedule, cancel=()):
    """Results by number of requests that arrive as scheduled: (after how many events, prompt, params).

    cancel: (after how many events, number of the request).
    """
    arrivals, schedule, found, submitted, seen = Arrivals(engine), list(schedule), {}, [], 0

    def come():
        while schedule and schedule[0][0] <= seen:
            _, prompt, params = schedule.pop(0)
            submitted.append(arrivals.submit(prompt, **params))
        for when, number in cancel:
            if when == seen:
                arrivals.cancel(submitted[number])

    come()
    for event in engine.stream(arrivals):
        seen += 1
        if event.generation is not None:
            found[event.request, event.sample] = event.generation
        come()
    assert not schedule
    return found


LATE = [
    (0, [5, 6, 7], {"max_new_tokens": 9, "temperature": 1.0, "seed": 1}),
    (2, [8] * 30, {"max_new_tokens": 12, "temperature": 0.7, "top_k": 9, "seed": 2, "n": 2}),
    (3, [9, 3], {"max_new_tokens": 40, "repetition_penalty": 1.3}),
    (4, [5, 6, 7, 1], {"max_new_tokens": 5, "temperature": 1.5, "min_p": 0.1, "seed": 4, "logprobs": 3}),
    (30, [1], {"max_new_tokens": 6, "stop_token_ids": list(range(0, 101, 3))}),
]


def test_requests_that_arrive_meanwhile_give_what_each_gives_alone(either):
    found = arriving(either, LATE)
    assert list(found) != sorted(found)  # they ran together, and the short ones ended first
    for number, (_, prompt, params) in enumerate(LATE):
        alone = either.generate([prompt], **params)
        assert [found[number, g.sample].token_ids for g in alone] == [g.token_ids for g in alone]
        assert found[number, 0].logprobs == pytest.approx(alone[0].logprobs, abs=1e-5)


@pytest.mark.parametrize("when", [0, 1, 4])
def test_a_request_ends_early_wherever_it_is(either, when):
    schedule = [(0, [number + 1] * 20, {"max_new_tokens": 9, "n": 2}) for number in range(5)]
    found = arriving(either, schedule, cancel=[(when, 0), (when, 3), (8, 3)])
    reasons = {key: generation.finish_reason for key, generation in found.items()}
    assert {key for key, reason in reasons.items() if reason == "cancelled"} == {
        (0, 0),
        (0, 1),
        (3, 0),
        (3, 1),
    }
    assert found[3, 0].token_ids == []
    wanted = either.generate([1] * 20, max_new_tokens=9).token_ids
    assert found[0, 0].token_ids == wanted[: len(found[0, 0].token_ids)]
    assert len(reasons) == 10


def test_what_has_ended_cannot_be_cancelled_and_closed_arrivals_take_nothing(engine):
    arrivals = Arrivals(engine)
    requests = arrivals.submit([1, 2], max_new_tokens=2)
    assert arrivals.wait()
    events = list(engine.stream(arrivals))
    arrivals.cancel(requests)
    assert events[-1].finish == "length"
    assert list(engine.stream(arrivals)) == []
    assert not arrivals.wait(timeout=0)
    arrivals.close()
    assert not arrivals.wait()
    with pytest.raises(HandloomError, match="closed"):
        arrivals.submit([1, 2])
    with pytest.raises(ParameterError, match="temprature"):
        Arrivals(engine).submit([1, 2], temprature=1)


def test_a_batch_that_grows_keeps_recurrent_states():
    engine = Engine(ARCHITECTURES["mamba2"](), slots=3)
    found = arriving(engine, LATE[:3])
    for number, (_, prompt, params) in enumerate(LATE[:3]):
        assert found[number, 0].token_ids == engine.generate([prompt], **params)[0].token_ids
