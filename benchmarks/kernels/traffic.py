"""Tensor operations of a call, and the bytes of their operands."""

from collections.abc import Callable, Iterator

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that write their first argument without reading it.
OVERWRITTEN = {"copy_", "fill_", "zero_", "exponential_", "random_", "normal_", "uniform_"}
# Operations that read as much of their first argument as they return.
PICKED = {"gather", "index", "index_select", "embedding"}
# Operations that give memory and touch none of it.
UNTOUCHED = {"empty", "new_empty", "empty_like", "empty_strided", "resize_", "set_", "_unsafe_view"}
# A view by its schema, but it makes a tensor of Python or NumPy data.
MADE = {"lift_fresh"}


class _Traffic(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = self.read = self.written = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if (function.is_view and name not in MADE) or name in UNTOUCHED:
            return result
        self.operations += 1
        made = sum(map(_bytes, _tensors(result)))
        sources = list(_tensors((args, kwargs)))
        if name in OVERWRITTEN:
            sources = sources[1:]
        elif name in PICKED and sources:
            sources, self.read = sources[1:], self.read + made
        self.read += sum(map(_bytes, sources))
        self.written += made
        return result


def _tensors(values) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of the distinct elements: what an expanded tensor repeats counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or size == 0 else 1
    return count * tensor.element_size()


def traffic(run: Callable[[], object]) -> dict[str, int]:
    """Operations of a call (views not counted), bytes that they read and write; exact, whatever the device."""
    with _Traffic() as mode:
        run()
    return {"operations": mode.operations, "bytes_read": mode.read, "bytes_written": mode.written}
