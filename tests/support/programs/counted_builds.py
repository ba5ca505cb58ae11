"""Builds of the sampling kernels over mixed traffic, counted by a spy on the compiler; run as a program of its own,
with the seed of traffic, or without one for the warm-up alone.

No GPU: a driver that only knows its target stands in, and the spy takes the place of the compiler. Prints two JSON
objects, {part of the day: {kernel: number of builds}} and {kernel: what Triton's cache on disk knows its build by}.
"""

import collections
import functools
import json
import sys
import types

import torch
import triton.compiler
from sampling_rows import edits, key
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from handloom.kernels import append_triton, penalties_triton
from handloom.kernels.sampling import fused, rules

VOCAB = 128256


class Driver:
    """What specialisation asks a driver for."""

    def get_current_target(self):
        """An H100's or H200's."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        """One device."""
        return 0

    def get_current_stream(self, device):
        """The default stream."""
        return 0


def traffic(g):
    """Yield (part, settings) of a day: rows come and go, and every row asks for something else."""
    for turn in range(200):
        rows = (1, 2, 3, 4, 7, 8, 16, 31, 32, 64, 100, 128, 256)[turn % 13]
        one = torch.ones(rows)
        rule = (rules.top_k(one), rules.top_p(one), rules.min_p(one), rules.top_k(one, ties="lowest"))
        chosen = tuple(rule[i] for i in torch.randperm(4, generator=g)[: turn % 5].tolist())
        settings = {**key(rows), "rules": chosen, "logprobs": (False, "chosen", True)[turn % 3]}
        settings |= {"temperature": one} if turn % 2 else {}
        if turn % 4 == 1:
            settings["bitmask"] = torch.zeros(rows, VOCAB // 32, dtype=torch.int32)
        if turn % 6 == 3:
            settings["adaptive"] = torch.ones(4, rows)
        if turn % 7 == 4:
            settings["n_top"] = 1 + turn % 16
        yield "without edits", rows, settings
        if turn % 5 == 2:
            listed = edits(rows, VOCAB, turn)
            width = (1, 7, 24, 64, 100, 1024, 1999)[turn % 7]
            wide = [torch.nn.functional.pad(part, (0, width))[:, :width].contiguous() for part in listed[:4]]
            listed = listed._replace(**dict(zip(listed._fields, wide, strict=False)))
            yield "with edits", rows, {**settings, "edits": listed}


def penalties(g):
    """Yield arguments of `penalties_triton.launch`: texts of any length, and every choice of penalties."""
    for rows, which in ((1, 1), (2, 2), (16, 4), (31, 3), (64, 5), (1, 6), (5, 7)):
        history = torch.zeros(rows, 3 + int(torch.randint(3000, (), generator=g)), dtype=torch.int64)
        some, strength = torch.zeros(rows, 1, dtype=torch.bool), torch.ones(rows, 1)
        rule = strength, some, some, some.long()
        asked = [rule if which & 1 << i else None for i in range(3)]
        yield torch.empty(rows, VOCAB), history[:, 1:], history[:, 0], history[:, 0], *asked


def steps():
    """Yield arguments of `append_triton.launch`: any number of rows, alternatives and ends."""
    for rows, top, stops in ((1, 0, 1), (2, 5, 8), (16, 20, 33), (5, 1, 16)):
        one, real = torch.zeros(rows, 1, dtype=torch.int64), torch.zeros(rows)
        best = (one.expand(-1, top), real[:, None].expand(-1, top)) if top else None
        results, fed = torch.zeros(rows, 3 + 2 * top, dtype=torch.float64), torch.zeros(3, rows + 5).long()
        table, ends = torch.zeros(rows, 7, dtype=torch.int32), one.expand(-1, stops)
        yield (
            one[:, 0],
            (real, real),
            best,
            results,
            one[:, 0],
            fed[:, :rows],
            one,
            table,
            16,
            one,
            one,
            one,
            ends,
        )


def main():
    """Count, and print."""
    driver.set_active(Driver())
    counts, names, part = collections.defaultdict(collections.Counter), {}, [""]

    def spy(source, options, **about):
        counts[part[0]][source.fn.__name__] += 1
        names[source.fn.__name__] = f"{source.hash()} {sorted(options.items(), key=str)}"
        return types.SimpleNamespace(run=None)

    triton.compiler.compile = spy  # before a kernel is first used, which binds it
    part[0] = "warm-up"
    fused.warm_up("cpu", VOCAB, edits=True, adaptive=True, n_top=1)
    penalties_triton.warm_up(torch.empty(1, VOCAB))
    day = traffic(torch.Generator().manual_seed(int(sys.argv[1]))) if sys.argv[1:] else ()
    for part[0], rows, settings in day:
        call = rules.Call(torch.empty(rows, VOCAB), **settings)
        plan = fused.Plan.of(call)
        for kernel, grid, arguments, named in fused.launches(call, plan, plan.tokens):
            kernel.warmup(*arguments, grid=grid, **named)
    # launches that only compile
    triton.JITFunction.__getitem__ = lambda kernel, grid: functools.partial(kernel.warmup, grid=grid)
    part[0] = "penalties"
    for asked in penalties(torch.Generator().manual_seed(0)) if sys.argv[1:] else ():
        penalties_triton.launch(*asked)
    part[0] = "a step's end"
    for asked in steps():
        append_triton.launch(*asked)
    json.dump([counts, names], sys.stdout)


if __name__ == "__main__":
    main()
