"""OpenAI's batch files: every line answered once, errors beside answers, and no work done twice."""

import json

import pytest
from served import chat_engine

from handloom.errors import ParameterError
from handloom.serve.batch import answer_file

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def line(name, url, **body):
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


LINES = [
    line("a", TEXT, prompt="the quick", max_tokens=4, seed=1, n=2),
    line("b", CHAT, messages=[{"role": "user", "content": "x"}], max_tokens=3, temperature=0),
    line("c", TEXT, prompt="the", temprature=1),
    line(
        "d", TEXT, prompt="the", max_tokens=3, temperature=0, strategy={"name": "beam_search", "num_beams": 2}
    ),
    line("e", "/v1/embeddings", input="x"),
    line("f", TEXT, prompt="the", max_tokens=3, allowed_tokens=[5], suppress_first=[5]),
]


def written(path, lines):
    path.write_text("".join(json.dumps(each) + "\n" for each in lines), encoding="utf-8")
    return path


def answers(path):
    return {
        record["custom_id"]: record["response"] for record in map(json.loads, path.read_text().splitlines())
    }


def test_every_line_is_answered_and_a_second_run_does_what_is_left(tmp_path):
    engine, source, target = (
        chat_engine(slots=2),
        written(tmp_path / "in.jsonl", LINES),
        tmp_path / "out.jsonl",
    )
    told = []
    assert answer_file(engine, "tiny", source, target, lambda *at: told.append(at)) == 3
    assert told[-1] == (6, 6)
    found = answers(target)
    assert {name: answer["status_code"] for name, answer in found.items()} == {
        **dict.fromkeys("abd", 200), **dict.fromkeys("cef", 400)
    }  # fmt: skip
    alone = engine.generate("the quick", max_new_tokens=4, seed=1, n=2, temperature=1.0)
    assert [choice["text"] for choice in found["a"]["body"]["choices"]] == [g.text for g in alone]
    assert found["b"]["body"]["choices"][0]["message"]["role"] == "assistant"
    assert "did you mean 'temperature'" in found["c"]["body"]["error"]["message"]
    assert "no token is left" in found["f"]["body"]["error"]["message"]

    whole = target.read_bytes()
    cut = whole.splitlines(keepends=True)
    target.write_bytes(b"".join(cut[:3]) + cut[3][:20])  # killed while it wrote the fourth
    answer_file(engine, "tiny", source, target)
    assert {name: a["status_code"] for name, a in answers(target).items()} == {
        name: a["status_code"] for name, a in found.items()
    }
    assert target.read_bytes().startswith(b"".join(cut[:3]))
    engine.pool.check()


@pytest.mark.parametrize(
    ("lines", "message"),
    [([LINES[0]] * 2, "line 2: custom_id='a' must be"), ([{"url": TEXT}], "line 1: custom_id=None")],
)
def test_lines_without_a_name_of_their_own(tmp_path, lines, message):
    with pytest.raises(ParameterError, match=message):
        answer_file(chat_engine(), "tiny", written(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
