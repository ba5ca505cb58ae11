"""The benchmark of strategies counts what it says, and names strategies that exist."""

import torch
from helpers import tiny_llama

from benchmarks.strategies import __main__ as benchmark
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
    assert not any(part._forward_pre_hooks for part in engine.model.modules())


def test_the_same_mode_of_transformers_gives_as_many_tokens(monkeypatch):
    engine = Engine(tiny_llama(), slots=8)
    monkeypatch.setattr(benchmark, "PROMPTS", ["abc", "de"])
    monkeypatch.setattr(engine, "encode", Words())
    for name in benchmark.THEIRS:
        with torch.no_grad():
            assert benchmark.theirs(engine, name, 4)() == 8


def test_every_name_is_a_strategy():
    for name in {*benchmark.GREEDY, *benchmark.SAMPLED}:
        assert strategies.named(name)
