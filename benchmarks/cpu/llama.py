"""llama.cpp as a side of the benchmark."""

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

_served: list = []  # the server of a process that was started for llama.cpp


def llama_cpp(gguf: Path, prompt: list[int], steps: int, threads: int) -> Callable[[int, bool], float]:
    """llama.cpp through the package xllamacpp, one request at a time.

    It has a process of its own: two thread pools in one process make OpenMP's threads sleep between any two products.
    A spawned process never imports the `__main__` of a package, so what it runs stands in this file.

    Returns:
        (rows, whether to sample) -> tokens per second of one greedy row, whatever is asked.
    """
    pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    pool.submit(_serve, str(gguf), threads).result()

    def measure(rows: int, sample: bool) -> float:
        asked = {
            "prompt": prompt,
            "n_predict": steps,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        return pool.submit(_complete, asked).result()

    return measure


def _serve(gguf: str, threads: int) -> None:
    """Start llama.cpp in this process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = gguf
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 1024, 1, threads
    params.cpuparams_batch.n_threads = threads
    _served.append(xllamacpp.Server(params))


def _complete(asked: dict) -> float:
    """Tokens a second of one completion."""
    start = time.perf_counter()
    made = _served[-1].handle_completions(asked)
    return made["timings"]["predicted_n"] / (time.perf_counter() - start)
