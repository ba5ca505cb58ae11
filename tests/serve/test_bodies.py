"""Bodies that nobody would write: whatever they hold, the answer is a result or names what is wrong, never a 500."""

import asyncio
import json

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import chat_engine

from handloom.params.aliases import ALIASES, ELSEWHERE
from handloom.params.settings import Settings
from handloom.serve.app import Server
from handloom.serve.protocol.reading import CHAT_ONLY, COMPLETION_ONLY, GRAMMARS, Limits

FIELDS = sorted(
    {*Settings.__annotations__, *ALIASES, *ELSEWHERE, *CHAT_ONLY, *COMPLETION_ONLY, *GRAMMARS}
    | {
        "stream",
        "stream_options",
        "response_format",
        "structured_outputs",
        "strategy",
        "processors",
        "dialect",
    }
    | {
        "trace",
        "return_token_ids",
        "return_raw_logprobs",
        "model",
        "chat_template_kwargs",
        "profile",
        "order",
    }
)
NUMBERS = st.integers(-(2**70), 2**70) | st.integers(-2, 6) | st.floats(allow_nan=False, allow_infinity=False)
LEAVES = (
    st.none()
    | st.booleans()
    | NUMBERS
    | st.text(max_size=6)
    | st.sampled_from(["top_k", "hf", "auto", "the"])
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LEAVES.map(str), inner, max_size=3)
)
EXTRA = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3)
SMALL = st.dictionaries(st.sampled_from(["prompt", "messages", "tokens", "model", "x"]), VALUES, max_size=3)
STEPS = st.fixed_dictionaries(
    {},
    optional={
        "steps": VALUES | st.integers(0, 3), "first": VALUES | st.just(0), "candidates": VALUES, "strategy": VALUES,
        "params": st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2), "prompt_ids": st.just([5, 6]) | VALUES,
        "output_ids": st.just([7, 8, 9]) | VALUES, "unknown": VALUES,
    },
)  # fmt: skip
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "x", 1]), "content": VALUES}), max_size=2
)


@pytest.fixture(scope="module")
def ask():
    """Post a body to the application itself, without a socket."""
    server = Server(chat_engine(slots=2, max_length=64), "tiny", limits=Limits(samples=4, seconds=120))
    loop = asyncio.new_event_loop()
    life = server.app.router.lifespan_context(server.app)
    loop.run_until_complete(life.__aenter__())
    client = httpx.AsyncClient(transport=httpx.ASGITransport(server.app), base_url="http://tiny")

    def post(path, body):
        content = json.dumps(body).encode()
        sent = client.post(path, content=content, headers={"Content-Type": "application/json"})
        return loop.run_until_complete(sent)

    yield post
    loop.run_until_complete(life.__aexit__(None, None, None))
    loop.run_until_complete(client.aclose())
    loop.close()
    server.engine.pool.check()


@settings(max_examples=150)
@given(extra=EXTRA, prompt=VALUES | st.just("the"), messages=MESSAGES)
def test_no_body_is_an_error_of_the_server(ask, extra, prompt, messages):
    for path, mine in (
        ("/v1/completions", {"prompt": prompt}),
        ("/v1/chat/completions", {"messages": messages}),
    ):
        answer = ask(path, {"max_tokens": 2, **mine, **extra})
        assert answer.status_code in (200, 400, 404, 429), answer.text
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]


@settings(max_examples=60)
@given(body=STEPS)
def test_no_body_of_the_inspector_is(ask, body):
    answer = ask("/inspect", {"prompt": "the", **body})
    assert answer.status_code in (200, 400, 404), answer.text


@settings(max_examples=40)
@given(body=SMALL)
def test_no_body_of_the_tokenizers_routes_is(ask, body):
    for path in ("/tokenize", "/detokenize"):
        assert ask(path, body).status_code in (200, 400, 404)
