"""Files of other tools: their requests as prompts, their answers as records to compare with ours."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import HandloomError

Row = Mapping[str, Any]
FORMS = "OpenAI's or vLLM's batches, human-eval, alpaca_eval, lm-eval's samples, open-ended generation"


def as_prompt(row: Row) -> Row:
    """A row with its prompt where `read_items` looks for it: requests of batches, and samples that lm-eval logged."""
    if {"custom_id", "body"} <= set(row):
        return {"id": row["custom_id"], **row["body"]}
    if {"doc_id", "arguments"} <= set(row):
        first = row["arguments"]
        first = first["gen_args_0"]["arg_0"] if isinstance(first, Mapping) else first[0][0]
        kept = {name: row[name] for name in ("target", "doc") if name in row}
        return {"id": str(row["doc_id"]), "prompt": first, **kept}
    return row


def read_answers(
    path: str | Path, setting: str | None = None, *, model: str | None = None, tokenizer=None
) -> list[dict[str, Any]]:
    """What another tool answered, as records for `compare_records` and reports.

    Prompts have the ids of that tool, so those of `read_items` on the same rows; several answers to a prompt are its
    samples. `correct` is taken from lm-eval's scores.

    Args:
        path: a JSON list or JSON lines, of OpenAI's or vLLM's batches, human-eval, alpaca_eval, lm-eval's samples or
            open-ended generation.
        setting: name in tables; None is alpaca_eval's generator, or the file's name.
        model: name of the model, as in the records to compare with.
        tokenizer: gives `token_ids`, which metrics of n-grams and length count; None leaves them empty.

    Raises:
        HandloomError: no file, or a row of none of these forms.
    """
    path = Path(path)
    if not path.is_file():
        raise HandloomError(f"there is no {path}")
    text = path.read_text(encoding="utf-8")
    try:
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(line) for line in text.splitlines() if line.strip()]
        )
    except json.JSONDecodeError as error:
        raise HandloomError(f"{path} is neither a JSON list nor JSON lines: {error.msg}") from error
    records: list[dict[str, Any]] = []
    seen: Counter[tuple[str, str]] = Counter()
    for number, row in enumerate(rows):
        for answer in _answers(row, number, path):
            name = setting or answer.pop("generator", None) or path.stem
            answer.pop("generator", None)
            sample = seen[name, answer["prompt_id"]]
            seen[name, answer["prompt_id"]] += 1
            ids = [] if tokenizer is None else tokenizer.encode(answer["text"], add_special_tokens=False)
            key = f"{name}/{answer['prompt_id']}"
            records.append(
                {"unit_id": key, "sample": sample, "model": model, "setting": name, "token_ids": ids}
                | {"params": {}, "finish_reason": "stop"}
                | answer
            )
    return records


def _answers(row: Any, number: int, path: Path) -> Iterator[dict[str, Any]]:
    """The answers in a row, each with `prompt_id` and `text`."""
    keys = set(row) if isinstance(row, Mapping) else set()
    if {"custom_id", "response"} <= keys:
        body = (row["response"] or {}).get("body") or {}
        for choice in body.get("choices", ()):
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            yield {
                "prompt_id": row["custom_id"],
                "text": text or "",
                "finish_reason": choice["finish_reason"],
            }
        if not body.get("choices"):
            error = row.get("error") or body.get("error") or row["response"]
            yield {"prompt_id": row["custom_id"], "text": "", "finish_reason": "error", "error": str(error)}
    elif {"task_id", "completion"} <= keys:
        yield {"prompt_id": str(row["task_id"]), "text": row["completion"]}
    elif {"instruction", "output"} <= keys:
        yield {
            "prompt_id": str(number), "prompt": row["instruction"], "text": row["output"],
            "generator": row.get("generator"),
        }  # fmt: skip
    elif {"doc_id", "resps"} <= keys:
        right = next((row[name] for name in ("exact_match", "acc", "pass@1") if name in row), None)
        kept = {"target": row.get("target"), "prompt": as_prompt(row)["prompt"]}
        for text in (text for request in row["resps"] for text in request if isinstance(text, str)):
            known = {} if right is None else {"correct": bool(right)}
            yield {"prompt_id": str(row["doc_id"]), "text": text} | kept | known
    elif {"prefix_text", "generated_result"} <= keys:
        made = row["generated_result"]
        for text in made.values() if isinstance(made, Mapping) else [made]:
            yield {"prompt_id": str(number), "prompt": row["prefix_text"], "text": text}
    else:
        raise HandloomError(
            f"{path}, row {number}: expected a row of {FORMS}; it has {', '.join(sorted(keys)) or 'no fields'}"
        )
