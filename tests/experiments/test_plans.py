"""Plans: what they expand to, what names a unit, and what is wrong with a bad one."""

import json

import pytest

from handloom.errors import ParameterError, PromptError
from handloom.experiments.plan import Plan
from handloom.experiments.prompts import read_items


def plan(**changes):
    source = {"model": "tiny", "prompts": ["a", "b", "c"], "samples": 2, "seed": 7}
    source |= {
        "settings": {"min-p": {"min_p": 0.05}, "top-p": {"top_p": 0.9}},
        "params": {"max_new_tokens": 4},
    }
    return Plan.of(source | changes)


def test_grids_cross_and_zips_go_in_step():
    made = plan(
        grid={"temperature": [0.7, 1.5]},
        zip={"top_k": [10, 20, 30], "seed_note": [1, 2, 3]} and {"top_k": [10, 20]},
    )
    assert [setting.name for setting in made.settings] == [
        f"{name} temperature={t} top_k={k}"
        for name in ("min-p", "top-p")
        for t in (0.7, 1.5)
        for k in (10, 20)
    ]
    assert made.settings[0].values == {"max_new_tokens": 4, "temperature": 0.7, "top_k": 10, "min_p": 0.05}
    assert len(made) == len(list(made.units())) == 3 * 8 * 2
    together = plan(zip={"top_k": [10, 20], "temperature": [0.5, 1.0]})
    assert [(s.values["top_k"], s.values["temperature"]) for s in together.settings[:2]] == [
        (10, 0.5),
        (20, 1.0),
    ]


def test_models_and_seeds_are_varied_like_parameters():
    several = plan(model=None, models=["a", "b"], seed=[7, 8])
    assert len(several) == len(list(several.units())) == 2 * 3 * 2 * 2 * 2
    alone = {(u.item.id, u.sample): u.seed for u in plan().units()}
    found = {(u.item.id, u.sample): u.seed for u in several.units()}
    assert {place: found[place] for place in alone} == alone  # the first seed's samples come first
    other = {(u.item.id, u.sample + 2): u.seed for u in plan(seed=8).units()}
    assert {place: found[place] for place in other} == other
    pairs = plan(model=None, zip={"model": ["a", "b"], "temperature": [0.7, 1.5]})
    assert list(pairs.models) == ["a", "b"]
    assert {(u.model, u.setting.values["temperature"]) for u in pairs.units()} == {("a", 0.7), ("b", 1.5)}
    assert len(pairs) == len(list(pairs.units())) == 2 * 2 * 3 * 2


def test_ids_name_what_a_sample_depends_on_and_nothing_else():
    ids = {unit.id for unit in plan().units()}
    assert len(ids) == 12
    renamed = plan(settings={"other name": {"min_p": 0.05}, "top-p": {"top_p": 0.9}}, metrics=["tokens"])
    assert {unit.id for unit in renamed.units()} == ids
    for change in (
        {"model": "other"},
        {"prompts": ["x", "y", "z"]},
        {"seed": 8},
        {"params": {"max_new_tokens": 5}},
        {"chat": True},
    ):
        assert not ids & {unit.id for unit in plan(**change).units()}, change
    assert ids < {unit.id for unit in plan(samples=3).units()}


def test_seeds_are_shared_by_settings_and_differ_over_prompts_and_samples():
    seeds = {}
    for unit in plan().units():
        seeds.setdefault((unit.item.id, unit.sample), set()).add(unit.seed)
    assert all(len(found) == 1 for found in seeds.values())
    assert len(set.union(*seeds.values())) == 6
    assert all(0 <= seed < 2**62 for found in seeds.values() for seed in found)


def test_shards_divide_the_prompts():
    parts = [{unit.id for unit in plan().units((i, 2))} for i in range(2)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == {unit.id for unit in plan().units()}
    with pytest.raises(ParameterError, match="shard 2/2: expected i/n"):
        next(plan().units((2, 2)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": "x"}, "unknown modle; expected model, models"),
        ({"model": None}, "expected a model"),
        ({"samples": 0}, "samples=0 must be a whole number of at least 1"),
        ({"settings": {"a": {"temprature": 1}}}, "temprature"),
        ({"settings": {"a": {"strategy": "beem_search"}}}, "beem_search.*did you mean 'beam_search'"),
        ({"grid": {"top_k": 5}}, "top_k in grid or zip must be a list"),
        ({"zip": {"top_k": [1], "top_p": [0.5, 0.6]}}, "must have one length; they have top_k: 1, top_p: 2"),
        ({"settings": {"a": {"top_p": 1.5}}}, "top_p"),
        ({"settings": {"a": {"seed": 3}}}, "seed of setting 'a': the plan's own seed and samples"),
        ({"seed": [1, 1]}, "must be a whole number, or a list of different ones"),
        ({"zip": {"model": ["x"]}}, "no model 'x'; expected one of tiny"),
        ({"grid": [1]}, "grid is a mapping"),
        ({"settings": {"a": 3}}, "setting 'a' is a mapping from names to values.*got 3"),
        ({"metrics": ["lopgrob"]}, "metric 'lopgrob': expected one of tokens, logprob"),
        ({"metrics": "logprob"}, "metrics='logprob' must be a list"),
    ],
)
def test_a_bad_plan_says_what_is_wrong(change, message):
    with pytest.raises(ParameterError, match=message):
        plan(**change)


def test_options_of_a_strategy_are_told_from_parameters():
    made = plan(
        settings={"beam": {"strategy": "beam_search", "num_beams": 3, "length_penalty": 0.5, "top_k": 4}}
    )
    (setting,) = made.settings
    assert setting.options == {"num_beams": 3, "length_penalty": 0.5}
    assert setting.params == {"top_k": 4, "max_new_tokens": 4}


def test_prompts_from_files(tmp_path):
    rows = [
        {"task_id": "HumanEval/0", "prompt": "def f():", "entry_point": "f"},
        {"task_id": "h/1", "prompt": "def g():"},
    ]
    (tmp_path / "human.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    first, second = read_items("human.jsonl", tmp_path)
    assert (first.id, first.content, first.rest) == ("HumanEval/0", "def f():", {"entry_point": "f"})
    assert second.id == "h/1"
    made = read_items(
        {"file": "human.jsonl", "limit": 1, "prompt": "# {task_id}\n{prompt}", "target": "entry_point"},
        tmp_path,
    )
    assert [(item.content, item.target) for item in made] == [("# HumanEval/0\ndef f():", "f")]
    mixed = read_items(
        ["text", [3, 4], [{"role": "user", "content": "hi"}], {"instruction": "do", "id": 9, "target": 3}]
    )
    assert [item.content for item in mixed] == ["text", [3, 4], [{"role": "user", "content": "hi"}], "do"]
    assert (mixed[3].id, mixed[3].target) == ("9", 3)


def test_prompts_from_a_task_file(tmp_path):
    (tmp_path / "docs.jsonl").write_text('{"q": "2+2", "a": "4"}\n{"q": "3+3", "a": "6"}\n')
    task = "task: sums\ndataset_path: json\ndataset_kwargs: {data_files: {test: docs.jsonl}}\n"
    task += "doc_to_text: 'Q: {{q}}\\nA:'\ndoc_to_target: a\n"
    (tmp_path / "sums.yaml").write_text(task.replace("'Q: {{q}}\\nA:'", '"Q: {{q}}\\nA:"'))
    items = read_items("sums.yaml", tmp_path)
    assert [(item.id, item.content, item.target) for item in items] == [
        ("sums/0", "Q: 2+2\nA:", "4"),
        ("sums/1", "Q: 3+3\nA:", "6"),
    ]
    (tmp_path / "hub.yaml").write_text("task: x\ndataset_path: gsm8k\n")
    with pytest.raises(PromptError, match="task over local files"):
        read_items("hub.yaml", tmp_path)
    (tmp_path / "code.yaml").write_text("task: x\ndoc_to_text: !function utils.text\n")
    with pytest.raises(PromptError, match=r"no task that can be read as it is: .*!function"):
        read_items("code.yaml", tmp_path)


def test_prompts_from_several_files_and_a_datasets_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text(f'"{name} a"\n"{name} b"\n')
    items = read_items({"file": ["one.jsonl", "two.jsonl"], "limit": 1}, tmp_path)
    assert [(item.id, item.content) for item in items] == [("one/0", "one a"), ("two/0", "two a")]
    rows = datasets.Dataset.from_list(
        [{"question": "2+2", "answer": "4"}, {"question": "3+3", "answer": "6"}]
    )
    rows.save_to_disk(tmp_path / "saved")
    made = read_items({"file": "saved", "prompt": "Q: {question}\nA:", "target": "answer"}, tmp_path)
    assert [(item.content, item.target) for item in made] == [("Q: 2+2\nA:", "4"), ("Q: 3+3\nA:", "6")]
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "splits")
    with pytest.raises(PromptError, match=r"holds the splits test; name one: .*splits/test"):
        read_items("splits", tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.jsonl", "there is no"),
        ([{"id": 1, "question": "x"}], "expected one of the fields prompt, messages"),
        ([{"id": 1, "prompt": "x"}, {"id": 1, "prompt": "y"}], "id '1' comes twice"),
        ([], "none in"),
        ({"file": "x", "limt": 3}, "limt; expected file"),
        (7, "expected a list, a file"),
    ],
)
def test_bad_prompts_say_what_is_wrong(source, message, tmp_path):
    with pytest.raises(PromptError, match=message):
        read_items(source, tmp_path)
