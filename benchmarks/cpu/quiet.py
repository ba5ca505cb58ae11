"""What other processes take of this machine while something is measured, and waiting until they take little."""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

STAT = Path("/proc/stat")
PAUSE = 0.5  # seconds that are looked at before a measurement
QUIET = 0.1  # share of the cores that others may take
SHORTEST = 0.2  # seconds over which a share is known: the system counts in ticks of a hundredth


def busy_seconds(text: str, ticks: int) -> float:
    """Processor seconds that all processes have used since the start of the machine.

    Args:
        text: contents of /proc/stat.
        ticks: of the clock, a second.
    """
    user, nice, system, idle, waiting, *others = map(int, text.split("\n", 1)[0].split()[1:9])
    del idle, waiting
    return (user + nice + system + sum(others)) / ticks


@dataclass
class Neighbours:
    """Share of the cores that processes other than this one take; without /proc/stat it is not known.

    Args:
        patience: seconds to wait at most, before each measurement, until the share is at or below `QUIET`.
        seen: shares during the measurements so far.
    """

    patience: float = 0.0
    seen: list[float] = field(default_factory=list)

    def wait(self) -> None:
        """Return once the others are quiet, or patience is at its end."""
        deadline = time.monotonic() + self.patience
        while STAT.exists() and time.monotonic() < deadline and self._during(PAUSE) > QUIET:
            pass

    def _during(self, seconds: float) -> float:
        start = self._now()
        time.sleep(seconds)
        return self._share(start)

    def start(self) -> tuple[float, float, float] | None:
        """A measurement begins; give the result to `stop`."""
        return self._now() if STAT.exists() else None

    def stop(self, start) -> None:
        """It has ended: its share is noted, unless that was too short to tell."""
        if start is not None and time.perf_counter() - start[2] >= SHORTEST:
            self.seen.append(self._share(start))

    @staticmethod
    def _now() -> tuple[float, float, float]:
        busy = busy_seconds(STAT.read_text(), os.sysconf("SC_CLK_TCK"))
        return busy, time.process_time(), time.perf_counter()

    def _share(self, start) -> float:
        busy, own, clock = (now - then for now, then in zip(self._now(), start, strict=True))
        return min(max(0.0, busy - own) / (clock * (os.cpu_count() or 1)), 1.0)
