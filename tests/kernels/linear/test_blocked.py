"""Linear layers in oneDNN's blocked layout: against the plain ones, as modules, and behind an engine."""

import copy
import io
import logging

import pytest
import torch
from architectures import ARCHITECTURES, prompts_of
from helpers import full_logits, tiny_llama
from torch import nn

from handloom import Engine
from handloom.errors import ModelError
from handloom.forward.programs.compiling import CompiledStep
from handloom.forward.twin import copies
from handloom.kernels.linear import blocked
from handloom.kernels.linear.blocked import BlockedLinear, block_linears, supports, unblockable

pytestmark = pytest.mark.skipif(not supports(torch.float32), reason="torch without oneDNN")
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16, torch.float16) if supports(dtype)]
STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
PROMPTS = prompts_of([7, 3, 11])
product = BlockedLinear.product


def layer(outputs=48, inputs=64, *, bias=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
    return made.requires_grad_(False)


@pytest.fixture
def small(monkeypatch):
    """Blocks layers of any size."""
    monkeypatch.setattr(blocked, "SMALLEST", 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (5,), (8,), (33,), (300,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize(
    ("outputs", "inputs", "bias"), [(48, 64, True), (7, 13, False), (1, 1, True), (130, 17, True)]
)
def test_the_product_is_the_plain_one_up_to_rounding(dtype, shape, outputs, inputs, bias):
    source = layer(outputs, inputs, bias=bias, dtype=dtype)
    x = torch.randn(*shape, inputs, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = nn.functional.linear(
        x.double(), source.weight.double(), None if not bias else source.bias.double()
    )
    out = BlockedLinear(source)(x)
    assert out.dtype == dtype
    size = nn.functional.linear(
        x.double().abs(), source.weight.double().abs(), source.bias.double().abs() if bias else None
    )
    sums = (
        inputs * STEP[torch.float32] * size
    )  # what adding up in float32 may cost, then one rounding of the result
    assert ((out.double() - exact).abs() <= 2 * (sums + STEP[dtype] * exact.abs())).all()


def test_strided_inputs_give_the_same_bits():
    made, x = BlockedLinear(layer()), torch.randn(6, 64, 2, generator=torch.Generator().manual_seed(2))
    assert torch.equal(made(x[..., 0]), made(x[..., 0].contiguous()))
    assert torch.equal(made(x[::2, :, 1]), made(x[::2, :, 1].contiguous()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_plain_weight_comes_back_to_the_last_bit(dtype):
    source = layer(dtype=dtype)
    made = BlockedLinear(source)
    assert torch.equal(made.weight, source.weight)
    assert torch.equal(made.state_dict()["weight"], source.weight)
    assert made.state_dict().keys() == source.state_dict().keys()


def test_copies_and_pickles_are_layers_of_their_own():
    made, x = BlockedLinear(layer()), torch.ones(1, 64)
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(made), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), made(x))
        other.load_state_dict(layer(seed=5).state_dict())
        assert torch.equal(other(x), BlockedLinear(layer(seed=5))(x))
        assert not torch.equal(other(x), made(x))


def test_a_state_dict_without_the_weight_is_refused():
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        BlockedLinear(layer()).load_state_dict({"bias": torch.zeros(48)})


def test_another_dtype_works_and_another_device_says_what_to_do():
    made, x = BlockedLinear(layer()), torch.ones(1, 64)
    assert torch.equal(
        made.to(torch.bfloat16)(x.bfloat16()), BlockedLinear(layer(dtype=torch.bfloat16))(x.bfloat16())
    )
    with pytest.raises(RuntimeError, match=r"on meta.*layout='plain'"):
        BlockedLinear(layer()).to("meta")
    with pytest.raises(RuntimeError, match=r"torch.float64.*layout='plain'"):
        BlockedLinear(layer()).double()


def test_the_compiler_sees_one_opaque_product():
    made, other = BlockedLinear(layer()), BlockedLinear(layer(seed=9))
    step = torch.compile(
        lambda x: made(x).relu() + other(x), backend="aot_eager", fullgraph=True, dynamic=False
    )
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(step(x), made(x).relu() + other(x))
    torch.library.opcheck(
        torch.ops.handloom.blocked_linear, (x, made._number, 48), test_utils="test_faketensor"
    )


class Special(nn.Linear):
    """Somebody's own linear layer."""


REASONS = {
    "subclass": (Special(8, 8), "a Special"),
    "hooks": (nn.Linear(8, 8), "hooks"),
    "float64": (nn.Linear(8, 8, dtype=torch.float64), "float64"),
    "meta": (nn.Linear(8, 8, device="meta"), "on meta"),
    "int": (nn.Embedding(8, 8), "a Embedding"),
}
REASONS["hooks"][0].register_forward_hook(lambda *a: None)


@pytest.mark.parametrize(("module", "reason"), REASONS.values(), ids=REASONS)
def test_what_cannot_be_blocked_says_why_and_is_left_alone(small, module, reason):
    assert reason in unblockable(module)
    with pytest.raises(ValueError, match=reason):
        BlockedLinear(module)
    holder = nn.Sequential(module)
    block_linears(holder)
    assert holder[0] is module


def test_small_layers_are_left_alone_and_twice_changes_nothing():
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(255, 256))
    assert list(block_linears(model)) == ["1"]
    kept = list(model)
    assert block_linears(model) == {"1": f"{255 * 256} weights; blocking pays from {1 << 16}"}
    assert [a is b for a, b in zip(model, kept, strict=True)] == [True, True]
    assert isinstance(model[0], BlockedLinear)


@pytest.mark.parametrize(
    "name", ["llama", "qwen3", "gemma2", "mixtral", "deepseek_v3", "bloom", "mamba2", "jamba"]
)
def test_blocked_models_decode_what_their_own_logits_say(small, name):
    model = ARCHITECTURES[name]()
    block_linears(model)
    assert any(isinstance(part, BlockedLinear) for part in model.modules())
    engine = Engine(model, slots=2, max_length=64)
    for prompt, answer in zip(PROMPTS, engine.generate(PROMPTS, max_new_tokens=6), strict=True):
        logits = full_logits(model, prompt + answer.token_ids)
        for i, token in enumerate(answer.token_ids):
            row = logits[len(prompt) - 1 + i]
            assert row[token] >= row.max() - 1e-4 * row.std()


def test_a_compiled_step_runs_blocked_layers(small):
    model = tiny_llama()
    block_linears(model)
    engine = Engine(model, slots=2, max_length=64)
    eager = [g.token_ids for g in engine.generate(PROMPTS, max_new_tokens=8)]
    engine.compile = True
    engine.runner.compiled = CompiledStep(engine.runner, {1, 2}, "aot_eager")
    assert [g.token_ids for g in engine.generate(PROMPTS, max_new_tokens=8)] == eager
    assert engine.runner.compiled.refused == ""
    assert set(engine.runner.compiled.compiled) == {1, 2}


# -- loading


def count(engine):
    return sum(isinstance(part, BlockedLinear) for part in engine.runner.module.modules())


def test_loading_blocks_on_a_cpu_unless_told_not_to(small, tmp_path, caplog):
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, logger="handloom"):
        engine = Engine.from_pretrained(tmp_path, device="cpu", max_length=64)
    assert count(engine) == 2 * 7 + 1
    assert "15 linear layers in oneDNN's blocked layout" in caplog.text
    plain = Engine.from_pretrained(tmp_path, device="cpu", layout="plain", max_length=64)
    assert count(plain) == 0
    words = engine.model.get_input_embeddings().weight
    assert torch.equal(engine.model.get_output_embeddings().weight, words)
    for a, b in zip(engine.prefill(PROMPTS).logits, plain.prefill(PROMPTS).logits, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5 * float(b.std()))


@torch.no_grad()
@pytest.mark.parametrize(("layout", "sooner", "blocked_rows"), [
    ("auto", True, [2]), ("auto", False, [1, 2]), ("blocked", True, [1, 2]), ("plain", True, []),
])  # fmt: skip
def test_a_lone_row_takes_the_way_that_is_sooner_on_this_processor(
    small, monkeypatch, layout, sooner, blocked_rows
):
    monkeypatch.setattr(copies, "plain_alone", lambda dtype: sooner)
    engine, seen = Engine(tiny_llama(), layout=layout, max_length=64), []
    monkeypatch.setattr(BlockedLinear, "product", lambda self, x: seen.append(x) or product(self, x))
    states = [engine.prefill([[5, 6, 7]] * rows) for rows in (1, 2)]
    seen.clear()
    for state in states:
        engine.step(state, [7] * len(state))
    assert sorted({x.numel() // x.shape[-1] for x in seen}) == blocked_rows


def test_the_rule_for_a_lone_row_asks_the_processor_alone(monkeypatch):
    for amx in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert [blocked.plain_alone(dtype) for dtype in (torch.float32, torch.bfloat16)] == [amx, False]


def test_saved_blocked_models_load_again(small, tmp_path):
    source = tiny_llama()
    source.save_pretrained(tmp_path / "first")
    engine = Engine.from_pretrained(tmp_path / "first", device="cpu")
    engine.model.save_pretrained(tmp_path / "second")
    again = Engine.from_pretrained(tmp_path / "second", device="cpu", layout="plain").model
    for name, weight in source.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)


def test_layouts_that_are_none_or_cannot_be_say_so(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"layout='blockd' is not one of auto, blocked, plain"):
        Engine.from_pretrained(tmp_path, device="cpu", layout="blockd")
    with pytest.raises(
        ModelError, match=r"layout='blocked': no layer can be: .* weights; blocking pays from 65536"
    ):
        Engine.from_pretrained(tmp_path, device="cpu", layout="blocked")
