"""Requests: what a strategy keeps beside its State, so that every field of `SamplingParams` works in it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import ParameterError
from ...loop.generation import Event
from ...loop.loop import blame
from ...loop.request import Prefilled, Request
from ...pipeline.pipeline import Context, Rows
from ...state import State

FRESH, LAST = 2**20, 2**29  # streams of rows that draw anew: clear of samples and beams, roots and drafts
APART = 1024  # rows of one request for which two such selections share no stream


@dataclass(frozen=True)
class Requests:
    """What was asked for B rows, and their processors' memory: an immutable value that goes with a State.

    asked: the request that each row belongs to: its number and sample, prompt, params and seed.
    rows: what the pipeline keeps for them. forks: how often rows were selected to draw anew.
    seeds, streams: int64 [B], the keys of the draw's noise.
    """

    asked: tuple[Request, ...]
    rows: Rows
    seeds: Tensor
    streams: Tensor
    forks: int = 0

    @classmethod
    def start(cls, engine, prompts, params=None, *, hidden=False, **overrides) -> tuple[State, Requests]:
        """Prefill prompts; one row for each, or `n` where a request asks for n samples.

        Args:
            prompts, params, overrides: what `Engine.generate` takes.
            hidden: keep the prompts' hidden states.

        Raises:
            PromptError, ParameterError: before anything is computed.
        """
        asked = engine.requests(prompts, params, **overrides)
        for request in asked:
            for field in ("logprobs", "prompt_logprobs"):
                if getattr(request.params, field) is not None:
                    raise ParameterError(f"request {request.index}: {field} is for generate and decode alone")
        began = time.monotonic()
        state = engine.prefill([request.prompt for request in asked if request.sample == 0], hidden=hidden)
        for request in asked:
            request.admitted = began
            request.prefill_done()
        return state.select([request.index for request in asked]), cls.bind(engine, asked)

    @classmethod
    def bind(cls, engine, asked: Sequence[Request]) -> Requests:
        """What is kept for requests that have not drawn yet; none make an empty value."""
        seeds, streams = [request.seed for request in asked], [request.sample for request in asked]
        rows = engine.pipeline.bind(
            [request.params for request in asked],
            [request.prompt.ids for request in asked],
            device=engine.device,
            vocab_size=engine.vocab_size,
            eos_token_ids=engine.eos_token_ids,
            seeds=seeds,
            streams=streams,
        )
        keys = (torch.tensor(key, dtype=torch.long, device=engine.device) for key in (seeds, streams))
        return cls(tuple(asked), rows, *keys)

    def admit(self, fresh: Requests) -> Requests:
        """These rows, and behind them those of `fresh`, which have not drawn yet."""
        if not len(self) or not len(fresh):
            return self if len(self) else fresh
        rows = self.rows.select([*range(len(self)), *[0] * len(fresh)])
        for row, asked in enumerate(fresh.asked, len(self)):
            rows.fill(row, asked.params, asked.prompt.ids, asked.seed, asked.sample)
        keys = torch.cat([self.seeds, fresh.seeds]), torch.cat([self.streams, fresh.streams])
        return Requests(self.asked + fresh.asked, rows, *keys, max(self.forks, fresh.forks))

    @classmethod
    def concat(cls, parts: Sequence[Requests]) -> Requests:
        """The rows of several values that were selected from one, in order: `State.concat` for what goes with it."""
        asked = tuple(each for part in parts for each in part.asked)
        keys = (torch.cat([getattr(part, name) for part in parts]) for name in ("seeds", "streams"))
        return cls(
            asked, Rows.concat([part.rows for part in parts]), *keys, max(part.forks for part in parts)
        )

    def __len__(self) -> int:
        return len(self.asked)

    def select(self, index: Sequence[int], fresh: bool = False) -> Requests:
        """Fork, reorder or drop rows, as `State.select` does.

        Args:
            index: row numbers, repeated ones fork.
            fresh: every row takes a noise stream that no row has had, so that forks part, and a row that goes back
                draws another token. Otherwise forks share their noise: at equal States they draw equal tokens.
        """
        index = [int(i) for i in index]
        where = torch.tensor(index, dtype=torch.long, device=self.seeds.device)
        asked = tuple(self.asked[i] for i in index)
        streams, forks = self.streams[where], self.forks
        if fresh:
            seen: Counter = Counter()  # rows of one request are numbered, so that it depends on nobody else
            for row, request in enumerate(asked):
                streams[row] = FRESH + (forks * APART + seen[request.index]) % (LAST - FRESH)
                seen[request.index] += 1
            forks += 1
        return Requests(asked, self.rows.select(index), self.seeds[where], streams, forks)

    def context(self, tokens: Callable[[], list[list[int]]], lengths: Tensor) -> Context:
        """What processors may read when the next token is drawn.

        Args:
            tokens: makes the ids of every row, prompt included; called only if a processor reads history.
            lengths: int64 [B], how many ids that is.
        """
        device = self.seeds.device
        return Context(
            tokens=lambda: padded(tokens(), device),
            lengths=lengths,
            prompt_lengths=torch.tensor([len(request.prompt) for request in self.asked], device=device),
            seeds=self.seeds,
            streams=self.streams,
            params=[request.params for request in self.asked],
            vocab_size=self.rows.site.vocab_size,
            forgiving=True,
        )

    def at(self, state: State) -> Context:
        """The context of a State whose rows are these."""
        return self.context(lambda: state.tokens, state.lengths)

    @property
    def remembers(self) -> bool:
        """Whether a processor of a row has memory, which advances token by token."""
        return any(member.memory is not None for member in self.rows.active())

    def accept(self, tokens: Tensor, context: Context) -> Requests:
        """Requests after tokens [B] were committed; a row with token -1 committed nothing."""
        return replace(self, rows=self.rows.accept(tokens, context))

    def after(
        self, tokens: Tensor, given: Tensor, seen: Callable[[], list[list[int]]], lengths: Tensor
    ) -> Requests:
        """Requests after tokens [B] that nobody drew here: memory advances with the context that processors saw.

        Args:
            given: `[B, V]` what the pipeline is given before them. seen, lengths: the ids before them, see `context`.
        """
        if not self.remembers:
            return self
        context = self.context(seen, lengths)
        self.rows.apply(given, context)
        return self.accept(tokens, context)

    def branch(self, engine, state: State, rows: Sequence[int], tokens: Tensor, given: Tensor | None = None):
        """Forks of some rows of a State, each a token further: the State and the Requests of them.

        Args:
            rows: numbers of rows, repeated ones fork. tokens: int64 [R], what each goes on with.
            given: `[B, V]` what the pipeline was given at this State; None: its logits.
        """
        given = state.logits if given is None else given
        state, requests = state.select(rows), self.select(rows)
        if requests.remembers:
            requests = requests.after(tokens, given[list(rows)], lambda: state.tokens, state.lengths)
        return engine.step(state, tokens), requests

    def open(self, row: int, engine) -> Request:
        """A running request for this row, to which its tokens are pushed; the clock of `max_time` starts now."""
        asked = self.asked[row]
        running = replace(
            asked, prefilled=Prefilled(), raw_logprobs=[], logprobs=[], top_logprobs=[], extra={}
        )
        running.start(engine)
        running.admitted = asked.admitted or running.admitted
        return running


def push(request: Request, token: int, raw: float, logprob: float, top=None, failure=None) -> Event:
    """Commit one token; the Event says whether it ended the row. NaN log-probabilities end it in error.

    Args:
        raw, logprob: log-probabilities of the token, the model's and the pipeline's.
        top: (ids, log-probabilities) of the most probable tokens, where the request asked for them.
        failure: why a processor left no token.
    """
    if raw != raw or logprob != logprob:
        reason = blame(raw) if raw != raw else failure or blame(raw)
        return request.end("error", f"request {request.index}: {reason}")
    return request.push(token, raw, logprob, top)


def stop_ids(request: Request, engine) -> frozenset[int]:
    """Tokens that end this request."""
    return request.params.ends(engine.eos_token_ids) | frozenset(request.params.stop_token_ids)


def limit(request: Request, engine) -> int:
    """The most tokens that this request may generate."""
    total = min(engine.max_length, request.params.max_length or engine.max_length)
    return min(request.params.max_new_tokens, total - len(request.prompt))


def padded(rows: Sequence[Sequence[int]], device, least: int = 0) -> Tensor:
    """Ids [B, n] int64 of ragged rows, -1 behind their ends, n >= least."""
    wide = max([least, *map(len, rows)])
    ids = [[*row, *[-1] * (wide - len(row))] for row in rows]
    return torch.tensor(ids, dtype=torch.long, device=device).view(len(rows), wide)
