"""Tools: what a conversation offers, and the calls in what a model writes, whole or as it streams."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from .refusals import Refusal

OPEN, CLOSE = "<tool_call>", "</tool_call>"  # of Hermes, Qwen and SmolLM; others write the JSON alone
MARKS = ("<|python_tag|>", "[TOOL_CALLS]")  # that Llama and Mistral may put before it
GAP = re.compile(r"[\s;,]*")  # between two calls


@dataclass
class Offer:
    """Tools as a body names them.

    Args:
        tools: for the template. choice: "auto", "required" or the name of one. parallel: whether several may be called.
    """

    tools: list[dict[str, Any]]
    choice: str = "auto"
    parallel: bool = True

    @property
    def names(self) -> list[str]:
        """Of the functions."""
        return [tool["function"]["name"] for tool in self.tools]

    @property
    def forced(self) -> bool:
        """Whether the answer has to be a call."""
        return self.choice != "auto"

    @property
    def named(self) -> bool:
        """Whether it has to be a call of one of them."""
        return self.choice not in ("auto", "required")

    def schema(self) -> dict[str, Any]:
        """Of an answer that is one call."""
        return {"anyOf": [
            {
                "type": "object", "required": ["name", "arguments"], "additionalProperties": False,
                "properties": {
                    "name": {"const": tool["function"]["name"]},
                    "arguments": tool["function"].get("parameters") or {"type": "object"},
                },
            }
            for tool in self.tools
            if not self.named or tool["function"]["name"] == self.choice
        ]}  # fmt: skip

    def text(self) -> ToolText:
        """A text of one answer to it."""
        return ToolText(self.names, None if self.parallel else 1)


def offered(tools: Any, choice: Any, parallel: bool) -> Offer | None:
    """What the fields `tools`, `tool_choice` and `parallel_tool_calls` say; None where nothing is offered.

    Raises:
        Refusal: they do not have OpenAI's shape.
    """
    for tool in tools or ():
        function = tool.get("function") if isinstance(tool, dict) else None
        shaped = isinstance(function, dict) and isinstance(function.get("name"), str)
        if not shaped or not isinstance(function.get("parameters") or {}, dict):
            raise Refusal(
                'tools: each is {"type": "function", "function": {"name": ..., "parameters": a JSON schema}}',
                param="tools",
            )
    if isinstance(choice, dict):
        function = choice.get("function")
        choice = function.get("name") if isinstance(function, dict) else None
        known = [tool["function"]["name"] for tool in tools or ()]
        if not isinstance(choice, str) or choice not in known:
            raise Refusal(f"tool_choice: no tool is named {choice!r}; {known} are", param="tool_choice")
    elif choice not in ("auto", "none", "required"):
        wanted = '"auto", "none", "required" or {"type": "function", "function": {"name": ...}}'
        raise Refusal(f"tool_choice: expected {wanted}", param="tool_choice")
    if not tools and choice not in ("auto", "none"):
        raise Refusal("tool_choice asks for a call, and no tools are offered", param="tool_choice")
    return None if not tools or choice == "none" else Offer(tools, choice, parallel)


@dataclass
class ToolText:
    """What a model writes, parted into what it says and what it calls, as it comes.

    Args:
        names: of the tools; JSON outside of tags is a call only where it names one. most: calls that are taken.
    """

    names: Collection[str]
    most: int | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)
    _rest: str = ""
    _said: bool = False  # something was let through: JSON behind it is text

    def push(self, text: str, end: bool = False) -> tuple[str, list[dict[str, Any]]]:
        """What is certainly said, and the calls that are complete, in OpenAI's shape with their `index`."""
        self._rest += text
        said, known = "", len(self.calls)
        while True:
            before, tag, behind = self._rest.partition(OPEN)
            if not tag:
                break
            body, closed, after = behind.partition(CLOSE)
            if not closed and not end:
                return self._say(said + before.rstrip(), OPEN + behind), self.calls[known:]
            found = read_calls(body)
            said += before.rstrip() if found else before + tag + body + closed
            self._take(found or ())
            self._rest = after
        if end:
            found = None if self._said or said or self.calls else read_calls(self._rest, self.names)
            self._take(found or ())
            last = "" if found or (self.calls and not self._rest.strip()) else self._rest
            return self._say(said + last, ""), self.calls[known:]
        let = 0 if not (self._said or said) and self._may_be_json() else self._certain()
        return self._say(said + self._rest[:let], self._rest[let:]), self.calls[known:]

    def _say(self, said: str, rest: str) -> str:
        self._rest, self._said = rest, self._said or bool(said)
        return said

    def _take(self, found: Collection[tuple[str, Any]]) -> None:
        for name, arguments in found:
            if self.most is None or len(self.calls) < self.most:
                function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
                call = {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
                self.calls.append({"index": len(self.calls), **call})

    def _may_be_json(self) -> bool:
        start = self._rest.lstrip()
        return not start or start[0] in "{[" or any(m.startswith(start) or start.startswith(m) for m in MARKS)

    def _certain(self) -> int:
        """How much of the rest is no beginning of a tag, nor the space before one."""
        rest = self._rest
        cut = next((n for n in range(min(len(OPEN), len(rest)), 0, -1) if rest.endswith(OPEN[:n])), 0)
        return len(rest[: len(rest) - cut].rstrip())


def read_calls(text: str, names: Collection[str] | None = None) -> list[tuple[str, Any]] | None:
    """(name, arguments) of each call in JSON objects or lists of them, or None where it is something else."""
    text = text.strip()
    for mark in MARKS:
        text = text.removeprefix(mark).lstrip()
    found, at, decoder = [], 0, json.JSONDecoder()
    while at < len(text):
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            return None
        at = GAP.match(text, at).end()
        found += value if isinstance(value, list) else [value]
    calls = []
    for each in found:
        name = each.get("name") if isinstance(each, dict) else None
        arguments = each.get("arguments", each.get("parameters", {})) if isinstance(each, dict) else None
        if (
            not isinstance(name, str)
            or not isinstance(arguments, dict)
            or (names is not None and name not in names)
        ):
            return None
        calls.append((name, arguments))
    return calls or None
