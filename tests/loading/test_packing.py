"""Packed models behind an engine, the measured dtype, and what is refused."""

import copy
import logging

import pytest
import torch
from architectures import prompts_of
from helpers import full_logits, tiny_llama

from handloom import Engine
from handloom.errors import ModelError
from handloom.kernels.linear.blocked import BlockedLinear, supports
from handloom.kernels.linear.packed import PackedLinear, unpackable
from handloom.loading import loading
from handloom.loading.packing import pack

PROMPTS = prompts_of([7, 3, 11])
WIDE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 112}


@pytest.mark.parametrize(("kind", "bits"), [("int8-cpu", 8), ("int4-cpu", 4)])
def test_a_packed_model_decodes_what_its_own_logits_say(tmp_path, kind, bits):
    tiny_llama(**WIDE).save_pretrained(tmp_path)
    engine = Engine.from_pretrained(tmp_path, quantization=kind, device="cpu", slots=2, max_length=64)
    output = engine.model.get_output_embeddings()
    inner = [m for m in engine.model.modules() if isinstance(m, PackedLinear) and m is not output]
    assert [m.bits for m in inner] == [bits] * 2 * 7
    if kind == "int4-cpu" and supports(torch.bfloat16):
        assert isinstance(output, BlockedLinear)
        assert output.weight.dtype == torch.bfloat16
    else:
        assert output.bits == 8
    assert engine.dtype == torch.bfloat16
    assert engine.capabilities.path == "attention"
    for prompt, answer in zip(PROMPTS, engine.generate(PROMPTS, max_new_tokens=6), strict=True):
        logits = full_logits(engine.model, prompt + answer.token_ids)
        for i, token in enumerate(answer.token_ids):
            row = logits[len(prompt) - 1 + i]
            assert row[token] >= row.max() - 0.05 * row.std()  # bfloat16 ties may fall either way


def test_tied_embeddings_stay_and_the_output_layer_gets_its_own_copy():
    model = tiny_llama(torch.bfloat16, **WIDE, tie_word_embeddings=True)
    words = model.get_input_embeddings().weight
    before = words.clone()
    pack(model, "int4-cpu")
    assert model.get_input_embeddings().weight is words
    assert torch.equal(words, before)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        wanted, got = x.float() @ before.float().T, model.get_output_embeddings()(x).float()
    bound = 0.004 if supports(torch.bfloat16) else 0.02  # a bfloat16 result, or 8-bit weights
    assert float((got - wanted).norm() / wanted.norm()) < bound


def test_int8_is_refused_where_torch_would_read_past_the_weight():
    assert "24 inputs" in unpackable(torch.nn.Linear(24, 64), 8, 32)
    assert unpackable(torch.nn.Linear(48, 64), 8, 32) is None


@pytest.mark.parametrize("where", [{"device": "cuda"}, {"device_map": "auto"}], ids=["device", "device_map"])
def test_packing_for_another_device_names_what_to_use_there(tmp_path, where):
    with pytest.raises(ModelError, match=r"int4-cpu.*for the CPU.*nf4"):
        Engine.from_pretrained(tmp_path, quantization="int4-cpu", **where)


TIMES = {
    "bfloat16 is faster": ({torch.float32: 3.0, torch.bfloat16: 1.0}, torch.bfloat16),
    "too close to leave the checkpoint's own": ({torch.float32: 1.1, torch.bfloat16: 1.0}, torch.float32),
    "float32 is faster": ({torch.float32: 1.0, torch.bfloat16: 3.0}, torch.float32),
}


@pytest.mark.parametrize(("times", "chosen"), TIMES.values(), ids=TIMES)
def test_fastest_takes_the_faster_dtype_and_logs_it(tmp_path, monkeypatch, caplog, times, chosen):
    tiny_llama().save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "SMALL", 1)
    monkeypatch.setattr(loading, "linear_times", lambda *shapes: times)
    with caplog.at_level(logging.INFO, logger="handloom"):
        assert loading.load(tmp_path, device="cpu", dtype="fastest")[0].dtype == chosen
    assert any(str(chosen) in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_what_was_named_is_never_measured(tmp_path, monkeypatch, dtype):
    tiny_llama().save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "SMALL", 1)
    monkeypatch.setattr(loading, "linear_times", lambda *shapes: pytest.fail("measured"))
    assert loading.load(tmp_path, device="cpu", dtype=dtype)[0].dtype == torch.float32


@pytest.mark.parametrize("kind", ["int8-cpu", "int4-cpu"])
@torch.no_grad()
def test_a_model_of_ones_own_stays_whole_beside_its_packed_copies_and_edits_are_packed_anew(kind):
    model = tiny_llama(torch.bfloat16, **WIDE)
    whole = {name: id(parameter) for name, parameter in model.named_parameters()}
    linears = [name for name, part in model.named_modules() if type(part) is torch.nn.Linear]
    plain, engine = Engine(model), Engine(model, quantization=kind)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == whole
    assert [name for name, part in model.named_modules() if type(part) is torch.nn.Linear] == linears
    assert sum(isinstance(part, PackedLinear) for part in engine.runner.module.modules()) >= 2 * 7

    packed = pack(copy.deepcopy(model), kind)  # as it would have been loaded
    state, own = engine.prefill(PROMPTS[0]), plain.prefill(PROMPTS[0])
    assert torch.equal(state.logits, Engine(packed).prefill(PROMPTS[0]).logits)
    assert not torch.equal(state.logits, own.logits)

    part = model.model.layers[0].mlp.down_proj
    part.weight.mul_(-1)  # between two steps
    edited = pack(copy.deepcopy(model), kind)
    assert torch.equal(engine.prefill(PROMPTS[0]).logits, Engine(edited).prefill(PROMPTS[0]).logits)
    assert not torch.equal(engine.prefill(PROMPTS[0]).logits, state.logits)
    model.lm_head.weight.data.zero_()  # leaves no version behind
    assert engine.prefill(PROMPTS[0]).logits.abs().max() == 0


def test_weights_that_were_given_up_say_so():
    model = pack(tiny_llama(torch.bfloat16, **WIDE), "int8-cpu")
    with pytest.raises(AttributeError, match=r"packed into 8 bits and given up.*Engine\(model, quantization"):
        model.model.layers[0].mlp.down_proj.weight.mul_(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantization": "nf4"}, r"'nf4' is none that an Engine makes.*int8-cpu, int4-cpu.*from_pretrained"),
        ({"quantization": "int8-cpu", "layout": "blocked"}, "'int8-cpu' and layout='blocked' exclude"),
    ],
)
def test_an_engine_makes_packed_copies_alone_and_of_nothing_else(arguments, message):
    with pytest.raises(ModelError, match=message):
        Engine(tiny_llama(), **arguments)
