"""What the server does not do: wrong bodies, strangers, too much at once; always an answer in OpenAI's shape."""

import contextlib
import itertools
import json
import os
import signal
import socket
import threading
from contextlib import contextmanager

import httpx
import openai
import pytest
from helpers import until
from served import chat_engine, served

from handloom.cli import serving
from handloom.errors import ParameterError
from handloom.serve.protocol.reading import Limits

LONG = {"prompt": "the", "max_tokens": 120, "temperature": 1.0, "ignore_eos": True}


@contextmanager
def limited():
    """A server with small limits, and a client of it."""
    limits = Limits(body=20_000, samples=4, waiting=2, seconds=120)
    hosts = ("127.0.0.1", "localhost")
    with (
        served(chat_engine(slots=2), limits=limits, hosts=hosts) as running,
        httpx.Client(timeout=120) as http,
    ):
        http.base_url = running.url
        running.http = http
        yield running


@pytest.fixture(scope="module")
def server():
    with limited() as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def error_of(response, status):
    """The error of an answer, which has OpenAI's shape."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    return error


WRONG = {
    "temperature": (-1, "temperature=-1 is not valid"),
    "temprature": (1, "did you mean 'temperature'"),
    "top_k": ("x", "top_k='x' is not valid"),
    "prompt": ([], "prompt"),
    "logit_bias": ({"99999": 1}, "logit_bias: token id 99999"),
    "messages": ([], "messages is not a field of /v1/completions"),
    "suffix": ("x", "left to right"),
    "n": (5, "over 4"),
    "best_of": (0, "at least n=1"),
    "stream": (1, "stream=1 is not valid: expected bool"),
    "stream_options": ({"x": 1}, "include_usage alone"),
    "processors": (["nothing"], "has no 'nothing'"),
    "strategy": ({"name": "beam_serch"}, "did you mean 'beam_search'"),
    "regex": ("(", "invalid regex"),
    "response_format": ({"type": "x"}, "response_format"),
    "criteria": (["x"], "cannot be sent"),
    "prompt_logprobs": (101, "at most 100"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_field_is_named(server, name):
    value, message = WRONG[name]
    content = json.dumps({"prompt": "the", "max_tokens": 2} | {name: value})
    response = server.http.post(
        "/v1/completions", content=content, headers={"Content-Type": "application/json"}
    )
    error = error_of(response, 400)
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"


def test_openais_client_raises_its_own_errors(client, server):
    with pytest.raises(openai.BadRequestError, match="did you mean 'temperature'") as raised:
        client.completions.create(model="tiny", prompt="x", extra_body={"temprature": 1})
    assert raised.value.param == "temprature"
    with pytest.raises(openai.NotFoundError, match="'gpt-5' is not here; 'tiny' is"):
        client.completions.create(model="gpt-5", prompt="x")
    with pytest.raises(openai.BadRequestError, match="too many for max_length") as raised:
        client.completions.create(model="tiny", prompt=[1] * 600)
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="'role' must be a string"):
        client.chat.completions.create(model="tiny", messages=[{"content": "x"}])
    with pytest.raises(openai.BadRequestError, match="no token is left"):
        client.completions.create(
            model="tiny", prompt="x", extra_body={"allowed_tokens": [5], "suppress_first": [5]}
        )


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"{", b'{"n": NaN}', b"\xff", b"[" * 9_000, b"1" * 9_000, b"null"]
)
def test_what_is_no_json_object(server, content):
    headers = {"Content-Type": "application/json"}
    answer = server.http.post("/v1/completions", content=content, headers=headers)
    assert error_of(answer, 400)["code"] == "invalid_json"


def test_the_gate(server):
    assert (
        "larger than 20000"
        in error_of(server.http.post("/tokenize", json={"prompt": "x" * 30_000}), 413)["message"]
    )
    sent = {"content": (b"x" * 1000 for _ in range(30)), "headers": {"Content-Type": "application/json"}}
    error_of(server.http.post("/tokenize", **sent), 413)
    error_of(
        server.http.post("/tokenize", content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"}), 415
    )
    error_of(server.http.get("/health", headers={"Host": "evil.example:80"}), 421)
    error_of(server.http.get("/nowhere"), 404)
    error_of(server.http.get("/v1/completions"), 405)
    error_of(server.http.get("/page/..%2f__init__.py"), 404)
    policy = server.http.get("/health").headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'")


def test_a_key_is_needed_where_one_is_set():
    with served(chat_engine(slots=1), key="secret") as server:
        wrong = openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0)
        with wrong, pytest.raises(openai.AuthenticationError, match="Bearer"):
            wrong.models.list()
        with openai.OpenAI(base_url=server.url + "/v1", api_key="secret") as right:
            assert (
                right.completions.create(model="tiny", prompt="x", max_tokens=1).usage.completion_tokens == 1
            )
        assert httpx.get(server.url + "/health").status_code == 200
        error_of(httpx.get(server.url + "/metrics"), 401)


def test_a_run_that_breaks_is_told_to_all_and_the_next_one_works(server, monkeypatch):
    broken = RuntimeError("the device is gone")

    def stream(arrivals):
        yield from itertools.islice(plain(arrivals), 3)
        raise broken

    plain = server.engine.stream
    monkeypatch.setattr(server.engine, "stream", stream)
    body = {"prompt": ["the", "a"], "max_tokens": 5, "temperature": 0}
    assert "the device is gone" in error_of(server.http.post("/v1/completions", json=body), 500)["message"]
    with server.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert "the device is gone" in json.loads(lines[-2].removeprefix("data: "))["error"]["message"]
    assert lines[-1] == "data: [DONE]"
    monkeypatch.undo()
    assert server.http.post("/v1/completions", json=body).status_code == 200
    assert server.worker.pending == 0


def test_what_takes_too_long_is_given_up(server, monkeypatch):
    monkeypatch.setattr(server.limits, "seconds", 0.05)
    error = error_of(server.http.post("/v1/completions", json=LONG), 408)
    assert (error["code"], error["type"]) == ("timeout", "timeout_error")
    with server.http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
        told = [line for line in answer.iter_lines() if "timeout_error" in line]
    assert len(told) == 1
    until(lambda: server.worker.pending == 0)


@pytest.fixture
def ending():
    """A server that the test ends."""
    with limited() as running:
        yield running


def test_too_many_wait_and_shutdown_answers_those_who_were_taken(ending):
    server, threads, answers = ending, [], []
    for _ in range(4):
        ask = lambda: answers.append(server.http.post("/v1/completions", json=LONG))  # noqa: E731
        threads.append(threading.Thread(target=ask))
        threads[-1].start()
    until(lambda: server.worker.pending == 4)
    refused = server.http.post("/v1/completions", json=LONG)
    error_of(refused, 429)
    assert refused.headers["retry-after"] == "1"
    server.runner.should_exit = True
    for thread in threads:
        thread.join()
    assert [answer.json()["usage"]["completion_tokens"] for answer in answers] == [120] * 4
    until(lambda: not server.worker.alive)


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread"
)
def test_the_command_ends_on_a_signal_when_what_it_took_is_answered(tmp_path, monkeypatch):
    with pytest.raises(ParameterError, match="set --api-key"):
        serving.serve(host="0.0.0.0")
    engine, answers = chat_engine(), []
    engine.model.save_pretrained(tmp_path)
    engine.tokenizer.save_pretrained(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"

    def answered() -> bool:
        with contextlib.suppress(httpx.ConnectError):
            return httpx.get(url + "/health").status_code == 200
        return False

    def ask() -> None:
        until(answered, 60)
        with httpx.stream(
            "POST", url + "/v1/completions", json=LONG | {"stream": True}, timeout=60
        ) as answer:
            for line in answer.iter_lines():
                if not answers:
                    os.kill(os.getpid(), signal.SIGTERM)
                answers.append(line)

    thread, before = threading.Thread(target=ask), signal.signal(signal.SIGTERM, lambda *_: None)
    thread.start()
    try:
        serving.serve(model=str(tmp_path), port=int(url.rpartition(":")[2]), device="cpu", slots=1)
    finally:
        signal.signal(signal.SIGTERM, before)
    thread.join(60)
    assert answers[-2] == "data: [DONE]"
    assert json.loads(answers[-4].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert not answered()
