"""benchmarks/cpu from end to end on a tiny model, and what it says of other processes."""

import json
import pickle
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import tiny_llama
from tiny_tokenizers import byte_level

from benchmarks.cpu import __main__ as cpu
from benchmarks.cpu import llama, quiet
from benchmarks.cpu.quiet import Neighbours, busy_seconds

STAT = "cpu  1000 20 300 9000 700 10 5 15 0 0\ncpu0 1 1 1 1\n"


def test_what_the_process_of_llama_cpp_runs_can_be_found_there(monkeypatch):
    asked = []

    class Pool:
        def __init__(self, workers, mp_context):
            assert (workers, mp_context.get_start_method()) == (1, "spawn")

        def submit(self, function, *arguments):
            asked.append((pickle.dumps(function), *arguments))
            return SimpleNamespace(result=lambda: 7.0)

    monkeypatch.setattr(llama, "ProcessPoolExecutor", Pool)
    monkeypatch.delitem(sys.modules, "benchmarks.cpu.__main__")
    entered = runpy.run_module(
        "benchmarks.cpu", run_name="as_it_is_started"
    )  # which no other process can import
    assert entered["llama_cpp"](Path("some.gguf"), [1, 2], 8, 2)(1, False) == 7.0
    assert all(b"as_it_is_started" not in function for function, *_ in asked)
    assert asked[0][1:] == ("some.gguf", 2)


def test_busy_time_leaves_out_idle_and_waiting():
    assert busy_seconds(STAT, 100) == (1000 + 20 + 300 + 10 + 5 + 15) / 100


@pytest.fixture
def clocks(monkeypatch, tmp_path):
    """Clocks to be set by hand, and two cores."""
    stat = tmp_path / "stat"
    now = {"busy": 0, "own": 0.0, "clock": 0.0}

    class Clock:
        process_time = staticmethod(lambda: now["own"])
        perf_counter = staticmethod(lambda: now["clock"])
        monotonic = staticmethod(lambda: now["clock"])

        @staticmethod
        def sleep(seconds):
            now["clock"] += seconds
            now["busy"] += now.get("per_second", 0) * seconds
            set_stat()

    def set_stat():
        stat.write_text(f"cpu  {int(now['busy'])} 0 0 0 0 0 0 0 0 0\n")

    set_stat()
    now["write"] = set_stat
    monkeypatch.setattr(quiet, "time", Clock)
    monkeypatch.setattr(quiet, "STAT", stat)
    monkeypatch.setattr(quiet.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(quiet.os, "cpu_count", lambda: 2)
    return now


def test_the_share_of_the_others_is_what_this_process_did_not_use(clocks):
    neighbours = Neighbours()
    start = neighbours.start()
    clocks |= {"busy": 350, "own": 2.0, "clock": 3.0}  # 3.5 s of 2 x 3 s were used, 2 s of them here
    clocks["write"]()
    neighbours.stop(start)
    assert neighbours.seen == [pytest.approx(1.5 / 6)]


def test_ticks_decide_nothing_of_a_short_measurement(clocks):
    neighbours = Neighbours()
    for seconds, seen in ((0.01, []), (0.5, [0.03])):  # three ticks of others in each
        start = neighbours.start()
        clocks |= {"busy": clocks["busy"] + 3, "clock": clocks["clock"] + seconds}
        clocks["write"]()
        neighbours.stop(start)
        assert neighbours.seen == pytest.approx(seen)


@pytest.mark.parametrize(("per_second", "waited"), [(0, 0.5), (200, 5.0)], ids=["quiet", "busy"])
def test_waiting_ends_when_the_others_rest_or_patience_does(clocks, per_second, waited):
    clocks["per_second"] = per_second
    Neighbours(patience=5.0).wait()
    assert clocks["clock"] == waited


def test_without_a_count_of_the_system_nothing_is_known(monkeypatch):
    monkeypatch.setattr(quiet, "STAT", Path("/nowhere"))
    neighbours = Neighbours(patience=100.0)
    neighbours.wait()
    neighbours.stop(neighbours.start())
    assert neighbours.seen == []


def test_every_side_is_measured_in_both_cases(tmp_path, capsys):
    folder, output = tmp_path / "model", tmp_path / "cpu.jsonl"
    tokenizer = byte_level()
    tiny_llama(vocab_size=max(len(tokenizer), 64)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    cpu.main(
        str(folder), sides="float32,plain,bfloat16", steps=3, repeats=2, rows=2, quality=0, threads=1,
        output=output, as_json=True,
    )  # fmt: skip
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [json.loads(line) for line in output.read_text().splitlines()]
    names = [
        "handloom float32",
        "handloom plain",
        "handloom bfloat16",
        "generate float32",
        "generate bfloat16",
    ]
    assert [(row["case"], row["side"]) for row in printed] == [
        (case, name) for case in ("batch 1, greedy", "batch 2, sampling") for name in names
    ]
    for row in printed:
        assert 0 < row["median"] <= row["best"]
        assert row["others"] is None or 0 <= row["others"] <= 1
    rates = {row["side"]: row for row in printed[:5]}
    assert rates["generate float32"]["over_float32"] == 1.0
    assert rates["handloom plain"]["over_same_dtype"] == rates["handloom plain"]["over_float32"]
