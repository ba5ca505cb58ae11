"""FlashInfer's samplers from its bare headers: built where a checkout is on Python's path and nvcc is here.

The binding is ours. It takes addresses, so that none of torch's headers is compiled; a build takes about a minute of
one processor, and torch's extension loader keeps it. Headers of another version than the binding was written for
(August 2026) may not compile, which is told.
"""

import ctypes
import functools
import shutil
import sys
from pathlib import Path

import torch
from torch.utils import cpp_extension

HEADER = Path("include") / "flashinfer" / "sampling.cuh"
WORKSPACE = 1 << 20  # bytes: sums of a split softmax, the state of a radix top-k, or a flag a row
ARGUMENTS = (
    "float* given, void* out, void* space, unsigned rows, unsigned vocab, int k, float p, uint64_t seed, "
    "cudaStream_t stream"
)
TYPES = (
    [ctypes.c_void_p] * 3
    + [ctypes.c_uint] * 2
    + [ctypes.c_int, ctypes.c_float, ctypes.c_uint64, ctypes.c_void_p]
)
PROBS, IDS, FLAGS, SEED = (
    "(float*)out",
    "(int*)out",
    "(bool*)space",
    "true, nullptr, seed, nullptr, 0, stream",
)
CALLS = {  # function of the binding -> call of the header
    "softmax": f"OnlineSoftmax<float>(given, {PROBS}, rows, vocab, nullptr, p, space, {WORKSPACE}, false, stream)",
    "draw": f"SamplingFromLogits<float, int>(given, {IDS}, nullptr, rows, vocab, {SEED})",
    "top_p": f"TopPSamplingFromProb<float, int>(given, {IDS}, {FLAGS}, nullptr, nullptr, rows, p, vocab, {SEED})",
    "min_p": f"MinPSamplingFromProb<float, int>(given, nullptr, {IDS}, {FLAGS}, nullptr, rows, p, vocab, {SEED})",
    "top_k": f"TopKSamplingFromProb<float, int>(given, {IDS}, {FLAGS}, nullptr, nullptr, rows, k, vocab, {SEED})",
    "keep_top_k": f"RadixTopKRenormProbMultiCTA<float, int>(given, {PROBS}, nullptr, rows, k, vocab, "
    "(flashinfer::sampling::RadixRowState*)space, stream)",
    "keep_top_p": f"TopPRenormProb<float>(given, {PROBS}, nullptr, rows, p, vocab, stream)",
}  # fmt: skip


def binding() -> str:
    """CUDA source of a shared library with a C function for each of CALLS; they return 0, or what went wrong."""
    functions = (
        f'extern "C" int peer_{name}({ARGUMENTS}) {{\n'
        f"  try {{ return (int)flashinfer::sampling::{call}; }} catch (...) {{ return -1; }}\n}}\n"
        for name, call in CALLS.items()
    )
    return "#include <flashinfer/sampling.cuh>\n" + "".join(functions)


def folder() -> Path | None:
    """The first folder on Python's path that holds FlashInfer's headers, or None."""
    return next((Path(place) for place in sys.path if place and (Path(place) / HEADER).is_file()), None)


def missing(device: str) -> str | None:
    """Why the headers that are given cannot be built and run here; None where they can, or none are given."""
    if folder() is None:
        return None
    if device == "cpu":
        return "FlashInfer's kernels run on CUDA alone"
    if not shutil.which("nvcc") and not (Path(cpp_extension.CUDA_HOME or "/") / "bin" / "nvcc").exists():
        return "FlashInfer's headers are given, but there is no nvcc to build them with"
    try:
        library()
    except (RuntimeError, OSError, ImportError) as error:
        told = [line for line in str(error).splitlines() if "error:" in line] or [str(error)]
        return f"FlashInfer's headers do not build: {told[0].strip()[:200]}"
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """The binding, built for the current device from the headers of `folder()`."""
    place = Path(cpp_extension._get_build_directory("handloom_flashinfer", False))
    source = place / "binding.cu"
    if not source.exists() or source.read_text() != binding():
        source.write_text(binding())
    cpp_extension.load(
        "handloom_flashinfer", [str(source)], extra_cuda_cflags=["-O3", "--diag-suppress=177"],
        extra_include_paths=[str(folder() / "include")], is_python_module=False,
    )  # fmt: skip
    made = ctypes.CDLL(str(place / "handloom_flashinfer.so"))
    for name in CALLS:
        getattr(made, f"peer_{name}").argtypes = TYPES
    return made


class Samplers:
    """FlashInfer's samplers of rows [B, V], float32 on CUDA; each overwrites what it gave before.

    Attributes are the names of CALLS: (rows of logits or probabilities, k=, p=) -> probabilities float32 [B, V] or
    tokens int32 [B].
    """

    def __init__(self, batch: int, vocab: int, device):
        self.shape = batch, vocab
        self.probs = [torch.empty(batch, vocab, device=device) for _ in range(2)]
        self.tokens = torch.empty(batch, dtype=torch.int32, device=device)
        self.space, self.states = torch.zeros(2, WORKSPACE, dtype=torch.uint8, device=device)

    def __getattr__(self, name):
        """A function of the binding."""
        if name not in CALLS:
            raise AttributeError(f"there is no sampler {name!r}; there are {', '.join(CALLS)}")
        return functools.partial(self._call, name)

    def _call(self, name, given, k=0, p=1.0):
        if given.shape != self.shape or given.dtype != torch.float32 or not given.is_contiguous():
            raise ValueError(
                f"rows {given.dtype} {tuple(given.shape)}: float32 {self.shape}, contiguous, are expected"
            )
        out = self.tokens
        if name == "softmax" or name.startswith("keep"):
            out = next(part for part in self.probs if part is not given)
        space = self.states if name == "keep_top_k" else self.space  # its states are zeros between two calls
        addresses = (part.data_ptr() for part in (given, out, space))
        stream = torch.cuda.current_stream().cuda_stream
        status = getattr(library(), f"peer_{name}")(*addresses, *self.shape, k, p, 0, stream)
        if status:
            raise RuntimeError(f"FlashInfer's {name} failed with status {status}")
        return out
