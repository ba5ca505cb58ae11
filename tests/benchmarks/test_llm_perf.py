"""The LLM-Perf protocol, and its reports in optimum-benchmark's form."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
import typer
from benchmark_runs import Ticks, options, rows_of
from typer.testing import CliRunner

from benchmarks.decode import llm_perf
from benchmarks.decode.__main__ import main
from benchmarks.decode.llm_perf import Contender, Protocol, latency, memory, report
from benchmarks.decode.sides import Timeline
from benchmarks.decode.speed import Subject
from benchmarks.support.common import Progress
from benchmarks.support.shapes import build, sizes

TARGETS = {"load_model", "first_generate", "generate", "prefill", "decode", "per_token"}
ENTRY = {"memory", "latency", "throughput", "energy", "efficiency"}
LATENCY = {"unit", "values", "count", "total", "mean", "p50", "p90", "p95", "p99", "stdev", "stdev_"}
MEMORY = {"unit", "max_ram", "max_global_vram", "max_process_vram", "max_reserved", "max_allocated"}
CONFIG = {"name", "backend", "scenario", "launcher", "environment", "print_report", "log_report"}


@pytest.fixture(scope="module")
def perf(tmp_path_factory):
    """Rows of the protocol with one iteration, and the folder of its reports."""
    folder = tmp_path_factory.mktemp("perf")
    path, app = folder / "decode.jsonl", typer.Typer()
    app.command()(main)
    told = ("--preset", "llm-perf", "--duration", "0", "--reports", str(folder))
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    try:
        done = CliRunner().invoke(app, options(path, *told))
    finally:
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity(verbosity)
        transformers.logging.enable_progress_bar()
    assert done.exit_code == 0, done.output
    return rows_of(path, done.stdout)[1], folder


def test_defaults_are_those_of_llm_perf():
    assert Protocol() == Protocol(batch=1, prompt=256, new=64, warmup=10, iterations=10, duration=10.0)


def test_latency_by_hand():
    found = latency([4.0, 1.0, 3.0, 2.0])
    assert set(found) == LATENCY
    assert found["unit"] == "s"
    assert found["values"] == [4.0, 1.0, 3.0, 2.0]
    assert (found["count"], found["total"], found["mean"], found["p50"]) == (4, 10.0, 2.5, 2.5)
    assert (found["p90"], found["p95"], found["p99"]) == pytest.approx((3.7, 3.85, 3.97))
    assert found["stdev"] == pytest.approx(math.sqrt(1.25))
    assert found["stdev_"] == pytest.approx(100 * math.sqrt(1.25) / 2.5)


def test_report_by_hand():
    runs = [Timeline([[1.0, 2.0, 4.0], [1.5, 2.0, 4.0]], 4.5), Timeline([[2.0, 3.0, 5.0]] * 2, 5.5)]
    found = report(Protocol(batch=2, new=3), Contender(None, loaded=7.0, first=6.0, runs=runs))
    assert found["load_model"]["latency"]["values"] == [7.0]
    assert found["first_generate"]["latency"]["values"] == [6.0]
    assert found["generate"]["latency"]["values"] == [4.5, 5.5]
    assert found["prefill"]["latency"]["values"] == [1.5, 2.0]  # until the last row has its first token
    assert found["decode"]["latency"]["values"] == [3.0, 3.5]
    assert found["per_token"]["latency"]["values"] == [1.0, 2.0, 1.0, 2.0]
    assert found["generate"]["throughput"] == {"unit": "samples/s", "value": 2 / 5.0}
    assert found["prefill"]["throughput"] == {"unit": "samples/s", "value": 2 / 1.75}
    assert found["decode"]["throughput"] == {"unit": "tokens/s", "value": 4 / 3.25}
    assert found["per_token"]["throughput"] is None


def test_memory_by_hand(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30_000_000, 100_000_000))
    peak = SimpleNamespace(
        device=torch.device("cuda"), resident=5_000_000, allocated=1_500_000, reserved=2_000_000
    )
    assert memory(peak) == {
        "unit": "MB", "max_ram": 5.0, "max_global_vram": 70.0, "max_process_vram": None, "max_reserved": 2.0,
        "max_allocated": 1.5,
    }  # fmt: skip
    peak = SimpleNamespace(device=torch.device("cpu"), resident=5_000_000, allocated=None, reserved=None)
    assert memory(peak) == dict.fromkeys(MEMORY) | {"unit": "MB", "max_ram": 5.0}


def test_protocol_runs_every_side_until_it_has_its_iterations_and_seconds(tmp_path):
    model = build("tiny", torch.float32)
    subject = Subject("tiny", model, sizes(model.config, torch.float32))
    protocol = Protocol(prompt=8, new=4, warmup=1, iterations=2, duration=4.0)
    # A round is one second by this clock, so four of them.
    rows = [
        row
        for batch in llm_perf.measure(
            protocol, subject, ["loop", "handloom"], (3.0, None), tmp_path, Progress(), clock=Ticks()
        )
        for row in batch
    ]
    assert [(row["side"], row["repeats"]) for row in rows] == [("loop", 4), ("handloom", 4)]
    for side in ("loop", "handloom"):
        found = json.loads((tmp_path / f"tiny-{side}" / "benchmark_report.json").read_text())
        assert found["load_model"]["latency"]["values"] == [4.0]  # three to load, one to set up
        assert found["per_token"]["latency"]["count"] == 4 * 3


def test_both_sides_leave_a_row_and_a_report(perf):
    rows, folder = perf
    assert [row["side"] for row in rows] == ["handloom", "generate"]
    # One round, so the ratio is that of its two speeds.
    assert rows[1]["ratio"] == pytest.approx(rows[0]["tokens_per_s"] / rows[1]["tokens_per_s"])
    for row in rows:
        assert row["benchmark"] == "decode/llm-perf"
        assert (row["batch"], row["context"], row["new_tokens"]) == (1, 256, 64)
        assert row["protocol"]["warmup"] == 10
        files = {path.name for path in (folder / row["report"]).iterdir()}
        assert files == {"benchmark_report.json", "benchmark_config.json", "benchmark.json"}


def test_report_has_the_keys_and_units_of_optimum_benchmark(perf):
    rows, folder = perf
    for row in rows:
        place = folder / row["report"]
        found = json.loads((place / "benchmark_report.json").read_text())
        config = json.loads((place / "benchmark_config.json").read_text())
        assert json.loads((place / "benchmark.json").read_text()) == {"config": config, "report": found}
        assert set(found) == TARGETS
        for target, entry in found.items():
            assert set(entry) == ENTRY
            assert entry["energy"] is None  # not measured
            assert set(entry["latency"]) == LATENCY
            assert entry["latency"]["unit"] == "s"
            assert (entry["memory"] is None) == (target == "per_token")
            if entry["memory"]:
                assert set(entry["memory"]) == MEMORY
                assert entry["memory"]["unit"] == "MB"
                assert 50 < entry["memory"]["max_ram"] < 1e5  # megabytes of a Python process with torch
        units = {
            target: entry["throughput"] and entry["throughput"]["unit"] for target, entry in found.items()
        }
        assert units == dict.fromkeys(TARGETS) | {
            "generate": "samples/s", "prefill": "samples/s", "decode": "tokens/s",
        }  # fmt: skip
        whole, first, rest = (found[t]["latency"]["total"] for t in ("generate", "prefill", "decode"))
        assert whole == pytest.approx(first + rest)
        assert found["per_token"]["latency"]["count"] == 63
        assert found["per_token"]["latency"]["total"] <= rest
        assert set(config) == CONFIG
        assert config["backend"]["torch_dtype"] == "float32"
        assert config["backend"]["no_weights"] is True
        assert config["scenario"]["input_shapes"] == {"batch_size": 1, "sequence_length": 256}
        assert config["scenario"]["generate_kwargs"]["min_new_tokens"] == 64


def test_optimum_benchmark_reads_the_reports(perf):
    theirs = pytest.importorskip("optimum_benchmark", reason="optimum-benchmark is not installed")
    rows, folder = perf
    for row in rows:
        place = folder / row["report"]
        found = theirs.BenchmarkReport.from_json(place / "benchmark_report.json")
        assert found.decode.throughput.unit == "tokens/s"
        assert found.per_token.latency.count == 63
        assert found.to_dict() == json.loads((place / "benchmark_report.json").read_text())
        whole = theirs.Benchmark.from_json(place / "benchmark.json")
        assert whole.report.to_dict() == found.to_dict()
        assert whole.config.to_dict() == json.loads((place / "benchmark_config.json").read_text())
        # Their own statistics of our values are our statistics.
        values = found.per_token.latency
        again = type(values).from_values(values.values, unit="s")
        assert (again.mean, again.p99, again.stdev_) == pytest.approx(
            (values.mean, values.p99, values.stdev_)
        )
        assert "tokens/s" in found.to_markdown_text()
