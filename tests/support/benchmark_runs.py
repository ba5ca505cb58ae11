"""What the tests of the benchmarks share: a run of `decode.py`, and a clock."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_decode(folder: Path, *arguments: str):
    """Rows that `decode.py` printed, and those that it appended to its file."""
    path = folder / "decode.jsonl"
    command = [
        sys.executable,
        "-m",
        "benchmarks.decode",
        "--json",
        "--model",
        "tiny",
        "--threads",
        "1",
    ]
    command += ["--repeats", "1", "--output", str(path), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    written = path.read_text(encoding="utf-8")
    return [[json.loads(line) for line in text.splitlines()] for text in (done.stdout, written)]


class Ticks:
    """A clock that moves by one second whenever somebody looks at it."""

    def __init__(self):
        self.now = itertools.count()

    def __call__(self) -> float:
        return float(next(self.now))
