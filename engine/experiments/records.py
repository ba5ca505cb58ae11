"""JSON lines in and out: a file of prompts, and a file of results that survives a kill."""

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import HandloomError, PromptError

OF_MODELS = ("weights", "revisions", "slots")  # of a header: mappings from a model's name
KINDS = {"prompt": str, "text": str, "messages": list, "token_ids": list}


@dataclass(frozen=True)
class Record:
    """One line of a file of prompts.

    Args:
        id: name of the record, the line's `id` or its line number from 1.
        kind: "prompt" (text; a user's turn where the model has a chat template), "text" (continued as it is, as a
            string is in Python), "messages" (a conversation) or "token_ids".
        content: the prompt itself.
        params: sampling parameters of this record alone.
    """

    id: int | str
    kind: str
    content: Any
    params: dict[str, Any] = field(default_factory=dict)


def read_records(lines: Iterable[str]) -> list[Record]:
    """The prompts of a JSONL file; empty lines are skipped.

    A line is an object with one of `prompt`, `text`, `messages`, `token_ids`, and perhaps `id` and `params`.

    Raises:
        PromptError: a line is not such an object, or an id comes twice; the message names the line.
    """
    records: list[Record] = []
    first_seen: dict[int | str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _read_record(line, number)
        if record.id in first_seen:
            raise PromptError(f"line {number}: id {record.id!r} is also that of line {first_seen[record.id]}")
        first_seen[record.id] = number
        records.append(record)
    return records


def _read_record(line: str, number: int) -> Record:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptError(f"line {number} is not JSON: {error.msg} at column {error.colno}") from error
    found = [kind for kind in KINDS if isinstance(entry, dict) and kind in entry]
    if len(found) != 1:
        raise PromptError(f"line {number}: expected an object with exactly one of {', '.join(KINDS)}")
    if not isinstance(entry[found[0]], KINDS[found[0]]):
        kind = KINDS[found[0]].__name__
        raise PromptError(f"line {number}: {found[0]} must be a {kind}, got {entry[found[0]]!r:.80}")
    params = entry.get("params", {})
    name = entry.get("id", number)
    if not isinstance(params, dict):
        raise PromptError(f"line {number}: params must be an object, got {params!r:.80}")
    if isinstance(name, bool) or not isinstance(name, int | str):
        raise PromptError(f"line {number}: id must be a text or an integer, got {name!r:.80}")
    return Record(name, found[0], entry[found[0]], params)


class ResultFile:
    """A JSONL file of results that is only ever extended by whole lines; a context manager.

    Whatever kills the writer, a record is in the file whole or not at all: each line is one write, and a torn
    last line is cut off when the file is opened again. One process at a time may have it open.

    Args:
        path: the file; made if it does not exist.

    Attributes:
        done: {(id, sample): key} of the records that were in the file, `key` naming the settings that made them;
            both are the `unit_id` of a plan's samples.
        header: what the last header line says of the records behind it (model, versions, defaults), or None.

    Raises:
        HandloomError: the file is in use, cannot be written, is no regular file, or holds something else.
    """

    def __init__(self, path: Path):
        self.path = path
        if path.exists() and not path.is_file():
            raise HandloomError(f"{path} is no regular file, and results are read back when a run goes on")
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise HandloomError(f"{path} cannot be written: {error.strerror}") from error
        self.header: dict[str, Any] | None = None
        self._opening: list[dict[str, Any]] = []
        try:
            self._claim()
            self.done = self._repair()
        except BaseException:
            self.close()
            raise

    def _claim(self) -> None:
        """Lock the file itself, until it is closed; nothing is left behind."""
        if sys.platform == "win32":  # a second writer is not noticed there
            return
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HandloomError(f"{self.path} is being written by another process") from error
        except OSError as error:
            raise HandloomError(f"{self.path} cannot be locked: {error.strerror}") from error

    def _repair(self) -> dict[tuple[int | str, int], str]:
        """Cut a torn last line off, and read what is there."""
        whole = 0
        done = {}
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                try:
                    entry = json.loads(line)
                    if "header" in entry:
                        self.header = entry["header"]
                    else:
                        name, key = _named(entry)
                        done[name] = key
                except (ValueError, KeyError, TypeError) as error:
                    raise HandloomError(
                        f"{self.path}, line {number} is not a result of this command; name another --output"
                    ) from error
        os.truncate(self.path, whole)
        return done

    def begin(self, header: dict[str, Any]) -> None:
        """Say what the records from here on have in common; written with the first of them, if it is new."""
        header = json.loads(json.dumps(header))  # as it is read back
        self._opening = [] if header == self.header else [{"header": header}]
        self.header = header

    def write(self, entry: dict[str, Any]) -> None:
        """Append one record; it needs `sample`, and `unit_id` or `id` and `key`, and must be JSON."""
        self._append([*self._opening, entry])
        self._opening = []

    def _append(self, entries: Iterable[dict[str, Any]]) -> None:
        text = "".join(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n" for entry in entries)
        lines = text.encode("utf-8", "backslashreplace")
        if self._file.write(lines) != len(lines):
            raise OSError(f"{self.path}: only part of a record could be written; is the disk full?")

    def close(self) -> None:
        """Close the file and let others open it."""
        self._file.close()

    def __enter__(self) -> "ResultFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _named(entry: dict[str, Any]) -> tuple[tuple[int | str, int], str]:
    """What names a record, and the settings that made it."""
    unit = entry.get("unit_id")
    name, key = (entry["id"], entry["key"]) if unit is None else (unit, unit)
    return (name, entry["sample"]), key


def read_results(paths: Iterable[Path]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and records of result files of one plan, the first of records that come twice, in the plan's order.

    Raises:
        HandloomError: a file that is missing, holds something else, or was made from another plan.
    """
    header: dict[str, Any] | None = None
    found: dict[tuple[int | str, int], dict[str, Any]] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise HandloomError(f"there is no {path}")
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith("\n"):
                    break  # torn by a kill
                try:
                    entry = json.loads(line)
                    own = entry.get("header")
                    if own is None:
                        found.setdefault(_named(entry)[0], entry)
                except (ValueError, KeyError, AttributeError) as error:
                    raise HandloomError(f"{path}, line {number} is not a record") from error
                if own is not None and header is not None and own.get("same") != header.get("same"):
                    raise HandloomError(f"{path} holds the samples of another plan than the files before it")
                header = joined(header or {}, own or {})
    header = header or {}
    order = {name: place for place, name in enumerate(header.get("settings", ()))}

    def place(record: dict[str, Any]) -> tuple[int, str, int]:
        return (
            order.get(record.get("setting"), len(order)),
            str(record.get("prompt_id", "")),
            record["sample"],
        )

    return header, sorted(found.values(), key=place)


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two headers as one: what is told of each model by its name stays, otherwise the first counts."""
    told = {name: second[name] | first.get(name, {}) for name in OF_MODELS if name in second}
    return {**second, **first, **told}


def merge(paths: Iterable[Path], output: Path) -> int:
    """Write the records of several files into one, each once; returns their number.

    Args:
        paths: results of the shards of one plan. output: see `write_results`.
    """
    header, records = read_results(paths)
    write_results(output, header, records)
    return len(records)


def write_results(output: Path, header: dict[str, Any], records: Iterable[dict[str, Any]]) -> None:
    """A file of results, replaced as a whole when all is written."""
    fresh = output.with_name(f".{output.name}.new")
    with fresh.open("w", encoding="utf-8") as file:
        for entry in [{"header": header}, *records]:
            file.write(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")
    os.replace(fresh, output)


def export(
    records: Iterable[dict[str, Any]], path: Path, form: str, header: dict[str, Any] | None = None
) -> None:
    """Records in a form that other tools read.

    Args:
        header: what the records have in common, kept as JSON in Parquet's metadata under `handloom`.
        form: "parquet" (needs pyarrow), "human-eval" (task_id, completion), "alpaca-eval" (instruction, output,
            generator), or "open-ended" (prefix_text, generated_result) of the papers on open-ended generation.
    """
    forms = {
        "human-eval": lambda r: {"task_id": r["prompt_id"], "completion": r["text"]},
        "alpaca-eval": lambda r: {"instruction": r["prompt"], "output": r["text"], "generator": r["setting"]},
        "open-ended": lambda r: {"prefix_text": r["prompt"], "generated_result": r["text"]},
    }
    if form == "parquet":
        import pyarrow
        import pyarrow.parquet

        rows = [
            {k: json.dumps(v) if isinstance(v, dict) else v for k, v in record.items()} for record in records
        ]
        names = {name: None for row in rows for name in row}
        columns = {name: [row.get(name) for row in rows] for name in names}
        told = {} if header is None else {"handloom": json.dumps(header)}
        pyarrow.parquet.write_table(pyarrow.table(columns).replace_schema_metadata(told), path)
        return
    if form not in forms:
        raise HandloomError(f"form {form!r}: expected parquet, {', '.join(forms)}")
    rows = [forms[form](record) for record in records]
    text = json.dumps(rows) if form == "alpaca-eval" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
