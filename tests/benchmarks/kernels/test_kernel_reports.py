"""The offline compile report tells a broken limit, and the GPU check says so where there is no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.compile.__main__ import as_limit, breaches, pipelines, sampling_cases

ROOT = Path(__file__).resolve().parents[3]
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
    assert breaches({**FIGURES, "over": []}, None) == []  # builds that bring their limits along
    assert breaches({**FIGURES, "over": ["8 bytes of spills"]}, None) == ["8 bytes of spills"]


def test_every_pipeline_is_compiled_as_it_is_launched():
    """What the report compiles for a pipeline is what a `Plan` of it asks for."""
    pytest.importorskip("triton")
    from handloom.kernels.sampling import fused as sample_fused
    from handloom.kernels.sampling import rules

    constants = {name: values for name, _, _, values, _ in sampling_cases()}
    seen = set()
    for name, chosen, full in pipelines():
        seen |= {rule.kind for rule in chosen}
        x = torch.zeros(1, 151936, dtype=torch.bfloat16)
        plan = sample_fused.Plan(x, rules=chosen, logprobs=full, n_top=20 * full)
        compiled = constants[f"sample {name} bf16"]
        assert (compiled["STEPS"], compiled["NEEDS"]) == (plan.steps, plan.needs)
        assert (compiled["MOMENTS"], compiled["PLANES"]) == (plan.moments, plan.planes)
        assert compiled["VARIANT"][0] == sample_fused.second_groups(plan.moments, full, plan.entropy)
        assert compiled["WIDTH"] == plan.width
    assert seen == set(sample_fused.KINDS)
    assert set(rules.TIES.values()) <= seen


def test_gpu_check_without_a_gpu_says_so_and_fails():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
