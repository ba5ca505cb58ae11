"""The step as one device program: equal to the eager step, at fixed addresses, without reading anything back.

Without CUDA the steps of the tests below are recorded and replayed by `recorded_graph`, through the same code.
"""

import logging

import pytest
import torch
from architectures import ARCHITECTURES
from helpers import assert_nothing_leaked, tiny_llama
from recorded_graph import Recorder, Recording, install
from rule_cases import ON
from torch._dynamo.utils import counters

from handloom import CapabilityError, Engine, SamplingParams
from handloom.cache.pool import BlockPool
from handloom.cache.storage import Store
from handloom.forward.model import uncapturable
from handloom.forward.programs.compiling import CompiledStep
from handloom.kernels import dispatch
from handloom.loading.eightbit import EightBitLinear
from handloom.loop.graph import GraphBatch, _flatten
from handloom.loop.prefill import Prompts
from handloom.loop.request import Prefilled, Request
from handloom.pipeline.forms import Edit
from handloom.text.prompts import Prompt

PROMPTS = [[3, 5, 7, 9, 11], [1] * 17, [4], [2, 3] * 20, [9, 8, 7, 6, 5, 4, 3, 2, 1], [5] * 23]
MIXED = [
    SamplingParams(max_new_tokens=12, seed=1),
    SamplingParams(temperature=1.0, top_k=20, top_p=0.9, max_new_tokens=7, seed=2, n=2),
    SamplingParams(repetition_penalty=1.3, max_new_tokens=15, seed=3, logprobs=2),
    SamplingParams(
        temperature=0.7, frequency_penalty=0.5, presence_penalty=0.2, max_new_tokens=9, seed=4, min_p=0.05
    ),
    SamplingParams(temperature=1.2, mirostat=2, max_new_tokens=11, seed=5),
    SamplingParams(stop_token_ids=tuple(range(40)), temperature=1.0, seed=6, max_new_tokens=40),
]
ON_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if ON_CUDA else "cpu"


@pytest.fixture
def recorders(monkeypatch):
    """The recorders of all batches; on a machine with CUDA there is nothing to stand in for."""
    return install(monkeypatch) if not ON_CUDA else []


def engines(name, **options):
    """An engine that steps eagerly and one that runs the device program, over one model."""
    model = ARCHITECTURES[name]().to(DEVICE)
    options = {"slots": 3, "block_size": 4} | options
    return Engine(model, graph=False, **options), Engine(model, graph=True, **options)


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gpt_oss", "mixtral", "bloom", "deepseek_v3", "jamba", "mamba"]
)
def test_device_program_equals_eager_step_while_rows_are_replaced(name):
    eager, program = engines(name)
    want = eager.generate(PROMPTS, MIXED)
    for _ in range(2):  # the second run meets the batch, and on CUDA the graphs, that the first one left
        got = program.generate(PROMPTS, MIXED)
        for a, b in zip(want, got, strict=True):
            assert (b.token_ids, b.finish_reason, b.stop_reason) == (
                a.token_ids,
                a.finish_reason,
                a.stop_reason,
            )
            assert b.logprobs == pytest.approx(a.logprobs, abs=1e-4)
            assert (b.top_logprobs is None) == (a.top_logprobs is None)
        assert [list(t) for t in got[3].top_logprobs] == [list(t) for t in want[3].top_logprobs]
    program.pool.check()
    assert program.pool.in_use == 0


def test_closing_the_stream_in_flight_gives_every_block_back():
    eager, program = engines("llama")
    want = eager.generate(PROMPTS, max_new_tokens=20)
    events = program.stream(PROMPTS, max_new_tokens=20)
    seen = [[] for _ in PROMPTS]
    for event in events:
        seen[event.request].append(event.token_id)
        if len(seen[1]) == 7:
            break
    events.close()
    assert program.pool.in_use == 0
    program.pool.check()
    for tokens, whole in zip(seen, want, strict=True):
        assert tokens == whole.token_ids[: len(tokens)]
    assert [g.token_ids for g in program.generate(PROMPTS, max_new_tokens=20)] == [g.token_ids for g in want]


def test_a_python_processor_splits_the_program_and_keeps_working():
    def shift(logits, context):
        return logits.roll(1, -1)

    eager, program = engines("llama")
    params = [SamplingParams(max_new_tokens=8, processors=(shift,) if i % 2 else ()) for i in range(6)]
    assert [g.token_ids for g in program.generate(PROMPTS, params)] == [
        g.token_ids for g in eager.generate(PROMPTS, params)
    ]


def test_stop_seen_late_is_trimmed():
    eager, program = engines("llama")
    stop_after = 5
    criterion = SamplingParams(max_new_tokens=30, criteria=(lambda view: len(view.token_ids) >= stop_after,))
    for engine in (eager, program):
        results = engine.generate(PROMPTS, criterion)
        assert [len(g.token_ids) for g in results] == [stop_after] * len(PROMPTS)
        assert {g.finish_reason for g in results} == {"stop"}
    assert [g.token_ids for g in program.generate(PROMPTS, criterion)] == [
        g.token_ids for g in eager.generate(PROMPTS, criterion)
    ]


def started(engine, width=64):
    """A batch of the engine's slots with a prefilled request in each but the last."""
    batch = GraphBatch(engine, engine.slots, width)
    for slot in range(engine.slots - 1):
        request = Request(slot, 0, Prompt(PROMPTS[slot]), MIXED[slot + 1], 7 + slot, Prefilled())
        request.start(engine)
        prompts = Prompts(engine.runner, 512)
        prompts.add(request)
        assert not prompts.compute()
        assert not batch.place(prompts.done(1))
    return batch


@torch.no_grad()
def test_buffers_keep_their_addresses_over_steps_and_replaced_rows():
    _, program = engines("llama")
    batch = started(program)
    names = [n for n, v in vars(batch).items() if torch.is_tensor(v)]
    before = {n: getattr(batch, n).data_ptr() for n in names}
    for step in range(6):
        assert not batch.prepare()
        batch.draw()
        if step == 2:
            batch.clear(0)
    assert {n: getattr(batch, n).data_ptr() for n in names} == before
    assert {"logits", "tokens", "positions", "active", "history", "table"} <= set(names)


def to_meta(engine, batch):
    """The same batch with every tensor of model, pool, slots and pipeline on the meta device."""
    engine.model.to("meta")
    pool = batch.pool
    pool.stores = [Store(s.layers, s.keys.to("meta"), s.values.to("meta")) for s in pool.stores]
    pool._layers.clear()
    for name, value in list(vars(batch).items()):
        if torch.is_tensor(value):
            setattr(batch, name, value.to("meta"))
    site = batch.sampler.site
    site.device = torch.device("meta")
    for member in batch.sampler.members:
        member.values = None
        if isinstance(member.memory, dict):
            member.memory = {k: v.to("meta") for k, v in member.memory.items()}
    batch.sampler._plan = batch.sampler._greedy_tensor = None
    if batch.cache is not None:
        for layer in batch.cache._stateful:
            for kind in (layer.conv_states, layer.recurrent_states):
                kind.update({i: t if t is None else t.to("meta") for i, t in kind.items()})


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gpt_oss", "bloom", "deepseek_v3", "jamba", "qwen3_next", "mamba"]
)
@torch.no_grad()
def test_no_operation_of_the_step_reads_a_value_back(name):
    """On the meta device there are no values: whatever asks for one raises."""
    model = ARCHITECTURES[name]()
    if type(model)._can_set_experts_implementation():
        model.set_experts_implementation("batched_mm")  # the default has no float32 form off the CPU
    engine = Engine(model, graph=True, slots=4, block_size=4)
    batch = started(engine)
    to_meta(engine, batch)
    batch._live()
    for _ in range(3):
        batch._sample()
        batch._advance()
    assert batch.logits.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        batch.positions.sum().item()  # the probe itself: reading does raise here


def used(recorders) -> tuple[int, int]:
    """Steps that were recorded, and replays of them."""
    return sum(len(r.recordings) for r in recorders), sum(r.replays for r in recorders)


def no_refusals(engine) -> None:
    kept = [batch.programs for batch in engine._batches.values() if batch.programs is not None]
    kept += [] if engine.runner.recorded is None else [engine.runner.recorded.programs]
    assert [reason for programs in kept for reason in programs.refused.values()] == []


def changed(params: SamplingParams) -> SamplingParams:
    """A request of the same shape with other values: it meets the same recorded step."""
    return params.replace(
        temperature=params.temperature and params.temperature + 0.3,
        seed=100 + params.seed,
        repetition_penalty=1 + 1.5 * (params.repetition_penalty - 1),
        max_new_tokens=params.max_new_tokens + 3,
    )


@pytest.mark.parametrize(
    "name", ["llama", "gemma2", "gpt_oss", "mixtral", "bloom", "deepseek_v3", "jamba", "mamba"]
)
def test_replayed_steps_draw_the_eager_tokens_while_rows_are_replaced(name, recorders):
    eager, program = engines(name)
    once, others = eager.generate(PROMPTS, MIXED), [changed(p) for p in MIXED]
    for wanted, want in (
        (MIXED, once),
        (others, eager.generate(PROMPTS, others)),
        (MIXED, once),
    ):
        for a, b in zip(want, program.generate(PROMPTS, wanted), strict=True):
            assert (b.token_ids, b.finish_reason) == (a.token_ids, a.finish_reason)
            assert b.logprobs == pytest.approx(a.logprobs, abs=1e-4)
            assert (b.top_logprobs is None) == (a.top_logprobs is None)
    no_refusals(program)
    assert_nothing_leaked(program)
    # A smaller batch, as eager steps move to when rows end, would have to record every step again.
    assert [batch.size for batch in program._batches.values()] == [program.slots]
    recordings, replays = used(recorders) if recorders else (5, 45)
    assert recordings >= 5
    assert replays >= 45


@pytest.fixture(scope="module")
def ruled():
    """An engine that steps eagerly, one that runs the device program, and its recorders: the same for every rule."""
    with pytest.MonkeyPatch.context() as patch:
        made = install(patch) if not ON_CUDA else []
        model = tiny_llama(num_hidden_layers=1)
        yield Engine(model, slots=3, graph=False), Engine(model, slots=3, graph=True), made


@pytest.mark.parametrize("name", sorted(set(ON) - {"prefix_fn", "xtc"}))
def test_every_rule_replays(name, ruled):
    """XTC draws its coin with NumPy on a CPU, and a prefix function is Python: both are left out."""
    eager, program, recorders = ruled
    before = used(recorders)[1]
    rule = {"temperature": 1.0, **ON[name], "max_new_tokens": 6}
    for seed in (1, 20):
        params = [SamplingParams(**rule, seed=seed + i) for i in range(4)]
        want, got = eager.generate(PROMPTS[:4], params), program.generate(PROMPTS[:4], params)
        assert [g.token_ids for g in got] == [g.token_ids for g in want]
    no_refusals(program)
    assert not recorders or used(recorders)[1] >= before + 5


def test_the_pool_is_large_enough_from_the_start(recorders):
    _, program = engines("llama", block_size=2, slots=2)
    events = program.stream(PROMPTS[:2], max_new_tokens=80)
    next(events)
    capacity = program.pool.capacity
    assert capacity >= 2 * (17 + 80) // 2
    for _ in events:
        pass
    assert program.pool.capacity == capacity
    assert not recorders or used(recorders)[0] <= 2  # one row may end before the other
    small = Engine(program.model, graph=True, block_size=2, slots=2, max_blocks=60)
    assert [len(g.token_ids) for g in small.generate([[3], [4]], max_new_tokens=50)] == [50, 50]


def test_a_pool_that_moves_is_recorded_anew(recorders, monkeypatch):
    monkeypatch.setattr(BlockPool, "reserve", lambda pool, *blocks: None)
    eager, program = engines("llama", block_size=2, slots=2)
    capacity = program.pool.capacity
    for turn in range(2):
        prompts = [[*p, turn] for p in PROMPTS]
        want = eager.generate(prompts, max_new_tokens=70)
        assert [g.token_ids for g in program.generate(prompts, max_new_tokens=70)] == [
            g.token_ids for g in want
        ]
    assert program.pool.capacity > capacity
    for batch in program._batches.values():
        assert len(batch.programs) <= 2  # those that wrote to the old place are gone


@pytest.mark.parametrize("spoilt", [False, True])
def test_what_ran_before_the_pool_moved_is_recorded_without_another_run(spoilt, recorders, monkeypatch):
    """A request waits once: for a recording, or where that fails for the run that precedes another one."""
    if ON_CUDA:
        pytest.skip("counts what the stand-in does")
    eager, program = engines("llama", slots=2)
    moved, capacity = program.pool.moves, program.pool.capacity
    assert capacity >= 2 * program.max_length / program.pool.block_size  # room for all slots
    passes, events = program.runner.recorded.programs, {}
    for engine in (eager, program):
        state = engine.prefill(PROMPTS[0])
        state = engine.step(state, torch.tensor([3]))
        for _ in range(2):  # the second time they share what they begin with
            engine.generate(PROMPTS[:2], max_new_tokens=4)
        made = [passes.recorder, *recorders]
        before = [(r.warm_ups, len(r.recordings)) for r in made]
        for turn, event in enumerate(engine.stream(PROMPTS[:2], max_new_tokens=6)):
            events.setdefault(engine, []).append((event.request, event.token_id))
            if turn == 4:
                engine.pool._resize(engine.pool.capacity + 9)
                if spoilt and engine is program:
                    monkeypatch.setattr(Recorder, "record", failing_once(Recorder.record))
        state = engine.step(state, torch.tensor([4]))
        events[engine].append(state.logits)
    after = [(r.warm_ups, len(r.recordings)) for r in made]
    assert program.pool.moves == moved + 1
    assert events[program][:-1] == events[eager][:-1]
    torch.testing.assert_close(events[program][-1], events[eager][-1], atol=2e-4, rtol=1e-4)
    gained = [(now[0] - then[0], now[1] - then[1]) for now, then in zip(after, before, strict=True)]
    # A pass over a State, whose first recording may fail, and the loop's step.
    assert gained == [(0, 1), (int(spoilt), 1)]
    no_refusals(program)


def failing_once(record):
    """Of what records, the first call fails."""
    failed = []

    def call(recorder, *programs):
        if not failed:
            failed.append(programs)
            raise RuntimeError("operation not permitted when stream is capturing")
        return record(recorder, *programs)

    return call


def test_a_compiled_forward_is_recorded_with_the_rest(recorders):
    eager, program = engines("llama")
    program.compile, program.runner.compiled = True, CompiledStep(program.runner, {1, 2, 3}, "aot_eager")
    graphs = []
    for wanted in (MIXED, [changed(p) for p in MIXED]):
        want, got = eager.generate(PROMPTS, wanted), program.generate(PROMPTS, wanted)
        assert [g.token_ids for g in got] == [g.token_ids for g in want]
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1]  # rows came and went without another compilation
    assert set(program.runner.compiled.compiled) == {3}  # prompts of one token are no steps
    no_refusals(program)
    assert not recorders or used(recorders)[1] >= 30


KERNELS = {
    "edits": {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "logit_bias": {3: 4.0},
        "banned_tokens": (5, 6),
        "min_new_tokens": 3,
        "stop_token_ids": (12,),
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.02,
    },
    "memory": {"mirostat": 2, "mirostat_tau": 3.0, "dry_multiplier": 0.8, "dry_allowed_length": 1},
}


@pytest.mark.parametrize("name", KERNELS)
def test_launches_of_triton_kernels_are_recorded(name, recorders):
    """The kernels that CUDA runs, in the interpreter; attention and sampling read everything from device memory."""
    model = tiny_llama(num_hidden_layers=1)
    with dispatch.use("triton"):
        eager, program = Engine(model, slots=2, graph=False), Engine(model, slots=2, graph=True)
        for seed in (1, 9):
            params = [
                SamplingParams(temperature=0.9, seed=seed + i, max_new_tokens=3, **KERNELS[name])
                for i in (0, 1)
            ]
            want, got = eager.generate(PROMPTS[:2], params), program.generate(PROMPTS[:2], params)
            assert [g.token_ids for g in got] == [g.token_ids for g in want]
    no_refusals(program)
    assert not recorders or used(recorders)[1] >= 4


class CountingProcessor:
    """A Hugging Face processor with a state of its own: it bans one more token at every call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        scores[:, (7 * self.calls) % scores.shape[1] :][:, :20] = -torch.inf
        return scores


def test_python_processors_keep_their_state_around_replayed_forwards(recorders):
    eager, program = engines("llama")
    params = [
        SamplingParams(max_new_tokens=9, processors=(CountingProcessor(),) if i % 2 else ()) for i in range(6)
    ]
    want = eager.generate(PROMPTS, params)
    assert [g.token_ids for g in program.generate(PROMPTS, params)] == [g.token_ids for g in want]
    assert not recorders or used(recorders)[1] >= 12


def test_a_rule_that_reads_the_device_is_told_once_and_still_works(recorders, caplog):
    class Nosy(Edit):
        name, defaults = "nosy", {"strength": 0.0}

        def edit(self, logits, context):
            return logits + float(logits[0, 0] > 100)

    eager, program = engines("llama")
    params = [SamplingParams(max_new_tokens=6, processors=(Nosy(1.0),)) for _ in PROMPTS]
    want = eager.generate(PROMPTS, params)
    with caplog.at_level(logging.WARNING, logger="handloom"):
        got = program.generate(PROMPTS, params)
    assert [g.token_ids for g in got] == [g.token_ids for g in want]
    told = [r.getMessage() for r in caplog.records if "runs uncaptured" in r.getMessage()]
    assert told
    assert all("not permitted when stream is capturing" in line for line in told)


def test_rows_that_leave_early_and_wider_stop_lists(recorders):
    eager, program = engines("llama")
    params = [
        SamplingParams(max_new_tokens=30, stop_token_ids=tuple(range(i, 101, 9)), temperature=1.0, seed=i)
        for i in range(len(PROMPTS))
    ]
    for _ in range(2):
        want, got = eager.generate(PROMPTS, params), program.generate(PROMPTS, params)
        assert [(g.token_ids, g.finish_reason) for g in got] == [(g.token_ids, g.finish_reason) for g in want]
        events = program.stream(PROMPTS, params)
        for _ in range(9):
            next(events)
        events.close()
    assert_nothing_leaked(program)


def test_a_row_that_asks_for_what_the_one_before_it_asked_for_changes_nothing(recorders):
    """Its settings are in place, so the step is found at once; another one's, or none's, are not left behind."""
    eager, program = engines("llama", slots=2)
    asked = SamplingParams(temperature=0.9, top_k=20, max_new_tokens=4, seed=1)
    changes = []
    for params in (
        asked,
        asked,
        asked.replace(seed=5),
        asked.replace(top_k=5),
        SamplingParams(max_new_tokens=4),
    ):
        got = program.generate([PROMPTS[0]] * 2, params)
        assert [g.token_ids for g in got] == [g.token_ids for g in eager.generate([PROMPTS[0]] * 2, params)]
        [batch] = program._batches.values()
        changes.append(batch.sampler.changes)
    assert changes[0] == changes[1] == changes[2] < changes[3] < changes[4]
    program.generate(PROMPTS[:2], [asked, asked.replace(max_new_tokens=9)])  # the first leaves its slot empty
    assert [any(member.on) for member in batch.sampler.members].count(True) == 2
    assert batch.sampler.chains == [None, batch.sampler.pipeline]


@torch.no_grad()
def test_recording_leaves_no_trace(recorders):
    """Cells behind a row's own may belong to another row by the time that they are reached."""
    if ON_CUDA:
        pytest.skip("compares every cell of the pool")
    _, program = engines("llama")
    batch = started(program)
    assert not batch.prepare()
    other = batch.rows[1].table.blocks[0]
    batch.table[0, batch.lengths[0] // batch.block + 1 :] = other  # as a row before it may have left them
    keys = program.pool.stores[0].keys
    before = {name: value.clone() for name, value in vars(batch).items() if torch.is_tensor(value)}
    cells = keys[:, other].clone()
    assert batch._record(batch._key(_flatten(batch._live()))) is not None
    assert torch.equal(keys[:, other], cells)
    for name, value in before.items():
        assert torch.equal(getattr(batch, name), value), name


def test_the_recording_itself():
    """It replays constants and addresses, undoes what it did, and refuses what a capture refuses."""
    total, step, ahead = torch.zeros(3), torch.ones(3), 1.0
    with Recording() as recording:
        fresh = step * 2
        total.add_(fresh + ahead)
    recording.undo()
    assert total.tolist() == [0, 0, 0]
    ahead, step[0] = 100.0, 5.0
    recording.replay()
    assert total.tolist() == [11, 3, 3]  # the constant of the recording, the tensor of today
    for reading in (lambda: total.sum().item(), lambda: total.nonzero(), lambda: torch.tensor([1.0]) + total):
        with pytest.raises(RuntimeError, match="not permitted"), Recording():
            reading()


@pytest.mark.parametrize(("threshold", "able"), [(6.0, False), (0.0, True)])
def test_int8_is_captured_only_where_it_looks_for_no_outliers(threshold, able):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = tiny_llama()
    layer = model.model.layers[0].mlp.down_proj
    model.model.layers[0].mlp.down_proj = bitsandbytes.nn.Linear8bitLt(
        layer.in_features, layer.out_features, bias=False, has_fp16_weights=False, threshold=threshold
    )
    assert (uncapturable(model) == "") == able
    assert able or "outliers above 6" in uncapturable(model)
    theirs = model.model.layers[0].mlp.down_proj
    theirs.weight.SCB = torch.ones(theirs.out_features)
    model.model.layers[0].mlp.down_proj = EightBitLinear(theirs)  # it reads the weights and no outliers
    assert uncapturable(model) == ""


def test_models_that_cannot_be_captured_say_why():
    model = ARCHITECTURES["gpt_neo"]()
    assert not Engine(model).capabilities.graph
    with pytest.raises(CapabilityError, match="rows"):
        Engine(model, graph=True)
