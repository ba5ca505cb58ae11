"""Strategies over the server: several at once beside the loop, streamed, ended when their callers leave, drawn."""

import json
import threading

import httpx
import pytest
from helpers import recorded, until

from handloom import strategies

ASKED = {"prompt": "the", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
BEAMS = {"name": "beam_search", "num_beams": 3}


def post(server, body, path="/v1/completions"):
    return httpx.post(server.url + path, json=body, timeout=120)


def lines(server, body, path="/v1/completions"):
    """The JSON objects of a streamed answer."""
    with httpx.stream("POST", server.url + path, json=body, timeout=120) as answer:
        texts = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
    return [json.loads(text) for text in texts if text != "[DONE]"]


def test_several_run_at_once_beside_the_loop_and_get_what_they_would_alone(server, monkeypatch):
    engine, meeting = server.engine, threading.Barrier(2, timeout=120)
    plain = engine.prefill

    def prefill(*arguments, **options):
        meeting.wait()  # both strategies are under way, or neither gets further
        return plain(*arguments, **options)

    monkeypatch.setattr(engine, "prefill", prefill)
    bodies = [
        ASKED | {"strategy": BEAMS},
        ASKED | {"strategy": BEAMS, "prompt": "quick"},
        ASKED | {"max_tokens": 60},
    ]
    answers = {}
    threads = [
        threading.Thread(target=lambda i=i, body=body: answers.update({i: post(server, body)}))
        for i, body in enumerate(bodies)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    for i, body in enumerate(bodies[:2]):
        wanted = strategies.beam_search(
            engine, [body["prompt"]], num_beams=3, max_new_tokens=6, ignore_eos=True
        )[0].text
        assert answers[i].json()["choices"][0]["text"] == wanted
    assert (
        answers[2].json()["choices"][0]["text"]
        == engine.generate("the", max_new_tokens=60, ignore_eos=True).text
    )


@pytest.mark.parametrize("strategy", ["contrastive_search", "speculative", "beam_search", "best_of_n"])
def test_a_streamed_one_joins_to_the_whole(server, strategy):
    body = ASKED | {"strategy": strategy, "seed": 3, "temperature": 1.0 if strategy == "best_of_n" else 0}
    whole = post(server, body).json()["choices"][0]
    parts = lines(server, body | {"stream": True, "stream_options": {"include_usage": True}})
    choices = [choice for part in parts for choice in part["choices"] if choice["index"] == 0]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert choices[-1]["finish_reason"] == whole["finish_reason"]
    assert (len(choices) > 2) == (strategy in ("contrastive_search", "speculative"))
    assert parts[-1]["usage"]["completion_tokens"] >= 6
    if strategy == "speculative":
        assert whole["extra"]["passes"] >= 1


def test_who_leaves_ends_it_before_its_next_pass(server):
    engine, body = server.engine, ASKED | {"strategy": BEAMS, "max_tokens": 400}
    for streamed in (False, True):
        with recorded(engine.model) as passes:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(server.url + "/v1/completions", json=body | {"stream": streamed}, timeout=0.3)
            until(lambda: server.worker.pending == 0)
        assert 0 < len(passes.shapes) < 400
    until(lambda: engine.pool.in_use == 0)


def test_its_errors_are_answers_streamed_or_not(server):
    for strategy, message in (
        ({"name": "beam_search", "num_beams": 0}, "num_beams"),
        ({"name": "contrastive_search", "k": "x"}, "strategy contrastive_search: TypeError"),
    ):
        body = ASKED | {"strategy": strategy}
        refused = post(server, body)
        assert refused.status_code == 400
        assert message in refused.json()["error"]["message"]
        assert message in lines(server, body | {"stream": True})[-1]["error"]["message"]
    assert (
        "streams one prompt"
        in post(server, body | {"stream": True, "prompt": ["a", "b"]}).json()["error"]["message"]
    )
    assert "best_of" in post(server, body | {"best_of": 2}).json()["error"]["message"]


@pytest.mark.parametrize(
    "strategy", [BEAMS, {"name": "smc", "n": 3}, {"name": "speculative", "num_draft": 3}]
)
def test_its_passes_are_told_as_a_tree(server, strategy):
    drafts = strategy["name"] == "speculative"
    body = {
        "prompt": "the quick",
        "params": {"temperature": 0.0 if drafts else 1.0, "seed": 1, "ignore_eos": True},
        "steps": 60 if drafts else 6,
    }
    *passes, told = lines(server, body | {"strategy": strategy, "stream": True}, "/inspect")
    assert [each["pass"] for each in passes] == list(range(1, len(passes) + 1))
    nodes = {0: (None, None)}
    for each in [*passes, *told["results"]]:
        for number, parent, token, p in each["nodes"]:
            assert parent in nodes
            assert number not in nodes
            assert p is None or 0 <= p <= 1
            nodes[number] = parent, token
        assert all(base in nodes and tip in nodes for base, tip in each.get("rows", ()))

    def path(node):
        return [] if node == 0 else [*path(nodes[node][0]), nodes[node][1]]

    assert path(told["results"][0]["last"]) == told["output_ids"]
    name = strategy["name"]
    if drafts:
        tried = {node for each in passes for base, tip in each["rows"] for node in (tip,) if tip != base}
        assert all(each["kind"] == "extend" for each in passes)
        assert max(len(path(tip)) - len(path(base)) for each in passes for base, tip in each["rows"]) == 4
        kept = {base for each in passes for base, _ in each["rows"]}
        assert tried - kept  # drafts that were rejected
    else:
        assert all(len(each["rows"]) == 3 for each in passes[:3])
        assert len(told["results"]) == (1 if name == "beam_search" else 3)
    if name == "smc":
        assert sum(result["extra"]["weight"] for result in told["results"]) == pytest.approx(1)
