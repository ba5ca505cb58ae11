"""Unigram (arXiv 2306.17439): one green list for all contexts, hard to wash out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import ParameterError
from .detection import Detection, hypergeometric_tail, windows


class Unigram:
    """A processor that adds `bias` to the logits of a fixed, keyed half of the tokens; see `GreenList` for its use.

    Args:
        vocab_size: of the logits.
        ratio: gamma, share of green tokens, between 0 and 1. bias: delta, in logits.
        key: the secret, an integer.
    """

    name = "unigram"

    def __init__(self, vocab_size: int, *, ratio=0.5, bias=2.0, key=0):
        if not 0 < ratio < 1:
            raise ParameterError(f"Unigram takes a ratio between 0 and 1, got {ratio}")
        source = torch.Generator().manual_seed(key)
        self.green = torch.zeros(vocab_size, dtype=torch.bool)
        self.green[torch.randperm(vocab_size, generator=source)[: int(vocab_size * ratio)]] = True
        self.bias = bias

    def apply(self, logits: Tensor, context) -> Tensor:
        """Marked logits `[B, V]`."""
        return logits + self.bias * self.green.to(logits.device)

    def detect(self, tokens) -> Detection:
        """How many of a text's distinct tokens are green; exact hypergeometric tail.

        Args:
            tokens: output ids, or a Generation.
        """
        seen, green, total = windows(tokens, 1), int(self.green.sum()), len(self.green)
        hits, rate = sum(bool(self.green[token]) for (token,) in seen), green / total
        deviation = math.sqrt(len(seen) * rate * (1 - rate) * (total - len(seen)) / max(1, total - 1))
        z = (hits - len(seen) * rate) / deviation if deviation else 0.0
        return Detection(hits, len(seen), z, hypergeometric_tail(hits, len(seen), green, total))
