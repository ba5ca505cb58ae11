"""Programs against their tests: what passes, what fails, what never ends, what is too large."""

import json
import sys

import pytest

from handloom import ParameterError, cli
from handloom.experiments.analysis.checking import checked
from handloom.experiments.analysis.metrics import METRICS
from handloom.experiments.records import read_results, write_results

PROMPT = 'from typing import List\n\n\ndef add(a: List[int]) -> int:\n    """Their sum."""\n'
TASK = {"entry_point": "add", "test": "def check(candidate):\n    assert candidate([1, 2]) == 3\n"}


def record(text, sample=0, **more):
    made = {
        "unit_id": f"x{sample}",
        "sample": sample,
        "prompt_id": "HumanEval/0",
        "prompt": PROMPT,
        "text": text,
    }
    return (
        made
        | {
            "text": text,
            "task": TASK,
            "token_ids": [1],
            "finish_reason": "stop",
            "setting": "s",
            "model": "m",
        }
        | more
    )


CASES = {
    "    return sum(a)\n": "passed",
    "    return 4\n": "AssertionError",
    "Sure:\n```python\nimport math\n\ndef add(a: List[int]):\n    return math.fsum(a)\n```\nDone.": "passed",
    "```python\n    return sum(a)\n```": "passed",
    "    return 3\n\nprint('every test passed'); import os; os._exit(0)": "ended early (exit status 0)",
    "    while True: pass\n": "timed out",
    "    return len(bytearray(1 << 33))\n": "MemoryError",
    "    return sum(a\n": "SyntaxError: '(' was never closed",
    "    open('big', 'w').write('x' * (2 << 20)); return sum(a)\n": "OSError",
    "    import os; return 3 if os.listdir() == [] and 'HOME' not in os.environ else 0\n": "passed",
}


def test_programs_pass_or_say_why_not():
    made = checked([record(text, i) for i, text in enumerate(CASES)], execute=True, seconds=2, memory=1 << 30)
    for (text, wanted), found in zip(CASES.items(), made, strict=True):
        assert found["check"].startswith(wanted), text
        assert found["correct"] == (wanted == "passed")
    assert METRICS["pass_1"].of(made) == [pytest.approx(4 / 10)]
    assert METRICS["pass_10"].of(made) == [1.0]


def test_nothing_runs_unless_asked_for(tmp_path, monkeypatch, capsys):
    with pytest.raises(ParameterError, match="programs that a model wrote; execute=True"):
        checked([record("")])
    with pytest.raises(ParameterError, match="'HumanEval/0' has no tests"):
        checked([record("", task={})], execute=True)
    write_results(
        tmp_path / "run.jsonl", {"settings": ["s"]}, [record(text, i) for i, text in enumerate([*CASES][:2])]
    )
    arguments = ["handloom", "check", str(tmp_path / "run.jsonl"), "-o", str(tmp_path / "checked.jsonl")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert not (tmp_path / "checked.jsonl").exists()
    monkeypatch.setattr(sys, "argv", [*arguments, "--execute"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert "1 of 2 programs pass" in capsys.readouterr().out
    assert [r["correct"] for r in read_results([tmp_path / "checked.jsonl"])[1]] == [True, False]
    assert json.loads((tmp_path / "checked.jsonl").read_text().splitlines()[0]) == {
        "header": {"settings": ["s"]}
    }
