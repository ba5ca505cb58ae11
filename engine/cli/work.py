"""What the command line tells of a file of prompts while it is worked off, and when it is done."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress

if TYPE_CHECKING:
    from ..loop.generation import Generation

EVERY = 30.0  # seconds between lines where stderr is no terminal


class Work(AbstractContextManager):
    """Counts samples: a bar in a terminal, a line every half minute elsewhere, and a summary at the end.

    Args:
        note: where it is told. total: samples that are to be drawn. bar: whether a bar may be shown.
        clock: returns seconds.

    Attributes:
        failed: samples that ended with an error.
    """

    def __init__(self, note: Console, total: int, *, bar: bool, clock: Callable[[], float] = time.monotonic):
        self.note, self.total, self.clock = note, total, clock
        self.done = self.failed = self.tokens = 0
        self._progress = Progress(console=note, disable=not (bar and note.is_terminal))
        self._bar = self._progress.add_task("samples", total=total)
        self._start = self._told = clock()

    def __enter__(self) -> "Work":
        self._progress.start()
        return self

    def advance(self, generation: "Generation") -> None:
        """One sample more is done."""
        self.done += 1
        self.tokens += generation.n_new
        self.failed += generation.finish_reason == "error"
        self._progress.advance(self._bar)
        now = self.clock()
        if not self.note.is_terminal and now - self._told >= EVERY and self.done < self.total:
            self._told = now
            left = (self._told - self._start) / self.done * (self.total - self.done)
            self.note.print(f"{self.done} of {self.total} samples, {self._speed()}, about {left:.0f} s left")

    def _speed(self) -> str:
        seconds = self.clock() - self._start
        return f"{self.tokens / max(seconds, 1e-9):.1f} tokens/s"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if kind is not None:
            return
        seconds = self.clock() - self._start
        self.note.print(
            f"{self.done} samples in {seconds:.1f} s · {self.tokens} tokens · {self._speed()}", style="dim"
        )
        if self.failed:
            self.note.print(f"{self.failed} samples ended with an error, see their records", style="red")
