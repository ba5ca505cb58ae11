"""The bandwidth that shares are taken of: how fast this device reads memory."""

import time

import torch

WIDTH = 4096  # of the matrix in the product, which reads as a model's layers do
SIZES = {"cpu": 2**28, "cuda": 2**32}  # bytes; far more than any cache


def read_bandwidth(device: torch.device | str, size: int | None = None, repeats: int = 5) -> float:
    """Bytes a second that a plain reduction reads on a device: the best of several, by three reductions.

    Args:
        size: bytes to read, a multiple of 16384; None takes a size that no cache holds. repeats: of each reduction.
    """
    device = torch.device(device)
    data = torch.ones((size or SIZES[device.type]) // 4, dtype=torch.float32, device=device)
    vector = torch.ones(WIDTH, device=device)
    reductions = (torch.sum, torch.amax, lambda x: x.view(-1, WIDTH).mv(vector))
    best = float("inf")
    for reduce in reductions:
        reduce(data)
        for _ in range(repeats):
            best = min(best, _seconds(reduce, data))
    return data.nbytes / best


def _seconds(reduce, data: torch.Tensor) -> float:
    if data.device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        reduce(data)
        end.record()
        torch.cuda.synchronize(data.device)
        return start.elapsed_time(end) / 1e3
    start = time.perf_counter()
    reduce(data)
    return time.perf_counter() - start
