"""The README's Python runs as it stands, from the first block to the last, and says what it promises."""

import re
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


def blocks(language):
    """Every fenced block of a language, with its line number."""
    text = README.read_text(encoding="utf-8")
    for found in re.finditer(rf"^```{language}\n(.*?)^```", text, re.M | re.S):
        yield text[: found.start()].count("\n") + 2, found.group(1)


@pytest.mark.slow
def test_python_blocks_run_in_order(smollm2, monkeypatch, capsys):
    monkeypatch.setenv("HANDLOOM_MODEL", str(smollm2))
    namespace, count = {}, 0
    for line, source in blocks("python"):
        # Padding with newlines gives tracebacks the README's own line numbers.
        exec(compile("\n" * (line - 1) + source, str(README), "exec"), namespace)
        count += 1
    assert count >= 8
    printed = capsys.readouterr().out
    assert "The capital of France is Paris. eos" in printed
    assert {"repetition_penalty", "top_k"} <= set(printed.split())
    engine = namespace["engine"]
    del namespace
    engine.pool.check()


def test_both_commands_are_those_that_ci_runs():
    commands = "".join(source for _, source in blocks("bash"))
    assert (
        'pip install -c constraints.txt -e ".[demo]" && handloom "What is the capital of France?"' in commands
    )
    assert 'pip install -c constraints.txt -e ".[dev]" && pytest' in commands
    ci = (README.parent / ".ci" / "run").read_text(encoding="utf-8")
    assert '-c constraints.txt -e ".[dev]"' in ci
    assert re.search(r"^pytest", ci, re.M)


def test_the_tree_names_files_that_exist():
    section = README.read_text(encoding="utf-8").split("## The tree")[1]
    tree = section.split("```")[1]
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    there = {path.name for folder in ("engine", "kernels", "tests", "benchmarks") for path in
             (README.parent / folder).rglob("*.py")}  # fmt: skip
    assert len(named) > 25
    assert named <= there
