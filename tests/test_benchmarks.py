"""The benchmark of decoding, end to end on a tiny model, and the instruments that it measures with."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # `benchmarks` is not installed; appended, so that it shadows nothing

from benchmarks.common import in_turn, median_ratio, read, record  # noqa: E402
from benchmarks.counting import operations, python_calls, seconds_outside  # noqa: E402
from benchmarks.memory import resident_bytes  # noqa: E402


@pytest.fixture(scope="module")
def decode(tmp_path_factory):
    """Rows that `decode.py` printed, and those that it appended to its file."""
    path = tmp_path_factory.mktemp("results") / "decode.jsonl"
    command = [sys.executable, "-m", "benchmarks.decode", "--json", "--preset", "quick", "--model", "tiny"]
    command += ["--repeats", "1", "--threads", "1", "--output", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], read(path)


def test_every_section_leaves_rows_with_their_circumstances(decode):
    printed, written = decode
    assert printed == written
    assert {row["benchmark"] for row in written} == {"decode/counts", "decode/throughput", "decode/memory"}
    for row in written:
        assert row["commit"]
        assert row["hardware"]["threads"] == 1
        assert row["versions"]["torch"] == torch.__version__


def test_operations_per_step_stay_within_their_limits(decode):
    rows = [row for row in decode[1] if row["benchmark"] == "decode/counts"]
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


def test_throughput_compares_both_sides(decode):
    rows = [row for row in decode[1] if row["benchmark"] == "decode/throughput"]
    assert [row["side"] for row in rows] == ["handloom", "generate"] * 3
    for ours, theirs in zip(rows[::2], rows[1::2], strict=True):
        assert ours["case"] == theirs["case"]
        assert ours["unit"] == theirs["unit"]
        slowest, fastest = ours["min"] / theirs["max"], ours["max"] / theirs["min"]
        factor = 1 / ours["ratio"] if ours["unit"] == "s" else ours["ratio"]
        assert slowest <= factor * (1 + 1e-9)
        assert factor <= fastest * (1 + 1e-9)


def test_memory_is_what_the_blocks_take_and_does_not_grow(decode):
    rows = {row["quantity"]: row for row in decode[1] if row["benchmark"] == "decode/memory"}
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
    tensor = torch.from_numpy(np.zeros(2**23, np.float32))  # 32 MiB of untouched pages
    assert resident_bytes(tensor) < 2**21
    tensor[: 2**22] = 1
    # Half of it was written; a large page may straddle each end.
    assert abs(resident_bytes(tensor) - 2**24) <= 2**22
