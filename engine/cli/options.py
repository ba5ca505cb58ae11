"""Command-line options for every field of SamplingParams, made from the class itself."""

import dataclasses
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, get_origin, get_type_hints

import typer
from rich.markup import escape

from ..errors import ParameterError
from ..params.sampling_params import SamplingParams

Strategy = Annotated[
    str | None,
    typer.Option(
        help="A decoding strategy of handloom.strategies by name, such as contrastive_search; its own options follow "
        "as --alpha 0.6 or -O alpha=0.6."
    ),
]
StrategyOptions = Annotated[
    list[str] | None,
    typer.Option("--option", "-O", help="An option of the strategy: name=value, the value as JSON or text."),
]
Reader = Callable[[str, Any], Any]  # (field, what the command line gave) -> value for SamplingParams


def signature_parameters() -> list[inspect.Parameter]:
    """One keyword parameter a field, with a `typer.Option` as its default; an option not given is None."""
    descriptions = described()
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=typer.Option(
                None,
                help=escape(descriptions[name][1]),
                rich_help_panel=f"Sampling: {descriptions[name][0].lower()}",
                metavar=_METAVARS.get(reader),
                show_default=False,
            ),
            annotation=annotation,
        )
        for name, (annotation, reader) in _kinds().items()
    ]


def read_parameters(given: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams from the options of `signature_parameters`; those that are None keep their default.

    Raises:
        ParameterError: a value that does not parse or is out of range.
    """
    kinds = _kinds()
    settings = {name: kinds[name][1](name, value) for name, value in given.items() if value not in (None, [])}
    return SamplingParams(**settings)


def strategy_events(name: str | None, given: tuple[str, ...]) -> Callable[..., Iterator[Any]]:
    """What yields the Events of (engine, prompts, params): the engine's own loop, or a strategy.

    Raises:
        ParameterError: an unknown strategy or option, or options without a strategy.
    """
    if name is None:
        if given:
            raise ParameterError(f"--option {given[0]} is an option of a strategy: name one with --strategy")
        return lambda engine, prompts, params: engine.stream(prompts, params)
    from ..strategies import named
    from ..strategies.modes import Mode, own_options

    strategy, chosen = named(name), {}
    known = own_options(strategy)
    for each in given:
        key, equals, value = each.partition("=")
        if not equals or key not in known:
            raise ParameterError(f"--option {each}: {name} takes name=value of {', '.join(known) or 'none'}")
        chosen[key] = _json(key, value)
    return lambda engine, prompts, params: Mode(engine, strategy, params, chosen).events(prompts)


def spelled(arguments: Sequence[str]) -> list[str]:
    """The command's arguments, with options of the strategy that is named, `--alpha 0.6`, as `-O alpha=0.6`.

    Where a sampling parameter has the same name, the strategy's own is meant.
    """
    pairs = [
        (*each.partition("="), after) for each, after in zip(arguments, [*arguments[1:], ""], strict=True)
    ]
    values = [value if equals else after for name, equals, value, after in pairs if name == "--strategy"]
    if not values:
        return list(arguments)
    from ..strategies import named
    from ..strategies.modes import own_options

    try:
        known = own_options(named(values[-1]))
    except ParameterError:  # the command says so when it runs
        return list(arguments)
    found, rest = [], iter(arguments)
    for each in rest:
        name, equals, value = each.partition("=")
        option = name[2:].replace("-", "_") if name.startswith("--") else None
        found += ["-O", f"{option}={value if equals else next(rest, '')}"] if option in known else [each]
    return found


def described() -> dict[str, tuple[str, str]]:
    """(group, help text) of every field, from the docstring of SamplingParams."""
    names = [field.name for field in dataclasses.fields(SamplingParams)]
    found = dict.fromkeys(names, ("other", ""))
    doc = inspect.getdoc(SamplingParams) or ""
    start = re.compile(rf"(?:^|(?<=[.;])\s)(?=(?:{'|'.join(names)}): )")
    for group, body in re.findall(r"^(\w+)\n((?:[ ]+.*(?:\n|$))+)", doc, flags=re.MULTILINE):
        for entry in start.split(" ".join(body.split())):
            name, _, text = entry.partition(": ")
            if name in found:
                found[name] = (group, text.rstrip(";."))
    return found


def _plain(name: str, value: Any) -> Any:
    return value


def _json(name: str, value: str) -> Any:
    """JSON, or else plain text: `norm` for "norm"."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _list(name: str, value: str) -> list:
    """A JSON list, its brackets left out at will: `[1, 2]`, `1,2`, `5`; anything else is one text."""
    for text in (value, f"[{value}]"):
        try:
            parsed = json.loads(text)
        except json.JSONDecodeError:
            continue
        return parsed if isinstance(parsed, list) else [parsed]
    return [value]


def _mapping(name: str, value: str) -> Any:
    """A JSON object, or a JSON list of pairs where the keys are no texts."""
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ParameterError(
            f"{name}={value!r} is not valid: expected JSON ({error.msg} at {error.pos})"
        ) from error


def _named(name: str, value: str) -> Any:
    """The object `module:attribute`, looked up in the current directory too; a class is instantiated."""
    module, _, attribute = value.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ParameterError(f"{name}={value!r} is not valid: expected module:attribute ({error})") from error
    return found() if isinstance(found, type) else found


def _all_named(name: str, values: list[str]) -> list:
    return [_named(name, value) for value in values]


_METAVARS = {_json: "JSON", _list: "JSON", _mapping: "JSON", _named: "MODULE:NAME", _all_named: "MODULE:NAME"}


def _kinds() -> dict[str, tuple[Any, Reader]]:
    """(annotation for typer, reader) of every field, by the field's type."""
    hints = get_type_hints(SamplingParams)
    return {field.name: _kind(hints[field.name]) for field in dataclasses.fields(SamplingParams)}


def _kind(hint: Any) -> tuple[Any, Reader]:
    plain = {kind: (kind | None, _plain) for kind in (bool, int, float, str)}
    for kind, option in plain.items():
        if hint in (kind, kind | None):
            return option
    if hint == tuple[str, ...]:
        return list[str] | None, _plain
    inner = [part for part in getattr(hint, "__args__", ()) if part is not type(None)]
    origins = {get_origin(part) for part in (hint, *inner)}
    if tuple in origins and inner and (Any in inner or Callable in {*inner, *origins}):
        return list[str] | None, _all_named
    if origins & {Callable, get_origin(Callable[[], Any])}:
        return str | None, _named
    if Mapping in origins:
        return str | None, _mapping
    return str | None, _list if tuple in origins else _json
