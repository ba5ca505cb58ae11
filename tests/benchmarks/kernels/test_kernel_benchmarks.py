"""The kernel benchmarks: end to end at tiny sizes, sides that compute the same thing, exact counts by hand."""

import importlib.util
import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.kernels import attention, nf4, rare, sampling, timing
from benchmarks.kernels.__main__ import app
from benchmarks.kernels.timing import Call, CpuTimer, cache_bytes, exact, rounds, shortage
from benchmarks.kernels.traffic import traffic
from benchmarks.report.rows import newest, read
from benchmarks.report.tables import tables
from handloom.kernels.attention.attention import paged_attention_reference
from handloom.kernels.linear.blocked import supports
from handloom.kernels.sampling.reference import apply_edits, scale, truncate

ROOT = Path(__file__).resolve().parents[3]
FIGURES = {"operations", "bytes_read", "bytes_written", "passes"}


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    """Emptying a cache of a hundred MiB before every call is what costs time here."""
    monkeypatch.setattr(timing, "cache_bytes", lambda: 2**20)


def parsed(path, printed):
    """Rows that a command printed, which must be those that it appended to its file."""
    rows = [json.loads(line) for line in printed.splitlines()]
    assert rows == [json.loads(line) for line in path.read_text().splitlines()]
    return rows


def invoke(path, *arguments):
    """Run a command in this process; its rows."""
    threads = torch.get_num_threads()
    try:
        done = CliRunner().invoke(app, [*arguments, "--json", "--output", str(path)])
    finally:
        torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    return parsed(path, done.stdout)


def check(rows, sides):
    """What every row must have, in cells of all sides; with one round the lead is the ratio of the times."""
    for cell in zip(*[iter(rows)] * len(sides), strict=True):
        assert [row["side"] for row in cell] == sides
        ours = cell[0]["p50"]
        for row in cell:
            assert 0 < row["p20"] == row["p50"] == row["p80"]
            assert row["repeats"] == 1
            assert row["device"] == "cpu"
            assert ("ratio" in row) == (row["side"] != "handloom")
            if "ratio" in row:
                assert row["ratio"] == pytest.approx(row["p50"] / ours, abs=0.006, rel=0.01)
            assert ("bandwidth_share" in row) == (row["cache"] == "cold")


def test_sampling_runs_every_mode_row_and_dtype(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = invoke(
        path, "--batch", "3", "--vocab", "300", "--dtype", "bf16", "--dtype", "fp32", "--repeats", "1"
    )
    everyone = ["handloom", "transformers", "torch"]
    for mode, part in itertools.groupby(
        sorted(rows, key=lambda row: sampling.MODES.index(row["mode"])), lambda r: r["mode"]
    ):
        check(list(part), [*everyone, "topk"] if mode in ("k", "k+p+min-p") else everyone)
    cells = {(row["mode"], row["rows"], row["dtype"], row["cache"]) for row in rows}
    assert cells == set(itertools.product(sampling.MODES, sampling.ROWS, ("bf16", "fp32"), ("warm", "cold")))
    for row in rows:
        assert row["benchmark"] == "kernels/sampling"
        assert (row["side"] == "handloom") == (not FIGURES & set(row))  # NumPy: nothing is counted
    greedy = [
        row for row in rows if row["mode"] == "greedy" and row["dtype"] == "bf16" and row["cache"] == "warm"
    ]
    # torch reads 900 bf16 logits; transformers copies them to float32 first: 900 * 2 + 900 * 4, written 900 * 4 + 3 * 8
    wanted = {"torch": (1, 1800, 24, 1.0), "transformers": (2, 5400, 3624, 3.0)}
    for row in greedy:
        if row["side"] in wanted:
            got = tuple(row[name] for name in ("operations", "bytes_read", "bytes_written", "passes"))
            assert got == wanted[row["side"]]
    text = tables(newest(read([path])[0]))
    assert text.count("\n| cpu |") == len(cells)


def test_the_command_of_the_log_still_runs(tmp_path):
    path = tmp_path / "rows.jsonl"
    options = "--side handloom --side transformers --repeats 2 --rows typical --rows flat --mode p --batch 1"
    options += f" --vocab 400 --vocab 500 --cache warm --json --output {path}"
    command = [sys.executable, "-m", "benchmarks.kernels", *options.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = parsed(path, done.stdout)
    assert {row["hardware"]["threads"] for row in rows} == {1}
    assert [(row["vocab"], row["rows"], row["side"]) for row in rows] == list(
        itertools.product((400, 500), ("typical", "flat"), ("handloom", "transformers"))
    )
    assert {row["dtype"] for row in rows} == {"fp32"}
    assert {row["repeats"] for row in rows} == {2}


def test_attention_runs_end_to_end(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = invoke(
        path, "attention", "--batch", "1", "--batch", "3", "--context", "40", "--heads", "4/2x16", "--heads", "2/2x8",
        "--dtype", "bf16", "--dtype", "fp32", "--repeats", "1",
    )  # fmt: skip
    check(rows, ["handloom", "gathered", "dense"])
    cells = {tuple(row[name] for name in ("shape", "batch", "rows", "dtype", "cache")) for row in rows}
    assert cells == set(
        itertools.product(("4/2x16", "2/2x8"), (1, 3), attention.ROWS, ("bf16", "fp32"), ("warm", "cold"))
    )
    for row in rows:
        assert set(row) >= FIGURES
        assert row["bytes_read"] > 0
    assert tables(newest(read([path])[0])).count("\n| cpu |") == len(cells)


def test_nf4_runs_end_to_end(tmp_path):
    pytest.importorskip("bitsandbytes")
    path = tmp_path / "rows.jsonl"
    rows = invoke(path, "nf4", "--batch", "1", "--batch", "5", "--layer", "512x128", "--repeats", "1")
    blocked = ["handloom blocked"] if supports(torch.bfloat16) else []
    check(rows, ["handloom", "handloom int4", "handloom int8", *blocked, "bitsandbytes", "dense"])
    assert {(row["batch"], row["cache"]) for row in rows} == {
        (1, "warm"),
        (1, "cold"),
        (5, "warm"),
        (5, "cold"),
    }
    read_bytes = {row["side"]: row["bytes_read"] for row in rows if row["batch"] == 5}
    # 5 x 128 bf16 inputs; 512 * 128 weights of 2 bytes, or of half a byte and a float32 scale for every 64
    assert read_bytes["dense"] == 5 * 128 * 2 + 512 * 128 * 2
    assert read_bytes["bitsandbytes"] == 5 * 128 * 2 + 512 * 128 // 2 + 512 * 128 // 64 * 4
    assert tables(newest(read([path])[0])).count("\n| cpu | 512x128 |") == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "q"], "--mode q: expected greedy, temperature"),
        (["--rows", "odd"], "--rows odd: expected typical, flat, ties"),
        (["--dtype", "int8"], "--dtype int8: expected fp32, bf16"),
        (["--side", "them"], "--side them: expected handloom"),
        (["--cache", "tepid"], "--cache tepid: expected warm, cold"),
        (["--device", "tpu"], "--device tpu: expected cpu or cuda"),
        (["--batch", "1", "attention"], "batch before attention"),
        (["attention", "--heads", "7/2x8"], "--heads 7/2x8: expected QUERY/KEYxSIZE"),
        (["attention", "--heads", "8x8"], "--heads 8x8: expected QUERY/KEYxSIZE"),
        (["nf4", "--layer", "10x10"], "--layer 10x10: expected OUTPUTSxINPUTS"),
        (["nf4", "--layer", "9B q_proj"], "--layer 9B q_proj: expected OUTPUTSxINPUTS"),
    ],
)
def test_what_is_unknown_is_named_with_what_would_be_valid(arguments, message, tmp_path):
    done = CliRunner().invoke(app, [*arguments, "--output", str(tmp_path / "rows.jsonl")])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_side_that_took_no_part_is_named(tmp_path):
    if "flashinfer" in sys.modules or torch.cuda.is_available():
        pytest.skip("it may take part here")
    arguments = [
        "--side",
        "flashinfer",
        "--mode",
        "everything",
        "--rows",
        "ties",
        "--batch",
        "1",
        "--vocab",
        "300",
    ]
    arguments += ["--cache", "warm", "--repeats", "1", "--json", "--output", str(tmp_path / "rows.jsonl")]
    threads = torch.get_num_threads()
    done = CliRunner().invoke(app, arguments)
    torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    assert "flashinfer took no part: it is not installed, or cannot do any of this" in done.stderr


def test_a_cell_that_does_not_fit_is_skipped_and_says_why():
    (row,) = sampling.measure("p", "flat", 2**20, 2**20, "fp32", "cpu", ["handloom"], 1)
    assert row["skipped"].startswith("needs about 98304 GiB of ")  # 2**40 logits, 96 bytes each
    assert "p50" not in row
    assert shortage(1, "cpu") is None


def kept_by(mode, logits):
    settings = sampling.settings_of(mode, logits)
    edited = apply_edits(logits, edits=settings.get("edits"), bitmask=settings.get("bitmask"))
    return truncate(scale(edited, settings["temperature"]), settings["rules"]) > -torch.inf


def tokens_of(result):
    """Tokens [B] of whatever a side's call returns."""
    if isinstance(result, tuple):
        result = result[0]
    return result.flatten()


@pytest.mark.parametrize("mode", sampling.MODES)
@pytest.mark.parametrize("kind", sampling.ROWS)
@pytest.mark.parametrize("side", ["handloom", "transformers", "torch", "topk"])
def test_every_side_of_sampling_draws_from_the_same_tokens(side, kind, mode):
    logits = sampling.logits_of(kind, 4, 600, torch.float32, "cpu")
    call = sampling.SIDES[side](mode, logits)
    if call is None:
        assert side == "topk"
        return
    kept = kept_by(mode, logits)
    torch.manual_seed(0)
    for _ in range(25):
        tokens = tokens_of(call())
        assert tokens.shape == (4,)
        if mode == "greedy":
            assert logits.gather(1, tokens[:, None])[:, 0].equal(logits.amax(1))
        assert kept.gather(1, tokens[:, None]).all()
        assert mode != "everything" or (tokens % sampling.BANNED != 0).all()


def test_rare_tokens_keep_their_probability():
    """Three tokens of probability 1e-5, 4 million draws: 40 expected of each, Poisson 10 ... 80 misses with 3e-8."""
    hits = rare.drawn(4_000_000, (1e-5, 1e-5, 1e-5))
    assert ((hits > 10) & (hits < 80)).all()
    assert rare.expected(4_000_000, (1e-5, 1e-5, 1e-5)) == pytest.approx([40.0] * 3, rel=1e-4)


@pytest.mark.parametrize("side", ["transformers", "torch", "topk"])
def test_every_side_of_sampling_has_the_same_distribution(side):
    """Counts of 40,000 draws of k+p+min-p on one row against its probabilities: chi-square at 1 in 10,000."""
    from scipy.stats import chisquare

    row = sampling.logits_of("typical", 1, 200, torch.float32, "cpu")
    kept = kept_by("k+p+min-p", row)[0]
    weights = torch.where(kept, row[0] / sampling.TEMPERATURE, -torch.inf).softmax(-1).double()
    call = sampling.SIDES[side]("k+p+min-p", row.expand(4000, -1).contiguous())
    torch.manual_seed(1)
    counts = sum(torch.bincount(tokens_of(call()), minlength=200) for _ in range(10))
    assert counts[~kept].sum() == 0
    expected = weights[kept] / weights[kept].sum() * 40000
    assert expected.min() > 100
    assert chisquare(counts[kept].numpy(), expected.numpy()).pvalue > 1e-4


def test_rows_are_what_their_names_say():
    typical, flat, ties = (sampling.logits_of(kind, 3, 5000, torch.float32, "cpu") for kind in sampling.ROWS)
    assert torch.allclose(
        typical.sort(descending=True).values[:, :3], -1.2 * torch.tensor([1.0, 2.0, 3.0]).log()
    )
    assert not typical[0].equal(typical[1])
    assert flat.std() < 0.002
    assert len(ties[0].unique()) < 30
    with_history, edits = sampling.history_edits(2, 1000, "cpu")
    for row in range(2):
        listed = edits.ids[row][edits.ids[row] >= 0]
        assert set(listed.tolist()) == set(with_history[row].tolist())


@pytest.mark.parametrize("kind", attention.ROWS)
@pytest.mark.parametrize("heads", ["4/2x16", "6/6x8"])
@pytest.mark.parametrize("side", ["handloom", "gathered", "dense"])
def test_every_side_of_attention_computes_the_reference(side, heads, kind):
    cells = attention.cells_of(attention.parse_heads(heads), kind, 3, 45, torch.float32, "cpu")
    out = attention.SIDES[side](cells)()
    expected = paged_attention_reference(cells.q, cells.keys, cells.values, cells.table, cells.lengths)
    assert torch.allclose(out, expected, atol=1e-5)


def test_cells_are_even_or_ragged():
    heads = attention.parse_heads("4/2x16")
    even = attention.cells_of(heads, "even", 3, 45, torch.bfloat16, "cpu")
    assert even.lengths.tolist() == [45] * 3
    assert even.table.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert (
        even.needed == 3 * 4 * 16 * 2 + 2 * 3 * 45 * 2 * 16 * 2
    )  # queries; keys and values of 45 cells a row
    ragged = attention.cells_of(heads, "ragged", 8, 400, torch.bfloat16, "cpu")
    lengths = ragged.lengths.tolist()
    assert lengths[0] == 400
    assert 100 <= min(lengths) < 300
    used = [row[: math.ceil(n / 16)] for row, n in zip(ragged.table.tolist(), lengths, strict=True)]
    ids = sorted(itertools.chain(*used))
    assert ids == list(range(len(ragged.keys)))  # every block is one row's
    assert used[0] != sorted(used[0])


@pytest.mark.parametrize("library", [True, False], ids=["bitsandbytes", "without it"])
def test_every_side_of_nf4_computes_its_layer(library, monkeypatch):
    if library:
        pytest.importorskip("bitsandbytes")
    else:
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    layer = nf4.Layer(x, nf4.weight_of((512, 256), torch.float32, "cpu"))
    exactly = x.double() @ layer.weight.double().T
    quantised = x.double() @ nf4.four_bit(layer.weight).dense().double().T

    def error(side, wanted):
        return float((nf4.SIDES[side](layer)().double() - wanted).norm() / wanted.norm())

    with torch.no_grad():
        assert error("dense", exactly) < 1e-6
        assert error("handloom blocked", exactly) < 1e-6
        assert error("handloom", quantised) < 1e-5
        if library:
            assert error("bitsandbytes", quantised) < 1e-2
        assert error("handloom int8", exactly) < 2e-2
        assert error("handloom int4", exactly) < 0.15
        assert 0.02 < error("handloom", exactly) < 0.2  # it is quantised


@pytest.mark.parametrize(
    ("call", "operations", "read", "written"),
    [
        (lambda x: (x + 1).argmax(-1), 2, 128 + 128, 128 + 4 * 8),
        (lambda x: x.t()[2:].view(-1, 4), 0, 0, 0),
        (lambda x: x[:, :2].exp(), 1, 32, 32),
        (lambda x: x[:1].expand(4, 8).exp(), 1, 32, 128),  # an expanded row is read once
        (lambda x: torch.empty_like(x).copy_(x), 1, 128, 128),
        (lambda x: x.gather(1, torch.zeros(4, 1, dtype=torch.int64)), 2, 4 * 8 + 4 * 4, 4 * 8 + 4 * 4),
        (lambda x: x.topk(2), 1, 128, 4 * 2 * 4 + 4 * 2 * 8),
        (lambda x: x.clone().exponential_(), 2, 128, 128 + 128),
    ],
)
def test_traffic_by_hand(call, operations, read, written):
    x = torch.ones(4, 8)  # 128 bytes
    assert traffic(lambda: call(x)) == {
        "operations": operations,
        "bytes_read": read,
        "bytes_written": written,
    }


def test_known_costs_are_taken_as_they_are():
    assert exact(lambda x: Call(lambda: x + 1, {}), torch.ones(4), 16, "cpu") == {}
    known = {"bytes_read": 40, "bytes_written": 3}
    assert exact(lambda x: Call(lambda: x, known), None, 16, "cpu") == {**known, "passes": 2.5}
    assert exact(lambda x: None, None, 16, "cpu") == {}
    counted = {"operations": 1, "bytes_read": 16, "bytes_written": 16, "passes": 1.0}
    assert exact(lambda x: lambda: x + 1, torch.ones(4), 16, "cpu") == counted
    seen = []
    exact(lambda x: Call(lambda: seen.append("known"), {}), None, 16, "cpu")
    exact(lambda x: lambda: seen.append("counted"), None, 16, "cpu")
    assert seen == ["known", "counted"]  # every side has run once before it is timed


def test_traffic_of_the_fused_kernels_by_hand():
    """Two rows of 300 tokens: groups of 128, 128 and 44."""
    logits = torch.zeros(2, 300)
    logits[0, 299] = logits[1, 5] = logits[1, 130] = 50.0  # min-p keeps these alone: 1 + 2 groups

    def of(mode, x=logits):
        return sampling.fused_traffic(mode, x, sampling.settings_of(mode, x))

    statistics = 2 * 3 * 4  # of one plane: two rows of three groups, float32
    assert of("greedy") == {
        "bytes_read": 2400 + 2 * 512 + 2 * statistics, "bytes_written": 2 * statistics + 2 * 8,
    }  # fmt: skip
    assert of("temperature")["bytes_read"] == 2400 + 2 * 512 + 3 * statistics
    assert of("min-p")["bytes_read"] == 2400 + 3 * 512 + 2 * statistics
    assert of("min-p", logits.bfloat16())["bytes_read"] == 1200 + 3 * 256 + 2 * statistics
    logits[1, 130] = 0.0  # or the penalty would part it from its twin
    full = of("everything")
    planes = 9 * 2 * (3 + 2) * 4  # two more groups hold the 256 edited tokens
    edits = 2 * 256 * 4 * 4 + 2 * 10 * 4 + 2 * 256 * 4  # four lists, bits of 300 tokens, the tokens' logits
    assert full["bytes_written"] == planes + 2 * (8 + 28)
    assert full["bytes_read"] == 2400 + 2 * 512 + planes + edits + 2 * 10 * 4  # and the bitmask


class Clock:
    """Time that passes only when someone works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def work(self, seconds):
        self.now += seconds
        return self.now


@pytest.mark.parametrize(
    ("budget", "repeats", "expected"),
    [(0, 4, 4), (100, 4, 4), (10, 9, 3), (7.6, 9, 2), (4.9, 9, 1), (2.5, 9, 1), (0.1, 9, 1)],
)
def test_the_budget_limits_the_rounds(budget, repeats, expected):
    clock = Clock()
    sides = {"a": lambda turn: clock.work(1.5), "b": lambda turn: clock.work(1.0)}  # a round takes 2.5
    found = rounds(sides, repeats, budget, clock)
    assert {side: len(values) for side, values in found.items()} == {"a": expected, "b": expected}
    only = budget and budget < 5
    assert found["a"][0] == (1.5 if only else 4.0)  # the first round counts only where it is the only one


def test_the_timer_takes_a_few_short_calls_or_one_long_one_and_empties_the_caches():
    seen = []
    assert CpuTimer(lambda: seen.append("run"))(0) >= 0
    assert seen == ["run"] * 5
    seen.clear()
    CpuTimer(lambda: seen.append("run"), lambda: seen.append("evict"))(0)
    assert seen == ["evict", "run"]
    seen.clear()

    def busy():
        seen.append("run")
        end = time.process_time() + 0.06
        while time.process_time() < end:
            pass

    assert CpuTimer(busy)(0) >= 0.06
    assert seen == ["run"]
    assert cache_bytes() >= 2**16


interpreted = pytest.mark.skipif(
    torch.cuda.is_available() or not importlib.util.find_spec("triton"), reason="for Triton's interpreter"
)


@interpreted
@pytest.mark.parametrize("mode", sampling.MODES)
def test_sampling_on_cuda_computes_the_same_in_the_interpreter(mode):
    logits = sampling.logits_of("typical", 2, 300, torch.float32, "cpu")
    ours, fused = sampling.ours(mode, logits)(), sampling.fused(mode, logits)()
    assert ours.tokens.equal(fused.tokens)
    assert mode != "everything" or torch.allclose(ours.logprob, fused.logprob, atol=1e-5)


@interpreted
@pytest.mark.parametrize("kind", attention.ROWS)
def test_attention_on_cuda_computes_the_same_in_the_interpreter(kind):
    cells = attention.cells_of(attention.parse_heads("4/2x16"), kind, 2, 40, torch.float32, "cpu")
    call = attention.triton(cells)
    assert torch.allclose(attention.ours(cells)(), call(), atol=1e-5)
    assert call.exact["bytes_read"] >= cells.needed


@interpreted
def test_nf4_on_cuda_computes_the_same_in_the_interpreter():
    pytest.importorskip("bitsandbytes")
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(0))
    layer = nf4.Layer(x, nf4.weight_of((64, 128), torch.float32, "cpu"))
    assert torch.allclose(nf4.ours(layer)(), nf4.triton(x, nf4.four_bit(layer.weight), {})(), atol=1e-4)
