"""A model's passes over prompts, recorded by shape: host numbers go to one buffer, the rest is a replay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...cache.feed import Feed, packed_numbers
from ...cache.transfer import upload
from .capture import recorder_for
from .programs import Programs, bucket

KEPT = 64  # shapes; what their passes allocate is shared
SMALL = 1024  # tokens of a pass that is recorded at once; a larger one keeps the device busy while the host launches it


def record_passes(model, rows: int, vocab_size: int) -> None:
    """Let a model's passes over prompts be recorded where the device can; it must be one whose step can be, too."""
    recorder = recorder_for(model.device)
    if recorder is not None and model.packs:
        model.recorded = RecordedPasses(recorder, model.pool, rows, vocab_size)


@dataclass
class Packed:
    """A packed pass of one shape: its numbers on the device, and what replays it."""

    numbers: torch.Tensor
    graph: Any = None


class RecordedPasses:
    """Passes of an adapter over packed rows, padded to shapes that come again.

    Surplus tokens go to the trash block, and surplus rows have none, so a shape serves every pass that fits in.

    Args:
        recorder: see `capture.recorder_for`.
        pool: the block pool that they read and write.
        rows: most rows of a pass whose logits are kept.
        vocab_size: of the logits.
    """

    def __init__(self, recorder, pool, rows: int, vocab_size: int):
        self.programs = Programs(recorder, pool, KEPT, "a pass over prompts")
        self._device = pool.stores[0].keys.device if pool.stores else torch.device("cpu")
        self._rows, self._vocab = rows, vocab_size
        self._logits: torch.Tensor | None = None

    @torch.no_grad()
    def packed(self, model, tokens, begins, tables) -> torch.Tensor:
        """Logits `[R, V]` after each row's last token; arguments as for `Feed.packed`."""
        count, rows = sum(map(len, tokens)), len(tokens)
        wide = max(map(len, tables))
        shape = bucket(count, 8), bucket(rows, 1, 1), bucket(wide, 1, 32)
        numbers, _ = packed_numbers(tokens, begins, tables, model.pool.block_size, shape)
        model.pool.clean()
        key = ("packed", *shape)
        found = self.programs.find(key)
        if found is not None:
            found.numbers.copy_(upload(numbers, model.device))
            found.graph.replay()
            return self._out(shape[1])[:rows].clone()
        fresh = Packed(upload(numbers, model.device))
        feed = Feed.unpacked(fresh.numbers, *shape)

        def program():
            self._out(shape[1]).copy_(model.forward(feed, last_only=True).logits[0])

        def make():
            fresh.graph = self.programs.recorder.record(program)
            return fresh

        self.programs.run(key, program, make, worth=1 if count <= SMALL else 2)
        return self._out(shape[1])[:rows].clone()

    def _out(self, rows: int) -> torch.Tensor:
        """Where the logits of every pass go."""
        if self._logits is None or len(self._logits) < rows:
            self.programs.forget()  # they write to the old place
            self._logits = torch.empty(max(rows, self._rows), self._vocab, device=self._device)
        return self._logits[:rows]
