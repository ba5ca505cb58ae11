"""The decode loop: admit, draw, collect, feed. Everything else in handloom is a wrapper around it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Generator, Iterator

import torch

from .batch import Batch, Step
from .generation import Event
from .intake import Arrivals
from .prefill import Prompts
from .request import Request


def run(engine, requests: list[Request] | Arrivals) -> Generator[Event, None, None]:
    """Decode `requests` in the engine's slots and yield an Event for every token.

    Of Arrivals it takes what has come before each step, until nothing is left. A finished row is replaced by the next
    waiting request; it is never decoded as padding. Prompts are computed between steps, so many tokens at a time that
    the running rows do not wait for long. Closing the generator gives every block back. What a row draws depends on its
    own prompt, seed and parameters alone.
    """
    arrivals = requests if isinstance(requests, Arrivals) else None
    waiting = deque(() if arrivals else requests)
    # A step that is recorded keeps its shape, so it is made for all that may come.
    most, width = (engine.slots, engine.max_length) if arrivals and engine.graphs else (len(waiting), 1)
    width = max((min(r.room, engine.max_length) for r in waiting), default=width)
    batch, prompts = engine.batch(most, width), Prompts(engine.runner, engine.prefill_chunk)
    most = engine.slots
    try:
        while True:
            if arrivals is not None:
                yield from welcome(arrivals, batch, prompts, waiting)
                batch = widened(engine, batch, waiting, len(prompts), most)
            if not (waiting or prompts.queue or batch.running):
                break
            if waiting or prompts.queue:
                yield from admit(engine, batch, prompts, waiting)
            yield from prepare(batch)
            if not batch.running:
                continue
            try:
                yield from collect(batch, batch.draw())
                if batch.shrinks and not (waiting or prompts):
                    fewer = engine.bucket(len(batch.running))
                    batch = batch.resized(engine, fewer) if fewer < batch.size else batch
                if batch.running:
                    batch.feed()
                record(engine, batch)
            except torch.OutOfMemoryError as error:
                yield from abandon(batch, error)
                most, width = max(1, batch.size // 2), batch.history.shape[1] - 1
                batch = engine.batch(most, width)
    finally:
        prompts.close()
        for slot in batch.running:
            batch.clear(slot)
        engine.give_back(batch)


def welcome(arrivals: Arrivals, batch: Batch, prompts: Prompts, waiting: deque[Request]) -> Iterator[Event]:
    """Take in what has come since the last step, and let go of what nobody waits for any more."""
    come, gone = arrivals.take()
    waiting.extend(come)
    for request in gone:
        if request in waiting:
            waiting.remove(request)
            request.start(arrivals.engine)
        elif request not in batch.requests and request not in prompts.queue:
            continue  # it has ended by itself
        event = request.end("cancelled")
        if request in batch.requests:
            batch.clear(batch.requests.index(request))
        else:
            prompts.drop(request)
        yield event


def widened(engine, batch: Batch, waiting: deque[Request], filling: int, most: int) -> Batch:
    """The batch, or one with more slots, or longer ones, where those that wait need them."""
    if not (waiting and batch.shrinks):
        return batch
    size = min(most, engine.bucket(len(batch.running) + filling + len(waiting)))
    width = max(min(request.room, engine.max_length) for request in waiting)
    if size <= batch.size and width < batch.history.shape[1]:
        return batch
    return batch.resized(engine, max(size, batch.size), width)


def admit(engine, batch: Batch, prompts: Prompts, waiting: deque[Request]) -> Iterator[Event]:
    """Take in waiting requests for which there is a slot, and memory to their end; compute some of their prompts."""
    running, queue = len(batch.running), prompts.queue
    while waiting and running + len(queue) < batch.size:
        if (running or queue) and not fits(batch, prompts, waiting[0]):
            break
        waiting[0].start(engine)
        prompts.add(waiting.popleft())
    if not queue:
        return
    if prompts.worth_a_pass(running > 0, bool(waiting)):
        for request, error in prompts.compute():
            request.prefilled.taken()
            yield request.end("error", f"request {request.index}: {error}")
    done = prompts.done(batch.size - running)
    for request, error in batch.place(done) if done else ():
        yield request.end("error", f"request {request.index}: {error}")


def fits(batch: Batch, prompts: Prompts, request: Request) -> bool:
    """Whether the pool can serve a request to its end beside those that were admitted before."""
    obtainable = batch.pool.obtainable()
    if obtainable == math.inf:
        return True
    running = (batch.requests[i].blocks(batch.block) - len(batch.rows[i].table or ()) for i in batch.running)
    return obtainable - sum(running) - prompts.blocks(batch.block) >= request.blocks(batch.block)


def prepare(batch: Batch) -> Iterator[Event]:
    """Make room for one more token in every row; a row for which there is none ends alone."""
    while exhausted := batch.prepare():
        for slot, error in exhausted:
            event = batch.requests[slot].end("error", f"request {batch.requests[slot].index}: {error}")
            batch.clear(slot)
            yield event


def record(engine, batch: Batch) -> None:
    """Record what ran for the first time, now that nobody waits for its results."""
    batch.record()
    if engine.runner.recorded is not None and engine.runner.recorded.programs.due:
        engine.runner.recorded.programs.catch_up()


def abandon(batch: Batch, error: Exception) -> Iterator[Event]:
    """End every running row: there was no memory for a step of so many."""
    for slot in batch.running:
        request = batch.requests[slot]
        event = request.end(
            "error", f"request {request.index}: out of memory with slots={batch.size}, use fewer: {error}"
        )
        batch.clear(slot)
        yield event


def collect(batch: Batch, step: Step) -> Iterator[Event]:
    """Hand each drawn token to its request; those that finish leave their slot."""
    for slot, (request, row) in enumerate(zip(step.requests, step.read(), strict=True)):
        if request is None:
            continue
        token, raw, processed = row if len(row) == 3 else row[:3]
        if raw != raw or processed != processed:  # NaN
            reason = blame(raw) if math.isnan(raw) else step.failures.get(slot, blame(raw))
            event = request.end("error", f"request {request.index}: {reason}")
        else:
            top = row[3:]
            best = ([int(i) for i in top[: len(top) // 2]], top[len(top) // 2 :]) if top else ((), ())
            event = request.push(int(token), raw, processed, best)
        if event.finish:
            batch.clear(slot)
        yield event


def blame(raw: float) -> str:
    """Why no token could be drawn."""
    if math.isnan(raw):
        return "the model's logits hold NaN, or nothing finite"
    return "no token is left: the request's bans, masks and processors exclude all of them"
