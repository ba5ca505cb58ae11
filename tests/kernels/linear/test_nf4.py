"""Products with 4-bit weights: our reading of bitsandbytes' layout against its own, and the kernel against that."""

import pytest
import torch
from helpers import tiny_llama
from recorded_graph import install

from handloom import Engine, ModelError, SamplingParams
from handloom.forward.programs.compiling import CompiledStep
from handloom.kernels import dispatch
from handloom.kernels.linear.nf4 import FourBitWeight, code_planes, four_bit_linear, four_bit_linear_reference
from handloom.loading.fourbit import own_products

bitsandbytes = pytest.importorskip("bitsandbytes")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def quantized(outputs, inputs, *, kind="nf4", nested=False, blocksize=64, seed=0):
    """(our weight, bitsandbytes' dense float32 weight) of one random matrix."""
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    functional = bitsandbytes.functional
    packed, state = functional.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type=kind
    )
    return FourBitWeight.from_bitsandbytes(packed, state), functional.dequantize_4bit(packed, state).float()


def activations(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(DEVICE, dtype)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("blocksize", [64, 128])
def test_layout_is_that_of_bitsandbytes(kind, nested, blocksize):
    weight, dense = quantized(40, 512, kind=kind, nested=nested, blocksize=blocksize)
    assert torch.allclose(weight.dense(), dense, rtol=1e-5, atol=1e-6)


def test_layout_by_hand():
    """Byte 0x2F: first code 2, then code 15; scale 10."""
    code = torch.arange(16.0)
    packed = torch.full((32, 1), 0x2F, dtype=torch.uint8)
    weight = FourBitWeight(packed, (1, 64), code, torch.tensor([10.0]), 64)
    assert weight.dense()[0, :4].tolist() == [20.0, 150.0, 20.0, 150.0]


def check(weight, x, bias=None):
    out = four_bit_linear(x, weight, bias, kernels="triton")
    dense = weight.dense().double()
    exact = x.double() @ dense.T + (0 if bias is None else bias.double())
    plain = torch.nn.functional.linear(x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype))
    assert out.dtype == x.dtype
    slack = 8 * torch.finfo(x.dtype).eps
    assert (out.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + slack


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 17])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "double"])
def test_kernel_against_the_dense_product(dtype, rows, nested):
    weight, _ = quantized(40, 576, nested=nested)
    check(weight, activations(rows, 576, dtype=dtype))


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_kernel_with_bias_and_other_blocks(rows, kind):
    weight, _ = quantized(33, 256, kind=kind, blocksize=128)
    check(weight, activations(rows, 256), torch.linspace(-3, 3, 33, device=DEVICE))


@pytest.mark.parametrize("rows", [1, 3])
def test_kernel_whose_inputs_are_shared_out(rows):
    """7,168 inputs are more than a program takes at once; 4,864 are no whole number of shares."""
    for inputs in (7168, 4864):
        weight, _ = quantized(19, inputs, nested=True)
        check(weight, activations(rows, inputs), torch.linspace(-3, 3, 19, device=DEVICE))


def test_kernel_writes_its_output_and_nothing_else():
    weight, _ = quantized(33, 128)
    for rows in (1, 4):
        frame = torch.full((rows + 2, 33), 7.25, device=DEVICE)
        frame[1:-1] = float("nan")
        x = activations(rows, 128)
        four_bit_linear(x, weight, kernels="triton", out=frame[1:-1])
        assert torch.allclose(frame[1:-1], four_bit_linear_reference(x, weight), atol=1e-4)
        assert (frame[[0, -1]] == 7.25).all()


def test_leading_axes_are_kept():
    weight, _ = quantized(16, 64)
    x = activations(2, 3, 64)
    for kernels in ("torch", "triton"):
        out = four_bit_linear(x, weight, kernels=kernels)
        assert out.shape == (2, 3, 16)
        assert torch.allclose(out[1, 2], four_bit_linear_reference(x[1, 2], weight), atol=1e-4)
        assert four_bit_linear(x[:0], weight, kernels=kernels).shape == (0, 3, 16)


def test_refusals():
    weight, _ = quantized(16, 64)
    with pytest.raises(ValueError, match="x has 65 features, the weight takes 64"):
        four_bit_linear(activations(1, 65), weight)
    odd = FourBitWeight(weight.packed, (16, 96), weight.code, weight.absmax, 64)
    with pytest.raises(dispatch.KernelUnavailable, match="96 inputs in blocks of 64"):
        four_bit_linear(activations(1, 96), odd, kernels="triton")


def permuted(text, word, planes):
    """Registers after PTX that knows and, or, shr, mov, cvt and prmt, given its word and its eight planes."""
    known = {f"${8 + i}": value & 0xFFFFFFFF for i, value in enumerate([word, *planes])}

    def get(name):
        return known[name] if name in known else int(name, 0)

    def prmt(low, high, selector):
        bytes_ = (low | high << 32).to_bytes(8, "little")
        assert selector & 0x8888 == 0  # else a byte's sign is taken
        return int.from_bytes(bytes(bytes_[selector >> 4 * i & 7] for i in range(4)), "little")

    rules = {
        "and.b32": int.__and__, "or.b32": int.__or__, "shr.b32": int.__rshift__, "shr.u32": int.__rshift__,
        "prmt.b32": prmt, "cvt.f32.f16": lambda half: half,
    }  # fmt: skip
    for line in filter(None, (line.strip() for line in text.strip("{}").split(";"))):
        name, operands = line.split(None, 1)
        if name == "mov.b32":
            first, second, source = (part.strip(" {}") for part in operands.split(","))
            known |= {first: get(source) & 0xFFFF, second: get(source) >> 16}
        elif name != ".reg":
            to, *sources = (part.strip() for part in operands.split(","))
            known[to] = rules[name](*map(get, sources))
    return [known[f"${i}"] for i in range(8)]


@pytest.mark.parametrize("which", ["values", "floats"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_permutations_pick_the_values_of_the_codes(which, dtype):
    """The interpreter runs no PTX, so its few instructions are followed by hand."""
    from handloom.kernels.linear.nf4_codes import PTX

    code = torch.randn(16, generator=torch.Generator().manual_seed(0))
    planes = code_planes(code)[int(dtype == torch.float16)].tolist()
    bits = [value & 0xFFFF for value in code.to(dtype).view(torch.int16).tolist()]
    for word in (0x76543210, 0xFEDCBA98, 0x0F1E2D3C, 0xFFFFFFFF, 0):
        bytes_ = word.to_bytes(4, "little")
        want = [bits[c] for byte in bytes_ for c in (byte >> 4, byte & 15)]
        assert permuted(PTX[which], word, planes) == want


# -- whole models


def four_bit(kind="nf4", nested=False):
    """A tiny model whose layers, but for the output, are bitsandbytes' 4-bit ones in float32."""
    model = tiny_llama(hidden_size=64, intermediate_size=128, head_dim=16)
    for name, layer in list(model.model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            quantised = bitsandbytes.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=False,
                compute_dtype=torch.float32,
                compress_statistics=nested,
                quant_type=kind,
            )
            quantised.weight = bitsandbytes.nn.Params4bit(
                layer.weight.data, requires_grad=False, compress_statistics=nested, quant_type=kind
            )
            quantised.support_avx512bf16_for_cpu = (
                False  # else some CPUs repack the weights and round to bfloat16
            )
            model.model.set_submodule(name, quantised)
    model.is_quantized = True
    return model.to(DEVICE)


def tokens(model, **options):
    answers = Engine(model, slots=2, max_length=64, **options).generate(PROMPTS, REQUESTS)
    return [answer.token_ids for answer in answers]


PROMPTS = [[3, 5, 7], [9] * 11, [4]]
REQUESTS = [
    SamplingParams(max_new_tokens=6),
    *(SamplingParams(max_new_tokens=6, temperature=1.0, seed=s) for s in (1, 2)),
]


@pytest.mark.parametrize(("kind", "nested"), [("nf4", False), ("nf4", True), ("fp4", False)])
def test_a_model_with_our_products_draws_the_tokens_of_bitsandbytes(kind, nested):
    model = four_bit(kind, nested)
    want = tokens(model)
    weights = [p.data_ptr() for p in model.parameters()]
    assert own_products(model) == 14
    assert tokens(model) == want
    assert [p.data_ptr() for p in model.parameters()] == weights


@torch.no_grad()
def test_a_layer_runs_in_the_kernel_that_it_was_given():
    model = four_bit(nested=True)
    x = activations(3, 64)
    want = model.model.layers[0].mlp.up_proj(x)
    own_products(model, "triton")
    torch.testing.assert_close(model.model.layers[0].mlp.up_proj(x), want, atol=1e-4, rtol=0)


def test_our_products_are_recorded_with_the_step(monkeypatch):
    recorders = [] if torch.cuda.is_available() else install(monkeypatch)
    model = four_bit()
    want = tokens(model)
    own_products(model)
    assert tokens(model, graph=True) == want
    assert not recorders or sum(r.replays for r in recorders) >= 4


def test_our_products_are_compiled_with_the_step():
    """With scales that are quantised too, which is the longer of two programs."""
    model = four_bit(nested=True)
    want = tokens(model)
    own_products(model)
    engine = Engine(model, slots=2, max_length=64)
    engine.compile, engine.runner.compiled = True, CompiledStep(engine.runner, {1, 2}, "aot_eager")
    assert [answer.token_ids for answer in engine.generate(PROMPTS, REQUESTS)] == want
    assert engine.runner.compiled.refused == ""
    assert engine.runner.compiled.compiled


def test_our_products_need_layers_in_bitsandbytes_layout():
    with pytest.raises(ModelError, match="no 4-bit or 8-bit layer"):
        own_products(tiny_llama())
    model = four_bit()
    model.model.layers[1].mlp.down_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj: its weights are not"):
        own_products(model)
