"""What one step of the loop launches beside the layers, with the kernels that CUDA runs in Triton's interpreter."""

import pytest
import torch
from helpers import tiny_llama
from launches import Always, launches

from handloom import Engine, SamplingParams
from handloom.forward.fused.recognise import fuse
from handloom.kernels import dispatch, penalties_triton
from handloom.kernels.sampling import fused
from handloom.loop.graph import GraphBatch
from handloom.loop.intake import compile_sampler, rehearsals
from handloom.loop.prefill import Prompts
from handloom.loop.request import Prefilled, Request
from handloom.text.prompts import Prompt

WHOLE_ROWS = {"_log_softmax", "_softmax", "argmax", "topk", "sort", "max", "amax", "logsumexp"}
ASKED = {
    "greedy": {},
    "alternatives": {"logprobs": 3},
    "sampling": {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.05, "logprobs": 1},
    "entropy": {"temperature": 0.8, "dynatemp_range": 0.3, "top_p": 0.9, "logprobs": 1},
    "penalties": {
        "repetition_penalty": 1.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "logprobs": 1,
    },
}
# Launches of the draw and its append.
MOST = {"greedy": 4, "alternatives": 5, "sampling": 8, "entropy": 11, "penalties": 6}


def batch_of(engine, params: SamplingParams) -> GraphBatch:
    """A batch with one request, ready to draw."""
    batch, prompts = GraphBatch(engine, 1, 64), Prompts(engine.runner, 512)
    request = Request(0, 0, Prompt([3, 5, 7, 9]), params, 7, Prefilled())
    request.start(engine)
    prompts.add(request)
    assert not prompts.compute()
    assert not batch.place(prompts.done(1))
    assert not batch.prepare()
    return batch


@pytest.mark.parametrize("name", ASKED)
def test_nothing_is_computed_over_the_vocabulary_beside_the_sampler(name):
    params = SamplingParams(max_new_tokens=20, seed=3, **ASKED[name])
    engine = Engine(tiny_llama(num_hidden_layers=1), graph=True, slots=1, fuse=False)
    batch = batch_of(engine, params)
    with dispatch.use("triton"), torch.no_grad():
        batch._sample()  # what is made once
        with launches() as names:
            batch._sample()
    assert WHOLE_ROWS.isdisjoint(names)
    assert names[-1] == "append_kernel"
    assert len(names) <= MOST[name], names


def test_what_a_step_launches_beside_its_layers():
    """Nine launches around the decoder layers of a Llama, the draw and the logits' way to float32 included."""
    engine = Engine(tiny_llama(num_hidden_layers=1), graph=True, slots=1, fuse=True)
    fuse(engine.runner, Always())
    batch = batch_of(engine, SamplingParams(max_new_tokens=20))
    batch.recorder = object()  # as where steps are recorded, the host then knows nothing of the rows
    with dispatch.use("triton"), torch.no_grad():
        batch._sample()  # what is made once
    with launches(run=False) as names:
        batch._sample()
        batch._advance()
    draw, given = ["group_kernel", "row_kernel", "clamp", "append_kernel"], ["embedding", "_look_up_kernel"]
    assert names[:6] == draw + given
    assert names[-3:] == ["_add_norm_kernel", "_vector_kernel", "copy_"]
    assert len(names) == 9 + 8


@pytest.mark.parametrize("logprobs", [None, 2])
def test_greedy_rows_and_alternatives_through_the_sampler_are_those_of_torch(logprobs):
    engine = Engine(tiny_llama(num_hidden_layers=1), slots=2)
    wanted = [
        SamplingParams(max_new_tokens=3, logprobs=logprobs, repetition_penalty=penalty)
        for penalty in (1.0, 1.5)
    ]
    want = engine.generate([[3, 5, 7], [9, 1]], wanted)
    with dispatch.use("triton"):
        have = engine.generate([[3, 5, 7], [9, 1]], wanted)
    for ours, theirs in zip(have, want, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.raw_logprobs == pytest.approx(theirs.raw_logprobs, abs=1e-5)
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
        if logprobs:
            for mine, other in zip(ours.top_logprobs, theirs.top_logprobs, strict=True):
                assert list(mine) == list(other)
                assert list(mine.values()) == pytest.approx(list(other.values()), abs=1e-5)
    assert have[0].logprobs == have[0].raw_logprobs  # nothing was changed: not even the last bit


def test_a_warm_up_compiles_the_sampler_for_what_is_announced(monkeypatch):
    engine, built = Engine(tiny_llama(num_hidden_layers=1), slots=1), []
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setattr(dispatch, "select", lambda *about: "triton")
    monkeypatch.setattr(fused, "warm_up", lambda *about, **settings: built.append((about, settings)))
    texts = []
    monkeypatch.setattr(penalties_triton, "warm_up", texts.append)
    compile_sampler(engine, [SamplingParams(), SamplingParams(logprobs=30)])
    assert {about for about, _ in built} == {(engine.device, engine.vocab_size)}
    settings = {(s["logprobs"], s["edits"], s["n_top"], s["adaptive"]) for _, s in built}
    assert settings == {("chosen", edits, top, True) for edits in (False, True) for top in (1, 30)}
    assert [(logits.shape, logits.device) for logits in texts] == [((1, engine.vocab_size), engine.device)]


def test_the_first_request_of_its_kind_has_its_kernels_compiled_side_by_side(monkeypatch):
    from handloom.kernels.sampling import rules
    from handloom.kernels.sampling import sample as sampling

    built, x = [], torch.zeros(3, 40)
    monkeypatch.setattr(sampling, "_built", set())
    monkeypatch.setattr(dispatch, "select", lambda *about: "triton")
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setattr(fused, "sample_fused", lambda call, out=None: rules.Drawn(call.positions))
    monkeypatch.setattr(fused, "warm_up", lambda *about, **settings: built.append((about, settings)))

    def ask(*chosen, rows=3, **more):
        key = torch.zeros(rows, dtype=torch.int64)
        before = len(built)
        sampling.sample(x[:rows], seeds=key, positions=key, rules=chosen, **more)
        return len(built) - before

    value = torch.tensor([3.0, 4.0, 5.0])
    xtc = rules.xtc(value, value)
    assert [
        ask(),
        ask(rules.top_k(value)),
        ask(rules.top_k(value + 1)),
        ask(rules.top_k(value[:1]), rows=1),
    ] == [0, 1, 0, 0]
    assert [
        ask(rules.top_k(value), xtc),
        ask(xtc, rules.top_k(value)),
        ask(xtc, rules.top_k(value), n_top=2),
    ] == [1, 0, 1]
    about, settings = built[1]
    assert about == (x.device, 40, torch.float32)
    assert [(rule.kind, rule.parameter.tolist()) for rule in settings["rules"]] == [
        ("count", [3.0]),
        ("xtc", [3.0]),
    ]
    assert settings["rules"][1].second.tolist() == [3.0]
    assert ask(rules.eta(value[:0]), rows=0) == 0


def test_a_warm_up_of_several_kinds_runs_them_alone_and_beside_each_other():
    engine = Engine(tiny_llama(num_hidden_layers=1), slots=3)
    kinds = [SamplingParams(typical_p=0.9), SamplingParams(top_h=0.5, n=2, max_time=1)]
    runs = [
        [(request.params.typical_p, request.params.top_h) for request in requests]
        for requests in rehearsals(engine, kinds, None, (5,))
    ]
    one, two = (0.9, 0.0), (1.0, 0.5)
    assert runs == [[one] * 3, [two] * 3, [one, two, one], [one], [two]]
