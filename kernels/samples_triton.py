"""Launcher and kernel of `Samples`; importing this file needs triton."""

import torch
import triton
import triton.language as tl

from .launching import on_its_device


@triton.jit
def samples_kernel(first, where, out, WIDTH: tl.constexpr):
    """One view a program; where: int64 [n, 3], distance from the first view in elements, stride and length of each."""
    view = tl.program_id(0).to(tl.int64)
    start = first + tl.load(where + view * 3)
    stride, length = tl.load(where + view * 3 + 1), tl.load(where + view * 3 + 2)
    place = tl.arange(0, WIDTH)
    found = tl.load(start + place * stride, mask=place < length, other=0)
    tl.store(out + view * WIDTH + place, found)


@on_its_device
def launch(first, where, longest):
    """`Samples.read` by the kernel; first: the view from which the others are counted."""
    width = triton.next_power_of_2(longest)
    out = torch.empty(len(where), width, dtype=first.dtype, device=where.device)
    samples_kernel[(len(where),)](first, where, out, WIDTH=width, num_warps=1)
    return out.flatten()
