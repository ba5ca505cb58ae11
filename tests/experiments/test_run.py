"""Running plans: nothing lost, nothing drawn twice, the same samples in whichever pieces."""

import json
import sys
import tracemalloc
from collections import Counter

import pytest
from helpers import text_engine, tiny_llama

from handloom import Engine, HandloomError, cli
from handloom.experiments.plan import Plan
from handloom.experiments.records import export, merge, read_results
from handloom.experiments.run import run
from handloom.experiments.samples import header_of, record_of

SOURCE = {
    "model": "tiny",
    "prompts": ["the cat", "a dog sat", "once upon a time", "x"],
    "settings": {
        "min-p": {"min_p": 0.2},
        "top-p": {"top_p": 0.7},
        "beam": {"strategy": "beam_search", "num_beams": 2},
    },
    "params": {"temperature": 1.2, "max_new_tokens": 5, "ignore_eos": True},
    "samples": 3,
    "seed": 4,
}


MEASURED = {"time", "peak_mem_mb"}


@pytest.fixture(scope="module")
def engine():
    """One engine for every run of this file."""
    return text_engine(slots=4, fixed_slots=True)


@pytest.fixture
def load(engine):
    """What a run loads its engine with."""
    return lambda **arguments: engine


def assert_same(first, second):
    """Two sets of files hold the same samples to the byte, but for times and memory: slots are fixed."""
    told = [
        {
            json.dumps({k: v for k, v in record.items() if k not in MEASURED})
            for record in read_results(paths)[1]
        }
        for paths in (first, second)
    ]
    assert told[0] == told[1]


def test_a_run_writes_every_sample_and_what_they_share(tmp_path, load, engine):
    plan, seen = Plan.of(SOURCE), []
    assert run(plan, tmp_path / "a.jsonl", load=load, progress=lambda *now: seen.append(now)) == 0
    header, records = read_results([tmp_path / "a.jsonl"])
    assert set(header) >= {"models", "weights", "versions", "defaults", "device", "seed"}
    assert len(records) == len(plan) == len(seen) == 36
    assert seen[-1][:2] == (36, 36)
    units = {unit.id: unit for unit in plan.units()}
    for record in records:
        unit = units[record["unit_id"]]
        assert (record["setting"], record["prompt_id"], record["seed"]) == (
            unit.setting.name,
            unit.item.id,
            unit.seed,
        )
        assert len(record["token_ids"]) == len(record["raw_logprobs"]) == record["n_new"] == 5
        for name, field in (("raw", "raw_logprobs"), ("processed", "logprobs")):
            assert record[f"logprob_{name}_sum"] == pytest.approx(sum(record[field]))
        assert record["prompt_tokens"] == len(engine.tokenizer.encode(unit.item.content))
        assert 10 < record["peak_mem_mb"] < 10**5
        assert "peak_mem_mb" not in record.get("extra", {})
        if unit.setting.strategy is None:
            values = {**unit.setting.params, "seed": unit.seed}
            assert engine.generate(unit.item.content, **values).token_ids == record["token_ids"]
    engine.pool.check()


def test_a_second_run_draws_nothing_and_a_torn_line_is_drawn_again(tmp_path, load):
    plan, path = Plan.of(SOURCE), tmp_path / "a.jsonl"
    run(plan, path, load=load)
    whole = path.read_bytes()
    run(plan, path, load=lambda **arguments: pytest.fail("a model was loaded"))
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-20])
    run(plan, path, load=load)
    (tmp_path / "before.jsonl").write_bytes(whole)
    assert_same([path], [tmp_path / "before.jsonl"])


def test_shards_merge_to_the_whole(tmp_path, load):
    plan = Plan.of(SOURCE)
    run(plan, tmp_path / "whole.jsonl", load=load)
    parts = [tmp_path / f"part{i}.jsonl" for i in range(3)]
    for i, part in enumerate(parts):
        run(plan, part, shard=(i, 3), load=load)
    assert merge([*parts, parts[0]], tmp_path / "merged.jsonl") == 36
    assert_same([tmp_path / "merged.jsonl"], [tmp_path / "whole.jsonl"])
    twins = SOURCE | {"settings": {"a": {"top_k": 3}, "b": {"top_k": 3}}}
    with pytest.raises(HandloomError, match="setting 'a' is another one under a second name"):
        run(Plan.of(twins), tmp_path / "twins.jsonl", load=load)
    run(Plan.of(SOURCE | {"seed": 5}), tmp_path / "other.jsonl", load=load)
    with pytest.raises(HandloomError, match="another plan"):
        merge([parts[0], tmp_path / "other.jsonl"], tmp_path / "merged.jsonl")
    with pytest.raises(HandloomError, match="another plan"):
        run(Plan.of(SOURCE | {"seed": 5}), parts[0], load=load)


def test_a_unit_that_fails_is_a_record_and_the_others_go_on(tmp_path, load):
    bad = {"top-k": {"top_k": 5}, "plain": {}}
    source = SOURCE | {"settings": bad, "prompts": ["the cat", "word " * 400, "x"], "samples": 1}
    assert run(Plan.of(source), tmp_path / "a.jsonl", load=load) == 2
    records = read_results([tmp_path / "a.jsonl"])[1]
    failed = [r for r in records if r["finish_reason"] == "error"]
    assert {r["prompt_id"] for r in failed} == {"1"}
    assert all("max_length" in r["error"] or "tokens" in r["error"] for r in failed)
    assert len([r for r in records if len(r["token_ids"]) == 5]) == 4


def test_records_in_fixed_slots_are_the_same_bytes_in_whatever_pieces(tmp_path, load, engine):
    """Strategies that feed several tokens a pass included; without fixed slots the last bits differ here."""
    settings = {"min-p": {"min_p": 0.2}, "draft": {"strategy": "speculative"}}
    plan = Plan.of(
        SOURCE | {"settings": settings, "prompts": [f"prompt number {i}" for i in range(4)], "samples": 2}
    )
    run(plan, tmp_path / "whole.jsonl", load=load)
    parts = [tmp_path / f"{i}.jsonl" for i in range(2)]
    for i, part in enumerate(parts):
        run(plan, part, shard=(i, 2), load=load)
    lines = parts[0].read_bytes().splitlines(keepends=True)
    parts[0].write_bytes(b"".join(lines[:7]))
    run(plan, parts[0], shard=(0, 2), load=load)
    assert_same(parts, [tmp_path / "whole.jsonl"])


def test_bytes_depend_on_no_neighbour_at_any_number_of_slots(tmp_path):
    """Three slots of 77 tokens: neither a number that vectors divide. What counts is the MLP's width, see `run`."""
    engine = Engine(tiny_llama(vocab_size=77, intermediate_size=64), slots=3, fixed_slots=True)
    plan = Plan.of(
        SOURCE
        | {
            "settings": {"min-p": {"min_p": 0.1}},
            "prompts": [[5, 6, 7], [8], [9, 10, 11, 12, 13]],
            "samples": 4,
        }
    )
    run(plan, tmp_path / "whole.jsonl", load=lambda **_: engine)
    for i in range(3):
        run(plan, tmp_path / f"{i}.jsonl", shard=(i, 3), load=lambda **_: engine)
    assert_same([tmp_path / f"{i}.jsonl" for i in range(3)], [tmp_path / "whole.jsonl"])


def test_a_header_tells_of_every_model(tmp_path, engine):
    given = []

    def load(name_or_path, **arguments):
        given.append((name_or_path, arguments))
        return engine

    models = {"one": "a", "two": {"name_or_path": "b", "slots": 2}}
    source = SOURCE | {"model": None, "models": models, "samples": 1}
    for i in range(2):
        run(Plan.of(source), tmp_path / f"{i}.jsonl", shard=(i, 2), load=load)
    assert given == [("a", {}), ("b", {"slots": 2})] * 2
    assert merge([tmp_path / f"{i}.jsonl" for i in range(2)], tmp_path / "all.jsonl") == 24
    header, records = read_results([tmp_path / "all.jsonl"])
    assert {len(header[name]) for name in ("weights", "slots", "revisions")} == {2}
    assert header["weights"]["one"] == header["weights"]["two"]
    assert header["chains"]["min-p"] == ["temperature", "min_p"]
    assert {r["model"] for r in records} == {"one", "two"}


def test_ten_thousand_units_are_not_held_in_memory():
    plan = Plan.of(SOURCE | {"samples": 10_000 // 12 + 1})
    tracemalloc.start()
    assert sum(1 for _ in plan.units()) >= 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_records_in_forms_that_others_read(tmp_path, load):
    run(Plan.of(SOURCE | {"samples": 1}), tmp_path / "a.jsonl", load=load)
    records = read_results([tmp_path / "a.jsonl"])[1]
    export(records, tmp_path / "h.jsonl", "human-eval")
    line = json.loads((tmp_path / "h.jsonl").read_text().splitlines()[0])
    assert line == {"task_id": records[0]["prompt_id"], "completion": records[0]["text"]}
    export(records, tmp_path / "a.json", "alpaca-eval")
    assert {entry["generator"] for entry in json.loads((tmp_path / "a.json").read_text())} == {
        "min-p",
        "top-p",
        "beam",
    }
    with pytest.raises(HandloomError, match="'parqet': expected parquet, human-eval"):
        export(records, tmp_path / "x", "parqet")
    parquet = pytest.importorskip("pyarrow.parquet")
    header = read_results([tmp_path / "a.jsonl"])[0]
    export(records, tmp_path / "a.parquet", "parquet", header)
    assert json.loads(parquet.read_schema(tmp_path / "a.parquet").metadata[b"handloom"]) == header
    assert parquet.read_table(tmp_path / "a.parquet").column("unit_id").to_pylist() == [
        r["unit_id"] for r in records
    ]


def test_a_unit_costs_the_same_however_many_there_are(tmp_path, engine):
    """With ten times the units: memory's peak is within a tenth, the plan itself aside, and nothing is opened more
    often; a unit takes one write and no more calls, fresh and where all are there."""
    generation = engine.generate("the cat", max_new_tokens=5, ignore_eos=True)

    def draw(plan, model, units):
        yield header_of(plan, engine, model)
        for unit in units:
            yield record_of(unit, generation)

    def peak(samples):
        plan, path = Plan.of(SOURCE | {"samples": samples}), tmp_path / f"{samples}.jsonl"
        calls = [counted(lambda: run(plan, path, draw=draw)) for _ in ("fresh", "all there")]
        path.unlink()
        tracemalloc.start()
        try:
            run(plan, path, draw=draw)
            return len(plan), tracemalloc.get_traced_memory()[1], calls
        finally:
            tracemalloc.stop()

    peak(1)  # imports and caches
    (few, small, before), (many, large, after) = peak(3), peak(30)
    assert (few, many) == (36, 360)
    assert large < 1.1 * small
    for once, more in zip(before, after, strict=True):
        assert more["open"] == once["open"]
    assert after[0]["write"] == before[0]["write"] + 2 * (many - few)  # ours, and the file's
    assert after[1]["write"] == before[1]["write"]
    for limit, once, more in zip((2000, 300), before, after, strict=True):
        assert more.total() / many <= min(limit, once.total() / few)


def counted(work):
    """How often each function is called meanwhile, by its name: Python's and those of C."""
    calls = Counter()

    def seen(frame, event, called):
        if event in ("call", "c_call"):
            calls[frame.f_code.co_name if event == "call" else called.__name__] += 1

    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def test_a_process_for_each_device_draws_its_part(tmp_path, load, monkeypatch, capsys):
    source = SOURCE | {"samples": 1, "prompts": [f"prompt {i}" for i in range(8)]}
    (tmp_path / "plan.yaml").write_text(json.dumps(source))
    started = []

    class Child:
        """Stands for a process: runs the command here."""

        def __init__(self, command, env):
            plan, _, output, _, shard = command[command.index("sweep") + 1 :]
            started.append((env["CUDA_VISIBLE_DEVICES"], shard))
            part, parts = map(int, shard.split("/"))
            self.failed = run(Plan.read(plan), output, shard=(part, parts), load=load)

        def wait(self):
            return self.failed

    def sweep(*options):
        arguments = ["sweep", str(tmp_path / "plan.yaml"), "-o", str(tmp_path / "all.jsonl"), *options]
        monkeypatch.setattr(sys, "argv", ["handloom", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, capsys.readouterr().err

    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    code, said = sweep("--gpus", "0,1")
    assert (code, "'0' is not there; expected a machine with CUDA" in said) == (2, True)
    monkeypatch.setattr("handloom.cli.experiments.subprocess.Popen", Child)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert sweep("--gpus", "0, 3", "--shard", "1/2")[0] == 0
    assert started == [("0", "1/4"), ("3", "3/4")]
    records = read_results([tmp_path / "all.jsonl"])[1]
    assert {r["unit_id"] for r in records} == {u.id for u in Plan.of(source).units((1, 2))}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,GPU-a,7")  # numbers are among those that a job was given
    assert sweep("--gpus", "1", "--shard", "0/2")[0] == 0  # what was there stays
    assert started[2:] == [("5", "0/2")]
    assert len(read_results([tmp_path / "all.jsonl"])[1]) == len(Plan.of(source))
    assert sweep("--gpus", "0,,1")[0] == sweep("--gpus", "0", "--ray")[0] == 2
    assert "'4' is not there; expected one of 0, 1, 2, 3" in sweep("--gpus", "0,4")[1]
