"""How often the sampling kernels are compiled over a day of mixed traffic, counted by a spy on the compiler."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SUPPORT = Path(__file__).resolve().parents[1] / "support" / "sampling"


def test_a_day_of_mixed_traffic_takes_four_builds_and_one_for_edits():
    """1 to 256 rows; counts, exact counts, masses, min-p in every order; masks, log-probabilities, edit lists of 1 to
    1,999 tokens: what `warm_up` has compiled serves all of it. A process of its own, as its driver is a stand-in."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SUPPORT / "counted_builds.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = ("group", "list", "row", "bin", "wide")
    assert json.loads(done.stdout) == {"warm-up": {f"{kernel}_kernel": 1 for kernel in kernels}}
