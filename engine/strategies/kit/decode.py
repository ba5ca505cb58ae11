"""decode: the whole life of requests around one function of the step."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...engine import Engine
from ...errors import HandloomError, ParameterError
from ...kernels.sampling.draw import draw
from ...loop.generation import Event, Results
from ...loop.request import Request
from ...pipeline.drawing import logprob_of
from ...state import State
from .joint import Joint
from .requests import Requests, push

log = logging.getLogger("handloom")
LEAST = -1e4  # a log-probability whose token counts nothing


@dataclass
class Now:
    """The running rows at one moment, as the functions that `decode` takes see them.

    joint: their States, the model's first, then those of the members beside it.
    requests: parameters, processor memory and noise. live: the running request of each row; what is put into its
    `extra` comes back with the Generation, and it is the key for what a strategy remembers of a row.
    """

    joint: Joint
    requests: Requests
    live: tuple[Request, ...]
    source: Callable[[Now], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.live)

    @property
    def engine(self) -> Engine:
        """The engine that decodes."""
        return self.joint.engines[0]

    @property
    def state(self) -> State:
        """The State of the rows."""
        return self.joint.states[0]

    @property
    def logits(self) -> Tensor:
        """`[B, V]` float32 that the model gave."""
        return self.state.logits

    @property
    def beside(self) -> tuple[Tensor, ...]:
        """`[B, V]` float32 that each member beside the model gave."""
        return self.joint.logits[1:]

    @cached_property
    def raw(self) -> Tensor:
        """`[B, V]` what the pipeline is given: the model's logits, or what the function `logits` makes of them."""
        return self.logits if self.source is None else self.source(self)

    @cached_property
    def context(self):
        """What processors may read in this step."""
        return self.requests.at(self.state)

    @cached_property
    def processed(self) -> Tensor:
        """`[B, V]` what the pipeline leaves."""
        return self.requests.rows.apply(self.raw, self.context)

    @cached_property
    def logprobs(self) -> Tensor:
        """`[B, V]` log-probabilities of the next token after the pipeline."""
        return self.processed.log_softmax(-1)

    @cached_property
    def entropy(self) -> Tensor:
        """`[B]` nats of what the pipeline leaves."""
        return -(self.logprobs.exp() * self.logprobs.clamp(min=LEAST)).sum(-1)  # 0 log 0 is 0

    def draw(self, logits: Tensor | None = None, streams: int = 0) -> Tensor:
        """`[B]` tokens drawn from the pipeline's logits, or from others `[B, V]`, with each row's own noise.

        Args:
            logits: what to draw from instead.
            streams: added to the rows' noise streams, for draws beside the one that decides.

        Returns:
            Tokens; rows of temperature 0 take the argmax, -1 where no token is left.
        """
        keys = self.requests.seeds, self.context.positions, self.requests.streams + streams
        return draw(self.processed if logits is None else logits, *keys, self.requests.rows.greedy_rows())


Step = Callable[[Now], Tensor | tuple[Tensor, Joint | State] | None]


def decode(
    engine: Engine, prompts, params=None, *, logits: Callable[[Now], Tensor] | None = None, step: Step | None = None,
    beside: Sequence[tuple[Engine, Sequence]] = (), hidden: bool = False, stream: bool = False, **overrides,
):  # fmt: skip
    """Decode like `Engine.generate`, with a function in place of the step's logits or of its choice.

    For instance classifier-free guidance (arXiv 2306.17806), with all of `SamplingParams`:

        def guided(now):
            conditional, unconditional = (x.log_softmax(-1) for x in now.joint.logits)
            return unconditional + 1.5 * (conditional - unconditional)

        decode(engine, prompts, params, logits=guided, beside=[(engine, negative_prompts)])

    Args:
        engine, prompts, params, overrides: as for `Engine.generate`; finished rows are replaced by waiting ones.
        logits: `now -> [B, V]`, what the pipeline is given instead of the model's logits. None: those.
        step: `now -> tokens [B]`, instead of the seeded draw from what the pipeline leaves; or `now -> (tokens,
            states)`, where the strategy has computed the State (or Joint) after them. A token of -1 ends its row in
            error. See `Now` for what both may read.
        beside: (engine, prompts) of members that are fed the same tokens in lockstep: other models of one
            vocabulary, or other prompts of the same one, as many as `prompts`. A step costs one forward pass more
            for each other model, and rows for each other prompt.
        hidden: keep hidden states (`now.state.hidden()`): of a whole prompt at first, then of one token a step.
        stream: return a `Decoding`, which yields an Event for every token, instead of the results.

    Returns:
        One Generation for each sample of each prompt, in order. `raw_logprobs` are the model's own, `logprobs`
        those after `logits` and the pipeline. After Ctrl-C what is unfinished is "cancelled".

    Raises:
        PromptError, ParameterError: before anything is computed.
    """
    asked = engine.requests(prompts, params, **overrides)
    members = [(engine, _prompts(asked)), *(_member(engine, asked, *pair) for pair in beside)]
    running = Decoding(asked, members, logits, step, hidden)
    return running if stream else running.results()


def _prompts(asked: Sequence[Request]) -> list:
    return [request.prompt for request in asked if request.sample == 0]


def _member(engine: Engine, asked: Sequence[Request], other: Engine, prompts) -> tuple[Engine, list]:
    """A member beside the model and its prompts, or an error that says what does not fit."""
    if other.vocab_size != engine.vocab_size:
        raise ParameterError(
            f"models in lockstep must share a vocabulary; theirs have {engine.vocab_size} and {other.vocab_size} tokens"
        )
    own = _prompts(other.requests(prompts))
    if len(own) != len(_prompts(asked)):
        raise ParameterError(f"{len(own)} prompts beside {len(_prompts(asked))}; give one for each")
    return other, own


class Decoding(Iterator[Event]):
    """Requests on their way; iterate for an Event of every token.

    `cancel(request)` ends one request, `close()` all; either gives its blocks back.
    """

    def __init__(self, asked, members, logits, step, hidden):
        self.asked, self.members = asked, members
        self.logits, self.step, self.hidden = logits, step, hidden
        engine = members[0][0]
        self.waiting, self.live = deque(asked), []
        self.joint, self.requests = None, Requests.bind(engine, [])
        self.filled: dict[int, Joint] = {}  # prompts that further samples wait for
        self._cancelled: set[Request] = set()
        self._events = self._run()

    def __next__(self) -> Event:
        return next(self._events)

    def close(self) -> None:
        """End everything that runs, without a result."""
        self._events.close()

    def cancel(self, request: int, sample: int | None = None) -> None:
        """End a request (or one of its samples) before its next token; its Event says "cancelled"."""
        wanted = [r for r in self.asked if r.index == request and sample in (None, r.sample)]
        if not wanted:
            raise ParameterError(f"request {request}, sample {sample} is not among those that run")
        self._cancelled.update(wanted)

    def results(self) -> Results:
        """Run to the end; what is unfinished after Ctrl-C is "cancelled"."""
        found = {}
        try:
            for event in self:
                if event.generation is not None:
                    found[event.request, event.sample] = event.generation
        except KeyboardInterrupt:
            log.warning("interrupted: %d of %d results are complete", len(found), len(self.asked))
        for request in self.asked:
            if (request.index, request.sample) not in found:
                found[request.index, request.sample] = request.cancelled(self.members[0][0])
        return Results(found[request.index, request.sample] for request in self.asked)

    # -- the loop

    @torch.no_grad()
    def _run(self) -> Iterator[Event]:
        try:
            while self.waiting or self.live:
                yield from self._admit()
                yield from self._end_some()
                if self.live:
                    yield from self._advance()
        finally:
            self.joint, self.live, self.filled = None, [], {}

    def _admit(self) -> Iterator[Event]:
        """Prefill waiting requests into the free slots."""
        engine, fresh, rows = self.members[0][0], [], []
        while self.waiting and len(self.live) + len(fresh) < engine.slots:
            request = self.waiting.popleft()
            request.start(engine)
            if request in self._cancelled:
                yield request.end("cancelled")
                continue
            try:
                rows.append(self._prefill(request))
            except (HandloomError, torch.OutOfMemoryError) as error:
                yield request.end("error", f"request {request.index}: {error}")
                continue
            request.prefill_done()
            fresh.append(request)
        if fresh:
            running = [self.joint] if self.live else []
            self.joint = Joint.concat([*running, *rows])
            self.requests = self.requests.admit(Requests.bind(engine, fresh))
            self.live += fresh

    def _prefill(self, request: Request) -> Joint:
        """The States of one prompt, computed once for all its samples."""
        ready = self.filled.pop(request.index, None)
        if ready is None:
            engines = tuple(engine for engine, _ in self.members)
            given = [prompts[request.index] for _, prompts in self.members]
            hidden = [self.hidden, *[False] * len(given)]
            states = (e.prefill([p], hidden=h) for e, p, h in zip(engines, given, hidden, strict=False))
            ready = Joint(engines, tuple(states))
            if request.params.prompt_logprobs is not None:
                request.prefilled.prompt_logprobs = prompt_logprobs(engines[0], request.prompt)
        if request.sample + 1 < request.params.n:
            self.filled[request.index] = ready
        return ready

    def _end_some(self) -> Iterator[Event]:
        """End rows that were cancelled, and those for which a member beside the model has no room."""
        ends = {}
        for row, request in enumerate(self.live):
            if request in self._cancelled:
                ends[row] = "cancelled"
            elif any(s.rows[row].length >= e.max_length for e, s in self.joint.members()[1:]):
                ends[row] = "length"
        if ends:
            yield from [self.live[row].end(reason) for row, reason in ends.items()]
            self._keep([row for row in range(len(self.live)) if row not in ends])

    def _keep(self, rows: list[int]) -> None:
        if len(rows) < len(self.live):
            self.joint, self.requests = self.joint.select(rows), self.requests.select(rows)
            self.live = [self.live[row] for row in rows]

    def _advance(self) -> Iterator[Event]:
        """One token for every row."""
        now = Now(self.joint, self.requests, tuple(self.live), self.logits)
        tokens, raw, logprobs, after = self._choose(now)
        self.requests = self.requests.accept(tokens, now.context)
        best, failures = most_probable(now), now.context.failures
        logprobs = now.context.spoiled(logprobs)
        told = zip(self.live, tokens.tolist(), raw.tolist(), logprobs.tolist(), best, strict=True)
        events = [push(*row, failures.get(i)) for i, row in enumerate(told)]
        if after is not None:
            self.joint = after if isinstance(after, Joint) else Joint(self.joint.engines, (after,))
        keep = [row for row, event in enumerate(events) if not event.finish]
        self._keep(keep)
        if after is None and keep:
            self.joint = self.joint.step(tokens[keep], hidden=self.hidden)
        yield from events

    def _choose(self, now: Now) -> tuple[Tensor, Tensor, Tensor, Joint | State | None]:
        """Tokens, their raw and processed log-probabilities [B], and the States after them if the step made those."""
        moved = None if self.step is None else self.step(now)
        tokens, after = moved if isinstance(moved, tuple) else (moved, None)
        if tokens is None:
            drawn = now.requests.rows.sample(now.raw, now.context)
            raw = drawn.raw_logprobs if self.logits is None else logprob_of(now.logits, drawn.tokens)
            return drawn.tokens, raw, drawn.logprobs, after
        tokens = torch.as_tensor(tokens, device=now.logits.device)
        if tokens.shape != (len(now),):
            raise ParameterError(f"the step gave tokens of shape {list(tokens.shape)} for {len(now)} rows")
        lost, tokens = tokens < 0, tokens.clamp(min=0)
        logprobs = logprob_of(now.processed, tokens).masked_fill(lost, torch.nan)
        return tokens, logprob_of(now.logits, tokens), logprobs, after


def most_probable(now: Now) -> list:
    """(ids, log-probabilities) of each row's most probable tokens in the model's own law; None where nobody asked."""
    wanted = [request.params.logprobs for request in now.live if request.params.logprobs is not None]
    if not wanted:
        return [None] * len(now)
    best = now.logits.log_softmax(-1).topk(min(max(*wanted, 1), now.logits.shape[1]))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def prompt_logprobs(engine: Engine, prompt) -> list[float | None]:
    """Log-probability of each prompt token after those before it; None for the first, and for embeddings."""
    if prompt.embeddings is not None or len(prompt) < 2:
        return [None] * len(prompt)
    return [None, *engine.score(engine.prefill([prompt.ids[:1]]), [prompt.ids[1:]])[0].tolist()]
