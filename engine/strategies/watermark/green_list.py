"""Green lists that follow the context: KGW (arXiv 2301.10226, 2306.04634), with transformers' hashes."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...errors import ParameterError
from .detection import Detection, of_hits, windows

TABLE = 1_000_003  # size of the table of self-hashing
TRIED = 40  # most probable tokens that self-hashing looks at


class GreenList:
    """A processor that adds `bias` to the logits of the tokens that are green behind the last ones.

    Give it to a request: `engine.generate(prompts, temperature=1.0, processors=[mark])`; it acts behind the others,
    in any strategy. The same lists as transformers' `WatermarkingConfig` on a CPU. It costs a permutation of the
    vocabulary a row and token, 40 with "selfhash"; those of recent contexts are kept.

    Args:
        vocab_size: of the logits.
        greenlist_ratio: gamma, share of green tokens, between 0 and 1. bias: delta, in logits.
        hashing_key: the secret.
        seeding_scheme: "lefthash": the last token seeds the list (Algorithm 2); "selfhash": the last context_width
            tokens with the candidate itself (Algorithm 3).
        context_width: tokens before which nothing is marked.
    """

    name, needs_history = "green_list", True

    def __init__(
        self, vocab_size: int, *, greenlist_ratio=0.25, bias=2.0, hashing_key=15485863, seeding_scheme="lefthash",
        context_width=1,
    ):  # fmt: skip
        if seeding_scheme not in ("lefthash", "selfhash") or not 0 < greenlist_ratio < 1 or context_width < 1:
            raise ParameterError(
                f"a green list takes seeding_scheme 'lefthash' or 'selfhash', greenlist_ratio between 0 and 1 and "
                f"context_width >= 1, got {seeding_scheme!r}, {greenlist_ratio} and {context_width}"
            )
        self.vocab_size, self.ratio, self.bias = vocab_size, greenlist_ratio, bias
        self.key, self.itself, self.width = hashing_key, seeding_scheme == "selfhash", context_width
        self._table = None
        self.green = lru_cache(maxsize=1024)(self._green)

    def _green(self, seed: int) -> Tensor:
        source = torch.Generator().manual_seed(seed)
        return torch.randperm(self.vocab_size, generator=source)[: int(self.vocab_size * self.ratio)]

    def seed(self, context: tuple[int, ...]) -> int:
        """Of the list behind a context; with "selfhash" its last token is the candidate."""
        if not self.itself:
            return (self.key * context[-1]) % (2**64 - 1)
        if self._table is None:
            source = torch.Generator().manual_seed(self.key)
            self._table = torch.randperm(TABLE, generator=source)
        hashed = self._table[torch.tensor(context[-self.width :]) % TABLE] + 1
        return int((self.key * hashed * hashed[-1]).min()) % (2**64 - 1)

    def apply(self, logits: Tensor, context) -> Tensor:
        """Marked logits `[B, V]`."""
        marked = logits.clone()
        for row, (ids, length) in enumerate(
            zip(context.history.tolist(), context.lengths.tolist(), strict=True)
        ):
            before = tuple(ids[max(0, length - self.width - 1) : length])
            if length >= self.width:
                marked[row, self._chosen(before, logits[row]).to(logits.device)] += self.bias
        return marked

    def _chosen(self, before: tuple[int, ...], logits: Tensor) -> Tensor:
        if not self.itself:
            return self.green(self.seed(before))
        best = logits.sort(descending=True).indices[:TRIED].tolist()
        return torch.tensor([v for v in best if self.is_green((*before, v))], dtype=torch.long)

    def is_green(self, text: tuple[int, ...]) -> bool:
        """Whether the last token of a text is green behind the others."""
        return bool((self.green(self.seed(text if self.itself else text[:-1])) == text[-1]).any())

    def detect(self, tokens) -> Detection:
        """How many of a text's distinct n-grams end with a green token.

        Args:
            tokens: output ids, or a Generation.
        """
        seen = windows(tokens, self.width + (0 if self.itself else 1))
        hits = sum(self.is_green(text) for text in seen)
        return of_hits(hits, len(seen), int(self.vocab_size * self.ratio) / self.vocab_size)
