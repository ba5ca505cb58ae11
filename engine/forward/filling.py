"""Prompts on their way into the pool: pieces of several in one packed pass, what they have in common computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..cache.feed import Feed
from ..cache.pool import Table
from ..cache.sequence import EMBEDDING, History, Row
from ..errors import PoolExhausted
from .passes import Output


@dataclass(eq=False)
class Filling:
    """One prompt while it is computed.

    Args:
        ids: its tokens, at least one.
        embeddings: `[T, D]` instead; `ids` then only gives the length.
        room: blocks that the row may grow to, a hint for placing it.
        hidden, every: keep hidden states, or logits, of every token. Such a prompt shares no prefix, as an embedded
            one does not, and is computed in passes of its own.
        table: the blocks that hold it so far; None before the first pass.
        claim: blocks behind it that others stay out of, for what it may grow to.
        done: how many of its tokens are computed.
        outputs: what its passes gave; without `hidden` and `every` the last one alone.
    """

    ids: Sequence[int]
    embeddings: torch.Tensor | None = None
    room: int = 0
    hidden: bool = False
    every: bool = False
    table: Table | None = None
    claim: tuple[int, int] | None = None
    done: int = 0
    outputs: list[Any] = field(default_factory=list)

    @property
    def lone(self) -> bool:
        """Whether it needs a pass of its own."""
        return self.hidden or self.every or self.embeddings is not None

    @property
    def left(self) -> int:
        """Tokens that are still to be computed."""
        return len(self.ids) - self.done

    def output(self) -> Any:
        """What all its passes gave: logits `[1, 1, V]` after it, or `[1, T, V]` with `every`."""
        last = self.outputs[-1]
        logits = torch.cat([out.logits for out in self.outputs], 1) if self.every else last.logits
        layers = None
        if self.hidden:
            layers = tuple(torch.cat(h, 1) for h in zip(*(out.hidden for out in self.outputs), strict=True))
        return replace(last, logits=logits, hidden=layers)

    def dropped(self, pool) -> None:
        """Back to where it was before its first pass."""
        if self.claim:
            pool.unclaim(self.claim)
        self.table, self.claim, self.done, self.outputs = None, None, 0, []

    def row(self) -> Row:
        """The row that holds the whole prompt."""
        history = History(self.ids if self.embeddings is None else [EMBEDDING] * len(self.ids))
        return Row(self.table, history, len(self.ids))


@torch.no_grad()
def advance(model, fillings: Sequence[Filling], budget: int) -> int:
    """Compute the next pieces of prompts in one pass of at most `budget` tokens; return how many it computed.

    A prompt that needs a pass of its own gets it when it is the first. Prompts that begin with the same blocks share
    them even within the pass: cells are written before any is read.

    Args:
        model: an adapter; one that does not pack is given one prompt at a time.
        fillings: prompts that are not done, in order; those whose `done` has moved were in the pass.
        budget: most tokens, at least one.

    Raises:
        PoolExhausted: there is no block for the first of them. Nothing has changed, whatever is raised.
    """
    pieces: list[tuple[Filling, Table, int]] = []
    named: list[int] = []
    fresh = [filling for filling in fillings if filling.table is None]
    try:
        for filling in fillings:
            if budget <= 0 or (pieces and (filling.lone or model.alone or not model.packs)):
                break
            table = _room(model, filling, budget, optional=bool(pieces))
            if table is None:
                break
            count = min(filling.left, budget)
            pieces.append((filling, table, count))
            budget -= count
            if filling.lone:
                break
            if model.shares_prefixes:
                named += model.pool.register(table, filling.ids[: filling.done + count])
        outputs = _run(model, pieces)
    except BaseException:
        model.pool.unregister(named)
        for filling in fresh:
            filling.dropped(model.pool)
        raise
    for (filling, table, count), output in zip(pieces, outputs, strict=True):
        filling.table, filling.done = table, filling.done + count
        filling.outputs.append(output)
        if not filling.lone:
            del filling.outputs[:-1]
    return sum(count for _, _, count in pieces)


def _room(model, filling: Filling, budget: int, optional: bool) -> Table | None:
    """A table with room for the next piece; None where there is none and the pass can do without."""
    if filling.table is None:
        filling.table = model.pool.table(
            () if filling.lone or not model.shares_prefixes else model.pool.match(filling.ids)
        )
        filling.done = len(filling.table) * model.pool.block_size
    try:
        table = model.pool.writable(filling.table, filling.done, min(filling.left, budget), filling.room)
    except PoolExhausted:
        if not optional:
            raise
        if not filling.outputs:
            filling.dropped(model.pool)  # it holds on to nothing that it has not computed
        return None
    if filling.claim is None and filling.room > len(table):
        filling.claim = model.pool.claim(table.blocks[-1] + 1, filling.room - len(table))
    return table


def _run(model, pieces) -> list:
    """An Output for each piece: logits `[1, 1, V]` after it, or what a lone prompt asks for."""
    size, device = model.pool.block_size, model.device
    parts = [filling.ids[filling.done : filling.done + count] for filling, _, count in pieces]
    begins, tables = [filling.done for filling, _, _ in pieces], [table for _, table, _ in pieces]
    first = pieces[0][0]
    if model.packs and not first.lone:
        if model.recorded is not None and not model.hooked:
            found = model.recorded.packed(model, parts, begins, tables)
        else:
            found = model.forward(Feed.packed(parts, begins, tables, size, device), last_only=True).logits[0]
        return [Output(logits) for logits in found[:, None, None].unbind()]
    given = None
    if first.embeddings is not None:
        given = model.embedded(first.embeddings[None, begins[0] : begins[0] + len(parts[0])])
    feed = Feed.build(parts, begins, tables, size, device, given)
    return [model.forward(feed, hidden=first.hidden, last_only=not first.every)]
