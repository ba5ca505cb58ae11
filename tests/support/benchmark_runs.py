"""What the tests of the benchmarks share: a run of `decode.py`, and a clock."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def options(path: Path, *arguments: str) -> list[str]:
    """What every run is told: rows are printed, and appended to `path`."""
    fixed = ["--json", "--model", "tiny", "--threads", "1", "--repeats", "1"]
    return [*fixed, "--output", str(path), *arguments]


def rows_of(path: Path, printed: str) -> list[list[dict]]:
    """Rows that a run printed, and those that it appended to its file."""
    written = path.read_text(encoding="utf-8")
    return [[json.loads(line) for line in text.splitlines()] for text in (printed, written)]


def run_decode(folder: Path, *arguments: str) -> list[list[dict]]:
    """Rows of `decode.py` in a process of its own, whose memory is nobody else's."""
    path = folder / "decode.jsonl"
    command = [sys.executable, "-m", "benchmarks.decode", *options(path, *arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return rows_of(path, done.stdout)


class Ticks:
    """A clock that moves by one second whenever somebody looks at it."""

    def __init__(self):
        self.now = itertools.count()

    def __call__(self) -> float:
        return float(next(self.now))
