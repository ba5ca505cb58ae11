"""The activated gate times its factor: torch reference, and the choice between it and the Triton kernel."""

import torch
from torch.nn import functional

from .. import dispatch

ACTIVATIONS = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}


def gated(gate, up, activation, *, kernels=None):
    """act(gate) * up, rounded once.

    Args:
        gate, up: [R, N] with contiguous rows, of one dtype: float16, bfloat16 or float32.
        activation: name in ACTIVATIONS (SwiGLU, GeGLU: arXiv 2002.05202).
        kernels: "auto", "triton", "torch" or None (see `dispatch`).

    Returns:
        [R, N], contiguous.

    Raises:
        ValueError: unknown activation, shapes that differ. dispatch.KernelUnavailable: kernels="triton" cannot run.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if gate.dim() != 2 or gate.shape != up.shape:
        raise ValueError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)}: [R, N] both")
    if dispatch.select("gated", gate.device, kernels, uncovered(gate, up)) == "torch":
        return gated_reference(gate, up, activation)
    from . import gated_triton

    return gated_triton.launch(gate, up, activation)


def gated_reference(gate, up, activation):
    """Defines `gated`, whose arguments it shares."""
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32
    return (ACTIVATIONS[activation](gate.to(wide)) * up.to(wide)).to(gate.dtype)


def uncovered(gate, up):
    """What keeps the Triton kernel from this call, in words; None where nothing does."""
    if gate.dtype != up.dtype or gate.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"gate {gate.dtype} and up {up.dtype}"
    if gate.stride(1) != 1 or up.stride(1) != 1:
        return "rows that are not contiguous"
    return None
