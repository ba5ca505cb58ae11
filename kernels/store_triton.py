"""Storing what was computed in float32, for every kernel; importing this file needs triton."""

import triton
import triton.language as tl


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
