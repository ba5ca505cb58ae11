"""rollout: rows that go on for a while by their own pipeline, as trials, proposals and lookahead do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from ...kernels.sampling.draw import draw
from ...loop.generation import Generation
from ...loop.request import Request
from ...pipeline.drawing import logprob_of
from ...state import State
from .requests import Requests, stop_ids


@dataclass
class Walk:
    """One row's continuation: its tokens, their log-probabilities under the model and the pipeline; nothing is pushed.

    proposed: log-probability of each token in what it was drawn from. ended: whether its last token ends the request.
    """

    tokens: list[int]
    raw_logprobs: list[float]
    logprobs: list[float]
    proposed: list[float] = field(default_factory=list)
    ended: bool = False

    def then(self, cut: int, other: Walk) -> Walk:
        """The first `cut` tokens, and what another one draws behind them."""
        ours, theirs = ([w.tokens, w.raw_logprobs, w.logprobs, w.proposed] for w in (self, other))
        lists = [mine[:cut] + new for mine, new in zip(ours, theirs, strict=True)]
        return Walk(*lists, ended=other.ended or (self.ended and cut == len(self.tokens)))

    def told(self, request: Request) -> Generation:
        """The result of a running request that says this."""
        for each in zip(self.tokens, self.raw_logprobs, self.logprobs, strict=True):
            event = request.push(*each, None)
            if event.finish:
                return event.generation
        return request.end("length").generation


@torch.no_grad()
def rollout(
    engine, state: State, requests: Requests, most: Sequence[int], *, streams: int | Sequence[int] = 0,
    until: Callable[[int, int], bool] = lambda row, token: False, power: float = 1.0,
) -> list[Walk]:  # fmt: skip
    """Draw up to `most[i]` tokens for row i, with the processors' memory of `requests`; the State stays as it is.

    Args:
        engine, state, requests: the rows to go on from; forked rows should be given streams of their own.
        most: most tokens of each row, >= 0.
        streams: added to the rows' noise streams, one for all or one for each.
        until: (row, token) -> whether this token is the row's last one. EOS and stop tokens always are.
        power: draw from the pipeline's distribution to this power, renormalised.
    """
    added = torch.as_tensor(streams, device=requests.streams.device)
    requests = replace(requests, streams=requests.streams + added)
    walks = [Walk([], [], []) for _ in most]
    live = [row for row, count in enumerate(most) if count > 0]
    stops = {id(r): stop_ids(r, engine) for r in requests.asked}
    state, requests = state.select(live), requests.select(live)
    while live:
        context = requests.at(state)
        processed = requests.rows.apply(state.logits, context)
        greedy = requests.rows.greedy_rows()
        shaped = processed if power == 1 else processed.log_softmax(-1) * power
        tokens = draw(shaped, context.seeds, context.positions, context.streams, greedy).clamp(min=0)
        laws = state.logits, processed, shaped
        told = [tokens.tolist(), *(logprob_of(law, tokens).tolist() for law in laws)]
        requests, keep = requests.accept(tokens, context), []
        for i, (row, token, raw, logprob, proposed) in enumerate(zip(live, *told, strict=True)):
            walk = walks[row]
            walk.tokens.append(token)
            walk.raw_logprobs.append(raw)
            walk.logprobs.append(logprob)
            walk.proposed.append(proposed)
            walk.ended = token in stops[id(requests.asked[i])] or logprob != logprob
            if not (walk.ended or until(row, token) or len(walk.tokens) >= most[row]):
                keep.append(i)
        live = [live[i] for i in keep]
        if live:
            requests, state = requests.select(keep), engine.step(state.select(keep), tokens[keep])
    return walks
