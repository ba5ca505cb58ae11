"""Reports: numbers recomputed by hand, plots with content, a page that stands alone."""

import contextlib
import csv
import io
import re
import sys

import numpy as np
import pytest

from handloom import cli
from handloom.errors import ParameterError
from handloom.experiments.analysis.compare import by_model, compare_records
from handloom.experiments.analysis.metrics import find
from handloom.experiments.analysis.report import csv_text, markdown, pareto, report, table_of, throughput
from handloom.experiments.plan import Plan
from handloom.experiments.records import write_results

pytest.importorskip("matplotlib")


def record(setting, prompt, sample, tokens, **params):
    made = {
        "unit_id": f"{setting}{prompt}{sample}",
        "setting": setting,
        "prompt_id": prompt,
        "sample": sample,
        "model": "m",
    }
    made |= {"token_ids": tokens, "text": str(tokens), "finish_reason": "length", "params": params}
    return made | {"raw_logprobs": [-0.1 * t for t in tokens]}


@pytest.fixture
def records():
    rng = np.random.default_rng(0)
    return [
        record(f"t={t}", str(prompt), sample, rng.integers(1, 5 + 10 * t, 12).tolist(), temperature=t)
        for t in (0.5, 1.0, 1.5)
        for prompt in range(12)
        for sample in range(2)
    ]


def test_tables_hold_means_over_prompts_with_n_and_interval(records):
    table = table_of(records, find(["logprob", "distinct_2"]))
    by_prompt = {}
    for r in records:
        if r["setting"] == "t=1.0":
            by_prompt.setdefault(r["prompt_id"], []).append(np.mean(r["raw_logprobs"]))
    found = table["t=1.0"]["logprob"]
    assert found.value == pytest.approx(np.mean([np.mean(v) for v in by_prompt.values()]))
    assert found.low < found.value < found.high
    assert found.n == 12
    rows = list(csv.DictReader(io.StringIO(csv_text(table))))
    assert len(rows) == 6
    assert all(
        float(row["low"]) <= float(row["mean"]) <= float(row["high"]) and row["n"] == "12" for row in rows
    )
    lines = markdown(table).splitlines()
    assert lines[0] == "| setting | logprob | distinct_2 |"
    assert all(re.search(r"\[.*, .*\] \(n=12\).*\[.*, .*\] \(n=12\)", line) for line in lines[2:])


def test_the_front_is_what_no_point_beats():
    points = {"a": (1, 5), "b": (2, 4), "c": (2, 3), "d": (4, 1), "e": (0, 5)}
    assert pareto(points) == ["a", "b", "d"]
    assert pareto({"a": (1, 1), "b": (1, 1)}) == ["a", "b"]


def test_a_report_opens_offline_and_has_every_plot(records, tmp_path):
    from matplotlib.image import imread

    paths = report(records, tmp_path / "out", ["logprob", "distinct_2"], {"weights": "<abc>"})
    names = {path.name for path in paths}
    plots = {"tradeoff", "survival", "logprob_over_temperature"}
    assert names == {"report.md", "report.csv", "report.html"} | {
        f"{p}.{k}" for p in plots for k in ("png", "svg")
    }
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "&lt;abc&gt;" in page
    assert (
        str(compare_records(records, find(["logprob", "distinct_2"]))).splitlines()[0]
        in (tmp_path / "out/report.md").read_text()
    )
    for plot in plots:
        pixels = imread(tmp_path / "out" / f"{plot}.png")[..., :3]
        coloured = np.ptp(pixels, axis=-1) > 0.2
        assert coloured.sum() > 100, plot


def test_models_are_settings_of_their_own_and_speed_is_over_their_batch(records, tmp_path):
    both = [
        r
        | {
            "unit_id": model + r["unit_id"],
            "model": model,
            "time": {"tokens_per_second": rate + int(r["prompt_id"])},
        }
        for model, rate in (("small", 10.0), ("large", 5.0))
        for r in records
    ]
    header = {"slots": {"small": 1, "large": 8}}
    paths = report(both, tmp_path, ["logprob", "tokens_per_second"], header)
    assert tmp_path / "tokens_per_second_over_batch.svg" in paths
    assert "large t=0.5" in (tmp_path / "report.csv").read_text()
    lines = throughput(by_model(both), header["slots"]).axes[0].get_lines()
    assert sorted(map(tuple, lines[0].get_xydata())) == [(1, 10 + 5.5), (8, (5 + 5.5) * 8)]


def test_bad_reports_say_what_is_wrong(records, tmp_path):
    with pytest.raises(ParameterError, match="no records"):
        report([], tmp_path)
    with pytest.raises(ParameterError, match="no record has what the metric 'exact_match' needs"):
        report(records, tmp_path, ["exact_match"])


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a command of experiments in this process, which has imported everything: (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["handloom", *map(str, arguments)])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
                status = 0
            except SystemExit as end:
                status = end.code or 0
        return status, out.getvalue(), err.getvalue()

    return call


def test_commands_say_what_is_wrong_in_one_line(tmp_path, run):
    (tmp_path / "plan.yaml").write_text("model: x\nprompts: [a]\nsettings: {a: {temprature: 1}}\n")
    for arguments, code, text in (
        (["sweep", "plan.yaml"], 2, "temprature"),
        (["sweep", "none.yaml"], 2, "there is no plan none.yaml"),
        (["compare", "none.jsonl"], 1, "there is no none.jsonl"),
    ):
        status, out, err = run(*arguments)
        assert (status, out) == (code, "")
        assert text in err
        assert err.count("\n") == 1


def test_a_dry_run_says_what_would_be_drawn(tmp_path, run):
    plan = "model: x\nprompts: [a, b]\nsettings: {min-p: {min_p: 0.1}}\ngrid: {temperature: [1, 2]}\nsamples: 3\n"
    (tmp_path / "plan.yaml").write_text(plan + "params: {max_new_tokens: 5}\n")
    status, out, _ = run("sweep", "plan.yaml", "--dry-run", "--shard", "0/2")
    assert status == 0
    assert (
        "1 models x 2 prompts x 2 settings x 3 samples = 12 samples, 6 in this shard, at most 30 tokens"
        in " ".join(out.split())
    )
    assert "min-p temperature=2" in out
    assert not (tmp_path / "plan.jsonl").exists()
    held = {"unit_id": next(Plan.read("plan.yaml").units()).id, "sample": 0}
    write_results(tmp_path / "plan.jsonl", {}, [held | {"time": {"prefill": 1.0, "decode": 15.0}}])
    assert (
        "11 are left of them, about 22 s by the 1 in plan.jsonl" in run("sweep", "plan.yaml", "--dry-run")[1]
    )
