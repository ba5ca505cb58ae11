"""Power sampling: p^alpha of whole sequences, by Metropolis-Hastings on blocks (arXiv 2510.14901) or by SMC."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ...errors import ParameterError
from ...kernels.sampling.draw import coin
from ...loop.generation import Generation
from ..kit.requests import Requests, limit
from ..kit.rollout import Walk, rollout
from .smc import smc

MOVE = 2**26  # noise streams of the moves


@torch.no_grad()
def power_sampling(
    engine, prompts, params=None, *, alpha=4.0, blocks=16, moves=10, **overrides
) -> list[Generation]:
    """A sample of each prompt whose law tends to p(x)^alpha as moves grow; p is the pipeline's law of sequences.

    Block after block is drawn from the proposal q, p^alpha of each token renormalised; then `moves` times the text
    is cut at a random place and drawn anew from q, and the new text x' is taken with probability
    min(1, p(x')^alpha q(x) |x| / (p(x)^alpha q(x') |x'|)). A move costs a pass over the output so far, and passes of
    one row for what is drawn anew; all prompts move together.

    Args:
        prompts, params, overrides: as for `Engine.generate`, with temperature > 0; no processors with memory.
        alpha: exponent, > 0; 1 is plain sampling. The paper's is 4.
        blocks: the output's length is reached in as many steps. moves: Metropolis-Hastings moves in each, >= 0.

    Returns:
        One Generation for each sample of each prompt; `extra`: "accepted" and "moves".
    """
    if alpha <= 0 or blocks < 1 or moves < 0:
        raise ParameterError(
            f"power sampling takes alpha > 0, blocks >= 1, moves >= 0, got {alpha}, {blocks}, {moves}"
        )
    state, requests = Requests.start(engine, prompts, params, **overrides)
    if any(requests.rows.greedy):
        raise ParameterError("power sampling needs temperature > 0")
    if requests.remembers:
        names = [member.processor.name for member in requests.rows.active() if member.memory is not None]
        raise ParameterError(f"power sampling rewinds texts: {names[0]}, which has memory, cannot")
    rows = range(len(state))
    rooms = [limit(request, engine) for request in requests.asked]
    texts, accepted, tried = [Walk([], [], []) for _ in rows], [0] * len(state), [0] * len(state)

    def continued(cuts: list[int], ends: list[int], stream: int) -> list[Walk]:
        """Every text from its cut on, drawn anew up to its end."""
        fed = engine.extend(state, [texts[row].tokens[: cuts[row]] or [0] for row in rows]).keep(cuts)
        new = rollout(
            engine, fed, requests, [end - cut for cut, end in zip(cuts, ends, strict=True)], streams=stream,
            power=alpha,
        )  # fmt: skip
        return [texts[row].then(cuts[row], new[row]) for row in rows]

    for block in range(1, blocks + 1):
        ends = [math.ceil(room * block / blocks) for room in rooms]
        sizes = [len(text.tokens) for text in texts]
        texts = continued(
            sizes, [n if text.ended else end for n, text, end in zip(sizes, texts, ends, strict=True)], 0
        )
        for move in range(moves):
            stream = MOVE + block * (moves + 1) + move
            keys = requests.seeds, torch.full_like(requests.seeds, stream), requests.streams + MOVE
            where = coin(*keys).tolist()
            chance = coin(keys[0], keys[1], keys[2] + 2**25).tolist()
            new = continued(
                [int(u * len(text.tokens)) for u, text in zip(where, texts, strict=True)], ends, stream
            )
            for row in rows:
                tried[row] += 1
                gain = target(new[row], alpha) - target(texts[row], alpha)
                if chance[row] < math.exp(min(0.0, gain)):
                    accepted[row] += 1
                    texts[row] = new[row]
    told = [{"accepted": taken, "moves": count} for taken, count in zip(accepted, tried, strict=True)]
    running = [requests.open(row, engine) for row in rows]
    return [text.told(replace(run, extra=own)) for text, run, own in zip(texts, running, told, strict=True)]


def power_smc(engine, prompts, params=None, *, alpha=4.0, n=64, **options) -> list[Generation]:
    """n weighted samples of p(x)^alpha; see `smc`, whose proposal draws from p^alpha of each token.

    A token costs one pass of at most n rows for each prompt.
    """
    return smc(engine, prompts, params, n=n, alpha=alpha, **options)


def target(text: Walk, alpha: float) -> float:
    """log p^alpha / (q |x|), up to what an unchanged beginning adds to both sides."""
    value = alpha * math.fsum(text.logprobs) - math.fsum(text.proposed) - math.log(max(1, len(text.tokens)))
    return -math.inf if value != value else value
