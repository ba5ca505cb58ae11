"""What the speed benchmark makes of moments, and the moments that every side tells."""

import itertools
from collections import Counter

import pytest
import torch
from benchmark_runs import Ticks
from helpers import tiny_llama

from benchmarks.decode import rivals, speed
from benchmarks.decode.rivals import COMPILED, BareLoop, ContinuousBatching, caches, pick, side
from benchmarks.decode.sides import Handloom, HuggingFace, Request, Sampling, Timeline, twin
from benchmarks.decode.speed import Case, Subject, grid, rates, share, summary
from benchmarks.support.common import Progress
from benchmarks.support.shapes import Sizes, build, sizes
from handloom.kernels.linear import blocked


@pytest.fixture(scope="module")
def tiny():
    return build("tiny", torch.float32)


@pytest.fixture(scope="module")
def subject(tiny):
    return Subject("tiny", tiny, sizes(tiny.config, torch.float32))


def test_summary_by_hand():
    lines = [
        Timeline([[1.0, 1.5, 2.5], [2.0, 2.25]], total=4.0),  # 5 tokens in 4 s
        Timeline([[3.0, 3.5, 4.5], [5.0, 5.25]], total=10.0),
    ]
    found = summary(lines)
    assert found["ttft_ms"] == 2500  # of 1, 2, 3, 5
    assert found["tpot_p50_ms"] == 500  # of 0.25, 0.25, 0.5, 0.5, 1, 1
    assert found["tpot_p99_ms"] == 1000
    assert found["tokens_per_s"] == (5 / 4 + 5 / 10) / 2
    assert (found["tokens_per_s_min"], found["tokens_per_s_max"]) == (0.5, 1.25)
    assert rates(lines) == [1.25, 0.5]


def test_summary_of_answers_of_one_token_has_no_time_between_tokens():
    found = summary([Timeline([[0.5]], 1.0)])
    assert (found["ttft_ms"], found["tpot_p50_ms"], found["tpot_p99_ms"]) == (500, None, None)


def test_share_of_the_bandwidth_by_hand():
    sized = Sizes(weights=900, every_step=600, experts=0, chosen=0, cell=2, window_cells=(), longest=100)
    found = share(100.0, sized, Case(batch=4, context=10, new=10), bandwidth=14400.0)
    assert found["read_bytes"] == 600 + 4 * 15 * 2
    assert found["mbu"] == pytest.approx(0.5)  # 720 bytes in 0.1 s of 1440
    assert share(None, sized, Case(4, 10, 1), 1.0)["mbu"] is None
    assert share(100.0, sized, Case(4, 10, 10, requests=16), 1.0)["mbu"] is None


def test_grid_has_ragged_cases_where_rows_can_be_replaced():
    assert grid([1, 8], [16, 32], 4, ragged=False) == [
        Case(1, 16, 4),
        Case(8, 16, 4),
        Case(1, 32, 4),
        Case(8, 32, 4),
    ]
    assert grid([1, 8], [16], 4, ragged=True) == [Case(8, 16, 4, requests=32)]


def test_ragged_rounds_have_the_same_lengths_and_other_tokens(subject):
    case = Case(3, 32, 16, requests=12)
    first, second = (case.workload(subject, turn) for turn in (1, 2))
    shape = [(len(r.prompt), r.new_tokens) for r in first]
    assert shape == [(len(r.prompt), r.new_tokens) for r in second]
    assert len(set(shape)) > 6
    assert all(2 <= prompt <= 32 and 2 <= new <= 16 for prompt, new in shape)
    assert all(a.prompt != b.prompt for a, b in zip(first, second, strict=True))


def test_caches_that_live_at_once():
    assert caches(["generate", "loop"]) == 1  # one after the other
    assert caches(["handloom", "generate", "generate_batch", "loop"]) == 3
    assert caches(["handloom"]) == 1


def test_twin_shares_weights_and_nothing_else(tiny):
    other = twin(tiny)
    for mine, theirs in zip(tiny.parameters(), other.parameters(), strict=True):
        assert mine is theirs
    assert other.config is not tiny.config
    assert other.model.layers[0] is not tiny.model.layers[0]
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert torch.equal(tiny(ids).logits, other(ids).logits)


REQUESTS = [Request([5, 6, 7], 3), Request([8, 9, 10], 3)]


@pytest.mark.parametrize(
    ("make", "tokens", "total"),
    [
        # Looks at the clock: start; every token of every row; end.
        (lambda m, c: Handloom(m, 2, clock=c), [[1, 3, 5], [2, 4, 6]], 7),
        # Two rows in one slot each: the second waits for the first.
        (lambda m, c: Handloom(m, 1, clock=c), [[1, 2, 3], [4, 5, 6]], 7),
        # Start; the prompt; every step; end.
        (lambda m, c: HuggingFace(m, 2, clock=c), [[2, 3, 4], [2, 3, 4]], 5),
        (lambda m, c: HuggingFace(m, 1, clock=c), [[2, 3, 4], [6, 7, 8]], 9),
        (lambda m, c: BareLoop(m, clock=c), [[1, 2, 3], [1, 2, 3]], 4),
    ],
)
def test_moments_of_every_token(tiny, make, tokens, total):
    line = make(twin(tiny), Ticks()).timeline(REQUESTS)
    assert line == Timeline(tokens, total)
    for moments in line.tokens:  # the first token and the times between tokens make up the way to the last
        gaps = [b - a for a, b in itertools.pairwise(moments)]
        assert moments[0] + sum(gaps) == moments[-1] < line.total


def test_shorter_answers_of_a_padded_batch_end_earlier(tiny):
    requests = [Request([5, 6, 7], 2), Request([8, 9], 4)]
    line = HuggingFace(twin(tiny), 2, clock=Ticks()).timeline(requests)
    assert line.tokens == [[2, 3], [2, 3, 4, 5]]


def test_continuous_batching_gives_every_request_its_length(tiny):
    made = ContinuousBatching(twin(tiny), slots=2, longest=40)
    requests = [Request([5, 6, 7], 2), Request([8, 9] * 15, 6), Request([4], 4)]
    try:
        for sampling in (None, Sampling(temperature=0.8, top_k=5), None):
            line = made.timeline(requests, sampling)
            assert [len(moments) for moments in line.tokens] == [2, 6, 4]
            for moments in line.tokens:
                assert moments[0] > 0
                assert moments == sorted(moments)
                assert moments[-1] <= line.total
        assert made.answer(requests) == 12
    finally:
        made.close()
    assert made.model.config._attn_implementation == "sdpa"  # as it was


def test_the_sides_decode_the_same_model(tiny):
    """First tokens of a long greedy answer, by the engine and by the bare loop, whose forward is transformers' own."""
    ours = Handloom(twin(tiny), 1).engine.generate([5, 6, 7], max_new_tokens=12, ignore_eos=True)
    seen = []

    class Loop(BareLoop):
        def __init__(self, model):
            super().__init__(model)
            model.register_forward_hook(lambda m, a, out: seen.append(int(out.logits[0, -1].argmax())))

    Loop(twin(tiny)).timeline([Request([5, 6, 7], 12)])
    assert seen == ours.token_ids


def test_the_bare_loop_refuses_ragged_requests(tiny):
    with pytest.raises(ValueError, match="one length"):
        BareLoop(tiny).timeline([Request([3], 2), Request([3, 4], 2)])


def test_pick_keeps_to_the_smallest_set_that_reaches_p():
    torch.manual_seed(0)
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(200, 3)
    # Before the third token there is 0.8, before the second 0.5. Both miss 200 times with a chance of (5/8)**200.
    assert set(pick(logits, Sampling(1.0, top_p=0.6)).tolist()) == {1, 2}
    assert set(pick(logits, Sampling(1.0, top_k=1)).tolist()) == {1}
    assert set(pick(logits, None).tolist()) == {1}
    with pytest.raises(ValueError, match="top-k and top-p alone"):
        pick(logits, Sampling(1.0, min_p=0.1))


def test_a_side_that_fails_says_why_and_the_others_go_on(subject, monkeypatch):
    def broken(name, *rest):
        if name == "loop":
            raise RuntimeError("no such kernel\nadvice")
        return side(name, *rest)

    monkeypatch.setattr(speed, "side", broken)
    rows = speed.contest(subject, Case(1, 8, 4), ["handloom", "loop"], 1, lambda text: None)
    assert rows[0]["tokens_per_s"] > 0
    assert rows[1] == {"side": "loop", "skipped": "RuntimeError: no such kernel"}


def test_a_case_that_does_not_fit_is_skipped_with_its_reason(subject, capsys):
    cases = [Case(1, 5000, 4), Case(1, 8, 4)]
    rows = list(speed.measure(subject, cases, ["loop"], 1, 2**40, Progress()))
    assert "longest sequence is 2048" in rows[0][0]["skipped"]
    assert rows[1][0]["tokens_per_s"] > 0


def test_calls_on_cuda_are_those_of_one_more_step(subject, monkeypatch):
    """With a profiler that finds three launches a step and four on the way, and one sync a step."""
    made = BareLoop(subject.model)
    steps = []
    monkeypatch.setattr(made, "answer", lambda requests, sampling: steps.append(requests[0].new_tokens))

    def profiled(run):
        run()
        return Counter(launches=3 * steps[-1] + 4, syncs=steps[-1])

    monkeypatch.setattr(speed, "device_calls", profiled)
    monkeypatch.setattr(speed, "on_cuda", lambda model: True)
    found = speed.calls(subject, Case(2, 8, 4), made)
    assert steps == [*speed.STEPS] * 2  # the first ones warm up
    assert found == {
        "launches_per_token": 3, "syncs_per_token": 1, "waits_per_token": 0, "operations_per_token": None,
    }  # fmt: skip


@pytest.mark.slow
def test_compiled_sides_compile(subject, monkeypatch):
    """Traced as inductor does, without the C++ compiler's time; what inductor makes the engine's tests tell."""
    from torch._dynamo.utils import counters

    compile_, traced = torch.compile, {"backend": "aot_eager", "mode": None, "options": None}
    monkeypatch.setattr(torch, "compile", lambda *args, **options: compile_(*args, **(options | traced)))
    for name in COMPILED:
        counters.clear()
        (row,) = speed.contest(subject, Case(1, 8, 6), [name], 1, lambda text: None)
        assert "skipped" not in row, row
        assert row["tokens_per_s"] > 0
        assert row["operations_per_token"] is None
        assert counters["stats"]["unique_graphs"] >= 1, name


def test_on_a_cpu_our_sides_have_the_layout_that_loading_gives(monkeypatch):
    monkeypatch.setattr(blocked, "SMALLEST", 1)
    model = tiny_llama()
    ours, theirs = (rivals.side(name, model, 2, 32) for name in ("handloom", "generate"))
    kinds = [{type(part) for part in each.model.modules()} for each in (ours, theirs)]
    assert [blocked.BlockedLinear in kind for kind in kinds] == [True, False]
    assert not any(isinstance(part, blocked.BlockedLinear) for part in model.modules())
    assert rivals.copies(["handloom", "handloom compile", "generate"], torch.device("cpu")) == 2
    assert rivals.copies(["handloom", "loop"], torch.device("cuda")) == 0
