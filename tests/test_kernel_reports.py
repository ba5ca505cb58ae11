"""The offline compile report tells a broken limit, and the GPU check says so where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # `benchmarks` is not installed; appended, so that it shadows nothing

from benchmarks.compile_report import as_limit, breaches  # noqa: E402

FIGURES = {"registers": 40, "spills": 0, "shared": 64, "wide_loads": 2, "contractions": 0, "seconds": 1.0}


def test_each_limit_is_held():
    limit = as_limit("noise", FIGURES)
    assert breaches(FIGURES, limit) == []
    assert breaches({**FIGURES, "spills": 4}, limit) == ["spills > 0"]
    assert breaches({**FIGURES, "registers": 49}, limit) == ["registers > 48"]
    assert breaches({**FIGURES, "shared": 2000}, limit) == ["shared > 1088"]
    assert breaches({**FIGURES, "wide_loads": 1}, limit) == ["wide_loads < 2"]
    assert breaches({**FIGURES, "contractions": 1}, limit) == ["contractions > 0"]
    assert breaches({**FIGURES, "contractions": 9}, as_limit("another", FIGURES)) == []
    assert breaches(FIGURES, None) == ["no limit recorded: run with --write"]
    assert breaches({"error": "it exited"}, limit) == ["it exited"]


def test_gpu_check_without_a_gpu_says_so_and_fails():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    program = ROOT / "benchmarks" / "gpu_check.py"
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
