"""Weight-only int8 and int4 linear layers for the CPU, over torch's packed products with bfloat16 activations.

Decoding reads every weight once a token, so fewer bytes a weight is time saved. Activations are rounded to bfloat16
for the product (torch's float32 variants of these products are not vectorised and far slower than a plain one) and
results come back in the input's dtype.
"""

import torch
from torch import nn
from torch.nn.functional import linear

from .linears import replace_linears

int4_product = torch.ops.aten._weight_int4pack_mm_for_cpu.default
DENSE_ROWS = 32  # with more rows than this an int8 weight is worth widening for a plain product
INT8_INPUTS = 16  # torch's int8 product reads inputs in steps of so many, past the end of other weights
INT4_OUTPUTS = 16  # torch packs int4 weights in tiles of so many outputs
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)  # ranges tried for each int4 group; the least squared error wins


class PackedLinear(nn.Module):
    """A linear layer with an int8 (one scale an output) or int4 (scale and zero a group) weight, on the CPU.

    Args:
        source: nn.Linear on the CPU with a floating weight [N, K]; it is not changed.
        bits: 8 or 4.
        group: inputs that share a scale at 4 bits: 32, 64, 128 or 256.

    Raises:
        ValueError: what `unpackable` says.
    """

    def __init__(self, source, bits, group=32):
        super().__init__()
        reason = unpackable(source, bits, group)
        if reason:
            raise ValueError(reason)
        self.in_features, self.out_features = source.in_features, source.out_features
        self.bits, self.group = bits, group
        for name in ("codes", "scales", "bias"):
            self.register_buffer(name, None)
        self.take(source)

    def take(self, source):
        """Take over weight and bias of a layer of the same shape."""
        if self.bits == 8:
            self.codes, self.scales = quantize_int8(source.weight.detach())
        else:
            codes, scales = quantize_int4(source.weight.detach(), self.group)
            self.codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
            self.scales = scales.transpose(0, 1).contiguous()  # [K / group, N, 2]
        self.bias = None if source.bias is None else source.bias.detach().clone()

    def __getattr__(self, name):
        if name == "weight":
            raise AttributeError(
                f"the weight of this layer was packed into {self.bits} bits and given up when the model was loaded; "
                "Engine(model, quantization=...) packs copies, and the model keeps its layers"
            )
        return super().__getattr__(name)

    def forward(self, x):
        """x [..., K] floating -> [..., N] in x's dtype."""
        held = self._buffers  # asked by name, a module's buffer takes as long as a small operation
        codes, scales, bias = held["codes"], held["scales"], held["bias"]
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        if self.bits == 4:
            out = int4_product(rows.to(torch.bfloat16), codes, self.group, scales)
        elif len(rows) <= DENSE_ROWS:
            out = torch._weight_int8pack_mm(rows.to(torch.bfloat16), codes, scales)
        else:
            out = linear(rows, codes.to(rows.dtype)) * scales.to(rows.dtype)
        out = out.to(x.dtype).view(*x.shape[:-1], self.out_features)
        return out if bias is None else out + bias.to(x.dtype)

    def extra_repr(self):
        group = f", group={self.group}" if self.bits == 4 else ""
        return (
            f"{self.in_features}, {self.out_features}, bits={self.bits}{group}, bias={self.bias is not None}"
        )


def pack_linears(model, bits, *, group=32, skip=(), around=None):
    """Replace the linear layers of a CPU model by packed ones, in place.

    Args:
        model: nn.Module in eval use; every nn.Linear in it is considered, the output layer too.
        bits: 8 or 4. group: see `PackedLinear`.
        skip: names of layers to leave alone, or last parts of names, such as ("lm_head",).
        around: (layer, make) -> the module that takes a layer's place; None takes what `make` makes of it.

    Returns:
        dict of the layers left as they were: name -> why. Packing twice changes nothing.
    """

    def refusal(name, layer):
        skipped = name in skip or name.rpartition(".")[2] in skip
        return "skipped by name" if skipped else unpackable(layer, bits, group)

    def make(layer):
        return PackedLinear(layer, bits, group)

    return replace_linears(model, refusal, make if around is None else lambda layer: around(layer, make))


def unpackable(layer, bits, group):
    """Why a linear layer cannot be packed, in words; None where it can."""
    if bits not in (4, 8):
        return f"bits={bits}: expected 8 or 4"
    if type(layer) is not nn.Linear:
        return f"a {type(layer).__name__}, not a plain nn.Linear"
    weight = layer.weight
    if weight.device.type != "cpu" or not weight.is_floating_point():
        return (
            f"weight is {weight.dtype} on {weight.device}; packed products need a floating weight on the CPU"
        )
    if bits == 8:
        odd = layer.in_features % INT8_INPUTS
        return f"{layer.in_features} inputs; int8 needs a multiple of {INT8_INPUTS}" if odd else None
    if group not in (32, 64, 128, 256):
        return f"group={group}: expected 32, 64, 128 or 256"
    if layer.in_features % group or layer.out_features % INT4_OUTPUTS:
        return (
            f"{layer.in_features} inputs and {layer.out_features} outputs; "
            f"int4 needs multiples of {group} and {INT4_OUTPUTS}"
        )
    return None


def quantize_int8(weight):
    """Symmetric int8 with a scale an output: [N, K] -> codes int8 [N, K] in -127..127, scales bfloat16 [N]."""
    weight = weight.float()
    scales = _not_below(weight.abs().amax(1) / 127)
    return (weight / scales.float()[:, None]).round().clamp_(-127, 127).to(torch.int8), scales


def quantize_int4(weight, group):
    """Asymmetric int4 a group of inputs: [N, K] -> codes int32 [N, K] in 0..15, scales bfloat16 [N, K / group, 2].

    A weight is (code - 8) * scale + zero, the pair (scale, zero) lying in the last axis.
    """
    parts = weight.float().unflatten(1, (-1, group))
    low, high = parts.amin(-1), parts.amax(-1)
    middle, half = (low + high) / 2, (high - low) / 2
    best_error, best = torch.full_like(low, float("inf")), None
    for shrink in SHRINKS:
        scale = _not_below(2 * half * shrink / 15)
        pair = torch.stack([scale, (middle + scale.float() / 2).to(torch.bfloat16)], -1)
        codes = _encode(parts, pair)
        error = (_decode(codes, pair) - parts).square().sum(-1)
        better = error < best_error
        if best is None:
            best = (codes, pair)
        else:
            best = (
                torch.where(better[..., None], codes, best[0]),
                torch.where(better[..., None], pair, best[1]),
            )
        best_error = torch.where(better, error, best_error)
    return best[0].flatten(1), best[1]


def dequantize_int8(codes, scales):
    """The weight that `quantize_int8` stands for, float32 [N, K]."""
    return codes.float() * scales.float()[:, None]


def dequantize_int4(codes, scales):
    """The weight that `quantize_int4` stands for, float32 [N, K]."""
    return _decode(codes.unflatten(1, (scales.shape[1], -1)), scales).flatten(1)


def _encode(parts, pair):
    scale, zero = pair.float().unbind(-1)
    return ((parts - zero[..., None]) / scale[..., None] + 8).round().clamp_(0, 15).to(torch.int32)


def _decode(codes, pair):
    scale, zero = pair.float().unbind(-1)
    return (codes.float() - 8) * scale[..., None] + zero[..., None]


def _not_below(values):
    """float32 -> bfloat16, rounded up by at most one step so that no weight is clipped; never zero."""
    rounded = values.clamp(min=1e-12).to(torch.bfloat16)
    above = rounded * (1 + 2**-7)
    return torch.where(rounded.float() < values, above.to(torch.bfloat16), rounded)
