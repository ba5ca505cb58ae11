"""Launcher and kernel of `append`: one program a row; importing this file needs triton."""

import triton
import triton.language as tl

from .launching import on_its_device

LANES = tl.constexpr(32)  # stops and alternatives taken at a time


@triton.jit(
    do_not_specialize=("top", "stop_count", "result_stride", "history_stride", "table_stride", "stop_stride"),
    do_not_specialize_on_alignment=(
        "drawn", "raw", "processed", "top_ids", "top_logprobs", "results", "ids", "positions_fed", "cells_fed",
        "counts_fed", "history", "table", "positions", "active", "limits", "stops",
    ),
)  # fmt: skip
def append_kernel(
    drawn, raw, processed, top_ids, top_logprobs, results, ids, positions_fed, cells_fed, counts_fed,
    history, table, positions, active, limits, stops,
    top, stop_count, result_stride, history_stride, table_stride, stop_stride,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """See `append`; results are float64 [B, 3 + 2 top]."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.maximum(tl.load(drawn + row), 0)
    lane = tl.arange(0, LANES)
    stopped = (token < 0).to(tl.int32)  # not so far
    for start in range(0, stop_count, LANES):
        slot = start + lane
        ends = tl.load(stops + row * stop_stride + slot, mask=slot < stop_count, other=-1)
        stopped = tl.maximum(stopped, tl.max((ends == token).to(tl.int32), axis=0))
    position = tl.load(positions + row)
    goes_on = tl.load(active + row)
    block = tl.load(table + row * table_stride + position // BLOCK_SIZE).to(tl.int64)
    cell = block * BLOCK_SIZE + position % BLOCK_SIZE
    line = results + row * result_stride
    tl.store(line, token.to(tl.float64))
    tl.store(line + 1, tl.load(raw + row).to(tl.float64))
    tl.store(line + 2, tl.load(processed + row).to(tl.float64))
    tl.store(ids + row, token)
    tl.store(history + row * history_stride + position, token)
    tl.store(positions_fed + row, position)
    tl.store(cells_fed + row, cell)
    tl.store(counts_fed + row, position + 1)
    goes_on = tl.where((stopped > 0) | (position + 1 >= tl.load(limits + row)), 0, goes_on)
    tl.store(active + row, goes_on)
    tl.store(positions + row, position + goes_on)
    for start in range(0, top, LANES):
        place = start + lane
        there = place < top
        named = tl.load(top_ids + row * top + place, mask=there, other=0)
        weight = tl.load(top_logprobs + row * top + place, mask=there, other=0.0)
        tl.store(line + 3 + place, named.to(tl.float64), mask=there)
        tl.store(line + 3 + top + place, weight.to(tl.float64), mask=there)


@on_its_device
def launch(
    tokens, logprobs, top, results, ids, fed, history, table, block_size, positions, active, limits, stops
):
    """`append` by the kernel."""
    count = 0 if top is None else top[0].shape[1]
    named = (tokens, logprobs[0]) if top is None else [part.contiguous() for part in top]
    append_kernel[(len(tokens),)](
        tokens, *logprobs, *named, results, ids, *fed, history, table, positions, active, limits, stops,
        count, stops.shape[1], results.stride(0), history.stride(0), table.stride(0), stops.stride(0),
        BLOCK_SIZE=block_size, num_warps=1,
    )  # fmt: skip
