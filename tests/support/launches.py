"""What a forward pass launches: kernels in the interpreter, and operations that would be kernels on CUDA."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from handloom.cache.feed import Feed
from handloom.forward.fused.products import Products
from handloom.kernels import dispatch

# Operations that only look at memory in another way, or ask for some.
NOTHING = {
    "view", "reshape", "_reshape_alias", "_unsafe_view", "transpose", "t", "permute", "expand", "slice", "select",
    "unsqueeze", "squeeze", "split", "split_with_sizes", "chunk", "unbind", "alias", "detach", "as_strided", "empty",
    "new_empty", "empty_like",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Names of the operations and kernels that ran inside the block, in order."""

    def __init__(self):
        super().__init__()
        self.names, self.quiet = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name not in NOTHING and not self.quiet:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Always(Products):
    """Every product that can be goes through the kernel of few rows."""

    def takes(self, rows, linears, gate=None):
        return rows <= 8


@contextmanager
def launches(run: bool = True):
    """Count, with every kernel of ours in Triton's interpreter, or `run=False` none: what they would write is noise."""
    import triton.runtime.interpreter as interpreter

    original, counted = interpreter.GridExecutor.__call__, Launches()

    def call(executor, *args, **kwargs):
        counted.names.append(executor.fn.__name__)
        counted.quiet = True
        try:
            return original(executor, *args, **kwargs) if run else None
        finally:
            counted.quiet = False

    with pytest.MonkeyPatch.context() as patch, dispatch.use("triton"), torch.no_grad(), counted:
        patch.setattr(interpreter.GridExecutor, "__call__", call)
        yield counted.names


def step_feed(engine, cells: int = 5) -> Feed:
    """One new token of one row with `cells` older ones, as a recorded step is fed: nothing that the host knows."""
    block = engine.pool.block_size
    table = engine.pool.writable(engine.pool.table(), 0, cells + 1)
    feed = Feed(
        ids=torch.tensor([[7]]),
        positions=torch.tensor([[cells]]),
        cells=torch.tensor([[table.blocks[cells // block] * block + cells % block]]),
        tables=(),
        lengths=(),
        block_table=torch.tensor([table.blocks], dtype=torch.int32),
        cell_counts=torch.tensor([cells + 1]),
    )
    feed.held = table  # its blocks stay taken
    return feed


def launches_of_a_step(engine) -> list[str]:
    """What one step of one row launches, the model's ends included."""
    feed = step_feed(engine)
    engine.pool.clean()
    with launches(run=False) as names:
        engine.runner.forward(feed)
    return names
