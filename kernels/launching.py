"""What launches of Triton kernels share; importing this file needs triton."""

import contextlib
import contextvars
import functools

import torch
import triton
import triton.language as tl

_early = contextvars.ContextVar("handloom_early", default=True)


@triton.jit
def store(ptr, value, mask, UPCAST: tl.constexpr):
    """Store float32 values in the pointer's dtype, rounding to nearest even.

    UPCAST: the interpreter truncates float32 to bfloat16, so there the rounding is spelled out.
    """
    if UPCAST and ptr.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value == value, rounded, 0x7FC0)  # a NaN whose last bits are set would carry over
        tl.store(ptr, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


def on_its_device(launch):
    """A launcher that works on the device of its first tensor, whichever device is current."""

    @functools.wraps(launch)
    def guarded(first, *rest, **named):
        with torch.cuda.device_of(first):
            return launch(first, *rest, **named)

    return guarded


@contextlib.contextmanager
def early(on):
    """Whether kernels launched or recorded in the block may start beside the launch before them; local to thread."""
    token = _early.set(bool(on))
    try:
        yield
    finally:
        _early.reset(token)


def beside(device):
    """Launch options and the constant PDL of a kernel that may start beside the launch before it.

    Such a kernel (programmatic dependent launch, sm_90 on) calls `gdc_wait` in every program before it reads what
    other launches wrote, or writes anything.

    Returns:
        ({"PDL": bool}, options for the launch).
    """
    overlaps = device.type == "cuda" and _early.get() and _overlaps(device.index)
    return {"PDL": overlaps}, {"launch_pdl": True} if overlaps else {}


@functools.cache
def _overlaps(index):
    return torch.version.hip is None and torch.cuda.get_device_capability(index)[0] >= 9
