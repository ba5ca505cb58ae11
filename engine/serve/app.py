"""The application: OpenAI's routes, and what stands beside them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response, StreamingResponse

from ..engine import Engine
from ..errors import HandloomError
from ..experiments.analysis.trace import PAGE
from ..loop.generation import Generation
from . import aside
from .gate import Gate, too_large
from .inspector import steps
from .metrics import Metrics
from .protocol import reading
from .protocol.answers import Answer, ChatAnswer, sent
from .protocol.reading import Asked, Limits
from .protocol.refusals import Refusal, as_json, decoded, encoded, refusal_of, refusal_of_result
from .worker import Aside, Channel, Worker

GONE = 499  # the status of a request whose caller has left; nobody reads it


class Server:
    """An engine behind OpenAI's API.

    Args:
        engine: it runs in a thread of the server's from startup to shutdown.
        name: of the model, as clients call it.
        key: that clients must bring, or None. hosts: names under which it is reached; empty for any.
        limits: of a request.

    `app` is the ASGI application; shutdown waits for what was taken.
    """

    def __init__(
        self, engine: Engine, name: str, *, key: str | None = None, hosts: Sequence[str] = (),
        limits: Limits | None = None,
    ):  # fmt: skip
        self.engine, self.name, self.limits = engine, name, limits or Limits()
        self.worker, self.started = Worker(engine, self.limits.waiting), int(time.time())
        self.metrics = Metrics(self.worker)
        self.app = FastAPI(lifespan=self._life, docs_url=None, redoc_url=None, openapi_url=None)
        posts = {
            "/v1/completions": partial(self.generate, reading.completion, Answer),
            "/v1/chat/completions": partial(self.generate, reading.chat, ChatAnswer),
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
            "/inspect": self.inspect,
        }
        gets = {
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.models,
            "/health": self.health,
            "/metrics": self.told,
            "/": self.page,
            "/page/{name}": self.page,
        }
        for method, routes in (("POST", posts), ("GET", gets)):
            for path, function in routes.items():
                self.app.add_route(path, _answered(function), methods=[method])
        self.app.add_exception_handler(HTTPException, _no_route)
        self.app.add_exception_handler(Exception, _fault)
        gate = {"key": key, "hosts": hosts, "body": self.limits.body, "metrics": self.metrics}
        self.app.add_middleware(Gate, **gate, paths=[*posts, *gets])

    @asynccontextmanager
    async def _life(self, _: FastAPI) -> AsyncIterator[None]:
        self.worker.start()
        yield
        await self.worker.close()

    # -- generating

    async def generate(self, read: Callable[..., Asked], kind: type[Answer], request: Request) -> Response:
        """Completions of either kind."""
        body = await self.body(request)
        asked = await self.worker.read(read, self.engine, body, self.limits)
        answer = kind(self.engine, asked, self.name)
        if asked.strategy or asked.trace:
            run = aside.traced if asked.trace else aside.strategic
            work: Channel = self.worker.beside(run, self.engine, asked, samples=len(asked.requests))
        else:
            work = self.worker.submit(asked.requests, tokens=asked.stream)
        if asked.stream:
            return StreamingResponse(self._parts(work, answer), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-store"})  # fmt: skip
        return as_json(await self.unless_gone(request, self._whole(work.result(), answer)))

    async def _whole(self, results: Awaitable[list[Generation]], answer: Answer) -> dict[str, Any]:
        found = await results
        self._count(found)
        return answer.whole(found)

    def _count(self, results: Sequence[Generation]) -> None:
        for result in results:
            self.metrics.ended(result)
        for result in results:
            if result.error is not None:
                raise refusal_of_result(result.error)

    async def _parts(self, work: Channel, answer: Answer) -> AsyncIterator[bytes]:
        """Server-sent events, those of a step together; a caller who leaves cancels what it asked for."""
        found, until = [], asyncio.get_running_loop().time() + self.limits.seconds
        if opening := answer.opening():
            yield b"".join(map(sent, opening))
        try:
            async with asyncio.timeout_at(until), aclosing(work.batches()) as batches:
                async for events in batches:
                    parts = b"".join(map(answer.sent, events))
                    if parts:
                        yield parts
                    ended = [event.generation for event in events if event.generation is not None]
                    found += ended
                    self._count(ended)
        except (TimeoutError, Refusal, HandloomError) as error:
            yield sent((self._too_late() if isinstance(error, TimeoutError) else refusal_of(error)).body())
        yield b"".join(map(sent, answer.closing(found))) + b"data: [DONE]\n\n"

    async def unless_gone(self, request: Request, work: Awaitable[dict[str, Any]]) -> dict[str, Any]:
        """The result of work, which is given up when the caller leaves or time is up."""
        task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
        try:
            await asyncio.wait({task, gone}, timeout=self.limits.seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise Refusal("the caller has left", GONE) if gone.done() else self._too_late()
        finally:
            task.cancel()
            gone.cancel()

    def _too_late(self) -> Refusal:
        return Refusal(f"no answer after {self.limits.seconds:g} s", 408, code="timeout")

    async def body(self, request: Request) -> dict[str, Any]:
        """The body of a request as a JSON object, for this model."""
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self.limits.body:
                raise too_large(self.limits.body)
            parts.append(part)
        content = decoded(b"".join(parts))
        model = content.get("model")
        if model is not None and model != self.name:
            message = f"model {str(model)[:80]!r} is not here; {self.name!r} is"
            raise Refusal(message, 404, param="model", code="model_not_found")
        return content

    # -- the rest

    async def tokenize(self, request: Request) -> Response:
        ids = await self.worker.read(reading.tokens, self.engine, await self.body(request))
        return as_json({"tokens": ids, "count": len(ids), "max_model_len": self.engine.max_length})

    async def detokenize(self, request: Request) -> Response:
        return as_json(
            {"prompt": await self.worker.read(reading.text, self.engine, await self.body(request))}
        )

    async def inspect(self, request: Request) -> Response:
        body = await self.body(request)
        question = await self.worker.read(steps.read, self.engine, body)
        work = self.worker.beside(steps.answer, self.engine, question)
        if question.stream:
            return StreamingResponse(self._lines(work), media_type="application/x-ndjson",
                                     headers={"Cache-Control": "no-store"})  # fmt: skip
        return as_json(await self.unless_gone(request, work.result()))

    async def _lines(self, work: Aside) -> AsyncIterator[bytes]:
        """What an answer of the inspector's tells as it goes, and then the answer, one JSON object a line."""
        try:
            async with asyncio.timeout(self.limits.seconds), aclosing(work.batches()) as batches:
                async for told in batches:
                    yield b"".join(encoded(each) + b"\n" for each in told)
            yield encoded(work.value) + b"\n"
        except (TimeoutError, Refusal, HandloomError) as error:
            yield encoded((self._too_late() if isinstance(error, TimeoutError) else refusal_of(error)).body())

    async def models(self, request: Request) -> Response:
        entry = {"id": self.name, "object": "model", "created": self.started, "owned_by": "handloom",
                 "max_model_len": self.engine.max_length}  # fmt: skip
        name = request.path_params.get("name")
        if name is None:
            return as_json({"object": "list", "data": [entry]})
        if name != self.name:
            raise Refusal(f"model {name!r} is not here; {self.name!r} is", 404, code="model_not_found")
        return as_json(entry)

    async def health(self, request: Request) -> Response:
        return as_json({"status": "ok"}) if self.worker.alive else as_json({"status": "stopped"}, 503)

    async def told(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def page(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        file = next((file for file in PAGE.iterdir() if file.name == name), None)
        if file is None:
            raise Refusal(f"there is no {request.url.path}", 404)
        return FileResponse(file, headers={"Cache-Control": "no-cache"})


def _answered(function: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """A route whose errors have OpenAI's shape."""

    async def route(request: Request) -> Response:
        try:
            return await function(request)
        except (Refusal, HandloomError) as error:
            return refusal_of(error).response()

    return route


async def _no_route(request: Request, error: Exception) -> Response:
    status = getattr(error, "status_code", 500)
    return Refusal(
        f"{request.method} {request.url.path}: {getattr(error, 'detail', error)}", status
    ).response()


async def _fault(request: Request, error: Exception) -> Response:
    return Refusal(
        f"a fault of the server, which its log tells more of: {type(error).__name__}", 500
    ).response()


async def _left(request: Request) -> None:
    """Return when the caller has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
