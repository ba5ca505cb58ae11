"""Plans and datasets on Ray: the records of one process, whoever drew them."""

import json
import sys

import numpy as np
import pytest
from helpers import text_engine
from tiny_tokenizers import byte_level

from handloom import Engine, ParameterError, cli
from handloom.experiments.plan import Plan
from handloom.experiments.ray import Generate, on_ray
from handloom.experiments.records import read_results
from handloom.experiments.run import run

PARAMS = {"temperature": 1.2, "max_new_tokens": 5, "ignore_eos": True}
SOURCE = {
    "prompts": ["the cat", "a dog sat", "once upon a time", "x", "over the lazy dog"],
    "settings": {"min-p": {"min_p": 0.2}, "top-p": {"top_p": 0.7}},
    "params": PARAMS,
    "samples": 2,
    "seed": 4,
}


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
    greedy = generate.engine.generate("a dog", PARAMS | {"temperature": 0.0})
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


@pytest.mark.slow
def test_two_workers_give_the_records_of_one_process(folder, tmp_path):
    import ray

    model = {"name_or_path": str(folder), "slots": 1, "layout": "plain"}
    plan = Plan.of(SOURCE | {"model": model})

    def lines(path):
        return sorted(
            json.dumps({k: v for k, v in record.items() if k != "timings"})
            for record in read_results([path])[1]
        )

    run(plan, tmp_path / "here.jsonl", load=lambda **arguments: Engine.from_pretrained(**arguments))
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False)
    try:
        with on_ray(workers=2) as draw:
            done = []
            run(plan, tmp_path / "there.jsonl", draw=draw, progress=lambda *now: done.append(now[:2]))
        assert done[-1] == (20, 20)
        assert lines(tmp_path / "there.jsonl") == lines(tmp_path / "here.jsonl")
        assert read_results([tmp_path / "there.jsonl"])[0] == read_results([tmp_path / "here.jsonl"])[0]
        rows = [{"id": f"r{i}", "prompt": prompt} for i, prompt in enumerate(SOURCE["prompts"])]
        options = {
            "fn_constructor_kwargs": {"model": model, "params": PARAMS},
            "concurrency": 1,
            "batch_size": 2,
        }
        made = ray.data.from_items(rows).map_batches(Generate, **options).take_all()
    finally:
        ray.shutdown()
    expected = Generate(model, PARAMS)({name: [row[name] for row in rows] for name in rows[0]})
    told = {row["id"]: (row["generated_text"], list(row["generated_tokens"])) for row in made}
    assert told == {
        name: (text, list(tokens))
        for name, text, tokens in zip(
            expected["id"], expected["generated_text"], expected["generated_tokens"], strict=True
        )
    }
