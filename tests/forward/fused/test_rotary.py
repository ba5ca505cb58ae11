"""Rotary embeddings that are looked up in tables: every bit of the module's own, and when they stay as they are."""

import logging

import pytest
import torch
from architectures import ARCHITECTURES, prompts_of
from helpers import tiny_llama
from recorded_graph import install

from handloom import Engine, SamplingParams
from handloom.forward.fused import rotary
from handloom.forward.fused.rotary import LEAST, RotaryTable, read_call, read_rotary

FAR = torch.tensor([[0, 1, 63, 64], [LEAST - 1, LEAST, 8191, 5000]])
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 10000.0,
}  # fmt: skip
WAYS = [("full_attention",), ("sliding_attention",)]  # that some models make angles in
# Angles given twice, once, in pairs, over a part of a head, scaled, in float32 whatever the model's dtype; two ways.
MODELS = {
    "linear": lambda: tiny_llama(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    "llama3": lambda: tiny_llama(rope_parameters=LLAMA3),
    **{
        name: ARCHITECTURES[name]
        for name in (
            "llama", "llama_yarn", "phi", "glm4", "ernie4_5", "gpt_oss", "olmo2", "gemma3_text", "gemma4_text"
        )
    },
}  # fmt: skip


def heard(rope, x, positions, ways=((),)):
    """Calls as `read_rotary` wants them."""
    return [((x, positions, *rest), {}, rope(x, positions, *rest)) for rest in ways]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_tables_hold_every_bit_of_the_module(name, dtype):
    rope = MODELS[name]().model.rotary_emb
    ways = WAYS if name.startswith("gemma") else [()]
    x = torch.zeros(2, 4, 32, dtype=dtype)
    table = read_rotary(rope, heard(rope, x, FAR % 97, ways))
    assert isinstance(table, RotaryTable), table
    table.aim(8192)
    for rest in ways:
        have, want = table(x, FAR, (rest, ())), rope(x, FAR, *rest)
        for mine, theirs in zip(have, want, strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)
    if len(ways) > 1:
        assert not torch.equal(*(table(x, FAR, (rest, ()))[0][..., :4] for rest in ways))


@pytest.mark.parametrize("name", ["llama_yarn", "gemma3_text", "gpt_oss", "glm4"])
def test_logits_are_those_of_the_module_to_the_bit(name):
    """Ragged prompts, an extension and a step."""
    engine = Engine(ARCHITECTURES[name](), slots=2, fuse=True)
    tables = engine.runner.rotary_tables
    assert len(tables) == 1

    def logits():
        state = engine.extend(engine.prefill(prompts_of([9, 4])), [[7, 8, 9], [11]])
        return state.logits, engine.step(state, torch.tensor([4, 5])).logits

    have, engine.runner.rotary_tables = logits(), []  # nobody tells the tables of a pass
    for mine, theirs in zip(have, logits(), strict=True):
        assert torch.equal(mine, theirs)


class Ragged(torch.nn.Module):
    """Angles that depend on the longest row."""

    def __init__(self):
        super().__init__()
        self.register_buffer("inv_freq", torch.tensor([1.0, 0.1]))

    def forward(self, x, position_ids):
        angles = position_ids[..., None] * self.inv_freq / position_ids.max().clamp_min(1)
        return angles.cos(), angles.sin()


@pytest.mark.parametrize("name", ["ragged", "llama_dynamic_ntk", "phi3_longrope"])
def test_angles_that_depend_on_the_rows_are_refused(name):
    rope = Ragged() if name == "ragged" else ARCHITECTURES[name]().model.rotary_emb
    calls = heard(rope, torch.zeros(1, 4, 32), torch.arange(4)[None])
    before = {name: (buffer, buffer.clone()) for name, buffer in rope._buffers.items()}
    assert read_rotary(rope, calls) == "its angles at a position depend on the others in a pass"
    assert before.keys() == rope._buffers.keys()
    for key, (buffer, value) in before.items():  # nor did the try leave anything behind
        assert rope._buffers[key] is buffer
        assert torch.equal(buffer, value)


def test_other_calls_and_results_are_refused():
    rope, x, positions = tiny_llama().model.rotary_emb, torch.zeros(1, 4, 32), torch.arange(4)[None]
    cos, sin = rope(x, positions)
    three = positions[None].expand(3, -1, -1)  # time, height and width of what a multimodal model sees
    for reason, *call in (
        ("it was not called",),
        ("it is called in another way", (x,), {}, (cos, sin)),
        ("it is called in another way", (x, positions, torch.ones(3)), {}, (cos, sin)),
        ("its positions are not one number a token", (x, three), {}, (cos, sin)),
        ("it does not give cosines and sines", (x, positions), {}, cos),
        ("its angles are not those of single tokens", (x, positions), {}, (cos[:, :1], sin[:, :1])),
        ("alone it gives other angles than in a pass", (x, positions), {}, (sin, cos)),
    ):
        assert read_rotary(rope, [tuple(call)] if call else []) == reason
    rope.forward = lambda *a: (cos, sin)
    assert "a forward of its own" in read_rotary(rope, [])
    assert read_call((x,), {"position_ids": positions}) == (x, positions, ((), ()))


def test_only_passes_over_the_pool_look_up():
    """Positions of other passes may be anywhere; so may those of another dtype or kind."""
    rope, x, positions = tiny_llama().model.rotary_emb, torch.zeros(1, 4, 32), torch.arange(4)[None]
    table, way = read_rotary(rope, heard(rope, x, positions)), ((), ())
    assert table(x, positions, way) is None
    table.aim(16)
    assert table(x, positions, way) is not None
    assert table(x.double(), positions, way) is None
    assert table(x, positions[None], way) is None
    assert table(x, positions, (("full",), ())) is None
    engine = Engine(tiny_llama(), fuse=True)
    engine.generate([[3, 4, 5]], max_new_tokens=2)
    assert [table.positions for table in engine.runner.rotary_tables] == [0]


def test_tables_grow_and_follow_the_module_where_they_lie():
    """What was outgrown stays, for recorded passes read it; edits of the module reach all of them."""
    model = tiny_llama()
    engine, rope = Engine(model, fuse=True), model.model.rotary_emb
    (table,) = engine.runner.rotary_tables
    table.aim(LEAST + 1)
    table.aim(7)
    (tables,) = table.tables.values()
    places = [part.data_ptr() for part in tables]
    assert [len(part) for part in tables] == [LEAST, 2 * LEAST]

    def check():
        want = torch.stack(rope(torch.zeros(1, 1, 32), torch.arange(2 * LEAST)[None]), 2)[0]
        before = tables[1].clone()
        logits = engine.prefill([[3, 4, 5]]).logits
        assert engine.runner.rotary_tables == [table]
        assert [part.data_ptr() for part in tables] == places
        assert torch.equal(tables[1], want)
        assert torch.equal(tables[0], want[:LEAST])
        plain = Engine(model, fuse=False).prefill([[3, 4, 5]]).logits
        torch.testing.assert_close(logits, plain, atol=1e-3, rtol=0)
        return not torch.equal(before, want)

    assert not check()
    rope.inv_freq *= 3  # in place
    assert check()
    rope.inv_freq = rope.inv_freq / 2  # assigned
    assert check()
    rope.attention_scaling = 1.5  # an attribute: everything is read again
    assert check()


def test_a_table_without_memory_to_grow_leaves_the_model_as_it_was(monkeypatch):
    engine = Engine(tiny_llama(), fuse=True)
    want, (table,) = engine.prefill([[3, 4, 5]]).logits, engine.runner.rotary_tables
    before = engine.runner.config._attn_implementation

    def refuse(count):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(table, "_grow", refuse)
        patch.setattr(rotary, "LEAST", 0)
        with pytest.raises(torch.OutOfMemoryError):
            engine.prefill([[6, 7, 8]])
    assert (engine.runner.config._attn_implementation, table.positions) == (before, 0)
    assert torch.equal(engine.prefill([[3, 4, 5]]).logits, want)


def test_a_module_that_becomes_another_runs_plain(caplog):
    """Its tables stay for those who have recorded them."""
    model = tiny_llama()
    engine = Engine(model, fuse=True)
    tables = engine.runner.rotary_tables
    caplog.set_level(logging.INFO, "handloom")
    rope = model.model.rotary_emb
    rope.forward = lambda x, position_ids: type(rope).forward(rope, x, 2 * position_ids)
    have, want = (e.prefill([[3, 4, 5]]).logits for e in (engine, Engine(model, fuse=False)))
    torch.testing.assert_close(have, want, atol=1e-3, rtol=0)
    assert (engine.runner.rotary_tables, engine.runner.outlived) == ([], tables)
    assert "model.rotary_emb stays plain: LlamaRotaryEmbedding has a forward of its own" in caplog.text


def test_recorded_steps_follow_the_frequencies(monkeypatch):
    """An edit in place drops no recorded step, and all of them read it."""
    recorders = install(monkeypatch)
    model = tiny_llama()
    engine = Engine(model, slots=2, fuse=True, graph=True)
    prompts, params = prompts_of([5, 9]), SamplingParams(max_new_tokens=8)

    def run():
        before = sum(recorder.replays for recorder in recorders)
        have = [g.token_ids for g in engine.generate(prompts, params)]
        want = [g.token_ids for g in Engine(model, slots=2, fuse=False).generate(prompts, params)]
        assert have == want
        return have, sum(recorder.replays for recorder in recorders) - before

    run()
    first, some = run()
    model.model.rotary_emb.inv_freq.mul_(0.2)
    second, as_many = run()
    assert second != first
    assert as_many == some > 4
