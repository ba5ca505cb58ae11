"""The decode loop: admit, draw, collect, feed. Everything else in handloom is a wrapper around it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import torch

from .batch import Batch, Step
from .errors import HandloomError, PoolExhausted
from .generation import Event
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
    """Prefill waiting requests into free slots, one at a time; the samples of one prompt share its prefill."""
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


def fits(batch: Batch, request: Request) -> bool:
    """Whether the pool can serve a request to its end beside those that run."""
    promised = sum(
        -(-batch.requests[i].room // batch.block) - len(batch.rows[i].table or ()) for i in batch.running
    )
    return batch.pool.obtainable() - promised >= -(-request.room // batch.block)


@torch.no_grad()
def prefill(model, request: Request) -> None:
    """Compute the prompt, unless a sibling already has."""
    ready, prompt = request.prefilled, request.prompt
    if ready.row is None:
        every = request.params.prompt_logprobs is not None
        room = -(-request.room // getattr(getattr(model, "pool", None), "block_size", 1))
        ready.row, out = model.prefill(prompt.ids, prompt.embeddings, every=every, room=room)
        ready.logits, ready.states = out.logits[0, -1], out.states
        if every:
            ready.prompt_logprobs = prompt_logprobs(prompt.ids, out.logits[0])
    request.prefill_done()


def prompt_logprobs(ids: list[int], logits: torch.Tensor) -> list[float | None]:
    """Log-probability of each prompt token after those before it, from `logits [T, V]`; None for the first."""
    if len(ids) < 2 or min(ids) < 0:
        return [None] * len(ids)
    targets = torch.tensor(ids[1:], device=logits.device)[:, None]
    return [None, *logits[:-1].log_softmax(-1).gather(-1, targets)[:, 0].tolist()]


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
