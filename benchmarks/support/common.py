"""What every benchmark shares: rows with their circumstances, tables for people, both sides in turn."""

import functools
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TextIO, TypeVar

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
WIDTH = 150  # columns of a table that is not printed to a terminal
PACKAGES = ("torch", "transformers", "triton", "numpy", "bitsandbytes")


def git_commit() -> str:
    """Short hash of the commit that is checked out, with "+" if the code that is measured differs from it."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git(
            "status", "--porcelain", "--untracked-files=no", "engine", "kernels", "benchmarks/*.py"
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def hardware() -> dict:
    """Processor, cores that this process may use, threads of torch, and the accelerator if there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"cpu": cpu_name(), "cores": cores, "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found |= {"gpu": card.name, "gpu_memory_gib": round(card.total_memory / 2**30, 1)}
    return found


def cpu_name() -> str:
    """What the system calls the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def versions() -> dict:
    """Version of Python and of every package that decides the outcome."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@functools.cache
def _circumstances() -> dict:
    return {"commit": git_commit(), "hardware": hardware(), "versions": versions()}


def record(rows: Iterable[dict], path: Path) -> list[dict]:
    """Append rows to a JSON-lines file, each with time, commit, hardware and versions.

    Args:
        rows: one flat dict per measurement.
        path: the file; its folder is made if need be.

    Returns:
        The rows as written.
    """
    time = datetime.now(UTC).isoformat(timespec="seconds")
    written = [{**row, "time": time, **_circumstances()} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in written)
    return written


def read(path: Path) -> list[dict]:
    """All rows of a results file."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def show(title: str, columns: dict[str, str], rows: Iterable[dict], console: Console | None = None) -> None:
    """Print rows as a table.

    Args:
        columns: key in the row -> heading; a missing key prints as an empty cell, None as a dash. A column of
            which no row has the key is left out.
    """
    rows = list(rows)
    columns = {key: heading for key, heading in columns.items() if any(key in row for row in rows)}
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(columns.values()):
        table.add_column(heading, justify="left" if index < 2 else "right")
    for row in rows:
        table.add_row(*(_cell(row.get(key, "")) for key in columns))
    if console is None:
        console = Console()
        console = console if console.is_terminal else Console(width=WIDTH)
    console.print(table)


def _cell(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
    return str(value)


class Progress:
    """One line on standard error that says what runs now; outside a terminal a line for each case alone."""

    def __init__(self, stream: TextIO | None = None):
        self.stream = sys.stderr if stream is None else stream
        self._said = ""

    def __call__(self, case: str, detail: str = "") -> None:
        """Say what runs, and in a terminal which part of it."""
        if self.stream.isatty():
            self.stream.write(f"\r\x1b[K{case}{': ' if detail else ''}{detail}"[:WIDTH])
        elif case != self._said:
            self.stream.write(f"{case}\n")
        self._said = case
        self.stream.flush()

    def clear(self) -> None:
        """Leave the terminal's line empty."""
        if self.stream.isatty():
            self.stream.write("\r\x1b[K")
            self.stream.flush()


Measured = TypeVar("Measured")


def in_turn(
    sides: dict[str, Callable[[int], Measured]], repeats: int, warmup: int = 1
) -> dict[str, list[Measured]]:
    """Run every side once per round, so that a slow minute of the machine falls on all of them.

    Args:
        sides: name -> a function from the round's number to a measurement.
        repeats: rounds that count, > 0. warmup: rounds before them that do not.

    Returns:
        name -> `repeats` measurements, in the order of the rounds.
    """
    measured = {name: [] for name in sides}
    for turn in range(warmup + repeats):
        # The order alternates: whoever runs second finds warmer caches and a warmer processor.
        for name in sides if turn % 2 == 0 else reversed(sides):
            value = sides[name](turn)
            if turn >= warmup:
                measured[name].append(value)
    return measured


def median_ratio(above: list[float], below: list[float]) -> float:
    """Median over the rounds of `above / below`."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}
