"""4-bit weights in bitsandbytes' layout: reference product, and the choice between it and the Triton kernel.

A weight [N, K] is stored row after row, two codes a byte (the first in the high half), each an index into 16 values;
every `blocksize` weights share one scale (absmax). With double quantisation the scales themselves are bytes: indices
into 256 values, with a float scale for every `nested.blocksize` of them and one common offset (arXiv 2305.14314).
"""

from dataclasses import dataclass

import torch

from .. import dispatch


@dataclass(frozen=True)
class NestedScales:
    """What turns byte scales back into floats: code float32 [256], absmax float32 [n / blocksize], offset [] ."""

    code: torch.Tensor
    absmax: torch.Tensor
    offset: torch.Tensor
    blocksize: int


@dataclass(frozen=True)
class FourBitWeight:
    """A 4-bit weight read in place.

    Attributes:
        packed: uint8 [N * K / 2], any shape. shape: (N, K).
        code: float32 [16], the values (nf4 or fp4). blocksize: weights a scale.
        absmax: scales, float32 [N * K / blocksize], or uint8 with `nested`.
        planes: `code_planes(code)`, made once; None makes it at every product.
    """

    packed: torch.Tensor
    shape: tuple
    code: torch.Tensor
    absmax: torch.Tensor
    blocksize: int
    nested: NestedScales | None = None
    planes: torch.Tensor | None = None

    @classmethod
    def from_bitsandbytes(cls, packed, state):
        """Wrap a `Params4bit`'s data and its quant_state; nothing is copied."""
        nested = None
        if state.nested:
            inner = state.state2
            nested = NestedScales(inner.code, inner.absmax, state.offset, inner.blocksize)
        return cls(packed, tuple(state.shape), state.code, state.absmax, state.blocksize, nested)

    def code_planes(self):
        """Its values as the kernels pick them, see `code_planes`."""
        return code_planes(self.code)

    def scales(self):
        """The scales as float32 [N * K / blocksize]."""
        if self.nested is None:
            return self.absmax.float()
        outer = self.nested.absmax.repeat_interleave(self.nested.blocksize)[: self.absmax.numel()]
        return self.nested.code[self.absmax.long()] * outer + self.nested.offset

    def dense(self):
        """The weight that the codes stand for, float32 [N, K]."""
        bytes_ = self.packed.reshape(-1).to(torch.int64)
        codes = torch.stack([bytes_ >> 4, bytes_ & 15], -1).flatten()
        values = self.code[codes].view(-1, self.blocksize) * self.scales()[:, None]
        return values.view(self.shape)


def code_planes(code):
    """float32 [16] values -> int32 [2, 8]: high bytes, then low bytes, four a word; as bfloat16 and as float16."""
    found = []
    for dtype in (torch.bfloat16, torch.float16):
        low, high = code.to(dtype).view(torch.uint8).view(16, 2).unbind(1)
        found.append(torch.cat([high, low]).contiguous().view(torch.int32))
    return torch.stack(found)


def four_bit_linear(x, weight, bias=None, *, kernels=None, out=None):
    """Product of activations with a 4-bit weight, read in place; reads no value on the host.

    Args:
        x: [..., K] float16, bfloat16 or float32. weight: FourBitWeight of shape (N, K). bias: [N] or None.
        kernels: "auto", "triton", "torch" or None (see `dispatch`).
        out: [..., N] contiguous in x's dtype, written instead of a new tensor.

    Returns:
        [..., N] in x's dtype; products are summed in float32.

    Raises:
        ValueError: x does not fit the weight. dispatch.KernelUnavailable: kernels="triton" cannot run here.
    """
    outputs, inputs = weight.shape
    if x.shape[-1] != inputs:
        raise ValueError(f"x has {x.shape[-1]} features, the weight takes {inputs}")
    if dispatch.select("four_bit_linear", x.device, kernels, uncovered(x, weight)) == "torch":
        result = four_bit_linear_reference(x, weight, bias)
        return result if out is None else out.copy_(result)
    from . import nf4_triton

    out = x.new_empty(*x.shape[:-1], outputs) if out is None else out
    rows = x.reshape(-1, inputs)
    if len(rows):
        nf4_triton.launch(rows if rows.stride(1) == 1 else rows.contiguous(), weight, bias, out)
    return out


def four_bit_linear_reference(x, weight, bias=None):
    """Defines `four_bit_linear`: the weight made dense, the product in float32."""
    out = x.float() @ weight.dense().T
    return (out if bias is None else out + bias.float()).to(x.dtype)


def uncovered(x, weight):
    """What keeps the Triton kernel from this product, in words; None where nothing does."""
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"activations of {x.dtype}"
    if weight.blocksize not in (32, 64, 128, 256, 512) or weight.shape[1] % weight.blocksize:
        return f"{weight.shape[1]} inputs in blocks of {weight.blocksize} (a row must hold whole blocks)"
    return None
