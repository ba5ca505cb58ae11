"""The one thread in which the engine runs, and the way from an event loop to it and back."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..engine import Engine
from ..errors import HandloomError
from ..loop.generation import Event, Generation
from ..loop.intake import Arrivals
from ..loop.request import Request

log = logging.getLogger("handloom")
PAUSE, EVERY = (
    1e-4,
    2e-3,
)  # seconds: where something else wants the engine, the loop steps aside so long, so often


class Full(HandloomError):
    """As many samples run and wait as the server takes."""


class Ticket:
    """What one caller waits for: its requests' events, as they come.

    Args:
        requests: one a sample. tokens: whether every token is told, or the results alone.
    """

    def __init__(self, worker: Worker, requests: list[Request], tokens: bool):
        self.worker, self.requests, self.tokens = worker, requests, tokens
        self.left = len(requests)
        self.queue: asyncio.Queue[Event] = asyncio.Queue()

    async def events(self) -> AsyncIterator[Event]:
        """Every Event until all requests have ended; who leaves early cancels them."""
        ended = 0
        try:
            while ended < len(self.requests):
                event = await self.queue.get()
                ended += event.generation is not None
                yield event
        finally:
            if ended < len(self.requests):
                self.worker.arrivals.cancel(self.requests)

    async def results(self) -> list[Generation]:
        """The results, in the order of the requests."""
        found = {}
        async for event in self.events():
            if event.generation is not None:
                found[event.request, event.sample] = event.generation
        return [found[request.index, request.sample] for request in self.requests]


class Worker:
    """Runs the engine's loop for every ticket, and other work of the engine between its steps.

    Args:
        engine: nobody else should run long things on it.
        waiting: samples that may wait beside those that have a slot.
    """

    def __init__(self, engine: Engine, waiting: int = 256):
        self.engine, self.most = engine, engine.slots + waiting
        self.arrivals = Arrivals(engine)
        self.pending = 0  # samples that have not ended
        self._tickets: dict[int, Ticket] = {}
        self._told: deque[Event] = deque()
        self._ended: set[tuple[int, int]] = set()  # samples of this run whose end was told
        self._awake, self._aside = False, 0
        # Tokenizers are not for several threads at once, and strategies run one at a time.
        self._reader = ThreadPoolExecutor(1, "handloom-reader")
        self._beside = ThreadPoolExecutor(1, "handloom-beside")
        self._thread = threading.Thread(target=self._run, name="handloom-engine", daemon=True)

    def start(self) -> None:
        """Begin, from inside the event loop that will wait for results."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """Finish what has come, take no more, and end the thread."""
        self.arrivals.close()
        await asyncio.to_thread(self._thread.join)
        self._reader.shutdown(cancel_futures=True)
        self._beside.shutdown(cancel_futures=True)

    @property
    def alive(self) -> bool:
        """Whether requests will be answered."""
        return self._thread.is_alive()

    # -- from the event loop

    def submit(self, requests: list[Request], tokens: bool = False) -> Ticket:
        """Hand requests to the loop.

        Raises:
            Full: there are too many already. HandloomError: the worker is closing.
        """
        self.room(len(requests))
        ticket = Ticket(self, requests, tokens)
        now = time.monotonic()
        for request in requests:
            request.submitted = now
        self.arrivals.add(requests)
        self._tickets |= {request.index: ticket for request in requests}
        self.pending += len(requests)
        return ticket

    def room(self, samples: int) -> None:
        """Raise Full where so many samples more are too many."""
        if self.pending + samples > self.most:
            raise Full(f"{self.pending} samples run or wait, {samples} more would be over {self.most}")

    async def read(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of what needs the tokenizer, not the model."""
        return await self._loop.run_in_executor(self._reader, function, *arguments)

    async def beside(self, function: Callable[..., Any], *arguments: Any, samples: int = 1) -> Any:
        """The result of what uses the engine in its own way, such as a strategy, step by step beside the loop."""
        self.room(samples)
        self.pending += samples
        self._aside += 1
        work = self._loop.run_in_executor(self._beside, function, *arguments)
        work.add_done_callback(lambda _: self._leave(samples))  # who has given up waiting does not end it
        return await asyncio.shield(work)

    def _leave(self, samples: int) -> None:
        self.pending -= samples
        self._aside -= 1

    def _deliver(self) -> None:
        """Give what the engine's thread has told to whom it belongs."""
        self._awake = False
        while self._told:
            event = self._told.popleft()
            ticket = self._tickets.get(event.request)
            if ticket is None:
                continue
            ticket.queue.put_nowait(event)
            if event.generation is not None:
                self.pending -= 1
                ticket.left -= 1
                if not ticket.left:
                    for request in ticket.requests:
                        self._tickets.pop(request.index, None)

    # -- the engine's thread

    def _run(self) -> None:
        while self.arrivals.wait():
            try:
                self._decode()
            except Exception as error:  # whatever ended the run, its callers are told
                log.exception("the run ended with an error")
                self._fail(error)
            self._ended.clear()

    def _decode(self) -> None:
        stepped = time.monotonic()
        for event in self.engine.stream(self.arrivals):
            ticket = self._tickets.get(event.request)
            if event.generation is not None or ticket is None or ticket.tokens:
                self._tell(event)
            if self._aside and time.monotonic() - stepped > EVERY:
                time.sleep(PAUSE)
                stepped = time.monotonic()

    def _tell(self, event: Event) -> None:
        self._told.append(event)
        if event.generation is not None:
            self._ended.add((event.request, event.sample))
        if not self._awake:  # one call for all that comes until it is heard
            self._awake = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _fail(self, error: Exception) -> None:
        """End everything that ran or waited: its results will not come."""
        come, _ = self.arrivals.take()
        lost = [request for ticket in list(self._tickets.values()) for request in ticket.requests]
        for request in dict.fromkeys([*lost, *come]):
            if (request.index, request.sample) in self._ended:
                continue
            if request.stopper is None:
                request.start(self.engine)
            self._tell(request.end("error", f"request {request.index}: the run ended: {error!r}"))
