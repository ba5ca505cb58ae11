"""Prompts into rows: long ones alone, several short ones in one pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..errors import PoolExhausted
from .request import Request

SHORT = 48  # new tokens of a prompt up to which reading the weights costs more than computing with them
TOGETHER = 256  # tokens of one common pass, padding included


@torch.no_grad()
def prefill(model, request: Request) -> None:
    """Compute the prompt, unless a sibling or a common pass already has."""
    ready, prompt = request.prefilled, request.prompt
    if ready.row is None:
        every = request.params.prompt_logprobs is not None
        room = request.blocks(model.pool.block_size) if model.paged else 0
        ready.row, out = model.prefill(prompt.ids, prompt.embeddings, every=every, room=room)
        ready.logits, ready.states = out.logits[0, -1], out.states
        if every:
            ready.prompt_logprobs = prompt_logprobs(prompt.ids, out.logits[0])
    request.prefill_done()


@torch.no_grad()
def prefill_together(model, requests: Iterable[Request]) -> None:
    """Compute those of some requests' prompts that are short enough, in one pass if there are several.

    A prompt that shares its first block with another of them is left for later, when that block can be shared; equal
    prompts share all of it. Without memory for all of them nothing is computed.

    Args:
        model: the adapter; one that does not take prompts together is left alone.
        requests: those that are about to be prefilled, in order.
    """
    if not model.takes_prompts_together:
        return
    chosen = _group(requests, model.pool.block_size)
    if len(chosen) < 2:
        return
    try:
        rows, logits = model.prefill_together(
            [list(ids) for ids in chosen],
            [same[0].blocks(model.pool.block_size) for same in chosen.values()],
        )
    except (PoolExhausted, torch.OutOfMemoryError):
        return  # one at a time each of them can fail alone
    for same, row, last in zip(chosen.values(), rows, logits, strict=True):
        for request in same:
            request.prefilled.row, request.prefilled.logits = row, last


def _group(requests: Iterable[Request], block: int) -> dict[tuple[int, ...], list[Request]]:
    """Prompt -> the requests with it, as many as one pass should take."""
    chosen: dict[tuple[int, ...], list[Request]] = {}
    heads, seen = set(), set()
    for request in requests:
        ids, ready = tuple(request.prompt.ids), request.prefilled
        if id(ready) in seen or ready.row is not None:
            continue
        seen.add(id(ready))
        plain = request.prompt.embeddings is None and request.params.prompt_logprobs is None
        if not plain or len(ids) > SHORT:
            continue
        if ids in chosen:
            chosen[ids].append(request)
            continue
        if ids[:block] in heads:
            continue
        if (len(chosen) + 1) * max(map(len, (ids, *chosen))) > TOGETHER:
            break
        chosen[ids] = [request]
        if len(ids) > block:
            heads.add(ids[:block])
    return chosen


def prompt_logprobs(ids: list[int], logits: torch.Tensor) -> list[float | None]:
    """Log-probability of each prompt token after those before it, from `logits [T, V]`; None for the first."""
    if len(ids) < 2 or min(ids) < 0:
        return [None] * len(ids)
    targets = torch.tensor(ids[1:], device=logits.device)[:, None]
    return [None, *logits[:-1].log_softmax(-1).gather(-1, targets)[:, 0].tolist()]
