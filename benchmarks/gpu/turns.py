"""Turns on one device: sections compile and warm up side by side, and each measures alone."""

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Turns:
    """A lock of several processes that is shared, or held alone. Who waits to be alone is not overtaken.

    Args:
        path: of the file that is locked; a second one beside it is the door through which everybody comes.
    """

    def __init__(self, path: Path):
        self._file, self._door = path.open("a"), path.with_suffix(".door").open("a")
        self.alone_for = 0.0  # seconds that this process had the device to itself
        self.waited_for = 0.0  # seconds in which others had it, after this process let them

    def _take(self, mode: int) -> None:
        fcntl.flock(self._door, fcntl.LOCK_EX)
        fcntl.flock(self._file, mode)
        fcntl.flock(self._door, fcntl.LOCK_UN)

    def _leave(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Use the device beside others."""
        self._take(fcntl.LOCK_SH)
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Have the device alone; inside `shared`, which is left for as long."""
        self._leave()
        self._take(fcntl.LOCK_EX)
        started = time.monotonic()
        try:
            yield
        finally:
            self.alone_for += time.monotonic() - started
            self._leave()
            self._take(fcntl.LOCK_SH)

    def let_others(self) -> None:
        """Let whoever waits to be alone go first; inside `shared`."""
        started = time.monotonic()
        self._leave()
        self._take(fcntl.LOCK_SH)
        self.waited_for += time.monotonic() - started
