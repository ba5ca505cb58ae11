"""Cautious next token prediction (CNTP, arXiv 2507.03038): where the model is unsure, trials up to a mark."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch

from ...errors import ParameterError
from ...loop.generation import Generation
from ..kit.decode import decode
from ..kit.requests import limit
from ..kit.rollout import rollout

TRIAL = 2**28  # noise streams of the trials beyond the first, which has the row's own
MARKS = ".,;:!?)]}\n。，；：！？）】"


def cautious(
    engine, prompts, params=None, *, most_trials=10, low=0.01, high=1.5, marks: Collection[int] | None = None,
    longest=64, stream=False, **options,
) -> list[Generation]:  # fmt: skip
    """At entropy H of the pipeline's distribution, the most probable of N trials is taken up to its mark.

    N grows from 1 at H <= low to most_trials at H >= high, linearly and rounded down, as in the authors' code. A trial
    is drawn by the pipeline until a token with a punctuation mark; the one with the lowest perplexity wins. A token
    costs one pass; a trial of t tokens, t rows in passes that all trials share.

    Args:
        prompts, params, options: as for `decode`, with temperature > 0.
        most_trials: N_max, >= 1; 1 is plain sampling.
        low, high: nats, H_min < H_max.
        marks: token ids that end a trial; None: those whose text holds a punctuation mark.
        longest: most tokens of a trial, >= 1.

    Returns:
        One Generation for each sample of each prompt; `extra["trials"]`: (position, N) of every choice.
    """
    if most_trials < 1 or not low < high or longest < 1:
        raise ParameterError(
            f"CNTP takes most_trials, longest >= 1 and low < high, got {most_trials}, {longest}, {low}, {high}"
        )
    ends = punctuation(engine) if marks is None else frozenset(marks)
    chosen: dict = {}  # request -> the tokens of its trial that are still to come

    def step(now):
        tokens = now.draw()
        share = ((now.entropy - low) / (high - low)).clamp(0, 1)
        counts = (1 + (most_trials - 1) * share).long().tolist()
        free = [row for row, request in enumerate(now.live) if not chosen.get(request) and counts[row] > 1]
        fan = [(row, trial) for row in free for trial in range(counts[row])]
        if fan:
            rows = [row for row, _ in fan]
            room = [limit(now.live[row], now.engine) - len(now.live[row].stopper.token_ids) for row in rows]
            walks = rollout(
                now.engine, now.state.select(rows), now.requests.select(rows), [min(r, longest) for r in room],
                streams=[TRIAL + trial if trial else 0 for _, trial in fan], until=lambda _, token: token in ends,
            )  # fmt: skip
            for row in free:
                mine = [walk for (owner, _), walk in zip(fan, walks, strict=True) if owner == row]
                best = max(mine, key=lambda walk: math.fsum(walk.logprobs) / len(walk.logprobs))
                chosen[now.live[row]] = list(best.tokens)
                trials = now.live[row].extra.setdefault("trials", [])
                trials.append((len(now.live[row].stopper.token_ids), counts[row]))
        queued = [chosen[r].pop(0) if chosen.get(r) else -1 for r in now.live]
        given = torch.tensor(queued, device=tokens.device)
        return torch.where(given >= 0, given, tokens)

    return decode(engine, prompts, params, step=step, stream=stream, **options)


def punctuation(engine) -> frozenset[int]:
    """Tokens whose text holds a punctuation mark or a line break."""
    if engine.tokenizer is None:
        raise ParameterError("without a tokenizer, CNTP needs marks: the ids of punctuation tokens")
    texts = engine.tokenizer.batch_decode([[i] for i in range(engine.vocab_size)])
    return frozenset(i for i, text in enumerate(texts) if any(mark in text for mark in MARKS))
