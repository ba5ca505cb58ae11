"""Reading of settings in a dialect's spelling: fields and checked values, or an error that names what was meant."""

import difflib
from collections.abc import Mapping
from typing import Any

from ..errors import ParameterError
from .aliases import ALIASES, ELSEWHERE, SPECIAL, Values
from .checks import Check, is_number, scalar, to_list
from .dialects import DIALECTS, HF_WITHOUT_EFFECT, Dialect


def read(settings: Mapping[str, Any], dialect: Dialect, checks: Mapping[str, Check], base: Mapping) -> Values:
    """Checked values by field name, from settings in a dialect's spelling.

    checks: the check of every field; base: the values that the settings are going to change, empty for
    none. A None stays None (the caller takes the field's default). Raises ParameterError for a name
    that is unknown or handled elsewhere, a value out of range, and two spellings of one field that
    disagree.
    """
    values: Values = {}
    spelled: dict[str, str] = {}
    special: Values = {}
    bans: list = []
    for spelling, value in settings.items():
        if spelling in dialect.special or spelling in SPECIAL:
            special[spelling] = value
            continue
        field, convert = _target(spelling, value, dialect, checks)
        if field is None:
            continue
        if field == "logit_bias" and value is not None:
            value, banned = _without_bans(spelling, value)
            bans += banned
        if convert is not None and value is not None:
            value = convert(spelling, value)
        checked = None if value is None else checks[field](spelling, value)
        if values.get(field) is not None and checked is not None and values[field] != checked:
            raise ParameterError(
                f"{spelled[field]}={settings[spelled[field]]!r} and {spelling}={settings[spelling]!r} "
                f"both set {field}, to different values"
            )
        if values.get(field) is None:
            values[field], spelled[field] = checked, spelling
    if bans:
        earlier = values.get("banned_tokens", base.get("banned_tokens")) or ()
        values["banned_tokens"] = checks["banned_tokens"]("logit_bias", [*earlier, *bans])
    special = {name: value for name, value in special.items() if value is not None}
    dialect.finish(values, special, base)
    return {name: None if value is None else checks[name](name, value) for name, value in values.items()}


def _target(spelling: Any, value: Any, dialect: Dialect, checks: Mapping[str, Check]) -> tuple:
    """(field, conversion or None) of a spelling; (None, None) for one that asks for nothing here."""
    if spelling in dialect.aliases:
        target = dialect.aliases[spelling]
    elif spelling in checks:
        target = spelling
    elif spelling in ALIASES:
        target = ALIASES[spelling]
    elif spelling in dialect.ignored:
        return None, None
    elif spelling in ELSEWHERE:
        if not asks(spelling, value):
            return None, None
        instead = ELSEWHERE[spelling][1]
        raise ParameterError(f"{spelling}={value!r} is not a sampling parameter of handloom: {instead}")
    else:
        raise ParameterError(_unknown(spelling, dialect, checks))
    return (target, None) if isinstance(target, str) else target


def asks(spelling: str, value: Any) -> bool:
    """Whether a value of a spelling in `ELSEWHERE` asks for something."""
    neutral = ELSEWHERE[spelling][0]
    same = any(type(value) is type(n) and value == n for n in neutral)
    return not (value is None or same or _same(value, neutral))


def _same(value: Any, neutral: tuple) -> bool:
    """Whether a number equals one of the neutral numbers, be it an int or a float."""
    number = scalar(value)
    return is_number(number) and any(is_number(other) and number == other for other in neutral)


def _unknown(spelling: Any, dialect: Dialect, checks: Mapping[str, Check]) -> str:
    """What to say about a name that nobody knows here."""
    message = f"unknown sampling parameter {spelling!r}"
    if any(spelling in other.ignored for other in DIALECTS.values()):
        why = HF_WITHOUT_EFFECT.get(spelling, "it does not concern decoding, leave it out")
        return f"{message}: {why}"
    if dialect.name == "handloom":
        for other in DIALECTS.values():
            if spelling in other.aliases or spelling in other.special:
                return f"{message}: it is {other.name}'s, read it with from_dict(..., dialect={other.name!r})"
    names = [*checks, *ALIASES, *dialect.aliases, *SPECIAL, *dialect.special]
    near = difflib.get_close_matches(str(spelling).lower(), names, n=1, cutoff=0.6)
    return message + (
        f"; did you mean {near[0]!r}?" if near else "; help(handloom.SamplingParams) lists them all"
    )


def _without_bans(name: str, value: Any) -> tuple[Any, list]:
    """A logit bias without its bans (`[id, false]`, llama.cpp's way), and the ids so banned."""
    if isinstance(value, str):
        return value, []
    kept, banned = [], []
    pairs = (
        list(value.items())
        if isinstance(value, Mapping)
        else to_list(name, value, "a mapping or a list of pairs")
    )
    for pair in pairs:
        is_pair = isinstance(pair, list | tuple) and len(pair) == 2
        if not is_pair or scalar(pair[1]) is not False:
            kept.append(pair)
        elif isinstance(pair[0], str) and not pair[0].isdigit():
            raise ParameterError(f"{name} cannot ban the text {pair[0]!r}: write bad_words=[{pair[0]!r}]")
        else:
            banned.append(int(pair[0]) if isinstance(pair[0], str) else pair[0])
    return kept, banned
