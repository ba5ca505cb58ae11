"""Triton kernel of the gated activation; importing this file needs triton."""

import torch
import triton
import triton.language as tl

from .. import dispatch
from ..launching import beside, on_its_device, store

BLOCK = 1024


@triton.jit
def activate(x, NAME: tl.constexpr):
    """The activation of that name, see `gated.ACTIVATIONS`; x in float32."""
    if NAME == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif NAME == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        x = x / (1.0 + tl.exp(-2.0 * inner))
    elif NAME == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        x = tl.where(x < 0.0, 0.0, x)  # NaN stays
    return x


@triton.jit
def _gated_kernel(
    gate_ptr, up_ptr, out_ptr, columns, gate_row, up_row,
    NAME: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """BLOCK columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < columns
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    gate = tl.load(gate_ptr + row * gate_row + n, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + n, mask=inside, other=0.0).to(tl.float32)
    store(out_ptr + row * columns + n, activate(gate, NAME) * up, inside, UPCAST)


@on_its_device
def launch(gate, up, activation):
    """Run the kernel; arguments and result as of `gated.gated`, all settled."""
    rows, columns = gate.shape
    out = gate.new_empty(rows, columns)
    overlap, options = beside(gate.device)
    if out.numel():
        _gated_kernel[(rows, triton.cdiv(columns, BLOCK))](
            gate, up, out, columns, gate.stride(0), up.stride(0), NAME=activation, BLOCK=BLOCK, **overlap,
            UPCAST=dispatch.interpreting() and gate.dtype == torch.bfloat16, num_warps=4, **options,
        )  # fmt: skip
    return out
