"""Plans and datasets on Ray: the records of one process, whoever drew them."""

import contextlib
import csv
import io
import json
import multiprocessing
import signal
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers import text_engine, until
from tiny_tokenizers import byte_level

from handloom import HandloomError, ParameterError, cli
from handloom.experiments.analysis.compare import compare_records
from handloom.experiments.plan import Plan
from handloom.experiments.ranks import Ranks
from handloom.experiments.ray import Generate, on_ray
from handloom.experiments.records import read_results
from handloom.experiments.run import run
from handloom.experiments.samples import load_engine

MEASURED = {"time", "peak_mem_mb"}
PARAMS = {"temperature": 1.2, "max_new_tokens": 5, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer."""
    place = tmp_path_factory.mktemp("ray") / "model"
    text_engine().model.save_pretrained(place)
    byte_level().save_pretrained(place)
    return place


@pytest.fixture
def without_ray(monkeypatch):
    """Importing Ray is an error."""
    for name in [name for name in sys.modules if name == "ray" or name.startswith("ray.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ray", None)


def test_rows_in_rows_out(folder, without_ray):
    generate = Generate(str(folder), PARAMS | {"min_p": 0.1}, seed=3)
    batch = {
        "prompt": np.array(["the cat", "a dog", "word " * 400, "the cat"], dtype=object),
        "id": np.array(["a", "b", "c", "d"]),
        "sampling_params": np.array([None, {"temperature": 0.0}, None, {"strategy": "beam_search"}]),
    }
    made = generate(batch)
    assert list(made["prompt"]) == list(batch["prompt"])
    assert made["finish_reason"].tolist() == ["length", "length", "error", "length"]
    assert "max_length" in made["error"][2] or "tokens" in made["error"][2]
    greedy = generate.drawer.engine.generate("a dog", PARAMS | {"temperature": 0.0})
    assert made["generated_text"][1] == greedy.text
    assert made["logprobs"][1] == pytest.approx(greedy.raw_logprobs, abs=1e-4)
    turned = generate({name: column[::-1] for name, column in batch.items()})
    tokens = [list(each) for each in made["generated_tokens"]]
    assert [list(each) for each in turned["generated_tokens"]] == tokens[::-1]
    assert tokens[0] != tokens[3]
    chats = generate({"messages": [np.array([{"role": "user", "content": "hi"}])], "id": ["m"]})
    assert "chat template" in chats["error"][0]
    with pytest.raises(ParameterError, match="rows have the columns question; expected prompt, messages"):
        generate({"question": ["a"]})
    with pytest.raises(ParameterError, match="did you mean 'temperature'"):
        Generate("nowhere", {"temprature": 1})


def test_a_command_without_ray_says_which_extra_it_needs(tmp_path, without_ray, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.yaml").write_text("model: x\nprompts: [a]\n")
    for arguments, said in (
        (["--ray"], "handloom[ray]"),
        (["--ray", "here:1", "--shard", "0/1"], "handloom[ray]"),
    ):
        monkeypatch.setattr(sys, "argv", ["handloom", "sweep", "plan.yaml", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert said in str(end.value)
    monkeypatch.setattr(sys, "argv", ["handloom", "sweep", "plan.yaml", "--workers", "2"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2


PLAN = """
model: {{name_or_path: {model}, slots: 40, fixed_slots: true, layout: plain, dtype: bfloat16}}
settings: {{min-p: {{min_p: 0.1}}, top-p: {{top_p: 0.9}}}}
grid: {{temperature: [0.7, 1.5]}}
params: {{max_new_tokens: 3, ignore_eos: true}}
samples: 4
prompts: {prompts}
"""


@pytest.mark.slow
def test_the_whole_path_on_a_real_model_and_on_ray(smollm2, folder, tmp_path, monkeypatch):
    """2 settings x 2 temperatures x 20 prompts x 4 samples: one shard killed twice and resumed, merged, compared and
    reported, its numbers by hand; the same on two workers. Ray is started once, so a model in ranks is asked there.
    """
    prompts = [f"What is {i} plus {i + 1}?" for i in range(20)]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.yaml").write_text(PLAN.format(model=smollm2, prompts=prompts))
    (arguments,) = Plan.read("plan.yaml").models.values()
    engine = load_engine(**arguments)  # once for all processes but Ray's
    monkeypatch.setattr("handloom.experiments.run.load_engine", lambda **_: engine)
    killed_twice(["sweep", "plan.yaml", "-o", "0.jsonl", "--shard", "0/2"], tmp_path / "0.jsonl", (5, 60))
    ids = [json.loads(line)["unit_id"] for line in (tmp_path / "0.jsonl").read_text().splitlines()[1:]]
    assert len(ids) == len(set(ids)) == 160
    said = ask("sweep", "plan.yaml", "-o", "1.jsonl", "--shard", "1/2")
    assert "160 samples drawn" in said
    assert "160 samples drawn" in (tmp_path / "1.log").read_text()
    assert ask("merge", "0.jsonl", "1.jsonl", "-o", "all.jsonl").startswith("320 samples")
    ask("report", "all.jsonl", "-o", "out", "-m", "logprob", "-m", "distinct_2")
    assert (tmp_path / "out" / "logprob_over_temperature.png").stat().st_size > 5000
    by_hand(
        tmp_path / "all.jsonl", tmp_path / "out" / "report.csv", ask("compare", "all.jsonl", "-m", "logprob")
    )
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    try:
        with on_ray(workers=2) as draw:
            done = []
            run(Plan.read("plan.yaml"), "there.jsonl", draw=draw, progress=lambda *now: done.append(now[:2]))
        assert done[-1] == (320, 320)
        assert lines(tmp_path / "there.jsonl") == lines(tmp_path / "all.jsonl")
        assert read_results([tmp_path / "there.jsonl"])[0] == read_results([tmp_path / "all.jsonl"])[0]
        made_in_ranks(ray, folder)
    finally:
        ray.shutdown()


def ask(*arguments):
    """What a command prints, in this process, which has imported everything."""
    out = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        patch.setattr(sys, "argv", ["handloom", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert not end.value.code, out.getvalue()
    return out.getvalue()


def killed_twice(arguments, path, after):
    """Run a command in a process of its own, kill it when its file has so many lines, and again, and then to the end.

    The processes are forks of this one, which has imported and loaded everything.
    """
    for count in (*after, None):
        child = multiprocessing.get_context("fork").Process(target=ask, args=arguments)
        child.start()
        if count is not None:
            until(lambda least=count: path.exists() and path.read_bytes().count(b"\n") >= least, 240)
            child.kill()
        child.join()
        assert child.exitcode == (0 if count is None else -signal.SIGKILL)
        assert count is None or count <= path.read_bytes().count(b"\n") < 161


def lines(path):
    """The records of a file without what was measured."""
    return sorted(
        json.dumps({k: v for k, v in record.items() if k not in MEASURED})
        for record in read_results([path])[1]
    )


def by_hand(path, table, told):
    """The report's means, differences and intervals again, from the lines of the file alone."""
    values = {}
    for record in map(json.loads, path.read_text().splitlines()[1:]):
        own = values.setdefault(record["setting"], {}).setdefault(record["prompt_id"], [])
        own.append(sum(record["raw_logprobs"]) / len(record["raw_logprobs"]))
    means = {name: [sum(v) / len(v) for v in prompts.values()] for name, prompts in values.items()}
    rows = {r["setting"]: r for r in csv.DictReader(table.open()) if r["metric"] == "logprob"}
    assert len(rows) == len(means) == 4
    for name, found in means.items():
        assert float(rows[name]["mean"]) == pytest.approx(sum(found) / 20)
        assert rows[name]["n"] == "20"
        width = 2 * 2.093 * statistics.stdev(found) / 20**0.5  # Student's t with 19 degrees of freedom
        assert float(rows[name]["high"]) - float(rows[name]["low"]) == pytest.approx(width, rel=0.3)
    (baseline, *others) = means
    pairs = compare_records(read_results([path])[1], ["logprob"]).pairs
    assert [pair.name for pair in pairs] == others
    for pair in pairs:
        apart = [b - a for a, b in zip(means[baseline], means[pair.name], strict=True)]
        found = pair.differences["logprob"]
        assert (found.value, found.n) == (pytest.approx(sum(apart) / 20), 20)
        width = 2 * 2.093 * statistics.stdev(apart) / 20**0.5
        assert found.high - found.low == pytest.approx(width, rel=0.3)
        assert f"{pair.name} against {baseline}, 80 samples in pairs" in told
        assert f"  logprob: {found}" in told


def made_in_ranks(ray, folder):
    """Rows through an actor that divides its model between two processes: those of one process."""
    model = {"name_or_path": str(folder), "layout": "plain"}
    rows = [{"id": f"r{i}", "prompt": prompt} for i, prompt in enumerate(["the cat", "a dog sat", "x"])]
    given = {"model": model, "params": PARAMS, "tp": 2}
    dataset = ray.data.from_items(rows)
    made = dataset.map_batches(Generate, fn_constructor_kwargs=given, concurrency=1, batch_size=2).take_all()
    expected = Generate(model, PARAMS)({name: [row[name] for row in rows] for name in rows[0]})
    told = {row["id"]: (row["generated_text"], list(row["generated_tokens"])) for row in made}
    assert told == {
        name: (text, list(tokens))
        for name, text, tokens in zip(
            expected["id"], expected["generated_text"], expected["generated_tokens"], strict=True
        )
    }


def test_ranks_that_fail_say_so():
    for size, message in ((0, "tp=0 must be a whole number"), ("2", "tp='2' must be a whole number")):
        with pytest.raises(ParameterError, match=message):
            Generate("nowhere", tp=size)
    for second, message in (
        ((False, "ModelError: x"), "^rank 1: ModelError: x$"),
        (None, "^rank 1: the process is gone$"),
    ):
        ranks, ends = Ranks.__new__(Ranks), [multiprocessing.Pipe() for _ in range(2)]
        ranks._pipes, ranks._processes = [mine for mine, _ in ends], []
        ranks._meeting = tempfile.TemporaryDirectory()
        ends[0][1].send((True, 7))
        if second is None:
            ends[1][1].close()
        else:
            ends[1][1].send(second)
        with pytest.raises(HandloomError, match=message):
            ranks.call(len)
        assert not Path(ranks._meeting.name).exists()
