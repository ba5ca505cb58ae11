"""How large what the GPU check runs is: real shapes, or small enough for a CPU, so that tests run every line."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

PROMPTS = [[3, 5, 7, 9, 11], [1] * 17, [4], [2, 3] * 20, [9, 8, 7, 6, 5, 4, 3, 2, 1], [5] * 23]
EVERYTHING = {
    "temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1,
    "presence_penalty": 0.1, "frequency_penalty": 0.1, "seed": 1, "logprobs": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Args:
        small, large: shapes, see `shapes.SHAPES`. architectures: of the tests, whose recorded steps are compared.
        prompt, new: tokens of a prompt and its answer. few: of an answer of a slow side.
        contexts: lengths before the answer. rows: of a large batch; requests: ragged ones that share it.
        quantised: batches at which 4 bits are compared. alone: what keeps other sections off the device meanwhile.
        peers: folder with checkouts of others, or None.
    """

    device: str
    small: str
    large: str
    dtype: torch.dtype
    architectures: tuple[str, ...]
    prompt: int = 128
    new: int = 96
    few: int = 24
    contexts: tuple[int, ...] = (32768, 256, 2048, 8192)  # first the one that is aimed at
    rows: int = 64
    requests: int = 192
    quantised: tuple[int, ...] = (1, 4, 16, 64)
    alone: Callable[[], AbstractContextManager] = nullcontext
    peers: Path | None = None

    @property
    def on_cuda(self) -> bool:
        """Whether there is a device to wait for."""
        return self.device == "cuda"


FULL = Scale(
    "cuda", "Llama-3.2-1B", "Llama-3.1-8B", torch.bfloat16,
    ("llama", "gemma2", "gpt_oss", "mixtral", "bloom", "deepseek_v3", "jamba"),
)  # fmt: skip
DRY = Scale(
    "cpu", "tiny", "tiny", torch.float32, ("llama",),
    prompt=8, new=6, few=3, contexts=(16,), rows=2, requests=4, quantised=(1, 3),
)  # fmt: skip
