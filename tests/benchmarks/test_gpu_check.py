"""The GPU check on a CPU, tiny: its sections, its clock, its interruptions, and the verdicts about its aims."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as gpu_check
from benchmarks.gpu import decode as gpu_decode
from benchmarks.gpu import targets as gpu_targets
from benchmarks.gpu.__main__ import Section, chosen, run
from benchmarks.gpu.decode import DRY
from benchmarks.support.common import read

ROOT = Path(__file__).resolve().parents[2]
TIMINGS = ["many_rows", "four_bits", "contexts", "sampling_timings", "attention_timings", "nf4_timings"]


def section(kind, *found, name="made_up", seconds=1.0, pause=0.0):
    """A section that yields what it is given, after a pause each."""

    def body(_):
        for one in found:
            time.sleep(pause)
            if isinstance(one, BaseException):
                raise one
            yield one

    body.__name__ = name
    return Section(body, seconds, kind)


def test_checks_of_the_engine_are_well_on_a_cpu(tmp_path):
    names = ["recorded_steps", "recorded_rules", "silent_steps"]
    well, rows = run(chosen(names, False, on_cuda=False), DRY, 500, tmp_path / "rows.jsonl")
    kept = read(tmp_path / "rows.jsonl")
    assert well
    assert rows == []
    assert [(row["check"], row["failed"], row["complete"]) for row in kept] == [
        (name, 0, True) for name in names
    ]


def test_a_recorded_step_that_draws_otherwise_is_a_failure(monkeypatch):
    from handloom.loop.graph import GraphBatch

    original = GraphBatch._advance

    def wrong(self):
        original(self)
        self.logits[1] += 3 * (self.logits[1] < 0)

    monkeypatch.setattr(GraphBatch, "_advance", wrong)
    found = list(gpu_decode.recorded_steps(DRY))
    assert any("llama, turn 0, request" in text for text in found if text)


def test_timings_run_to_their_end_and_keep_every_row(tmp_path):
    well, rows = run(chosen(TIMINGS, False, on_cuda=False), DRY, 500, tmp_path / "rows.jsonl")
    assert well
    assert {row["section"] for row in rows} == set(TIMINGS)
    assert read(tmp_path / "rows.jsonl") == json.loads(json.dumps(rows))
    assert [row["skipped"] for row in rows if "skipped" in row] == []
    ragged = {row["side"]: row for row in rows if row.get("benchmark") == "decode/ragged"}
    assert set(ragged) == {"handloom", "generate_batch"}
    assert all(row["tokens_per_s"] > 0 for row in ragged.values())
    assert {row["weights"] for row in rows if row["section"] == "four_bits"} == {"dense", "nf4", "nf4-triton"}
    gpu_check.tell(rows, tmp_path / "rows.jsonl")
    aims = [row for row in read(tmp_path / "rows.jsonl") if "target" in row]
    assert len(aims) == len(gpu_targets.TARGETS)
    by_text = {aim["target"]: aim for aim in aims}
    assert by_text["64 ragged rows with replacement: x generate_batch"]["measured"] == pytest.approx(
        ragged["handloom"]["tokens_per_s"] / ragged["generate_batch"]["tokens_per_s"]
    )
    assert by_text["8B, batch 1: x generate"]["met"] == "not measured"


def test_a_section_is_cut_off_and_what_it_leaves_over_is_used_by_the_next(tmp_path, capsys):
    rows = [{"value": n} for n in range(50)]
    slow = section("timing", *rows, name="slow", seconds=1.0, pause=0.05)
    quick = section("timing", {"value": 0}, name="quick", seconds=1.0)
    also = section("timing", *rows[:6], name="also", seconds=1.0, pause=0.05)
    _, first = run([slow, quick, also], DRY, 0.6, tmp_path / "a.jsonl")  # 0.2 s each, so `also` has 0.4
    found = [row["section"] for row in first]
    assert 1 <= found.count("slow") < 50
    assert found.count("quick") == 1
    assert found.count("also") == 6
    told = capsys.readouterr().out
    assert "slow: " in told
    assert "cut off" in told


def test_checks_that_fail_break_or_find_no_time_make_it_fail(tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    for found, well in (
        ([None, None], True),
        (["a wrong token"], False),
        ([None, ValueError("it broke")], False),
    ):
        assert run([section("kernel", *found)], DRY, 9, output)[0] is well
    assert run([section("kernel", *[None] * 90, pause=0.05)], DRY, 0.1, output)[0] is False
    last = read(output)[-1]
    assert (last["failed"], last["complete"]) == (0, False)
    told = capsys.readouterr().out
    assert "ValueError: it broke" in told
    assert "SHORT" in told


def test_a_broken_timing_keeps_its_rows_and_the_next_runs(tmp_path):
    sections = [section("timing", {"value": 1}, RuntimeError("no memory")), section("timing", {"value": 2})]
    well, rows = run(sections, DRY, 9, tmp_path / "rows.jsonl")
    assert well
    assert [row["value"] for row in rows] == [1, 2]


def test_interruption_keeps_what_is_there(tmp_path):
    sections = [section("timing", {"value": 1}, KeyboardInterrupt()), section("timing", {"value": 2})]
    assert not run(sections, DRY, 9, tmp_path / "rows.jsonl")[0]
    assert [row["value"] for row in read(tmp_path / "rows.jsonl")] == [1]


def test_what_does_not_come_back_is_broken_off(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "LAST_CALL", gpu_check.BUDGET + 0.2)
    began = time.monotonic()
    _, rows = run([section("timing", {"value": 1}, pause=30)], DRY, 0.1, tmp_path / "rows.jsonl")
    assert rows == []
    assert time.monotonic() - began < 25


def decode(side, tpot, **more):
    about = {"section": "large_steps", "model": gpu_targets.LARGE, "mode": "greedy", "batch": 1, "side": side}
    return {**about, "tpot_p50_ms": tpot, "mbu": 4.0 / tpot, **more}


def test_verdicts_by_hand():
    rows = [decode("handloom", 5.0), decode("handloom compile", 4.5), decode("generate", 24.0)]
    rows += [decode("generate static+compile", 6.3), decode("generate", 1.0, mode="sampling")]
    rows += [{"figure": f"everything on, {gpu_targets.LARGE}, batch 1", "value": 0.031}]
    sampled = {"benchmark": "kernels/sampling", "mode": "k+p+min-p", "side": "handloom", "rows": "typical"}
    rows += [
        {**sampled, "cache": "warm", "batch": 1, "p50": 8.0},
        {**sampled, "cache": "warm", "batch": 8, "p50": 11.5},
    ]
    rows += [{**sampled, "cache": "warm", "batch": 64, "p50": 40.0}]
    rows += [
        {**sampled, "cache": "cold", "batch": n, "bandwidth_share": s} for n, s in ((64, 0.8), (256, 0.5))
    ]
    rows += [
        {"section": "four_bits", "batch": 1, "weights": w, "value": v}
        for w, v in (("nf4", 3.0), ("nf4-triton", 4.0))
    ]
    found = {aim["target"]: (aim["measured"], aim["met"]) for aim in gpu_targets.verdicts(rows)}
    assert found["8B, batch 1, compiled: share of the bandwidth"] == (pytest.approx(4 / 4.5), "yes")
    assert found["8B, batch 1: share of the bandwidth"] == (0.8, "yes")
    assert found["8B, batch 1: x generate"] == (pytest.approx(4.8), "no")
    assert found["8B, batch 1, compiled: x static + compile"] == (pytest.approx(1.4), "yes")
    assert found["8B: everything switched on, share of the step"] == (0.031, "no")
    assert found["1B: everything switched on, share of the step"] == (None, "not measured")
    assert found["sampling, at most 8 rows, all filters: us"] == (11.5, "yes")
    assert found["sampling, 64 and 256 rows, all filters: x one read"] == (2.0, "yes")
    assert found["nf4, batch 1: our product x bitsandbytes'"] == (0.75, "no")


def test_sections_by_name():
    assert [s.name for s in chosen(["contexts"], False)] == ["contexts"]
    assert all(s.kind != "timing" for s in chosen(None, True))
    assert sum(s.seconds for s in gpu_check.SECTIONS) <= gpu_check.BUDGET * 1.1
    with pytest.raises(SystemExit, match="contxts: expected recorded_steps"):
        chosen(["contxts"], False)


@pytest.mark.slow
def test_the_whole_script_end_to_end(tmp_path):
    """Compiled sides too; some minutes on a slow machine."""
    output = tmp_path / "rows.jsonl"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--budget", "3000", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = read(output)
    assert [row for row in rows if row.get("failed")] == []
    assert [row["skipped"] for row in rows if "skipped" in row] == []
    assert {"handloom compile", "generate static+compile", "loop"} <= {row.get("side") for row in rows}
    assert "not measured" in done.stdout
