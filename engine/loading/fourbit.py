"""bitsandbytes' 4-bit layers with our own product: the packed weights are read where they lie, nothing is copied."""

from __future__ import annotations

import logging

import torch
from torch import nn

from ..errors import ModelError
from ..kernels.linear.linears import StandIn
from ..kernels.linear.nf4 import FourBitWeight, NestedScales, code_planes, four_bit_linear
from .eightbit import EightBitLinear

log = logging.getLogger("handloom")
MANY = 64  # rows from which a dense copy of the weight pays: bitsandbytes' own way for prompts

# One opaque op, so that a compiled step holds the product and need not look into the choice of kernels.
_library = torch.library.Library("handloom", "FRAGMENT")
_library.define(
    "four_bit(Tensor x, Tensor packed, Tensor code, Tensor? planes, Tensor absmax, int outputs, int blocksize, "
    "Tensor? inner_code, Tensor? inner_absmax, Tensor? offset, int inner_blocksize, Tensor? bias, str? kernels) "
    "-> Tensor"
)


def _four_bit(
    x, packed, code, planes, absmax, outputs, blocksize, inner_code, inner_absmax, offset, inner_blocksize, bias,
    kernels,
):  # fmt: skip
    """`kernels.nf4.four_bit_linear` of the parts of a weight; without double quantisation the inner ones are None."""
    nested = None if inner_code is None else NestedScales(inner_code, inner_absmax, offset, inner_blocksize)
    weight = FourBitWeight(packed, (outputs, x.shape[-1]), code, absmax, blocksize, nested, planes)
    return four_bit_linear(x, weight, bias, kernels=kernels)


def _four_bit_fake(x, packed, code, planes, absmax, outputs, *rest):
    return x.new_empty(*x.shape[:-1], outputs)


_library.impl("four_bit", _four_bit, "CompositeExplicitAutograd")
torch.library.register_fake("handloom::four_bit", _four_bit_fake, lib=_library)


class FourBitLinear(StandIn):
    """A `bitsandbytes.nn.Linear4bit` whose few-row products run in `kernels.nf4`.

    Args:
        layer: the layer; it keeps its weights and takes the products of many rows on CUDA.
        kernels: `auto`, `triton`, `torch` or None, see `kernels.dispatch`.
    """

    def __init__(self, layer: nn.Module, kernels: str | None = None):
        super().__init__(layer)
        self.kernels = kernels
        planes = code_planes(layer.weight.quant_state.code) if layer.weight.device.type == "cuda" else None
        self.register_buffer("planes", planes, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in]` -> `[..., out]` in x's dtype, computed in the layer's compute dtype."""
        watched = self.layer._forward_hooks or self.layer._forward_pre_hooks
        if watched or (x.device.type == "cuda" and x.numel() > MANY * self.in_features):
            return self.layer(x)
        state, nested = self.layer.weight.quant_state, (None, None, None, 0)
        if state.nested:
            nested = (state.state2.code, state.state2.absmax, state.offset, state.state2.blocksize)
        given = x if self.layer.compute_dtype is None else x.to(self.layer.compute_dtype)
        parts = (
            self.layer.weight.data,
            state.code,
            self.planes,
            state.absmax,
            self.out_features,
            state.blocksize,
        )
        return torch.ops.handloom.four_bit(given, *parts, *nested, self.layer.bias, self.kernels).to(x.dtype)


def own_products(model: nn.Module, kernels: str | None = None) -> int:
    """Give every 4-bit and 8-bit bitsandbytes layer of a model our product, in place; the number of layers.

    Args:
        model: the twin of one loaded with `quantization="nf4"`, `"fp4"` or `"int8"`.
        kernels: see `FourBitLinear`.

    Raises:
        ModelError: there is no such layer, or bitsandbytes has repacked its weights for this CPU.
    """
    found = [(name, m) for name, m in model.named_modules() if kind_of(m) in OWN]
    if not found:
        raise ModelError(
            'the model has no 4-bit or 8-bit layer of bitsandbytes; load it with quantization="nf4", "fp4" or "int8"'
        )
    for name, layer in found:
        reason = _repacked(layer)
        if reason:
            raise ModelError(f"{name}: {reason}")
    for name, layer in found:
        model.set_submodule(name, OWN[kind_of(layer)](layer, kernels))
    log.info("%d quantised layers read in place by our own product", len(found))
    return len(found)


def kind_of(layer: nn.Module) -> str:
    """The name of a class of bitsandbytes, empty for others: peft's wrappers around them have the same names."""
    kind = type(layer)
    return kind.__name__ if kind.__module__.partition(".")[0] == "bitsandbytes" else ""


def _repacked(layer) -> str:
    """Why a layer's weights cannot be read where they lie, in words; empty if they can."""
    if kind_of(layer) == "Linear8bitLt":
        known = layer.weight.dtype == torch.int8 and layer.weight.shape == (
            layer.out_features,
            layer.in_features,
        )
        return "" if known else f"its weights are {layer.weight.dtype}, not bytes [out, in]"
    state = layer.weight.quant_state
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return f"its weights are not in bitsandbytes' own layout on {layer.weight.device}"
    return ""


OWN = {"Linear4bit": FourBitLinear, "Linear8bitLt": EightBitLinear}  # by the names of bitsandbytes' classes
