"""The most memory that a piece of work holds."""

import ctypes
import gc
import sys
import threading

import psutil
import torch


class Peak:
    """Context manager that watches memory: the process's resident bytes, and the allocator's on CUDA.

    Attributes after it: `resident` (largest, bytes), `added` (largest above what was held at the start, on the
    device's own memory: resident bytes on a CPU), and on CUDA `allocated` and `reserved`, else None.

    Args:
        interval: seconds between two looks at resident memory.
    """

    def __init__(self, device: torch.device | str, interval: float = 0.005):
        self.device, self.interval = torch.device(device), interval
        self.resident = self.added = 0
        self.allocated = self.reserved = None
        self._process, self._over = psutil.Process(), threading.Event()

    def __enter__(self) -> "Peak":
        gc.collect()
        _trim()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._before = self._look()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()
        self._look()
        held = self.resident
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            held = self.allocated = torch.cuda.max_memory_allocated(self.device)
            self.reserved = torch.cuda.max_memory_reserved(self.device)
        self.added = max(0, held - self._before)

    def _watch(self) -> None:
        while not self._over.wait(self.interval):
            self._look()

    def _look(self) -> int:
        now = self._process.memory_info().rss
        self.resident = max(self.resident, now)
        return now


def _trim() -> None:
    """Give freed memory back to the system, so that who comes next is seen to take it."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
