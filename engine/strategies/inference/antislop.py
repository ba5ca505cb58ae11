"""Antislop sampling (Paech 2024, arXiv 2510.15061): phrases and patterns that are taken back once they are said."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch

from ...errors import ParameterError
from ...kernels.sampling.draw import draw
from ...loop.generation import Generation
from ...pipeline.drawing import logprob_of
from ...state import State
from ..kit.requests import Requests, push

AGAIN = 2**24  # noise stream of each further attempt


@torch.no_grad()
def antislop(
    engine, prompts, params=None, *, phrases: Sequence[str] = (), patterns: Sequence[str] = (), strength=None,
    most_rewinds=100, **overrides,
) -> list[Generation]:  # fmt: skip
    """Decode; where the output holds a banned phrase or pattern, go back to its first token and draw another one.

    Rewinding is taking an older State. A token costs one pass of one row for each prompt, and what is taken back is
    computed for nothing. Matches are found in the text as it grows, across token borders.

    Args:
        prompts, params, overrides: as for `Engine.generate`; needs a tokenizer.
        phrases: texts, in any letter case. patterns: regular expressions.
        strength: subtracted from the logits of the first token at that place, >= 0; None bans it there.
        most_rewinds: of a prompt, then matches stay.

    Returns:
        One Generation for each sample of each prompt; `extra["rewinds"]`: (position, what was taken back) of each.
    """
    if engine.tokenizer is None:
        raise ParameterError("antislop reads text, and this engine has no tokenizer")
    if strength is not None and strength < 0:
        raise ParameterError(f"antislop takes strength >= 0, got {strength}")
    banned = re.compile(
        "|".join([*(f"(?i:{re.escape(phrase)})" for phrase in phrases), *patterns]) or r"(?!)"
    )
    state, requests = Requests.start(engine, prompts, params, **overrides)
    # Of each row: what it was before each of its tokens, and what is forbidden there.
    places = [
        [(state.select([i]), requests.select([i]), requests.open(i, engine))] for i in range(len(state))
    ]
    costs: list[Counter] = [Counter() for _ in places]
    rewinds, results, live = [[] for _ in places], {}, list(range(len(places)))
    while live:
        tips = [places[row][-1] for row in live]
        state, requests = State.concat([tip[0] for tip in tips]), Requests.concat([tip[1] for tip in tips])
        logits, context = state.logits.clone(), requests.at(state)
        for i, row in enumerate(live):
            for (place, token), cost in costs[row].items():
                if place == len(places[row]) - 1:
                    logits[i, token] -= cost
        processed = requests.rows.apply(logits, context)
        again = torch.tensor([len(rewinds[row]) for row in live], device=logits.device)
        keys = context.seeds, context.positions, context.streams + AGAIN * again
        tokens = draw(processed, *keys, requests.rows.greedy_rows()).clamp(min=0)
        told = torch.stack([logprob_of(law, tokens) for law in (state.logits, processed)], 1).tolist()
        longer, after, going = engine.step(state, tokens), requests.accept(tokens, context), []
        for i, (row, token) in enumerate(zip(live, tokens.tolist(), strict=True)):
            running = tips[i][2].fork()
            event = push(running, token, *told[i])
            start = match_start(engine, running.stopper.token_ids, banned)
            if start is not None and len(rewinds[row]) < most_rewinds:
                said = running.stopper.token_ids
                costs[row] = Counter({key: cost for key, cost in costs[row].items() if key[0] <= start})
                costs[row][start, said[start]] += math.inf if strength is None else strength
                rewinds[row].append((start, engine.decode(said[start:])))
                places[row] = places[row][: start + 1]
                going.append(row)
            elif event.finish:
                event.generation.extra["rewinds"] = rewinds[row]
                results[row] = event.generation
                places[row] = []
            else:
                places[row].append((longer.select([i]), after.select([i]), running))
                going.append(row)
        live = going
    return [results[row] for row in sorted(results)]


def match_start(engine, tokens: list[int], banned: re.Pattern) -> int | None:
    """The output token at which the first match begins; None without a match."""
    found = banned.search(engine.decode(tokens))
    if found is None or found.end() == found.start():
        return None
    lengths = (len(engine.decode(tokens[: i + 1])) for i in range(len(tokens)))
    return next((i for i, length in enumerate(lengths) if length > found.start()), len(tokens) - 1)
