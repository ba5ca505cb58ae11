"""SynthID-Text (Dathathri et al., Nature 634, 2024): a tournament of keyed bits, with transformers' hashes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import ParameterError
from .detection import Detection, of_hits, windows

MULTIPLIER, TABLE = 6364136223846793005, 2**16


class Tournament:
    """A processor that lets tokens with more keyed bits win, layer by layer; on average over keys the law stays.

    Use it as `GreenList`. The same tournament as transformers' `SynthIDTextWatermarkingConfig` on a CPU: a context is
    the last ngram_len - 1 output tokens (0 where there are none yet), and one that was there before is not marked
    again. It costs depth hashes of the vocabulary a row and token.

    Args:
        keys: one secret integer a layer; the depth is their number (the paper's 30).
        ngram_len: tokens of a context and the one behind it, >= 2.
        sampling_table_seed: of the table of bits. context_history_size: contexts that are remembered.
    """

    name, needs_history = "tournament", True

    def __init__(
        self,
        keys: Sequence[int],
        *,
        ngram_len=5,
        sampling_table_seed=0,
        context_history_size=1024,
        table_size=TABLE,
    ):
        if ngram_len < 2 or not len(keys):
            raise ParameterError(
                f"a tournament takes keys and ngram_len >= 2, got {list(keys)} and {ngram_len}"
            )
        self.keys, self.width, self.remembered = torch.tensor(list(keys)), ngram_len - 1, context_history_size
        source = torch.Generator().manual_seed(sampling_table_seed)
        self.table = torch.randint(0, 2, (table_size,), generator=source)

    def bits(self, contexts: Tensor, tokens: Tensor) -> Tensor:
        """g `[N, K, depth]` of tokens `[N, K]` behind contexts `[N, ngram_len - 1]`."""
        value = torch.ones(len(contexts), dtype=torch.long)
        for column in contexts.unbind(1):
            value = (value + column) * MULTIPLIER + 1
        value = (value[:, None] + tokens) * MULTIPLIER + 1
        value = (value[..., None] + self.keys) * MULTIPLIER + 1
        return self.table[value % len(self.table)]

    def apply(self, logits: Tensor, context) -> Tensor:
        """Marked logits `[B, V]`."""
        starts, ends = context.prompt_lengths.tolist(), context.lengths.tolist()
        texts = [
            [0] * self.width + ids[a:b]
            for ids, a, b in zip(context.history.tolist(), starts, ends, strict=True)
        ]
        contexts = torch.tensor([text[-self.width :] for text in texts])
        ids = torch.arange(logits.shape[1]).expand(len(texts), -1)
        g = self.bits(contexts, ids).to(logits.device).to(logits.dtype)
        p = logits.softmax(-1)
        for layer in g.unbind(-1):
            p = p * (1 + layer - (layer * p).sum(-1, keepdim=True)).clamp(
                min=0
            )  # rounding, where g decides all
        again = torch.tensor([self._seen(text) for text in texts], device=logits.device)
        return torch.where(again[:, None], logits, p.log())

    def _seen(self, text: list[int]) -> bool:
        """Whether the context at the end of a text was there before."""
        last, first = text[-self.width :], max(0, len(text) - self.width - self.remembered)
        return any(text[i : i + self.width] == last for i in range(first, len(text) - self.width))

    def detect(self, tokens) -> Detection:
        """How many keyed bits are set over a text's distinct n-grams.

        Args:
            tokens: output ids, or a Generation.
        """
        first: dict = {}
        for text in windows(tokens, self.width + 1):
            first.setdefault(text[:-1], text[-1])  # a context is marked once
        if not first:
            return of_hits(0, 0, 0.5)
        bits = self.bits(torch.tensor(list(first)), torch.tensor(list(first.values()))[:, None])
        return of_hits(int(bits.sum()), bits.numel(), float(self.table.double().mean()))
