"""Device functions of edits in tests; needs Triton."""

import triton
import triton.language as tl


@triton.jit
def capped(x, token_ids, cap):
    return tl.where(x > cap, cap, x)


@triton.jit
def shifted(x, token_ids, value):
    return x + value * (token_ids % 3)


@triton.jit
def shifted_wrongly(x, token_ids, value):
    return x + value * (2 - token_ids % 3) * 4


@triton.jit
def at_least(x, token_ids, value):
    return tl.where(x > value, x, value)
