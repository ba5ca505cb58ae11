"""Kinds of parameter values: what a field accepts, and the one normal form in which it is kept."""

import dataclasses
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from ..errors import ParameterError

Check = Callable[[str, Any], Any]  # (spelling, value) -> normal form; raises ParameterError

PER_REQUEST = "per-request"  # the prefix of a seed's base
LARGEST_ID = 2**31 - 1  # token ids, positions and counts fit an int32
FLOAT32_MAX = 3.4028234663852886e38
FLOAT32_TINY = 1.1754943508222875e-38  # parameters reach the kernels as float32: nothing smaller is "above 0"


class FrozenDict(dict):
    """A dict that cannot change after it was made, and is hashable for it."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a parameter's mapping is read-only; use SamplingParams.replace()")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple:
        return FrozenDict, (dict(self),)


@dataclasses.dataclass(frozen=True)
class Interval:
    """A range of numbers, made from how it is written: `Interval.parse("(0, 1]")`."""

    text: str
    low: float
    high: float

    @classmethod
    def parse(cls, text: str) -> "Interval":
        low, high = text[1:-1].split(",")
        return cls(text, float(low), float(high))

    def __contains__(self, number: float) -> bool:
        if self.text[0] == "(" and (number <= self.low or 0 < number - self.low < FLOAT32_TINY):
            return False
        if self.text[-1] == ")" and number >= self.high:
            return False
        return self.low <= number <= self.high


def fail(name: str, value: Any, wanted: str) -> None:
    """Raise the ParameterError that names a field, the value it was given, and what would be valid."""
    raise ParameterError(f"{name}={reprlib.repr(value)} is not valid: expected {wanted}")


def scalar(value: Any) -> Any:
    """The Python number inside a NumPy or torch scalar; any other value unchanged."""
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        return value.item()
    return value


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float; a bool is neither."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def to_int(name: str, value: Any, low: int, high: int = LARGEST_ID, wanted: str | None = None) -> int:
    """A value as an int within [low, high]; bools, floats and text are errors."""
    number = scalar(value)
    if isinstance(number, bool) or not isinstance(number, int) or not low <= number <= high:
        beyond = isinstance(number, int) and number > high
        top = f" and at most {high}" if beyond or high != LARGEST_ID else ""
        fail(name, value, wanted or f"an integer of at least {low}{top}")
    return int(number)


def to_float(name: str, value: Any, wanted: str = "a finite number") -> float:
    """A value as a float that float32 can hold; bools, text, NaN and infinities are errors."""
    number = scalar(value)
    if not is_number(number) or not -FLOAT32_MAX <= number <= FLOAT32_MAX:
        fail(name, value, wanted)
    return float(number)


def to_list(name: str, value: Any, wanted: str) -> list:
    """The entries of a list, tuple, set, range or one-dimensional array or tensor."""
    if callable(getattr(value, "tolist", None)) and getattr(value, "ndim", None) == 1:
        return value.tolist()
    if not isinstance(value, list | tuple | set | frozenset | range):
        fail(name, value, wanted)
    return list(value)


def unique(entries: list) -> tuple:
    """The entries without repeats, in the order they came."""
    return tuple(dict.fromkeys(entries))


def real(default: float | None, interval: str, *, off: float | None = None, also_off: tuple = ()) -> Any:
    """Field for a float within `interval`; `off` is always valid, and so are the other spellings of it."""
    span = Interval.parse(interval)
    wanted = f"a finite number in {interval}" + ("" if off is None else f", or {off:g} to switch it off")

    def check(name: str, value: Any) -> float:
        number = to_float(name, value, wanted)
        if off is not None and (number == off or number in also_off):
            return float(off)
        if number not in span or not math.isfinite(number):
            fail(name, value, wanted)
        return number

    return dataclasses.field(default=default, metadata={"check": check})


def integer(default: int | None, low: int, high: int = LARGEST_ID, *, also_default: tuple = ()) -> Any:
    """Field for an int within [low, high]; the values in `also_default` mean the default."""

    def check(name: str, value: Any) -> int | None:
        number = scalar(value)
        if isinstance(number, int) and not isinstance(number, bool) and number in also_default:
            return default
        return to_int(name, value, low, high)

    return dataclasses.field(default=default, metadata={"check": check})


def seed_or_base() -> Any:
    """Field for a seed 0 .. 2**63 - 1; None and -1 mean none, and "per-request:7" is a base to derive seeds from."""

    number = integer(None, 0, 2**63 - 1, also_default=(-1,)).metadata["check"]

    def check(name: str, value: Any) -> int | str | None:
        kind, _, base = value.partition(":") if isinstance(value, str) else ("", "", "")
        if kind == PER_REQUEST and base.isdecimal() and int(base) < 2**63:
            return f"{PER_REQUEST}:{int(base)}"
        if isinstance(value, str):
            fail(
                name,
                value,
                f'a whole number of 0 .. 2**63 - 1, or "{PER_REQUEST}:7" with such a number as the base',
            )
        return number(name, value)

    return dataclasses.field(default=None, metadata={"check": check})


def flag(default: bool) -> Any:
    """Field for True or False; 0, 1 and text are errors."""
    return dataclasses.field(default=default, metadata={"check": to_bool})


def to_bool(name: str, value: Any) -> bool:
    """A Python, NumPy or torch bool as a Python bool."""
    truth = scalar(value)
    if not isinstance(truth, bool):
        fail(name, value, "True or False")
    return truth


def choice(default: Any, *options: Any) -> Any:
    """Field for one of a few values; True and 1 are different values."""

    def check(name: str, value: Any) -> Any:
        picked = scalar(value)
        for option in options:
            if type(picked) is type(option) and picked == option:
                return option
        return fail(name, value, "one of " + ", ".join(map(repr, options)))

    return dataclasses.field(default=default, metadata={"check": check})


def token_ids(default: tuple | None = (), *, may_be_empty: bool = True) -> Any:
    """Field for token ids, kept as a tuple without repeats in the order given."""
    wanted = (
        "a list of token ids (integers of at least 0)" if may_be_empty else "a list of one token id or more"
    )

    def check(name: str, value: Any) -> tuple[int, ...]:
        ids = unique([to_int(name, entry, 0, wanted=wanted) for entry in to_list(name, value, wanted)])
        if not ids and not may_be_empty:
            fail(name, value, wanted)
        return ids

    return dataclasses.field(default=default, metadata={"check": check})


def texts() -> Any:
    """Field for strings; one string stands for a list of it, an empty string is an error."""
    wanted = "a non-empty string, or a list of them"

    def check(name: str, value: Any) -> tuple[str, ...]:
        entries = [value] if isinstance(value, str) else to_list(name, value, wanted)
        if not all(isinstance(entry, str) and entry for entry in entries):
            fail(name, value, wanted)
        return unique(entries)

    return dataclasses.field(default=(), metadata={"check": check})


def texts_or_ids() -> Any:
    """Field for single tokens, each as an id or as a string that the tokenizer turns into one."""
    wanted = "a list of token ids or non-empty strings"

    def check(name: str, value: Any) -> tuple[int | str, ...]:
        entries = [value] if isinstance(value, str) else to_list(name, value, wanted)
        return unique([_text_or_id(name, entry, wanted) for entry in entries])

    return dataclasses.field(default=(), metadata={"check": check})


def words() -> Any:
    """Field for token sequences, each as a list of ids or as a string for the tokenizer."""
    wanted = "a list whose entries are non-empty strings or non-empty lists of token ids"

    def entry_of(name: str, entry: Any) -> str | tuple[int, ...]:
        if isinstance(entry, str) and entry:
            return entry
        return _sequence(name, entry, wanted)

    def check(name: str, value: Any) -> tuple[str | tuple[int, ...], ...]:
        entries = [value] if isinstance(value, str) else to_list(name, value, wanted)
        return unique([entry_of(name, entry) for entry in entries])

    return dataclasses.field(default=(), metadata={"check": check})


def token_bias() -> Any:
    """Field for {token id: bias}; keys may be numerals (JSON), or text for the tokenizer."""
    wanted = "a mapping {token id: finite bias}; to forbid a token write banned_tokens=[id]"

    def check(name: str, value: Any) -> FrozenDict:
        entries: dict[Any, Any] = {}
        for key, bias in _pairs(name, value, wanted):
            key = _numeral(key)
            key = _text_or_id(name, key, wanted)
            _add(name, entries, key, to_float(name, bias, wanted))
        return FrozenDict(entries)

    return _mapping_field(check)


def sequence_bias() -> Any:
    """Field for {(token ids): bias}; also a list of [[token ids], bias], as JSON needs it."""
    wanted = "a mapping {(token ids): finite bias}; to forbid a sequence write bad_words=[[ids]]"

    def check(name: str, value: Any) -> FrozenDict:
        entries: dict[Any, Any] = {}
        for key, bias in _pairs(name, value, wanted):
            _add(name, entries, _sequence(name, key, wanted), to_float(name, bias, wanted))
        return FrozenDict(entries)

    return _mapping_field(check)


def positions_to_ids() -> Any:
    """Field for {output position: token id}; keys may be numerals (JSON)."""
    wanted = "a mapping {output position from 0: token id}"

    def check(name: str, value: Any) -> FrozenDict:
        entries: dict[Any, Any] = {}
        for key, token in _pairs(name, value, wanted):
            position = to_int(name, _numeral(key), 0, wanted=wanted)
            _add(name, entries, position, to_int(name, token, 0, wanted=wanted))
        return FrozenDict(entries)

    return _mapping_field(check)


def start_and_factor() -> Any:
    """Field for None or (output length at which it starts, growth factor above 0)."""
    wanted = "(start, factor): an integer of at least 0 and a finite number above 0"

    def check(name: str, value: Any) -> tuple[int, float]:
        pair = to_list(name, value, wanted)
        if len(pair) != 2 or to_float(name, pair[1], wanted) < FLOAT32_TINY:
            fail(name, value, wanted)
        return to_int(name, pair[0], 0, wanted=wanted), float(scalar(pair[1]))

    return dataclasses.field(default=None, metadata={"check": check})


def watermark() -> Any:
    """Field for None or a watermark of transformers: its configuration object, or a mapping of the same settings."""

    def check(name: str, value: Any) -> FrozenDict:
        given = value.to_dict() if callable(getattr(value, "to_dict", None)) else value
        if not isinstance(given, Mapping):
            fail(
                name,
                value,
                "transformers' WatermarkingConfig or SynthIDTextWatermarkingConfig, or its settings",
            )
        try:
            config = watermarking(given)
            config.validate()
        except (TypeError, ValueError) as error:
            wanted = f"settings of a watermark of transformers, which says: {error}"
            raise ParameterError(f"{name}={reprlib.repr(value)} is not valid: expected {wanted}") from error
        return FrozenDict({k: tuple(v) if isinstance(v, list) else v for k, v in config.to_dict().items()})

    return dataclasses.field(default=None, metadata={"check": check})


def watermarking(settings: Mapping[str, Any]) -> Any:
    """transformers' configuration object of a watermark: SynthID's where there are `keys`, else a green list's."""
    from transformers import SynthIDTextWatermarkingConfig, WatermarkingConfig

    return (SynthIDTextWatermarkingConfig if "keys" in settings else WatermarkingConfig)(**settings)


def hook() -> Any:
    """Field for None or a callable; it counts for equality, not for the hash."""

    def check(name: str, value: Any) -> Callable:
        if not callable(value):
            fail(name, value, "a callable")
        return value

    return dataclasses.field(default=None, hash=False, metadata={"check": check})


def functions(*, method: str | None = None) -> Any:
    """Field for callables, or objects with the method `method`; one stands for a list of it."""
    wanted = "a callable" + (f" or an object with .{method}()" if method else "") + ", or a list of them"

    def fits(entry: Any) -> bool:
        usable = callable(entry) or (method is not None and callable(getattr(entry, method, None)))
        return usable and not isinstance(entry, type)

    def check(name: str, value: Any) -> tuple:
        entries = (
            [value] if fits(value) and not isinstance(value, list | tuple) else to_list(name, value, wanted)
        )
        for entry in entries:
            if not fits(entry):
                fail(name, entry, wanted)
        return tuple(entries)

    return dataclasses.field(default=(), hash=False, metadata={"check": check})


def _mapping_field(check: Check) -> Any:
    return dataclasses.field(default=FrozenDict(), metadata={"check": check})


def _pairs(name: str, value: Any, wanted: str) -> Iterator[tuple[Any, Any]]:
    """Key and value of each entry of a mapping, or of a list of pairs."""
    if isinstance(value, Mapping):
        yield from value.items()
        return
    for pair in to_list(name, value, wanted):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            fail(name, value, wanted)
        yield pair[0], pair[1]


def _add(name: str, entries: dict, key: Any, value: Any) -> None:
    if entries.setdefault(key, value) != value:
        raise ParameterError(f"{name} gives {key!r} two values: {entries[key]!r} and {value!r}")


def _numeral(key: Any) -> Any:
    """The int that a key such as "50256" stands for: JSON knows no other kind of key."""
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10 else key


def _text_or_id(name: str, entry: Any, wanted: str) -> int | str:
    if isinstance(entry, str) and entry:
        return entry
    return to_int(name, entry, 0, wanted=wanted)


def _sequence(name: str, value: Any, wanted: str) -> tuple[int, ...]:
    ids = tuple(to_int(name, entry, 0, wanted=wanted) for entry in to_list(name, value, wanted))
    if not ids:
        fail(name, value, wanted)
    return ids
