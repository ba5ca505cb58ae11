"""The step as one device program: equal to the eager step, at fixed addresses, without reading anything back."""

import pytest
import torch
from architectures import ARCHITECTURES

from handloom import CapabilityError, Engine, SamplingParams
from handloom.graph import GraphBatch
from handloom.kv import Store
from handloom.loop import prefill
from handloom.request import Prefilled, Request
from handloom.text import Prompt

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
    for _ in range(2):  # the second run meets the batch, and on CUDA the graphs, that the first one left
        want, got = eager.generate(PROMPTS, MIXED), program.generate(PROMPTS, MIXED)
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
        prefill(engine.runner, request)
        batch.place(slot, request)
    return batch


@torch.no_grad()
def test_buffers_keep_their_addresses_over_steps_and_replaced_rows():
    _, program = engines("llama")
    batch = started(program)
    names = [n for n, v in vars(batch).items() if torch.is_tensor(v)]
    before = {n: getattr(batch, n).data_ptr() for n in names}
    for step in range(6):
        for slot in batch.running:
            batch.prepare(slot)
        batch.draw()
        if step == 2:
            batch.clear(0)
    assert {n: getattr(batch, n).data_ptr() for n in names} == before
    assert {"logits", "tokens", "positions", "active", "history", "cells", "table"} <= set(names)


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
    "name", ["llama", "gemma2", "gpt_oss", "bloom", "deepseek_v3", "jamba", "qwen3_next"]
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
        batch._sample(None)
        batch._advance()
    assert batch.logits.device.type == "meta"
    with pytest.raises((RuntimeError, NotImplementedError)):
        batch.positions.sum().item()  # the probe itself: reading does raise here


def test_models_that_cannot_be_captured_say_why():
    model = ARCHITECTURES["gpt_neo"]()
    assert not Engine(model).capabilities.graph
    with pytest.raises(CapabilityError, match="rows"):
        Engine(model, graph=True)
