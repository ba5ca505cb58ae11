"""The compiled decode step against the eager one: tokens, recompilations, models that cannot be compiled."""

import gc
import logging

import pytest
import torch
from architectures import ARCHITECTURES, prompts_of
from helpers import assert_nothing_leaked, tiny_llama
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from handloom import Engine, SamplingParams
from handloom.forward.programs.compiling import CompiledStep

LENGTHS, NEW = [5, 17, 1, 9, 23], [6, 11, 8, 5, 9]  # two slots, so three rows replace others in flight


def compiled_engine(model, backend="aot_eager", **options) -> Engine:
    """An engine of two slots with a compiled step; `aot_eager` traces as inductor does and needs no C++ compiler."""
    engine = Engine(model, slots=2, max_length=100, **options)
    engine.compile = True
    engine.runner.compiled = CompiledStep(engine.runner, {1, 2}, backend)
    return engine


def answers(engine, **overrides) -> list[list[int]]:
    params = [SamplingParams(max_new_tokens=n, **overrides) for n in NEW]
    return [g.token_ids for g in engine.generate(prompts_of(LENGTHS), params)]


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "gpt_oss"])
def test_rows_replaced_in_flight_draw_the_eager_tokens_without_recompiling(name):
    model = ARCHITECTURES[name]()
    engine = compiled_engine(model)

    first = answers(engine)
    step = engine.runner.compiled
    assert step.refused == ""
    assert set(step.compiled) == {1, 2}
    graphs = counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        sampled = answers(engine, temperature=1.0, seed=3)

    assert counters["stats"]["unique_graphs"] == graphs
    eager = Engine(model, slots=2, max_length=100)
    assert first == answers(eager)
    assert sampled == answers(eager, temperature=1.0, seed=3)
    assert_nothing_leaked(engine)


def test_a_pool_that_grows_needs_no_other_graph():
    engine = compiled_engine(tiny_llama(), block_size=2)
    answers(engine)
    capacity = engine.pool.capacity
    with torch._dynamo.config.patch(error_on_recompile=True):
        long = engine.generate(prompts_of([60, 50]), max_new_tokens=38)
        state = engine.prefill(prompts_of([30, 31]))
        longer = [engine.step(state, [i, i + 1]) for i in range(40)]
    assert engine.pool.capacity > capacity
    assert engine.runner.compiled.refused == ""
    eager = Engine(engine.model, slots=2, max_length=100)
    assert [g.token_ids for g in long] == [
        g.token_ids for g in eager.generate(prompts_of([60, 50]), max_new_tokens=38)
    ]
    wanted = eager.step(eager.prefill(prompts_of([30, 31])), [39, 40]).logits
    torch.testing.assert_close(longer[39].logits, wanted, atol=1e-3, rtol=0)


def test_a_failure_of_the_compiler_is_told_once_and_decoding_goes_on(caplog):
    def broken(graph, inputs):
        raise RuntimeError("no compiler today")

    model = tiny_llama()
    engine = compiled_engine(model, backend=broken)
    with caplog.at_level(logging.WARNING, logger="handloom"):
        got = answers(engine)
    told = [r.getMessage() for r in caplog.records if "uncompiled" in r.getMessage()]
    assert len(told) == 1
    assert "no compiler today" in engine.runner.compiled.refused or "no compiler today" in told[0]
    assert got == answers(Engine(model, slots=2, max_length=100))


def test_a_model_on_another_path_says_why_and_stays_eager(caplog):
    model = ARCHITECTURES["bloom"]()
    with caplog.at_level(logging.WARNING, logger="handloom"):
        engine = Engine(model, slots=2, max_length=100, compile=True)
    assert any("mask path" in r.getMessage() for r in caplog.records)
    assert engine.runner.compiled is None


@pytest.mark.slow
def test_inductor_draws_the_eager_tokens_and_a_second_engine_finds_its_code(capsys):
    model = tiny_llama()
    wanted = answers(Engine(model, slots=2, max_length=100))
    with fresh_cache():
        for found in ({"fxgraph_cache_miss": 1}, {"fxgraph_cache_hit": 1}):
            gc.collect()  # the first engine is gone, and all that dynamo knows of it
            torch._dynamo.reset()
            counters.clear()
            engine = Engine(model, slots=2, max_length=100, compile=True)
            engine.runner.compiled.sizes = {2}  # each takes a C++ compiler's time
            assert answers(engine) == wanted
            assert set(engine.runner.compiled.compiled) == {2}
            assert "compiled the decode step of LlamaForCausalLM for 2 rows in" in capsys.readouterr().err
            assert {k: n for k, n in counters["inductor"].items() if k.startswith("fxgraph")} == found
            del engine
