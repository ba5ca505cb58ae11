"""Bodies of requests as work for the engine: fields by OpenAI's names and ours, and none that is dropped."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...engine import Engine
from ...errors import PromptError
from ...loop.request import Request
from ...params.sampling_params import SamplingParams
from ...pipeline.processors import Grammar
from ...strategies import named
from .refusals import Refusal
from .tools import Offer, offered

PARTS = ("text", "input_text", "output_text")  # kinds of a message's content that hold text
GRAMMARS: dict[str, Callable[[Any], Grammar]] = {
    "json_schema": lambda schema: Grammar.json_schema(schema, whitespace=False),
    "json": lambda schema: Grammar.json_schema(schema, whitespace=False),
    "regex": Grammar.regex,
    "choice": Grammar.choice,
    "grammar": Grammar.ebnf,
    "lark": Grammar.lark,
}
COMPLETION_ONLY = ("prompt", "suffix", "echo", "best_of")
CHAT_ONLY = ("messages", "tools", "tool_choice", "parallel_tool_calls", "modalities", "top_logprobs")
SHORT = 16  # OpenAI's most new tokens of a completion that names none
ALTERNATIVES = 100  # most log-probabilities of one token


@dataclass
class Limits:
    """What one request may ask for.

    Args:
        body: bytes. samples: prompts times samples. waiting: samples that wait beside those that run.
        seconds: until a request is given up.
    """

    body: int = 4 << 20
    samples: int = 128
    waiting: int = 256
    seconds: float = 600.0


@dataclass
class Asked:
    """One request, validated.

    Args:
        requests: one a sample, in order. samples: a prompt. returned: of them the best are given back.
        silent: the output token was asked for only because there has to be one.
    """

    requests: list[Request]
    samples: int
    returned: int
    stream: bool = False
    usage: bool = False
    echo: bool = False
    silent: bool = False
    logprobs: bool = False
    token_ids: bool = False
    both_logprobs: bool = False
    prompt_logprobs: bool = False
    trace: bool = False
    offer: Offer | None = None
    strategy: Callable[..., Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)


class Fields:
    """A body whose fields are taken one by one; what is left is the sampling parameters."""

    def __init__(self, body: Mapping[str, Any]):
        self.left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The value of a field, which has one of these types."""
        value = self.left.pop(name, default)
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wrong = isinstance(value, bool) and bool not in kinds
        if value is not None and (wrong or not isinstance(value, kinds)):
            raise self.refused(name, value, " or ".join(each.__name__ for each in kinds))
        return value

    def refused(self, name: str, value: Any, wanted: str) -> Refusal:
        """The error of a field."""
        shown = repr(value)
        return Refusal(f"{name}={shown[:80]} is not valid: expected {wanted}", param=name)


def completion(engine: Engine, body: Mapping[str, Any], limits: Limits) -> Asked:
    """A body of `/v1/completions`."""
    fields = Fields(body)
    _refuse(fields, CHAT_ONLY, "/v1/completions")
    if fields.take("suffix", str):
        raise Refusal("suffix: text is generated from left to right only", param="suffix")
    prompts = _prompts(fields.take("prompt", (str, list)))
    echo, best = fields.take("echo", bool, False), fields.take("best_of", int)
    most = fields.left.get("max_tokens")
    silent = most == 0 and not isinstance(most, bool)
    if silent:
        fields.left["max_tokens"] = 1
        if not echo:
            raise Refusal("max_tokens=0 gives nothing: it is for echo=true", param="max_tokens")
    asked = _asked(engine, fields, prompts, limits, best, SHORT, echo)
    asked.silent = silent
    if asked.stream and (asked.samples > asked.returned or (echo and asked.logprobs)):
        raise Refusal("best_of, and echo with logprobs, cannot be streamed", param="stream")
    return asked


def chat(engine: Engine, body: Mapping[str, Any], limits: Limits) -> Asked:
    """A body of `/v1/chat/completions`."""
    fields = Fields(body)
    _refuse(fields, COMPLETION_ONLY, "/v1/chat/completions")
    if fields.left.get("logprobs") is not None and not isinstance(fields.left["logprobs"], bool):
        raise fields.refused(
            "logprobs", fields.left["logprobs"], "true or false, with the count in top_logprobs"
        )
    offer = tools_of(fields)
    prompt = conversation(engine, fields, offer)
    if offer is not None and offer.forced:
        if {"response_format", "structured_outputs", *GRAMMARS} & fields.left.keys():
            raise Refusal("tool_choice asks for a call, whose grammar is its own", param="tool_choice")
        fields.left["json_schema"] = offer.schema()
    asked = _asked(engine, fields, [prompt], limits, None, None, False)
    asked.offer = offer
    return asked


def tools_of(fields: Fields) -> Offer | None:
    """The tools that a body offers."""
    tools, choice = fields.take("tools", list), fields.left.pop("tool_choice", "auto")
    return offered(tools, choice, fields.take("parallel_tool_calls", bool, True))


def tokens(engine: Engine, body: Mapping[str, Any]) -> list[int]:
    """A body of `/tokenize`: the ids of a text or a conversation."""
    fields = Fields(body)
    fields.take("model", str)
    special = fields.take("add_special_tokens", bool, True)
    if "messages" in fields.left:
        ids = conversation(engine, fields, tools_of(fields))
    else:
        text = fields.take("prompt", str)
        if text is None or engine.tokenizer is None:
            raise Refusal("prompt: a text is needed, and a tokenizer", param="prompt")
        try:
            ids = engine.tokenizer(text, add_special_tokens=special)["input_ids"]
        except UnicodeEncodeError as error:
            raise Refusal(f"prompt is not valid Unicode: {error}", param="prompt") from error
    _none_left(fields)
    return list(ids)


def text(engine: Engine, body: Mapping[str, Any]) -> str:
    """A body of `/detokenize`: the text of ids."""
    fields = Fields(body)
    fields.take("model", str)
    ids = fields.take("tokens", list)
    whole = ids is not None and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    if not whole or any(not 0 <= i < engine.vocab_size for i in ids):
        raise fields.refused("tokens", ids, f"a list of token ids below {engine.vocab_size}")
    _none_left(fields)
    return engine.decode(ids, skip_special_tokens=False)


def _none_left(fields: Fields) -> None:
    for name in fields.left:
        raise Refusal(f"unknown field {name!r}", param=name)


def _refuse(fields: Fields, names: tuple[str, ...], path: str) -> None:
    for name in names:
        if name in fields.left:
            raise Refusal(f"{name} is not a field of {path}", param=name)


def _prompts(given: Any) -> list:
    """The prompts of a completion: a text, ids, or a list of either."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise Refusal("prompt: a text, a list of token ids, or a list of these is needed", param="prompt")
    is_id = [isinstance(each, int) and not isinstance(each, bool) for each in given]
    if all(is_id):
        return [given]
    if any(is_id) or not all(isinstance(each, str | list) for each in given):
        raise Refusal("prompt: expected a text, a list of token ids, or a list of these", param="prompt")
    for each in given:
        if isinstance(each, list) and not all(isinstance(i, int) and not isinstance(i, bool) for i in each):
            raise Refusal("prompt: a list inside the list must hold token ids", param="prompt")
    return given


def conversation(engine: Engine, fields: Fields, offer: Offer | None = None) -> list[int]:
    """The ids of a body's messages, and of the tools on offer, in the chat template."""
    messages, tools = fields.take("messages", list), offer and offer.tools
    extra = dict(fields.take("chat_template_kwargs", dict, {}))
    for name in ("add_generation_prompt", "continue_final_message"):
        if name in fields.left:
            extra[name] = fields.take(name, bool)
    for name in {"chat_template", "tokenize", "return_dict", "return_tensors", "padding", "truncation"} & {
        *extra
    }:
        raise Refusal(f"chat_template_kwargs: {name} is the server's own", param="chat_template_kwargs")
    try:
        return engine.chat_prompt([_flat(message) for message in messages or []], tools=tools, **extra)
    except PromptError as error:
        raise Refusal(
            str(error).removeprefix("prompt 0, ").removeprefix("prompt 0: "), param="messages"
        ) from error
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise Refusal(f"the chat template cannot show these messages: {error!r}", param="messages") from error


def _flat(message: Any) -> Any:
    """A message whose content is one text, and whose calls hold their arguments; what is no text is an error."""
    if isinstance(message, dict) and isinstance(message.get("tool_calls"), list):
        message = message | {"tool_calls": [_call(each) for each in message["tool_calls"]]}
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        return message
    for part in message["content"]:
        if (
            not isinstance(part, dict)
            or part.get("type") not in PARTS
            or not isinstance(part.get("text"), str)
        ):
            raise Refusal("messages: parts of a content must be texts", param="messages")
    return message | {"content": "".join(part["text"] for part in message["content"])}


def _call(call: Any) -> Any:
    """A call of an earlier turn as templates write it out: its arguments as an object, not as OpenAI's text of one."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        arguments = function["arguments"]  # as a model wrote it
    return call | {"function": function | {"arguments": arguments}}


def _asked(
    engine: Engine, fields: Fields, prompts: list, limits: Limits, best: int | None, most: int | None, echo: bool
) -> Asked:  # fmt: skip
    """What both kinds of bodies share."""
    fields.take("model", str)
    stream, told = fields.take("stream", bool, False), dict(fields.take("stream_options", dict, {}))
    usage = told.pop("include_usage", False)
    if not isinstance(usage, bool) or told.keys() - {"include_obfuscation"}:
        raise Refusal("stream_options holds include_usage alone", param="stream_options")
    flags = {
        name: fields.take(name, bool, False) for name in ("return_token_ids", "return_raw_logprobs", "trace")
    }
    strategy, options = strategy_of(fields.take("strategy", (str, dict)))
    params = _params(engine, fields, echo)
    returned, samples = params.n, params.n if best is None else best
    if samples < returned:
        raise fields.refused("best_of", best, f"at least n={returned}")
    if len(prompts) * samples > limits.samples:
        raise Refusal(f"{len(prompts)} prompts x {samples} samples are over {limits.samples}", param="n")
    requests = engine.requests(prompts, params.replace(n=samples))
    limited: dict[tuple, SamplingParams] = {}
    for request in requests:  # a limit that the engine would reach first is the engine's
        room = engine.max_length - len(request.prompt)
        key = id(request.params), min(params.max_new_tokens if _says_length(fields) else most or room, room)
        if key not in limited:
            limited[key] = request.params.replace(max_new_tokens=max(1, key[1]))
        request.params = limited[key]
    if flags["trace"] and (len(requests) > 1 or stream or strategy):
        raise Refusal("trace follows one sample that is neither streamed nor a strategy's", param="trace")
    if strategy and best is not None:
        raise Refusal("best_of is for the loop; a strategy chooses itself", param="best_of")
    if strategy and stream and (len(prompts) > 1 or params.logprobs is not None):
        raise Refusal("a strategy streams one prompt, without log-probabilities", param="stream")
    if strategy:
        samples = returned = 1  # it returns what it returns
    return Asked(
        requests, samples, returned, stream, usage, echo,
        logprobs=params.logprobs is not None, token_ids=flags["return_token_ids"],
        both_logprobs=flags["return_raw_logprobs"], prompt_logprobs=params.prompt_logprobs is not None,
        trace=flags["trace"], strategy=strategy, options=options,
    )  # fmt: skip


LENGTHS = ("max_tokens", "max_completion_tokens", "max_new_tokens", "max_gen_toks", "n_predict")


def _says_length(fields: Fields) -> bool:
    return any(name in fields.left for name in LENGTHS)


def _params(engine: Engine, fields: Fields, echo: bool) -> SamplingParams:
    """The sampling parameters: everything that is left."""
    dialect = fields.take("dialect", str, "openai")
    grammar = _grammar(fields)
    if "processors" in fields.left:  # their order; objects cannot come over a wire
        fields.left["order"] = fields.take("processors", list)
    for name in ("criteria", "prefix_fn", "logits_processor", "logits_processors", "stopping_criteria"):
        if name in fields.left:
            raise Refusal(f"{name} holds functions, which cannot be sent", param=name)
    params = SamplingParams.from_dict(fields.left, dialect=dialect)
    if max(params.logprobs or 0, params.prompt_logprobs or 0) > ALTERNATIVES:
        raise fields.refused("logprobs", params.logprobs, f"at most {ALTERNATIVES}")
    if echo and params.logprobs is not None and params.prompt_logprobs is None:
        params = params.replace(prompt_logprobs=params.logprobs)
    return params.replace(processors=[grammar]) if grammar else params


def _grammar(fields: Fields) -> Grammar | None:
    """The grammar that the output follows, under any of its names."""
    form, found = fields.take("response_format", dict), {}
    if form is not None:
        kind = form.get("type")
        schema = form.get("json_schema")
        if kind == "json_object":
            found["json_schema"] = {"type": "object"}
        elif kind == "json_schema" and isinstance(schema, dict) and isinstance(schema.get("schema"), dict):
            found["json_schema"] = schema["schema"]
        elif kind != "text":
            raise fields.refused("response_format", form, "text, json_object, or json_schema with its schema")
    outputs = fields.take("structured_outputs", dict)
    for name, value in [
        *(outputs or {}).items(),
        *((n, fields.left.pop(n)) for n in GRAMMARS if n in fields.left),
    ]:
        if name not in GRAMMARS:
            raise Refusal(
                f"structured_outputs: {name} is not among {', '.join(GRAMMARS)}", param="structured_outputs"
            )
        found[name] = value
    if len(found) > 1:
        raise Refusal(f"one grammar at a time, not {' and '.join(found)}", param=next(iter(found)))
    for name, value in found.items():
        wanted = {"json_schema": (dict, str, bool), "json": (dict, str, bool), "choice": (list,)}.get(
            name, (str,)
        )
        if not isinstance(value, wanted):
            raise fields.refused(name, value, " or ".join(kind.__name__ for kind in wanted))
        return GRAMMARS[name](value)
    return None


def strategy_of(given: str | dict | None) -> tuple[Callable | None, dict]:
    """A strategy of the library and its options."""
    if given is None:
        return None, {}
    options = {"name": given} if isinstance(given, str) else dict(given)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise Refusal("strategy: a name, or an object with a name and options", param="strategy")
    function = named(name)
    known = list(inspect.signature(function).parameters.values())[2:]
    allowed = [p.name for p in known if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in allowed:
            raise Refusal(f"strategy {name}: {option} is not among {', '.join(allowed)}", param="strategy")
    return function, options
