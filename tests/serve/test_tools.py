"""Calls of tools: parted from words, whole and at every cut of a stream; forced by a grammar; in OpenAI's shape."""

import json

import pytest

from handloom.serve.protocol.reading import Fields, tools_of
from handloom.serve.protocol.refusals import Refusal
from handloom.serve.protocol.tools import ToolText

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["the", "dog"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "x", "parameters": CITY}}
    for name in ("weather", "fox")
]
CALL, OTHER = '{"name": "weather", "arguments": {"city": "the"}}', '{"name": "fox", "parameters": {}}'
TEXTS = {  # what a model writes: what it says, what it calls
    "Hermes, Qwen": (f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>", "Let me see.", ["weather"]),
    "two": (f"<tool_call>{CALL}</tool_call>\n<tool_call>{OTHER}</tool_call>\n", "", ["weather", "fox"]),
    "SmolLM": (f"<tool_call>[{CALL}, {OTHER}]</tool_call>", "", ["weather", "fox"]),
    "cut off behind the JSON": (f"<tool_call>\n{CALL}", "", ["weather"]),
    "Llama 3": (OTHER, "", ["fox"]),
    "Llama 3.1": (f"<|python_tag|>{CALL}; {OTHER}", "", ["weather", "fox"]),
    "Mistral": (f" [TOOL_CALLS] [{CALL}]", "", ["weather"]),
    "words": ("a < b, said <the> fox \n", "a < b, said <the> fox \n", []),
    "no call": ("<tool_call>{1}</tool_call> x", "<tool_call>{1}</tool_call> x", []),
    "JSON of its own": ('{"name": "nobody", "arguments": {}}', '{"name": "nobody", "arguments": {}}', []),
    "JSON behind words": (f"so: {CALL}", f"so: {CALL}", []),
    "unfinished": ('<tool_call>{"name": "wea', '<tool_call>{"name": "wea', []),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_calls_are_parted_from_words_however_the_text_comes(kind):
    text, said, called = TEXTS[kind]
    for size in (1, 2, 3, 5, 7, 11, len(text)):
        parted, words, calls = ToolText(["weather", "fox"]), "", []
        for at in range(0, len(text), size):
            more, found = parted.push(text[at : at + size], end=at + size >= len(text))
            words, calls = words + more, calls + found
        assert words == said
        assert [call["function"]["name"] for call in calls] == called
        assert [call["index"] for call in calls] == list(range(len(called)))
        assert all(isinstance(json.loads(call["function"]["arguments"]), dict) for call in calls)
    one = ToolText(["weather", "fox"], most=1).push(text, end=True)[1]
    assert [call["function"]["name"] for call in one] == called[:1]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"tools": [{"name": "x"}]}, "tools: each is"),
        ({"tools": TOOLS, "tool_choice": "some"}, "tool_choice: expected"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "no tool is named 'x'"),
        ({"tool_choice": "required"}, "no tools are offered"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_an_offer_is_named(body, message):
    with pytest.raises(Refusal, match=message):
        tools_of(Fields(body))


def test_a_forced_call_is_a_call_whole_and_streamed(client, server):
    asked = {
        "model": "tiny", "messages": [{"role": "user", "content": "dog"}], "tools": TOOLS, "seed": 4,
        "temperature": 1.0, "max_completion_tokens": 150,
    }  # fmt: skip
    only = {"type": "function", "function": {"name": "fox"}}
    for choice, names, finish in (("required", ("weather", "fox"), "tool_calls"), (only, ("fox",), "stop")):
        found = client.chat.completions.create(**asked, tool_choice=choice).choices[0]
        (call,) = found.message.tool_calls
        assert found.message.content is None
        assert found.finish_reason == finish
        assert call.function.name in names
        assert json.loads(call.function.arguments)["city"] in ("the", "dog")
        chunks = [
            c.choices[0] for c in client.chat.completions.create(**asked, tool_choice=choice, stream=True)
        ]
        told = [each for chunk in chunks for each in chunk.delta.tool_calls or ()]
        assert [each.function.arguments for each in told] == [call.function.arguments]
        assert not any(chunk.delta.content for chunk in chunks)
        assert chunks[-1].finish_reason == finish


def test_a_conversation_with_calls_in_it_goes_through_the_template(client, server, monkeypatch):
    template = (
        "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{% for m in messages %}{{ m.content }}"
    )
    template += "{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %}{% endfor %}"
    monkeypatch.setattr(server.engine.tokenizer, "chat_template", template)
    called = [{"id": "1", "type": "function", "function": {"name": "fox", "arguments": '{"city": "dog"}'}}]
    messages = [
        {"role": "user", "content": "the"},
        {"role": "assistant", "content": "", "tool_calls": called},
        {"role": "tool", "tool_call_id": "1", "content": "quick"},
    ]
    asked = {
        "model": "tiny",
        "messages": messages,
        "tools": TOOLS,
        "max_completion_tokens": 1,
        "logprobs": True,
    }
    found = client.chat.completions.create(**asked, extra_body={"return_token_ids": True}).choices[0]
    assert server.engine.decode(found.prompt_token_ids) == "weather fox thedogquick"
    none = client.chat.completions.create(**asked, tool_choice="none", extra_body={"return_token_ids": True})
    assert server.engine.decode(none.choices[0].prompt_token_ids) == "thedogquick"
