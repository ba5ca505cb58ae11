"""The decode loop: admit, draw, collect, feed. Everything else in handloom is a wrapper around it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from itertools import islice

import torch

from ..errors import HandloomError, PoolExhausted
from .batch import Batch, Step
from .generation import Event
from .prefill import prefill, prefill_together
from .request import Request


def run(engine, requests: list[Request]) -> Iterator[Event]:
    """Decode `requests` in the engine's slots and yield an Event for every token.

    A finished row is replaced by the next waiting request; it is never decoded as padding. Closing the generator
    gives every block back. What a row draws depends on its own prompt, seed and parameters alone.
    """
    waiting, steps = deque(requests), deque()
    width = max((min(r.room, engine.max_length) for r in requests), default=1)
    batch = engine.batch(len(waiting), width)
    try:
        while waiting or batch.running:
            yield from admit(engine, batch, waiting)
            yield from prepare(batch)
            try:
                steps.append(batch.draw())
                while len(steps) > batch.lag:
                    yield from collect(batch, steps.popleft())
                if batch.lag == 0 and not waiting and engine.bucket(len(batch.running)) < batch.size:
                    batch = batch.resized(engine, engine.bucket(len(batch.running)))
                if batch.running:
                    batch.feed()
            except torch.OutOfMemoryError as error:
                while steps:  # what was drawn before it is complete
                    yield from collect(batch, steps.popleft())
                yield from abandon(batch, error)
                batch = engine.batch(max(1, batch.size // 2), width)
    finally:
        for slot in batch.running:
            batch.clear(slot)
        engine.give_back(batch)


def admit(engine, batch: Batch, waiting: deque[Request]) -> Iterator[Event]:
    """Prefill waiting requests into free slots; short prompts share a pass, the samples of a prompt its prefill."""
    prefill_together(batch.model, next_in(batch, waiting))
    while waiting and (slot := batch.free()) is not None:
        if batch.running and not fits(batch, waiting[0]):
            return
        request = waiting.popleft()
        request.start(engine)
        try:
            prefill(batch.model, request)
            batch.place(slot, request)
        except (HandloomError, torch.OutOfMemoryError) as error:
            request.prefilled.taken()
            yield request.end("error", f"request {request.index}: {error}")


def next_in(batch: Batch, waiting: deque[Request]) -> Iterator[Request]:
    """The waiting requests for which there is a free slot, and memory to their end."""
    free, promised = batch.size - len(batch.running), 0
    for request in islice(waiting, free):
        if not fits(batch, request, promised):
            return
        promised += request.blocks(batch.block)
        yield request


def fits(batch: Batch, request: Request, more: int = 0) -> bool:
    """Whether the pool can serve a request to its end beside those that run, and `more` blocks."""
    promised = sum(
        batch.requests[i].blocks(batch.block) - len(batch.rows[i].table or ()) for i in batch.running
    )
    return batch.pool.obtainable() - promised - more >= request.blocks(batch.block)


def prepare(batch: Batch) -> Iterator[Event]:
    """Make room for one more token in every row; a row for which there is none ends alone."""
    for slot in batch.running:
        try:
            batch.prepare(slot)
        except PoolExhausted as error:
            event = batch.requests[slot].end("error", f"request {batch.requests[slot].index}: {error}")
            batch.clear(slot)
            yield event


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
    results, best = step.read(), step.most_probable()
    for slot, request in enumerate(step.requests):
        if request is None or batch.requests[slot] is not request:
            continue
        token, raw, processed = results[slot]
        if math.isnan(raw) or math.isnan(processed):
            reason = blame(raw) if math.isnan(raw) else step.failures.get(slot, blame(raw))
            event = request.end("error", f"request {request.index}: {reason}")
        else:
            event = request.push(int(token), raw, processed, best and best[slot])
        if event.finish:
            batch.clear(slot)
        yield event


def blame(raw: float) -> str:
    """Why no token could be drawn."""
    if math.isnan(raw):
        return "the model's logits hold NaN, or nothing finite"
    return "no token is left: the request's bans, masks and processors exclude all of them"
