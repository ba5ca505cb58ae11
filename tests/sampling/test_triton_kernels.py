"""The Triton sampling kernels in the interpreter, in one process that is told so before it imports anything."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


SHARES = 2  # processes that divide the checks among them


@pytest.mark.slow
@pytest.mark.parametrize("share", range(SHARES))
def test_kernels_compute_what_the_references_do(share):
    """A process of its own, because a stray pointer in the interpreter ends the process."""
    program = Path(__file__).resolve().parents[1] / "support" / "sampling" / "interpreted_kernels.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, program, "--share", f"{share}/{SHARES}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "0 failures" in done.stdout


def test_a_day_of_mixed_traffic_takes_four_builds():
    """1 to 256 rows; counts, exact counts, masses, min-p in every order; masks, log-probabilities, edit lists of 1 to
    1,999 tokens: what `warm_up` has compiled serves all of it, and a second process finds it on disk under the same
    names. Temperatures by the entropy, penalties and 16 alternatives take one build more each, the end of a step one.
    Processes of their own, as their driver is a stand-in."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # the folders of tests/support among them
    program = Path(__file__).resolve().parents[1] / "support" / "programs" / "counted_builds.py"
    days = [
        subprocess.Popen(
            [sys.executable, program, *seed],
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"PYTHONHASHSEED": hashed},
        )
        for seed, hashed in (("0", "1"), ("", "2"))
    ]
    (counts, names), (_, again) = (json.loads(day.communicate()[0]) for day in days)
    kernels, more = ("group", "row", "bin", "wide"), ("temperature", "top", "penalties")
    assert counts == {
        "warm-up": {f"{kernel}_kernel": 1 for kernel in kernels + more},
        "a step's end": {"append_kernel": 1},
    }
    assert names == again
    assert len(set(names.values())) == 4 + len(more) + 1
