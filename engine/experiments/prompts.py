"""Prompts of an experiment: from lists, JSONL files, `datasets` folders and task files of lm-evaluation-harness."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import PromptError
from .foreign import as_prompt

CONTENT = (
    "prompt",
    "messages",
    "token_ids",
    "text",
    "instruction",
    "prefix_text",
)  # the first that a row has


@dataclass(frozen=True)
class Item:
    """One prompt of an experiment.

    Args:
        id: unique in the experiment. content: text, a list of messages, or token ids.
        target: the right answer, or None. rest: other fields of its row, which records carry as `task`.
    """

    id: str
    content: Any
    target: Any = None
    rest: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """Names the content."""
        text = json.dumps(self.content, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]


def read_items(source: Any, folder: Path = Path()) -> list[Item]:
    """The prompts that a plan names.

    Args:
        source: a list of prompts or rows; the path of a .jsonl file (HumanEval, alpaca_eval, requests of OpenAI's and
            vLLM's batches, lm-eval's samples among them), of a `datasets` folder or of a task file (.yaml);
            or a mapping with such a `file`, or a list of them, whose prompts are named after their files, too, and
            perhaps `limit` (the first so many of each), `prompt` (a field, or a template with {fields}), `target`
            (likewise) and `id` (a field).
        folder: where relative paths begin.

    Raises:
        PromptError: a file that is missing, a row without a prompt, or an id that comes twice.
    """
    options = dict(source) if isinstance(source, Mapping) else {}
    unknown = set(options) - {"file", "limit", "prompt", "target", "id"}
    if unknown or (isinstance(source, Mapping) and "file" not in options):
        wrong = ", ".join(sorted(unknown)) or "no file"
        raise PromptError(f"prompts: {wrong}; expected file, and perhaps limit, prompt, target, id")
    given = options.get("file", source)
    if isinstance(options.get("file"), list):
        parts = [(Path(name).stem, read_items(options | {"file": name}, folder)) for name in given]
        return [replace(item, id=f"{stem}/{item.id}") for stem, items in parts for item in items]
    rows = _file_rows(folder / given) if isinstance(given, str | Path) else given
    if not isinstance(rows, Iterator | Sequence):
        raise PromptError(f"prompts: expected a list, a file or a mapping with a file, got {given!r:.80}")
    items: list[Item] = []
    seen: set[str] = set()
    for number, row in enumerate(rows):
        if options.get("limit") is not None and len(items) >= options["limit"]:
            break
        item = _item(row, number, options)
        if item.id in seen:
            raise PromptError(f"prompt {number}: id {item.id!r} comes twice")
        seen.add(item.id)
        items.append(item)
    if not items:
        raise PromptError(f"prompts: none in {given!r:.80}")
    return items


def _file_rows(path: Path) -> Iterator[Any]:
    if path.is_dir():
        from datasets import load_from_disk

        loaded = load_from_disk(str(path))
        if hasattr(loaded, "keys"):
            raise PromptError(
                f"{path} holds the splits {', '.join(loaded)}; name one: {path / next(iter(loaded))}"
            )
        return iter(loaded)
    if not path.is_file():
        raise PromptError(f"prompts: there is no {path}")
    return _task_rows(path) if path.suffix in (".yaml", ".yml") else _jsonl_rows(path)


def _jsonl_rows(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise PromptError(f"{path}, line {number} is not JSON: {error.msg}") from error


def _task_rows(path: Path) -> Iterator[dict]:
    """Rows of a task over local JSON files: `doc_to_text` and `doc_to_target` are templates, or names of fields."""
    import yaml
    from jinja2 import Environment, StrictUndefined

    try:
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:  # `!function` among them, which would run the task's own code
        raise PromptError(f"{path} is no task that can be read as it is: {error}") from error
    if not isinstance(task, Mapping):
        raise PromptError(f"{path}: expected a task, got {task!r:.80}")
    files = (task.get("dataset_kwargs") or {}).get("data_files")
    if task.get("dataset_path") != "json" or not files:
        raise PromptError(f"{path}: expected a task over local files (dataset_path: json with data_files)")
    if isinstance(files, Mapping):
        files = files.get(task.get("test_split", "test"), next(iter(files.values())))
    if not isinstance(task.get("doc_to_text"), str):
        raise PromptError(f"{path}: doc_to_text must be a template or the name of a field")
    templates = Environment(undefined=StrictUndefined, keep_trailing_newline=True)

    def fill(name: str, doc: dict) -> Any:
        template = task.get(name)
        if template is None or template in doc:
            return None if template is None else doc[template]
        return templates.from_string(template).render(**doc) if isinstance(template, str) else template

    for name in [files] if isinstance(files, str) else files:
        for number, doc in enumerate(_jsonl_rows(path.parent / name)):
            row = {"id": f"{task.get('task', path.stem)}/{number}", "prompt": fill("doc_to_text", doc)}
            yield row | {"target": fill("doc_to_target", doc), "doc": doc}


def _item(row: Any, number: int, options: Mapping[str, Any]) -> Item:
    """One row as an item: text and lists are content, mappings have fields."""
    if isinstance(row, str):
        return Item(str(number), row)
    if isinstance(row, Sequence):
        return Item(str(number), list(row))
    if not isinstance(row, Mapping):
        raise PromptError(f"prompt {number}: expected a text, a list or an object, got {row!r:.80}")
    row = as_prompt(row)
    name = next((key for key in CONTENT if key in row), None)
    wanted = options.get("prompt", name)
    if wanted is None:
        raise PromptError(
            f"prompt {number}: expected one of the fields {', '.join(CONTENT)}, got {', '.join(row)}"
        )
    content, target = (
        _filled(row, wanted, number),
        options.get("target", "target" if "target" in row else None),
    )
    key = options.get("id") or next((key for key in ("id", "task_id", "prompt_id") if key in row), None)
    rest = {k: v for k, v in row.items() if k not in {name, key, "target"}}
    return Item(
        str(row[key]) if key else str(number),
        content,
        None if target is None else _filled(row, target, number),
        rest,
    )


def _filled(row: Mapping[str, Any], wanted: str, number: int) -> Any:
    """A field of a row, or a template with {fields} filled in."""
    if wanted in row:
        return row[wanted]
    try:
        if "{" in wanted:
            return wanted.format_map(row)
    except KeyError as error:
        raise PromptError(f"prompt {number}: no field {error} for the template {wanted!r}") from error
    raise PromptError(f"prompt {number}: no field {wanted!r}; it has {', '.join(row)}")
