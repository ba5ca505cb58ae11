"""OpenAI's batch files without a server: every line a request, answered by one run of the loop."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engine import Engine
from ..errors import HandloomError, ParameterError
from ..loop.generation import Generation
from ..loop.intake import Arrivals
from . import aside
from .protocol import reading
from .protocol.answers import Answer, ChatAnswer
from .protocol.reading import Limits
from .protocol.refusals import Refusal, decoded, encoded, refusal_of, refusal_of_result
from .worker import Aside

ROUTES = {
    "/v1/completions": (reading.completion, Answer),
    "/v1/chat/completions": (reading.chat, ChatAnswer),
}
ALL = Limits(body=1 << 62, samples=1 << 30)  # nobody else waits


@dataclass
class Line:
    """One request of a file, and its results as they come."""

    name: str
    answer: Answer
    results: dict[tuple[int, int], Generation] = field(default_factory=dict)


def answer_file(
    engine: Engine, model: str, source: Path, target: Path, progress: Callable[[int, int], None] | None = None
) -> int:
    """Answer the lines of a file that have no answer yet, and append each answer when it is there.

    Args:
        source, target: JSON lines of `custom_id, method, url, body`, and of OpenAI's answers to them.
        progress: told of (done, all).

    Returns:
        How many lines got an error.

    Raises:
        ParameterError: a line without an id, or with one that came before.
    """
    lines = list(read_lines(source))
    known = {record["custom_id"] for record in map(json.loads, _complete(target))}
    waiting = [(name, content) for name, content in lines if name not in known]
    done, failed = len(lines) - len(waiting), 0
    with open(target, "ab") as out:
        for name, status, body in answers(engine, model, waiting):
            failed += status != 200
            response = {"status_code": status, "request_id": f"req_{uuid.uuid4().hex}", "body": body}
            record = {
                "id": f"batch_req_{uuid.uuid4().hex}",
                "custom_id": name,
                "response": response,
                "error": None,
            }
            out.write(encoded(record) + b"\n")
            out.flush()
            done += 1
            if progress is not None:
                progress(done, len(lines))
    return failed


def read_lines(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(custom_id, line) of each line."""
    seen = set()
    for number, text in enumerate(source.read_bytes().splitlines(), 1):
        if not text.strip():
            continue
        try:
            content = decoded(text)
        except Refusal as refusal:
            raise ParameterError(f"{source}, line {number}: {refusal.message}") from refusal
        name = content.get("custom_id")
        if not isinstance(name, str) or name in seen:
            raise ParameterError(f"{source}, line {number}: custom_id={name!r} must be a text of its own")
        seen.add(name)
        yield name, content


def _complete(target: Path) -> list[bytes]:
    """The lines of a file of answers; a last one that was cut off is taken away."""
    if not target.exists():
        return []
    content = target.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        target.write_bytes(whole)
    return whole.splitlines()


def answers(engine: Engine, model: str, lines: list[tuple[str, dict]]) -> Iterator[tuple[str, int, dict]]:
    """(custom_id, status, body) of every line, in the order in which they end."""
    arrivals, others = Arrivals(engine), []
    owners: dict[tuple[int, int], Line] = {}
    for name, content in lines:
        try:
            answer = _read(engine, model, content)
        except (Refusal, HandloomError) as error:
            yield name, *_refused(error)
            continue
        if answer.asked.strategy or answer.asked.trace:
            others.append((name, answer))
            continue
        arrivals.add(answer.asked.requests)
        line = Line(name, answer)
        owners |= {(r.index, r.sample): line for r in answer.asked.requests}
    with closing(engine.stream(arrivals)) as events:
        for event in events:
            if event.generation is None:
                continue
            line = owners.pop((event.request, event.sample))
            line.results[event.request, event.sample] = event.generation
            if len(line.results) == len(line.answer.asked.requests):
                ordered = [line.results[r.index, r.sample] for r in line.answer.asked.requests]
                yield line.name, *_told(line.answer, ordered)
    for name, answer in others:
        yield name, *_beside(engine, answer)


def _read(engine: Engine, model: str, content: dict[str, Any]) -> Answer:
    url, body = content.get("url"), content.get("body")
    if content.get("method", "POST") != "POST" or url not in ROUTES or not isinstance(body, dict):
        raise Refusal(f"a line holds method POST, a url of {', '.join(ROUTES)} and a body")
    read, kind = ROUTES[url]
    asked = read(engine, body, ALL)
    if asked.stream:
        raise Refusal("a line of a file cannot be streamed", param="stream")
    return kind(engine, asked, str(body.get("model", model)))


def _beside(engine: Engine, answer: Answer) -> tuple[int, dict[str, Any]]:
    run, nobody = aside.traced if answer.asked.trace else aside.strategic, Aside(lambda *told: None)
    try:
        return _told(answer, run(nobody, engine, answer.asked))
    except (Refusal, HandloomError) as error:
        return _refused(error)


def _told(answer: Answer, results: list[Generation]) -> tuple[int, dict[str, Any]]:
    wrong = next((result.error for result in results if result.error is not None), None)
    return (200, answer.whole(results)) if wrong is None else _refused(refusal_of_result(wrong))


def _refused(error: Refusal | HandloomError) -> tuple[int, dict[str, Any]]:
    refusal = refusal_of(error)
    return refusal.status, refusal.body()
