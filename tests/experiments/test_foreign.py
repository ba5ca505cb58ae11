"""Files of other tools: requests become prompts, answers become records."""

import json

import pytest
from tiny_tokenizers import byte_level

from handloom import HandloomError
from handloom.experiments.analysis.compare import compare_records
from handloom.experiments.foreign import read_answers
from handloom.experiments.prompts import read_items


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def choices(*texts, chat=True):
    made = [{"message": {"content": t}} if chat else {"text": t} for t in texts]
    return {"status_code": 200, "body": {"choices": [c | {"finish_reason": "length"} for c in made]}}


LOGGED = {
    "doc_id": 3,
    "doc": {"q": "2+2"},
    "target": "4",
    "arguments": {"gen_args_0": {"arg_0": "2+2=", "arg_1": {"until": ["\n"]}}},
    "resps": [["4", "5"]],
    "exact_match": 1.0,
}


def test_requests_are_prompts(tmp_path):
    chat = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions"}
    chat |= {"body": {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}}
    text = {
        "custom_id": "b",
        "method": "POST",
        "url": "/v1/completions",
        "body": {"model": "m", "prompt": "hi"},
    }
    items = read_items(lines(tmp_path / "batch.jsonl", chat, text, LOGGED | {"arguments": [["1+1=", {}]]}))
    assert [(item.id, item.content) for item in items] == [
        ("a", [{"role": "user", "content": "hi"}]),
        ("b", "hi"),
        ("3", "1+1="),
    ]
    assert (items[0].rest["max_tokens"], items[2].target) == (4, "4")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"custom_id": "a", "response": choices("x", "y"), "error": None}, [("a", 0, "x"), ("a", 1, "y")]),
        ({"custom_id": "a", "response": choices("x", chat=False)}, [("a", 0, "x")]),
        ({"custom_id": "a", "response": None, "error": {"code": "late"}}, [("a", 0, "")]),
        ({"task_id": "HumanEval/7", "completion": "  return 1"}, [("HumanEval/7", 0, "  return 1")]),
        (LOGGED, [("3", 0, "4"), ("3", 1, "5")]),
        ({"prefix_text": "p", "generated_result": {"0": "x", "1": "y"}}, [("0", 0, "x"), ("0", 1, "y")]),
    ],
)
def test_answers_are_records(tmp_path, row, expected):
    records = read_answers(lines(tmp_path / "theirs.jsonl", row), model="m")
    assert [(r["prompt_id"], r["sample"], r["text"]) for r in records] == expected
    assert {(r["setting"], r["model"]) for r in records} == {("theirs", "m")}
    assert [r["finish_reason"] == "error" for r in records] == [not text for *_, text in expected]
    assert {r.get("correct") for r in records} == {True if row is LOGGED else None}


def test_answers_of_two_generators_are_compared(tmp_path):
    rows = [
        {"instruction": f"q{i}", "output": f"a {word}", "generator": name}
        for name, word in (("one", "cat"), ("two", "dog sat"))
        for i in range(3)
    ]
    both = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps([row for row in rows if row["generator"] == name]))
        both += read_answers(path, tokenizer=byte_level())
    found = compare_records(both, ["tokens"])
    assert (found.baseline, found.pairs[0].name, found.pairs[0].samples) == ("one", "two", 3)
    lengths = [len(byte_level().encode(text)) for text in ("a cat", "a dog sat")]
    assert found.pairs[0].differences["tokens"].value == lengths[1] - lengths[0]


def test_what_is_none_of_these_is_said(tmp_path):
    with pytest.raises(
        HandloomError, match=r"row 0: expected a row of OpenAI's or vLLM's batches.*it has question"
    ):
        read_answers(lines(tmp_path / "a.jsonl", {"question": 1}))
    with pytest.raises(HandloomError, match="there is no"):
        read_answers(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_text("{")
    with pytest.raises(HandloomError, match="neither a JSON list nor JSON lines"):
        read_answers(tmp_path / "c.jsonl")
