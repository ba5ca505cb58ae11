"""The benchmark of decoding, end to end on a tiny model, and the instruments that it measures with."""

import io
import json
import mmap
from collections import Counter
from pathlib import Path

import pytest
import torch
import typer
from benchmark_runs import run_decode
from rich.console import Console
from typer.testing import CliRunner

from benchmarks.decode import __main__ as decode
from benchmarks.decode.counting import operations, per_step, python_calls, seconds_outside, sort_calls
from benchmarks.decode.memory import resident_bytes
from benchmarks.support import bandwidth
from benchmarks.support.common import Progress, in_turn, median_ratio, read, record, show
from benchmarks.support.peak import Peak

PLAIN = ["handloom", "generate", "generate_batch", "loop"]
# The tiny model by hand: 2 layers of 4 and 2 heads of 16, 64 wide, 128 inside, 512 tokens, float32.
LAYER = 64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 128 + 2 * 64
READ = 4 * (2 * LAYER + 64 + 512 * 64)  # without the table that is only looked up
CELL = 4 * 2 * 2 * 2 * 16


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Every section, at the smallest sizes."""
    return run_decode(tmp_path_factory.mktemp("results"), "--preset", "quick")


def test_every_section_leaves_rows_with_their_circumstances(quick):
    printed, written = quick
    assert printed == written
    assert {row["benchmark"] for row in written} == {f"decode/{name}" for name in decode.SECTIONS}
    for row in written:
        assert row["commit"]
        assert row["hardware"]["threads"] == 1
        assert row["versions"]["torch"] == torch.__version__
        assert row["preset"] == "quick"


@pytest.mark.parametrize(("batch", "limit"), [(1, 10), (3, 10)])
def test_speed_of_every_side(quick, batch, limit):
    rows = {
        row["side"]: row for row in quick[1] if row["benchmark"] == "decode/speed" and row["batch"] == batch
    }
    assert list(rows) == PLAIN
    for side, row in rows.items():
        assert "skipped" not in row
        assert row["mode"] == "greedy"
        assert row["ttft_ms"] > 0
        assert 0 < row["tpot_p50_ms"] <= row["tpot_p99_ms"]
        # A whole run is longer than its first token and shorter tokens: six tokens for each of the rows.
        assert row["tokens_per_s"] < batch * 6 / (row["ttft_ms"] / 1e3)
        assert row["peak_bytes"] >= READ
        assert row["launches_per_token"] is None  # no device to launch on
        assert row["read_bytes"] == READ + batch * 27 * CELL  # a prompt of 24 and half of 6
        wanted = row["read_bytes"] / (row["tpot_p50_ms"] / 1e3) / row["bandwidth_bytes_per_s"]
        assert row["mbu"] == pytest.approx(wanted)
        assert ("ratio" in row) == (side != "handloom")
    assert 0 < rows["handloom"]["operations_per_token"] <= limit
    assert rows["handloom"]["operations_per_token"] < rows["generate"]["operations_per_token"]
    assert rows["loop"]["operations_per_token"] == 1  # argmax
    assert rows["generate_batch"]["operations_per_token"] is None


def test_ragged_requests_go_through_every_side_that_takes_them(quick):
    rows = [row for row in quick[1] if row["benchmark"] == "decode/ragged"]
    assert [row["side"] for row in rows] == PLAIN[:-1]
    for row in rows:
        assert "skipped" not in row
        assert row["batch"] == 3  # a batch of one has nothing to replace
        assert "12 ragged requests" in row["case"]
        assert row["mbu"] is None
        assert row["tokens_per_s"] > 0


def test_operations_per_step_stay_within_their_limits(quick):
    rows = [row for row in quick[1] if row["benchmark"] == "decode/counts"]
    assert {(row["case"], row["side"]) for row in rows} == {
        (case, side) for case in ("greedy", "temperature+top-k+top-p") for side in ("handloom", "generate")
    }
    for row in rows:
        # Both sides step the same way at every length, so the difference of two lengths divides evenly.
        assert row["operations_per_step"] == sum(row["operation_names"].values())
        assert row["operations_per_step"] > 0
        assert row["python_calls_per_step"] > 0
        if row["side"] == "handloom":
            assert row["operations_per_step"] <= row["limit"], row["operation_names"]


def test_throughput_compares_both_sides(quick):
    rows = [row for row in quick[1] if row["benchmark"] == "decode/throughput"]
    assert [row["side"] for row in rows] == ["handloom", "generate"] * 3
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        assert ours["case"] == theirs["case"]
        assert ours["unit"] == theirs["unit"]
        slowest, fastest = ours["min"] / theirs["max"], ours["max"] / theirs["min"]
        factor = 1 / ours["ratio"] if ours["unit"] == "s" else ours["ratio"]
        assert slowest <= factor * (1 + 1e-9)
        assert factor <= fastest * (1 + 1e-9)


def test_memory_is_what_the_blocks_take_and_does_not_grow(quick):
    rows = {row["quantity"]: row for row in quick[1] if row["benchmark"] == "decode/memory"}
    assert 1 <= rows["bytes in memory"]["ratio"] <= rows["bytes in memory"]["limit"]
    assert rows["blocks in use"]["value"] == 0
    assert rows["pool capacity, blocks"]["value"] == rows["pool capacity, blocks"]["expected"]
    assert rows["tensors"]["value"] <= rows["tensors"]["expected"]


class Doubler(torch.nn.Module):
    def forward(self, x):  # [3]
        return self.helper(x) * 2 - 1

    def helper(self, x):
        return x.exp()


def test_operations_leave_out_views_and_the_forward():
    model, x = Doubler(), torch.zeros(3)

    def run():
        y = model(x + 1)  # add; then exp, mul and sub inside the forward
        return y.view(3, 1).transpose(0, 1)[0].cumsum(0)  # three views; cumsum

    assert operations(model, run) == {"aten.add.Tensor": 1, "aten.cumsum.default": 1}


def test_operations_count_tensors_made_from_python_data():
    assert operations(Doubler(), lambda: torch.tensor([1, 2])).total() == 1


def test_python_calls_leave_out_the_forward():
    model, x = Doubler(), torch.zeros(3)

    def plain():
        return sorted([3, 1, 2], key=lambda i: -i)  # plain, and the key three times

    def with_forward():
        model(x)
        return plain()

    assert python_calls(model, plain) == 4
    overhead = python_calls(model, lambda: model(x))
    assert python_calls(model, with_forward) == overhead + 4


def test_seconds_outside_leave_out_the_forward():
    class Slow(torch.nn.Module):
        def forward(self):
            sum(range(3_000_000))

    model = Slow()
    inside = seconds_outside(model, lambda: model())
    outside = seconds_outside(Doubler(), lambda: model())
    assert inside < outside / 2


def test_sides_take_turns_and_warm_up():
    seen = []

    def side(name):
        return lambda turn: seen.append(name) or 10 * turn

    measured = in_turn({"a": side("a"), "b": side("b")}, repeats=2)
    assert "".join(seen) == "abbaab"
    assert measured == {"a": [10, 20], "b": [10, 20]}


def test_median_ratio_pairs_the_rounds():
    assert median_ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == 3.0  # ratios 2, 3, 4


def test_record_appends(tmp_path):
    path = tmp_path / "folder" / "rows.jsonl"
    record([{"case": "one"}], path)
    record([{"case": "two"}, {"case": "three"}], path)
    assert [row["case"] for row in read(path)] == ["one", "two", "three"]


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="the system does not tell")
def test_resident_bytes_sees_which_pages_were_touched():
    # 32 MiB of untouched pages: mapped, as an allocator may hand out pages that somebody has used
    tensor = torch.frombuffer(mmap.mmap(-1, 2**25), dtype=torch.float32)
    assert resident_bytes(tensor) < 2**21
    tensor[: 2**22] = 1
    # Half of it was written; a large page may straddle each end.
    assert abs(resident_bytes(tensor) - 2**24) <= 2**22


def test_calls_of_the_cuda_runtime_by_kind():
    names = [
        "cudaLaunchKernel",
        "aten::mul",
        "cudaGraphLaunch",
        "cudaStreamSynchronize",
        "cudaEventSynchronize",
    ]
    assert sort_calls([*names, "cudaLaunchKernel"]) == {"launches": 3, "syncs": 1, "waits": 1}


def test_per_step_takes_the_difference_of_two_lengths():
    found = per_step(lambda n: Counter(launches=5 + 3 * n, syncs=2), 4, 12)
    assert found == {"launches": 3, "syncs": 0}


def test_peak_sees_what_was_held_for_a_while():
    with Peak("cpu", interval=0.001) as peak:
        tensor = torch.ones(2**24)  # 64 MiB, gone at the end
        tensor.add_(1)
        del tensor
    assert 2**26 * 0.9 < peak.added < 2**26 * 1.5
    assert peak.resident > peak.added
    assert peak.allocated is None


def test_bandwidth_is_that_of_the_fastest_reading(monkeypatch):
    seconds = iter([0.5, 0.25, 2.0, 1.0, 0.5, 3.0])
    monkeypatch.setattr(bandwidth, "_seconds", lambda reduce, data: next(seconds))
    assert bandwidth.read_bandwidth("cpu", size=2**16, repeats=2) == 2**18


def test_show_tells_unknown_from_missing():
    stream = io.StringIO()
    columns = {"side": "side", "speed": "speed", "syncs": "syncs", "skipped": "why"}
    show("t", columns, [{"side": "a", "speed": 12.34, "syncs": None}, {"side": "b"}], Console(file=stream))
    lines = stream.getvalue().splitlines()
    assert "why" not in stream.getvalue()
    cells = [[c.strip() for c in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert cells == [["a", "12.3", "-"], ["b", "", ""]]


def test_progress_says_each_case_once_outside_a_terminal():
    stream = io.StringIO()
    progress = Progress(stream)
    for case in ("one", "two"):
        for part in ("warm-up", "round 1"):
            progress(case, part)
    progress.clear()
    assert stream.getvalue() == "one\ntwo\n"


def test_an_interrupt_keeps_what_was_finished(tmp_path, capsys):
    def batches():
        yield [{"case": "one"}]
        yield [{"case": "two"}, {"case": "three"}]
        raise KeyboardInterrupt

    path = tmp_path / "rows.jsonl"
    assert not decode.run("speed", batches(), path, True, {"preset": "quick"})
    assert [row["case"] for row in read(path)] == ["one", "two", "three"]
    assert {row["preset"] for row in read(path)} == {"quick"}
    said = capsys.readouterr()
    assert [json.loads(line)["case"] for line in said.out.splitlines()] == ["one", "two", "three"]
    assert "interrupted: 3 rows of speed" in said.err


def refused(tmp_path, **options) -> str:
    """What the command line says when it refuses; it must have built and written nothing."""
    path = tmp_path / "rows.jsonl"
    with pytest.raises(typer.BadParameter) as error:
        decode.main(**{"output": path, "reports": tmp_path, "device": "cpu"} | options)
    assert not path.exists()
    return str(error.value)


def test_what_cannot_fit_is_refused_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "build", None)
    monkeypatch.setattr(decode, "available_bytes", lambda device: 24 * 2**30)
    big = {"sections": ["speed"], "model": "Llama-3.1-8B", "dtype": "bfloat16", "sides": "handloom,generate"}
    # 15.0 GiB of weights; a token takes 128 KiB, so 2 rows of 36 Ki tokens take 9 in each of two caches.
    said = refused(tmp_path, **big, batch=[2], context=[36864 - 64], new_tokens=64)
    assert "36.3 GiB needed (15.0 GiB of weights, 18.0 GiB of keys and values in 2 caches)" in said
    assert "24.0 GiB available" in said
    said = refused(tmp_path, **big, batch=[1], context=[131072], new_tokens=2)
    assert "131074 tokens" in said
    assert "131072" in said


def test_command_line_names_what_would_be_valid(tmp_path, monkeypatch):
    assert "generate_batch" in refused(tmp_path, sections=["speed"], model="tiny", sides="handlom")
    assert "counts, throughput" in refused(tmp_path, sections=["sped"], model="tiny")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU is found" in refused(tmp_path, sections=["speed"], model="tiny", device="cuda")
    assert "expected cpu" in refused(tmp_path, sections=["speed"], model="tiny", device="mps")
    assert "none with --preset llm-perf" in refused(tmp_path, sections=["speed"], preset="llm-perf")
    assert "fixes batch, context" in refused(tmp_path, preset="llm-perf", batch=[2])


def test_help_names_sections_sides_and_shapes():
    app = typer.Typer()
    app.command()(decode.main)
    done = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    words = " ".join(done.stdout.replace("│", " ").split())
    for name in (*decode.SECTIONS, "llm-perf", "Qwen3-8B", "loop"):
        assert name in words
