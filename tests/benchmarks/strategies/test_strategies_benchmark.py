"""The benchmark of strategies counts what it says, and names strategies that exist."""

import inspect
import io
import json
from importlib.metadata import version

import torch
from helpers import tiny_llama

from benchmarks.strategies import __main__ as benchmark
from benchmarks.strategies import older
from handloom import Engine, strategies


class Words:
    """One token a letter, for prompts of text."""

    def __call__(self, text):
        return [ord(letter) % 101 for letter in text]


def test_passes_and_rows_of_a_token(monkeypatch):
    """Eight prompts, five tokens each: a pass for four of them after the prompts; contrastive search feeds k rows."""
    engine = Engine(tiny_llama(), slots=8)
    monkeypatch.setattr(benchmark, "PROMPTS", [[i, i + 1] for i in range(8)])
    plain = benchmark.measured(engine.model, benchmark.ours(engine, "generate", {}, 5))
    wide = benchmark.measured(engine.model, benchmark.ours(engine, "contrastive_search", {"k": 3}, 5))
    assert plain["tokens"] == wide["tokens"] == 40
    assert plain["passes_per_token"] <= (8 + 4) / 40
    assert wide["rows_per_token"] >= 3
    half = strategies.early_exit(engine, 1)
    drafted = benchmark.measured(
        engine.model, benchmark.ours(engine, *benchmark.cases(half)["speculative, tree"], 5), 1
    )
    assert 0 <= drafted["acceptance"] <= 1
    assert drafted["tokens"] == 40
    assert not any(part._forward_pre_hooks for part in engine.model.modules())


def test_the_same_mode_of_transformers_gives_as_many_tokens(monkeypatch):
    engine = Engine(tiny_llama(), slots=8)
    monkeypatch.setattr(benchmark, "PROMPTS", ["abc", "de"])
    prompts = [Words()(text) for text in benchmark.PROMPTS]
    for name, fields in benchmark.THEIRS.items():
        with torch.no_grad():
            rows = benchmark.theirs(engine.model, prompts, name in benchmark.ALONE, fields, 4)()
        assert [row.n_new for row in rows] == [4, 4]


def test_every_strategy_is_measured():
    known = [name for name in strategies.__all__ if inspect.isfunction(getattr(strategies, name))]
    takes = {name: [*inspect.signature(getattr(strategies, name)).parameters] for name in known}
    assert {strategy for strategy, _ in benchmark.cases(None).values()} == {
        name for name in known if takes[name][:2] == ["engine", "prompts"] and name != "decode"
    }


def test_an_older_version_is_given_a_task(tmp_path, monkeypatch, capsys):
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path)
    task = {"model": str(tmp_path), "prompts": [[1, 2], [3]], "fields": {"num_beams": 2}, "count": 3}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(task | {"threads": torch.get_num_threads()})))
    older.main()
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["transformers"]) == (6, version("transformers"))
