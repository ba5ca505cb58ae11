"""Result rows for the report: read with their place, told apart by kind, the newest of every case."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

CIRCUMSTANCES = {"commit": str, "time": str, "hardware": dict, "versions": dict}
NAMED = {
    "decode/speed": "decode",
    "decode/ragged": "decode",
    "decode/llm-perf": "decode",
    "decode/counts": "counts",
    "decode/throughput": "throughput",
    "decode/memory": "memory",
    "cpu": "cpu",
    "kernels/sampling": "sampling",
    "kernels/attention": "attention",
    "kernels/nf4": "nf4",
}
STEP_METRICS = ("ttft_ms", "tpot_p50_ms", "tpot_p99_ms", "mbu", "launches_per_token", "syncs_per_token")
RENAMED = {"shape": "model", "ms_per_token": "tpot_p50_ms", "share_of_ceiling": "mbu"}  # of the GPU check

# Kind -> fields that say what was measured. Rows of one kind that agree in them are one case.
CASES = {
    "decode": (
        *("model", "dtype", "device", "mode", "benchmark", "preset"),
        *("case", "batch", "context", "new_tokens"),
    ),
    "throughput": ("model", "dtype", "preset", "case", "unit"),
    "cpu": ("model", "case", "steps"),
    "counts": ("case", "rows", "preset"),
    "memory": ("case", "quantity", "preset"),
    "sampling": ("device", "mode", "rows", "batch", "vocab", "dtype", "cache"),
    "attention": ("device", "shape", "rows", "batch", "context", "dtype", "cache"),
    "nf4": ("device", "layer", "batch", "dtype", "cache"),
    "checks": ("check",),
    "figures": ("figure",),
    "aims": ("target",),
}
# Kind -> what tells its rows apart, and its measurement, a number; a row that says why it was skipped lacks that.
NEEDED = {
    "decode": (("side",), None),
    "throughput": (("case", "side"), "median"),
    "cpu": (("case", "side"), "median"),
    "counts": (("case", "side"), "operations_per_step"),
    "memory": (("quantity",), "value"),
    "sampling": (("side", "mode", "batch", "vocab"), "p50"),
    "attention": (("side", "shape", "batch", "context"), "p50"),
    "nf4": (("side", "layer", "batch"), "p50"),
    "checks": (("check",), "failed"),
    "figures": (("figure",), "value"),
    "aims": (("target", "wanted", "met"), None),
}
NUMBERS = (*STEP_METRICS, "batch", "context", "vocab", "tokens_per_s", "ratio", "min", "max")


class RowError(Exception):
    """A row that cannot be reported; the message begins with its file and line."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        kind: a key of `CASES`. fields: what was written, GPU check names made those of the benchmark.
        place: "file:line".
    """

    kind: str
    fields: dict
    place: str

    @property
    def time(self) -> datetime:
        """When it was measured."""
        return _time(self.fields["time"])

    @property
    def hardware(self) -> str:
        """What rows must share to stand in one table."""
        return json.dumps(self.fields["hardware"], sort_keys=True)

    @property
    def case(self) -> tuple:
        """What rows share that measure the same thing, whichever side and commit they are of."""
        return tuple(json.dumps(self.fields.get(name)) for name in CASES[self.kind])

    def number(self, name: str) -> float | None:
        """A field's value where it is a finite number."""
        value = self.fields.get(name)
        return value if is_number(value) and math.isfinite(value) else None


def is_number(value) -> bool:
    """Whether a field's value is a number and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def read(paths: Iterable[Path]) -> tuple[list[Row], list[str]]:
    """Rows of JSON-lines files.

    Returns:
        The rows in order, and the places of rows of a kind that no table has.

    Raises:
        RowError: a line is not JSON or no object, or lacks its circumstances or its measurement.
    """
    rows, unknown = [], []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise RowError(f"{path}: no text in UTF-8 ({error.reason} at byte {error.start})") from None
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            fields = _parse(line, place)
            kind = kind_of(fields)
            if kind is None:
                unknown.append(place)
                continue
            fields = {RENAMED.get(name, name) if kind == "decode" else name: v for name, v in fields.items()}
            _check(kind, fields, place)
            rows.append(Row(kind, fields, place))
    return rows, unknown


def _parse(line: str, place: str) -> dict:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise RowError(f"{place}: not a JSON object ({error.msg}, column {error.colno})") from None
    if not isinstance(fields, dict):
        raise RowError(f"{place}: a {type(fields).__name__}, expected a JSON object")
    for name, kind in CIRCUMSTANCES.items():
        if not isinstance(fields.get(name), kind) or not fields[name]:
            raise RowError(f"{place}: {name} is {fields.get(name)!r}, expected a non-empty {kind.__name__}")
    try:
        _time(fields["time"])
    except ValueError:
        raise RowError(f"{place}: time is {fields['time']!r}, expected ISO 8601") from None
    return fields


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def kind_of(fields: dict) -> str | None:
    """The kind of a row, or None where no table has it."""
    if any(name in fields for name in (*STEP_METRICS, "ms_per_token")):
        return "decode"
    if fields.get("benchmark") in NAMED:
        return NAMED[fields["benchmark"]]
    for name, kind in (("check", "checks"), ("figure", "figures"), ("target", "aims")):
        if name in fields:
            return kind
    return "sampling" if "mode" in fields and "vocab" in fields else None


def _check(kind: str, fields: dict, place: str) -> None:
    """Raise RowError unless a row has what its kind needs, numbers where numbers belong."""
    names, measurement = NEEDED[kind]
    if measurement is not None and "skipped" not in fields:
        names = (*names, measurement)
    missing = [name for name in names if fields.get(name) is None]
    if missing:
        raise RowError(f"{place}: a row of kind {kind!r} without {' and '.join(missing)}")
    if not isinstance(fields.get("side", ""), str):
        raise RowError(f"{place}: side is {fields['side']!r}, expected a name")
    for name in (*NUMBERS, measurement):
        if fields.get(name) is not None and not is_number(fields[name]):
            raise RowError(f"{place}: {name} is {fields[name]!r}, expected a number")


def newest(rows: Iterable[Row], commit: str | None = None) -> list[Row]:
    """Of every case on every hardware the rows of its newest commit, one a side: the last that was measured.

    Args:
        commit: take rows of this commit alone (its first characters).
    """
    cases = defaultdict(list)
    for row in rows:
        if commit is None or row.fields["commit"].startswith(commit):
            cases[row.kind, row.hardware, row.case].append(row)
    found = []
    for same in cases.values():
        last = max(same, key=lambda row: row.time).fields["commit"]
        sides = {}
        for row in sorted(same, key=lambda row: row.time):  # stable: of equal times the later line wins
            if row.fields["commit"] == last:
                sides[row.fields.get("side")] = row
        found += sides.values()
    return found
