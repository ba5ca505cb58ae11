"""decode: with nothing put in, `Engine.generate` in every respect; what is put in acts, and the rest stays."""

import pytest
import torch
from helpers import assert_nothing_leaked, forced, nothing_left, poisoned, recorded, text_engine, tiny_llama

from handloom import Engine, ParameterError, SamplingParams, laws
from handloom.strategies import decode

PROMPTS = [[5, 9, 17, 5, 9], [40], [3, 3, 8, 21, 60, 2, 11, 3, 3], [7, 70, 7, 70]]
EVERYTHING = [
    SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=1, max_new_tokens=14, n=3),
    SamplingParams(temperature=1.1, mirostat=2, mirostat_tau=2.0, seed=2, max_new_tokens=9, logprobs=2),
    SamplingParams(repetition_penalty=1.4, no_repeat_ngram_size=2, max_new_tokens=12, prompt_logprobs=0),
    SamplingParams(temperature=0.7, dry_multiplier=0.8, frequency_penalty=0.5, seed=3, stop_token_ids=[4, 8, 15, 16]),
]  # fmt: skip


@pytest.fixture(scope="module")
def small():
    return Engine(tiny_llama(), slots=3)


def same(one, other):
    assert (one.request, one.sample, one.token_ids, one.text) == (
        other.request, other.sample, other.token_ids, other.text,
    )  # fmt: skip
    assert (one.finish_reason, one.stop_reason) == (other.finish_reason, other.stop_reason)
    assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert one.raw_logprobs == pytest.approx(other.raw_logprobs, abs=1e-4)
    assert (one.top_logprobs is None) == (other.top_logprobs is None)
    for a, b in zip(one.top_logprobs or [], other.top_logprobs or [], strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    known = [x for x in other.prompt_logprobs or [] if x is not None]
    assert [x for x in one.prompt_logprobs or [] if x is not None] == pytest.approx(known, abs=1e-4)


@pytest.mark.parametrize("step", [None, lambda now: now.draw()])
def test_it_is_generate(small, step):
    """Six samples in three slots: finished rows are replaced, memory of processors and all."""
    ours = decode(small, PROMPTS, EVERYTHING, step=step)
    for one, other in zip(ours, small.generate(PROMPTS, EVERYTHING), strict=True):
        same(one, other)
    assert_nothing_leaked(small)


def test_stop_strings_and_text_with_a_tokenizer():
    engine = text_engine(slots=2)
    asked = [
        SamplingParams(forced_tokens=forced(text), stop=["end"]) for text in ("one end two", "not", "the end")
    ]
    for one, other in zip(
        decode(engine, ["a", "b", "c"], asked, max_new_tokens=9),
        engine.generate(["a", "b", "c"], asked, max_new_tokens=9),
        strict=True,
    ):
        same(one, other)


def test_events_are_those_of_stream(small):
    params = SamplingParams(temperature=1.0, seed=5, max_new_tokens=5)
    plain, ours = {}, {}
    for found, events in (
        (plain, small.stream(PROMPTS, params)),
        (ours, decode(small, PROMPTS, params, stream=True)),
    ):
        for event in events:
            found.setdefault(event.request, []).append((event.token_id, event.finish))
    assert ours == plain


def test_logits_are_what_the_pipeline_is_given(small):
    """The negated model, with penalties and bans on top of it; raw log-probabilities stay the model's."""
    asked = {"max_new_tokens": 6, "repetition_penalty": 1.3, "suppress_tokens": [1, 2]}
    results = decode(small, PROMPTS[:2], logits=lambda now: -now.logits, **asked)
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.neg_()
    for one, other in zip(results, Engine(model).generate(PROMPTS[:2], **asked), strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        assert max(one.raw_logprobs) < -3 < min(other.raw_logprobs) + 3


def test_a_step_may_compute_the_states_after_it(small):
    def second_best(now):
        tokens = now.logprobs.topk(2).indices[:, 1]
        return tokens, now.engine.step(now.state, tokens)

    plain = decode(small, PROMPTS, step=lambda now: now.logprobs.topk(2).indices[:, 1], max_new_tokens=5)
    with recorded(small.model) as passes:
        ours = decode(small, PROMPTS, step=second_best, max_new_tokens=5)
    assert [r.token_ids for r in ours] == [r.token_ids for r in plain]
    assert (
        len(passes.steps) == 11
    )  # four prompts in three slots, five tokens each; one prompt is one token long
    laws.batch_equals_solo(decode, small, PROMPTS, step=second_best, max_new_tokens=5)


def test_members_beside_see_the_same_tokens(small):
    other = Engine(tiny_llama(num_hidden_layers=1))
    negative = [[7], [9, 2], [1, 2, 3], [4]]
    seen = []

    def logits(now):
        seen.append([states.new_tokens for states in now.joint.states])
        return now.logits - 0.5 * now.beside[0]

    results = decode(small, PROMPTS, beside=[(other, negative)], logits=logits, max_new_tokens=4)
    assert all(mine == theirs for mine, theirs in seen)
    for prompt, beside, result in zip(PROMPTS, negative, results, strict=True):
        ids = []
        for token in result.token_ids:
            own, theirs = small.prefill([prompt + ids]).logits, other.prefill([beside + ids]).logits
            assert int((own - 0.5 * theirs).argmax()) == token
            ids.append(token)
    assert_nothing_leaked(small)
    assert_nothing_leaked(other)


def test_a_member_without_room_ends_its_row(small):
    short = Engine(tiny_llama(), max_length=8)
    asked = {"logits": lambda now: now.logits + now.beside[0], "max_new_tokens": 20}
    first, second = decode(small, PROMPTS[:2], beside=[(short, [[1, 2, 3], [1]])], **asked)
    assert (first.finish_reason, first.n_new, second.n_new) == ("length", 5, 7)


def test_one_request_is_cancelled_the_others_go_on(small):
    plain = small.generate(PROMPTS, max_new_tokens=6)
    running, results = decode(small, PROMPTS, max_new_tokens=6, stream=True), {}
    for number, event in enumerate(running):
        if number == 4:
            running.cancel(0)
            running.cancel(3)  # which still waits
        if event.generation:
            results[event.request] = event.generation
    assert [results[i].finish_reason for i in range(4)] == ["cancelled", "length", "length", "cancelled"]
    assert results[0].token_ids == plain[0].token_ids[: results[0].n_new] != []
    assert [results[i].token_ids for i in (1, 2)] == [plain[i].token_ids for i in (1, 2)]
    assert results[3].token_ids == []
    with pytest.raises(ParameterError, match="request 9"):
        running.cancel(9)
    assert_nothing_leaked(small)


def test_closing_gives_every_block_back(small):
    running = decode(small, PROMPTS, max_new_tokens=6, stream=True)
    next(running)
    assert small.pool.in_use
    running.close()
    assert_nothing_leaked(small)


def test_ctrl_c_keeps_what_is_finished(small):
    def interrupted(now):
        if len(now.state.new_tokens[0]) == 3:
            raise KeyboardInterrupt
        return now.logits

    asked = [SamplingParams(max_new_tokens=n) for n in (5, 2, 5, 5)]
    results = decode(small, PROMPTS, asked, logits=interrupted)
    assert [r.finish_reason for r in results] == ["cancelled", "length", "cancelled", "cancelled"]
    assert [r.n_new for r in results] == [3, 2, 3, 1]


def test_failures_end_their_row_alone():
    engine = Engine(poisoned(tiny_llama()), slots=2)
    asked = [SamplingParams(), SamplingParams(), SamplingParams(processors=[nothing_left])]
    bad, good, empty = decode(engine, [[5, 100], [5, 9], [5, 9]], asked, max_new_tokens=3)
    assert (bad.finish_reason, bad.token_ids, good.n_new) == ("error", [], 3)
    assert "NaN" in bad.error
    assert "no token is left" in empty.error


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        (lambda e: [(Engine(tiny_llama(vocab_size=50)), [[1]])], "101 and 50 tokens"),
        (lambda e: [(e, [[1], [2]])], "2 prompts beside 1"),
    ],
)
def test_members_that_do_not_fit_are_refused(small, beside, message):
    with pytest.raises(ParameterError, match=message):
        decode(small, [[1]], beside=beside(small))


def test_tokens_of_a_wrong_shape(small):
    with pytest.raises(ParameterError, match=r"shape \[2\] for 1 rows"):
        decode(small, [[1]], step=lambda now: torch.tensor([1, 2]))


def test_a_strategy_may_tell_more(small):
    def step(now):
        for request in now.live:
            request.extra["steps"] = request.extra.get("steps", 0) + 1
        return now.draw()

    (result,) = decode(small, [[1, 2]], step=step, max_new_tokens=4)
    assert result.extra == {"steps": 4}
    assert result.to_dict()["extra"] == {"steps": 4}


def test_a_forked_request_goes_on_alone():
    engine = text_engine()
    (request,) = engine.requests("a", stop=["xyz"], max_new_tokens=9)
    request.start(engine)
    ids = engine.encode("tree xy")
    for token in ids:
        request.push(token, -1.0, -1.0, None)
    twin = request.fork()
    (z,) = engine.encode("xz")[1:]
    assert twin.push(z, -1.0, -1.0, None).finish == "stop"
    event = request.push(ids[0], -2.0, -2.0, None)
    assert event.finish is None
    rest = request.end("cancelled").generation
    assert rest.token_ids == [*ids, ids[0]]
    assert rest.logprobs[-1] == -2.0 != twin.logprobs[-1]
