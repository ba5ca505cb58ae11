"""The GPU check on a CPU, tiny: its sections, its clock, its interruptions, and the verdicts about its aims."""

import fcntl
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmark_runs import Ticks
from helpers import until

from benchmarks.gpu import __main__ as gpu_check
from benchmarks.gpu import checks, targets
from benchmarks.gpu import turns as gpu_turns
from benchmarks.gpu.__main__ import SECTIONS, Section, chosen, run, run_check, run_section, run_timing
from benchmarks.gpu.scale import DRY
from benchmarks.gpu.turns import Turns
from benchmarks.support.common import read
from handloom.kernels import launching

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def uncompiled():
    """What would be compiled runs as it is: `test_speed` compiles every compiled side."""
    with torch.compiler.set_stance("force_eager"):
        yield


def made_up(*found, name="made_up", seconds=9.0, pause=0.0, check=False):
    """A section that yields what it is given, after a pause each."""

    def body(scale):
        for one in found:
            with scale.alone():
                time.sleep(pause)
            if isinstance(one, BaseException):
                raise one
            yield one

    body.__name__, body.__module__ = name, checks.__name__ if check else __name__
    return Section(body, seconds, 3)


@pytest.fixture
def turns(tmp_path):
    """A lock that this process shares."""
    made = Turns(tmp_path / "turns")
    with made.shared():
        yield made


def dry(name):
    """A section that runs on a CPU."""
    (found,) = chosen([name], False, on_cuda=False)
    return found


@pytest.mark.parametrize("name", ["recorded_steps", "recorded_rules", "silent_steps", "compiled_steps"])
def test_checks_of_the_engine_are_well_on_a_cpu(name, tmp_path, uncompiled):
    assert run_section(dry(name), DRY, tmp_path / "turns", tmp_path / "rows.jsonl")
    (row,) = read(tmp_path / "rows.jsonl")
    assert (row["check"], row["failed"], row["complete"]) == (name, 0, True)


def test_a_recorded_step_that_draws_otherwise_is_a_failure(monkeypatch):
    from handloom.loop.graph import GraphBatch

    original = GraphBatch._advance

    def wrong(self):
        original(self)
        self.logits[1] += 3 * (self.logits[1] < 0)

    monkeypatch.setattr(GraphBatch, "_advance", wrong)
    found = list(checks.recorded_steps(DRY))
    assert any("llama, turn 0, request" in text for text in found if text)


@pytest.mark.parametrize("name", [s.name for s in SECTIONS if not s.cuda and not s.is_check])
def test_timings_run_to_their_end_and_keep_every_row(name, tmp_path, uncompiled):
    assert run_section(dry(name), DRY, tmp_path / "turns", tmp_path / "rows.jsonl")
    rows = read(tmp_path / "rows.jsonl")
    assert rows
    assert {row["section"] for row in rows} == {name}
    assert [row["skipped"] for row in rows if "skipped" in row] == []
    figures = [
        row[key] for row in rows for key in ("value", "tokens_per_s", "p50") if row.get(key) is not None
    ]
    assert len(figures) >= len(rows)
    gpu_check.tell(rows, tmp_path / "aims.jsonl")
    aims = read(tmp_path / "aims.jsonl")
    assert [aim["target"] for aim in aims] == [target.text for target in targets.TARGETS]


def test_a_section_is_cut_off_when_it_had_the_device_for_its_time(turns, tmp_path, capsys, monkeypatch):
    """By a clock that says that each row took a second."""
    monkeypatch.setattr(gpu_turns, "time", SimpleNamespace(monotonic=Ticks()))
    slow = made_up(*({"value": n} for n in range(50)), seconds=3.5)
    run_timing(slow, replace(DRY, alone=turns.alone), turns, tmp_path / "rows.jsonl")
    assert len(read(tmp_path / "rows.jsonl")) == 4
    assert "cut off: its time is up" in capsys.readouterr().out


def test_checks_that_fail_break_or_find_no_time_are_not_well(turns, tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    cases = (([None, None], True), (["a wrong token"], False), ([None, ValueError("it broke")], False))
    for found, well in cases:
        assert run_check(made_up(*found, check=True), DRY, turns, output) is well
    assert run_check(made_up(*[None] * 90, seconds=0.1, pause=0.05, check=True), DRY, turns, output) is False
    last = read(output)[-1]
    assert (last["failed"], last["complete"]) == (0, False)
    told = capsys.readouterr().out
    assert "ValueError: it broke" in told
    assert "SHORT" in told


def test_a_check_is_not_cut_off_for_the_time_in_which_others_measured(turns, tmp_path, monkeypatch):
    """By clocks that say that each look took a second; others have the device for ten of it after every case."""
    seconds = iter(range(10**6))
    clock = SimpleNamespace(monotonic=lambda: float(next(seconds)))
    monkeypatch.setattr(gpu_turns, "time", clock)
    monkeypatch.setattr(gpu_check, "time", clock)
    take = Turns._take

    def slow(self, mode):
        take(self, mode)
        [next(seconds) for _ in range(10)]

    monkeypatch.setattr(Turns, "_take", slow)
    output = tmp_path / "rows.jsonl"
    assert run_check(made_up(*[None] * 9, seconds=30, check=True), DRY, turns, output)
    assert not run_check(made_up(*[None] * 40, seconds=30, check=True), DRY, turns, output)
    assert [row["complete"] for row in read(output)] == [True, False]


def test_a_broken_timing_keeps_its_rows(turns, tmp_path, capsys):
    run_timing(made_up({"value": 1}, RuntimeError("no memory")), DRY, turns, tmp_path / "rows.jsonl")
    assert [row["value"] for row in read(tmp_path / "rows.jsonl")] == [1]
    assert "BROKEN: RuntimeError: no memory" in capsys.readouterr().out


def held(path):
    """Whether somebody has the lock of a file."""
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_who_measures_is_alone_and_who_waits_for_it_is_not_overtaken(tmp_path):
    path, heard = tmp_path / "turns", []

    def measure():
        other = Turns(path)
        with other.shared():
            heard.append("here")
            with other.alone():
                heard.append("alone")
                time.sleep(0.1)
                heard.append("done")

    mine = Turns(path)
    with mine.shared():
        thread = threading.Thread(target=measure)
        thread.start()
        until(lambda: heard and held(path.with_suffix(".door")))  # it waits to be alone
        assert heard == ["here"]
        mine.let_others()
        assert heard == ["here", "alone", "done"]
    thread.join()


def test_what_does_not_come_back_is_ended_and_rows_are_kept(tmp_path, monkeypatch, capsys):
    output, stuck = tmp_path / "rows.jsonl", "import time; time.sleep(600)"
    kept = f"open({str(output)!r}, 'a').write('{{\"value\": 1}}\\n')"
    programs = {"quick": kept, "stuck": stuck, "later": kept}
    original = gpu_check.Children.run

    def other(self, command):
        return original(self, [sys.executable, "-c", programs[command[command.index("--section") + 1]]])

    monkeypatch.setattr(gpu_check.Children, "run", other)
    began = time.monotonic()
    sections = [made_up(name=name, check=name == "stuck") for name in programs]
    well, rows = run(sections, [], 6.0, 1, output)
    assert time.monotonic() - began < 300
    assert not well  # a check that did not come back
    assert rows == [{"value": 1}]  # what would have started after the end did not
    told = capsys.readouterr().out
    assert "stuck: time is up" in told
    assert "later: time is up" in told


def test_a_section_that_dies_spoils_no_other(tmp_path, monkeypatch, capsys):
    programs = {"dies": "import os; print('at the brink'); os.abort()", "lives": "print('fine')"}
    original = gpu_check.Children.run

    def other(self, command):
        return original(self, [sys.executable, "-c", programs[command[command.index("--section") + 1]]])

    monkeypatch.setattr(gpu_check.Children, "run", other)
    well, rows = run([made_up(name=name) for name in programs], [], 60, 2, tmp_path / "rows.jsonl")
    told = capsys.readouterr().out
    assert (well, rows) == (False, [])
    assert "BROKEN dies: exit status -6" in told
    assert "at the brink" in told
    assert "fine" in told


def test_what_finds_nothing_to_check_says_so_and_is_well(turns, tmp_path, capsys, monkeypatch):
    output = tmp_path / "rows.jsonl"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert run_check(Section(checks.memory_faults, 9, 3), DRY, turns, output)
    (row,) = read(output)
    assert row["skipped"] == f"compute-sanitizer is neither on PATH nor in {tmp_path}/cuda"
    assert "SKIPPED memory_faults" in capsys.readouterr().out


def test_faults_are_looked_for_with_the_toolkits_own_tool(tmp_path, monkeypatch):
    """A stand-in that finds one, in the folder of the toolkit."""
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho '===== Invalid read of size 4'\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert list(checks.memory_faults(DRY)) == ["===== Invalid read of size 4", None]


@pytest.mark.slow
def test_what_is_run_under_the_tool_finds_its_rows():
    """In a process without this one's paths."""
    program = f"import torch\ntorch.randn = None\n{checks.ODD_SHAPES}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "").split(os.pathsep)[0]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.stderr.splitlines()[-1] == "TypeError: 'NoneType' object is not callable"


def test_early_starts_can_be_switched_off(monkeypatch):
    """As for a device that has them."""
    monkeypatch.setattr(launching, "_overlaps", lambda index: True)
    cuda = torch.device("cuda", 0)
    assert launching.beside(cuda) == ({"PDL": True}, {"launch_pdl": True})
    with launching.early(False):
        assert launching.beside(cuda) == ({"PDL": False}, {})
        with launching.early(True):
            assert launching.beside(cuda)[0] == {"PDL": True}
    assert launching.beside(cuda)[0] == {"PDL": True}


def test_an_error_without_text_is_named_by_its_kind():
    assert checks.first_line(AssertionError()) == "AssertionError"
    assert checks.first_line(ValueError("one\ntwo")) == "one"


def decode(side, tpot, **more):
    about = {"benchmark": "decode/speed", "section": "large_steps", "model": targets.LARGE, "mode": "greedy"}
    about |= {"batch": 1, "context": 128, "side": side}
    return {**about, "tpot_p50_ms": tpot, "mbu": 4.0 / tpot, **more}


def test_verdicts_by_hand():
    rows = [decode("handloom", 5.0), decode("handloom compile", 4.5), decode("generate", 24.0)]
    rows += [decode("generate static+compile", 6.3), decode("generate", 1.0, mode="sampling")]
    rows += [
        decode("handloom", 1.0, section="first_tokens", ttft_ms=11.0),
        decode("handloom", 6.4, context=32768),
    ]
    rows += [decode("handloom", 6.6, context=32768, section="contexts")]
    rows += [{"figure": f"everything on, {targets.LARGE}, batch 1", "value": 0.031}]
    rows += [{"figure": f"step of a State over the loop's, {targets.LARGE}", "value": 1.1}]
    served = {"benchmark": "decode/ragged", "model": targets.SMALL}
    rows += [{**served, "side": "handloom", "tokens_per_s": 9000, "tpot_p99_ms": 31}]
    rows += [{**served, "side": "generate_batch", "tokens_per_s": 500}]
    sampled = {"benchmark": "kernels/sampling", "mode": "k+p+min-p", "rows": "typical", "cache": "warm"}
    rows += [
        {**sampled, "side": "handloom", "batch": batch, "p50": us} for batch, us in ((1, 8.0), (8, 15.5))
    ]
    rows += [{**sampled, "side": "flashinfer", "batch": 8, "ratio": 2.5}]
    layer = {"benchmark": "kernels/nf4", "batch": 1, "side": "dense"}
    rows += [{**layer, "layer": "a", "ratio": 2.0}, {**layer, "layer": "b", "ratio": 1.7}]
    rows += [
        {**layer, "layer": name, "side": "handloom int8", "ratio": of}
        for name, of in (("a", 1.0), ("b", 0.5))
    ]
    found = {aim["target"]: (aim["measured"], aim["met"]) for aim in targets.verdicts(rows)}
    assert found["8B, one row, compiled: share of the bandwidth"] == (pytest.approx(4 / 4.5), "yes")
    assert found["8B, one row: share of the bandwidth"] == (0.8, "yes")
    assert found["1B, one row: share of the bandwidth"] == (None, "not measured")
    assert found["8B, one row: x generate"] == (pytest.approx(4.8), "no")
    assert found["8B, one row, compiled: x static + compile"] == (pytest.approx(1.4), "yes")
    assert found["8B, 128-token prompt: ms to the first token"] == (11.0, "yes")
    assert found["8B, 32,768-token context: ms a token"] == (6.6, "no")
    assert found["8B: everything switched on, share of the step"] == (0.031, "no")
    assert found["8B: step of a State over the loop's"] == (1.1, "yes")
    assert found["ragged requests, 1B: tokens/s"] == (9000, "yes")
    assert found["ragged requests, 1B: x generate_batch"] == (18.0, "yes")
    assert found["ragged requests, 1B: ms between tokens, p99"] == (31, "no")
    assert found["sampling k+p+min-p, typical, 1 rows: us"] == (8.0, "yes")
    assert found["sampling k+p+min-p, typical, 8 rows: us"] == (15.5, "no")
    assert found["sampling k+p+min-p, 8 rows: x flashinfer"] == (2.5, "yes")
    assert found["nf4, 1 rows: x dense"] == (1.7, "no")
    assert found["int8, 1 rows: x dense"] == (2.0, "yes")


def test_sections_by_name_and_size():
    assert [s.name for s in chosen(["contexts"], False)] == ["contexts"]
    assert all(s.is_check for s in chosen(None, True))
    assert len({s.name for s in SECTIONS}) == len(SECTIONS)
    sizes = [{s.name for s in chosen(None, False, minutes)} for minutes in gpu_check.MINUTES]
    assert sizes[0] < sizes[1] < sizes[2] == {s.name for s in SECTIONS}
    for minutes in gpu_check.MINUTES:  # those that measure take turns
        alone = sum(s.seconds for s in chosen(None, False, minutes) if not s.is_check)
        assert alone <= 60 * minutes - gpu_check.GRACE
    with pytest.raises(SystemExit, match="contxts: expected recorded_steps"):
        chosen(["contxts"], False)


def told_to(monkeypatch, *arguments):
    """The exit status of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", *map(str, arguments)])
    monkeypatch.chdir(ROOT)
    return gpu_check.main()


@pytest.mark.slow
def test_the_whole_command_end_to_end(tmp_path, monkeypatch, capsys):
    """A section runs in a process of its own."""
    output = tmp_path / "rows.jsonl"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert told_to(monkeypatch, "--dry", "--only", "silent_steps", "--output", output) == 0
    row, *aims = read(output)
    assert (row["check"], row["failed"], row["complete"]) == ("silent_steps", 0, True)
    assert {aim["met"] for aim in aims} == {"not measured"}
    assert "not measured" in capsys.readouterr().out


def test_without_a_gpu_it_says_so_and_fails(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert told_to(monkeypatch) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_fused_layers_that_compute_something_else_are_a_failure(monkeypatch):
    from handloom.forward.fused.layers import Structure

    assert [text for text in checks.fused_layers(DRY) if text] == []
    right = Structure.__call__

    def wrong(self, hidden, cache, turns):
        out = right(self, hidden, cache, turns)
        return out if len(out) < 8 else 1.2 * out  # as a kernel that is wrong at eight rows

    monkeypatch.setattr(Structure, "__call__", wrong)
    found = [text for text in checks.fused_layers(DRY) if text]
    assert any("llama torch.float32, 8 rows" in text for text in found)
    assert not any(" 2 rows" in text for text in found)
