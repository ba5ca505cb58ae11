"""The one thread in which the engine runs, and the way from an event loop to it and back."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import traceback
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


class Channel:
    """What one caller waits for: told by another thread, heard in the event loop's."""

    def __init__(self):
        self._items: list[Any] = []
        self._news: asyncio.Future | None = None  # of who listens and has heard everything
        self.ended = False
        self.error: BaseException | None = None

    def hear(self, item: Any) -> None:
        """Take in what was told; for the event loop's thread."""
        self._items.append(item)
        self._wake()

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more will be told."""
        self.ended, self.error = True, error
        self._wake()

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def leave(self) -> None:
        """End the work: nobody waits for it."""
        raise NotImplementedError

    async def batches(self) -> AsyncIterator[list[Any]]:
        """All that has come since the last time, until there is no more; who stops listening ends the work."""
        try:
            while self._items or not self.ended:
                if not self._items:
                    self._news = asyncio.get_running_loop().create_future()
                    await self._news
                items, self._items = self._items, []
                if items:
                    yield items
            if self.error is not None:
                raise self.error
        finally:
            if not self.ended:
                self.leave()


class Ticket(Channel):
    """Requests in the loop, whose Events are told.

    Args:
        requests: one a sample. tokens: whether every token is told, or the results alone.
    """

    def __init__(self, worker: Worker, requests: list[Request], tokens: bool):
        super().__init__()
        self.worker, self.requests, self.tokens = worker, requests, tokens
        self.left = len(requests)

    def hear(self, item: Event) -> None:
        super().hear(item)
        if item.generation is not None:
            self.left -= 1
            if not self.left:
                self.end()

    def leave(self) -> None:
        self.worker.arrivals.cancel(self.requests)

    async def result(self) -> list[Generation]:
        """The results, in the order of the requests."""
        found = {}
        async for events in self.batches():
            found |= {(e.request, e.sample): e.generation for e in events if e.generation is not None}
        return [found[request.index, request.sample] for request in self.requests]


class Aside(Channel):
    """Work beside the loop, in a thread of its own, that uses the engine between the loop's steps.

    Args:
        tell: tells the caller something, from that thread.
    """

    def __init__(self, tell: Callable[[Channel, Any], None]):
        super().__init__()
        self._tell, self._left, self.value = tell, threading.Event(), None

    def tell(self, item: Any) -> None:
        """Something for the caller to hear, from the thread of the work."""
        self._tell(self, item)

    @property
    def left(self) -> bool:
        """Whether nobody waits for it any more: it should end before its next pass."""
        return self._left.is_set()

    def leave(self) -> None:
        self._left.set()

    async def result(self) -> Any:
        """What the work has returned, when it is through."""
        async for _ in self.batches():
            pass
        return self.value


class Worker:
    """Runs the engine's loop for every ticket, and other work of the engine between its steps.

    Args:
        engine: nobody else should run long things on it.
        waiting: samples that may wait beside those that have a slot.
        beside: strategies that run at once, each in a thread of its own; their passes take turns with the loop's steps.
    """

    def __init__(self, engine: Engine, waiting: int = 256, beside: int = 4):
        self.engine, self.most = engine, engine.slots + waiting
        self.arrivals = Arrivals(engine)
        self.pending = 0  # samples that have not ended
        self._tickets: dict[int, Ticket] = {}
        self._told: deque[tuple[Channel | None, Any]] = deque()
        self._ended: set[tuple[int, int]] = set()  # samples of this run whose end was told
        self._awake, self._asides = False, set[Aside]()
        self._reader = ThreadPoolExecutor(
            1, "handloom-reader"
        )  # tokenizers are not for several threads at once
        self._beside = ThreadPoolExecutor(beside, "handloom-beside")
        self._thread = threading.Thread(target=self._run, name="handloom-engine", daemon=True)

    def start(self) -> None:
        """Begin, from inside the event loop that will wait for results."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """Finish what has come, take no more, and end the thread."""
        self.arrivals.close()
        for aside in self._asides:
            aside.leave()
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

    def beside(self, function: Callable[..., Any], *arguments: Any, samples: int = 1) -> Aside:
        """Have `function(aside, *arguments)` run in a thread beside the loop; it uses the engine in its own way.

        Raises:
            Full: there is too much already.
        """
        self.room(samples)
        aside = Aside(self._tell)
        self.pending += samples
        self._asides.add(aside)
        work = self._loop.run_in_executor(self._beside, function, aside, *arguments)

        def done(found: asyncio.Future) -> None:
            self.pending -= samples
            self._asides.discard(aside)
            error = asyncio.CancelledError() if found.cancelled() else found.exception()
            if error is not None:
                traceback.clear_frames(error.__traceback__)  # which hold States, and those their blocks
            aside.value = found.result() if error is None else None
            aside.end(error)

        work.add_done_callback(done)
        return aside

    def _deliver(self) -> None:
        """Give what other threads have told to whom it belongs."""
        self._awake = False
        while self._told:
            channel, item = self._told.popleft()
            if channel is not None:
                channel.hear(item)
                continue
            ticket = self._tickets.get(item.request)
            if ticket is None:
                continue
            ticket.hear(item)
            if item.generation is not None:
                self.pending -= 1
                if ticket.ended:
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
                self._tell(None, event)
            if event.generation is not None:
                self._ended.add((event.request, event.sample))
            if self._asides and time.monotonic() - stepped > EVERY:
                time.sleep(PAUSE)
                stepped = time.monotonic()

    def _tell(self, channel: Channel | None, item: Any) -> None:
        """Have the event loop give an item to a channel, or an Event to the one that its number belongs to."""
        self._told.append((channel, item))
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
            self._tell(None, request.end("error", f"request {request.index}: the run ended: {error!r}"))
