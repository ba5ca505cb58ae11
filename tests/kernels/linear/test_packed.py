"""Packed linear layers: against the weight they stand for, and that weight against the original."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from handloom.kernels.linear import packed
from handloom.kernels.linear.packed import PackedLinear, pack_linears

BF16_STEP = 2.0**-8  # relative spacing of bfloat16


def layer(outputs=48, inputs=64, *, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = nn.Linear(inputs, outputs, bias=bias)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return made


def stands_for(source, bits, group=32):
    if bits == 8:
        return packed.dequantize_int8(*packed.quantize_int8(source.weight.detach()))
    return packed.dequantize_int4(*packed.quantize_int4(source.weight.detach(), group))


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 32), (4, 64)])
@pytest.mark.parametrize("rows", [1, 5, 32, 33, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_product_is_that_of_the_weight_it_stands_for(bits, group, rows, dtype):
    source = layer()
    x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = PackedLinear(source, bits, group)(x)
    weight = stands_for(source, bits, group)
    exact = linear(x.to(torch.bfloat16).double(), weight.double(), source.bias.detach().double())
    assert out.dtype == dtype
    scale = x.float().norm(dim=1)[:, None] * weight.norm(dim=1)[None] + source.bias.detach().abs()
    assert ((out.double() - exact).abs() <= 2 * BF16_STEP * scale).all()


@pytest.mark.parametrize("shape", [(64,), (2, 64), (2, 3, 64), (0, 64)])
@pytest.mark.parametrize("bits", [4, 8])
def test_leading_axes_are_kept(shape, bits):
    module = PackedLinear(layer(bias=False), bits)
    x = torch.ones(shape)
    assert module(x).shape == (*shape[:-1], 48)
    if x.numel():
        assert torch.equal(module(x).reshape(-1, 48)[-1], module(torch.ones(64)))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_product_asks_for_no_attribute_the_slow_way(monkeypatch, bits):
    module, asked = PackedLinear(layer(), bits), []
    monkeypatch.setattr(PackedLinear, "__getattr__", lambda self, name: asked.append(name))
    module.forward(torch.ones(1, 64))
    assert asked == []


def test_int8_codes_by_hand():
    codes, scales = packed.quantize_int8(torch.tensor([[127.0, -64.0, 0.4], [0.0, 0.0, 0.0]]))
    assert codes.tolist() == [[127, -64, 0], [0, 0, 0]]
    assert scales[0] == 1.0


def test_int4_codes_by_hand():
    """Sixteen even steps from -8 to 7 are their own codes, shifted by 8."""
    weight = torch.arange(-8.0, 8.0).repeat(2)[None]
    codes, scales = packed.quantize_int4(weight, 32)
    assert codes[0].tolist() == [*range(16)] * 2
    assert scales[0, 0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e4])
def test_no_weight_is_further_off_than_its_grid_allows(magnitude):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3)) * magnitude
    codes, scales = packed.quantize_int8(weight)
    off = (packed.dequantize_int8(codes, scales) - weight).abs()
    assert (off <= 0.5001 * scales.float()[:, None]).all()
    assert (scales.float() * 127 <= weight.abs().amax(1) * 1.01).all()


def test_the_search_of_ranges_only_lowers_the_error(monkeypatch):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(4))

    def error():
        return (packed.dequantize_int4(*packed.quantize_int4(weight, 32)) - weight).square().sum().item()

    searched = error()
    monkeypatch.setattr(packed, "SHRINKS", (1.0,))
    assert searched < error()


def test_constant_groups_survive_int4():
    weight = torch.full((16, 32), 3.0)
    back = packed.dequantize_int4(*packed.quantize_int4(weight, 32))
    assert torch.allclose(back, weight, rtol=BF16_STEP)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(layer(64, 64), nn.ReLU(), layer(40, 64, seed=1))
        self.head = layer(32, 64, bias=False, seed=2)


def test_pack_linears_replaces_what_it_can_and_says_why_not():
    model = Net()
    left = pack_linears(model, 4, skip=("head",))
    assert left["head"] == "skipped by name"
    assert "40 outputs" in left["inner.2"]
    assert len(left) == 2
    assert isinstance(model.inner[0], PackedLinear)
    assert type(model.inner[2]) is nn.Linear
    assert pack_linears(model, 8) == {}
    assert (model.inner[0].bits, model.inner[2].bits, model.head.bits) == (4, 8, 8)


def test_tied_weights_keep_the_embedding():
    model = nn.ModuleDict({"embed": nn.Embedding(32, 64), "head": nn.Linear(64, 32, bias=False)})
    model["head"].weight = model["embed"].weight
    before = model["embed"].weight.detach().clone()
    pack_linears(model, 8)
    assert torch.equal(model["embed"].weight, before)
    assert isinstance(model["head"], PackedLinear)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_do_not_see_each_other(bits):
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(5))
    module = PackedLinear(layer(), bits)
    before = module(x)
    x[[0, 1, 2, 4, 5]] = 1e3
    assert torch.equal(module(x)[3], before[3])


def test_refusals():
    with pytest.raises(ValueError, match="expected 8 or 4"):
        PackedLinear(layer(), 3)
    with pytest.raises(ValueError, match="group=48"):
        PackedLinear(layer(), 4, 48)
    with pytest.raises(ValueError, match="100 inputs"):
        PackedLinear(layer(48, 100), 4)
    with pytest.raises(ValueError, match="not a plain"):
        PackedLinear(type("Special", (nn.Linear,), {})(64, 64), 8)
    with pytest.raises(ValueError, match="on meta"):
        PackedLinear(nn.Linear(64, 64, device="meta"), 8)
