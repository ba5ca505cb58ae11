"""The Triton sampling kernels in the interpreter, in one process that is told so before it imports anything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


SHARES = 4  # processes that divide the checks among them


@pytest.mark.parametrize("share", range(SHARES))
def test_kernels_compute_what_the_references_do(share):
    """A process of its own, because a stray pointer in the interpreter ends the process."""
    program = Path(__file__).resolve().parents[1] / "support" / "sampling" / "interpreted_kernels.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, program, "--share", f"{share}/{SHARES}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "0 failures" in done.stdout
