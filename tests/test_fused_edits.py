"""Edits in the fused sampler: the tokens of one rule after the other, in any order, and what explain() says of it."""

import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from edit_programs import Program, compare
from hypothesis import given, settings
from hypothesis import strategies as st

from handloom import rows as rows_module
from handloom.processors import DEFAULT_ORDER
from handloom.rows import unfused_alone

VOCAB = 150


def fused_everywhere(monkeypatch):
    """Let a CPU build the edits of the sampler too, as a device does."""
    monkeypatch.setattr(rows_module, "implementation", lambda device: None)


def check(program, moves):
    """Run a program; returns the names of the fused members of all its steps."""
    names = []
    for drawn, tokens, logprobs, members in program.run(moves):
        difference = compare(drawn, tokens, logprobs)
        assert not difference, f"{members}: {difference}"
        names += [name for name in members.split() if not name.startswith("[")]
    return names


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(0, 2**32))
def test_programs_on_the_cpu(seed):
    check(Program(random.Random(seed), VOCAB), 6)


@pytest.mark.parametrize("seed", range(60))
def test_programs_with_the_sampler_making_the_edits(seed, monkeypatch):
    fused_everywhere(monkeypatch)
    check(Program(random.Random(seed), VOCAB), 6)


def test_the_programs_fuse_every_member_that_can_be(monkeypatch):
    """Otherwise the tests above would compare nothing."""
    fused_everywhere(monkeypatch)
    seen = Counter(name for seed in range(100, 140) for name in check(Program(random.Random(seed), VOCAB), 4))
    fusable = {rule.name for rule in DEFAULT_ORDER if not unfused_alone(rule())} | {
        "Cheer",
        "EvenOnly",
        "Cap",
    }
    assert (fusable | {"bitmask"}) - {"prefix_fn", "epsilon", "eta", "top_a"} == set(seen)
    assert min(seen.values()) >= 5


def interpreted(first, last):
    """Run programs in a process of its own, because a stray pointer in the interpreter ends the process."""
    program = Path(__file__).with_name("interpreted_edits.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, program, str(first), str(last)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "0 failures" in done.stdout


def test_programs_in_the_kernels():
    pytest.importorskip("triton")
    interpreted(0, 8)


@pytest.mark.slow
def test_more_programs_in_the_kernels():
    pytest.importorskip("triton")
    interpreted(8, 40)
