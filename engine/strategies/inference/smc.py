"""Sequential Monte Carlo over sequences: steering (arXiv 2306.03081), twists (2404.17546), particle filtering."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import ParameterError
from ...kernels.sampling.draw import coin, draw
from ...loop.generation import Generation
from ...loop.request import Request
from ...pipeline.drawing import logprob_of
from ..kit.particles import effective, log_mean, normalised, systematic
from ..kit.requests import Requests, push

RESAMPLE = 2**27  # noise stream of the resampling
Twist = Callable[[Sequence[list[int]], Sequence[bool]], Sequence[float]]
Proposal = Callable[[Tensor, Sequence[list[int]], "Keys"], tuple[Tensor, Tensor]]


@dataclass
class Keys:
    """Noise keys of R rows: int64 `[R]` each."""

    seeds: Tensor
    positions: Tensor
    streams: Tensor


@dataclass(eq=False)
class Particle:
    """One of a prompt's weighted sequences; `result` when it has ended."""

    request: Request
    weight: float = 0.0
    twist: float = 0.0
    result: Generation | None = None

    def fork(self, weight: float) -> Particle:
        """A copy that goes on by itself."""
        result = self.result and replace(self.result, extra=dict(self.result.extra))
        return Particle(self.request.fork(), weight, self.twist, result)


@torch.no_grad()
def smc(
    engine, prompts, params=None, *, n=16, twist: Twist | None = None, proposal: Proposal | None = None, alpha=1.0,
    threshold=0.5, **overrides,
) -> list[Generation]:  # fmt: skip
    """n weighted samples a prompt of p(x)^alpha psi(x), normalised, where p is the pipeline's law of sequences.

    Particles are drawn token by token from the proposal q, weighed by p^alpha / q and by psi_t / psi_{t-1}, and
    resampled (systematically, finished ones with them) when their effective number falls below threshold n. A token
    costs one pass of at most n rows for each prompt.

    Args:
        prompts, params, overrides: as for `Engine.generate`, with temperature > 0.
        n: particles a prompt, >= 1; 1 is plain sampling.
        twist: (output ids of N texts, whether each has ended) -> N values log psi_t, -inf to exclude. Those of ended
            texts are the target's psi; earlier ones are guesses of it, and only make it better. None: psi = 1.
        proposal: (log-probabilities `[R, V]`, output ids, `Keys`) -> tokens `[R]` and their log-weights `[R]`, whose
            mean, for any token, is log p^alpha / q. None draws from p^alpha renormalised.
        alpha: the target's exponent, > 0.
        threshold: 0 (never) to 1 (after every token).

    Returns:
        n Generations for each prompt; `extra`: "weight" (they sum to 1), "log_evidence": of an unbiased estimate of
        the normaliser, "resampled": how often.
    """
    if n < 1 or alpha <= 0 or not 0 <= threshold <= 1:
        raise ParameterError(
            f"SMC takes n >= 1, alpha > 0 and threshold in [0, 1], got {n}, {alpha}, {threshold}"
        )
    state, requests = Requests.start(engine, prompts, params, **overrides)
    if any(requests.rows.greedy) or any(request.params.n != 1 for request in requests.asked):
        raise ParameterError("SMC takes temperature > 0, and n as its own argument")
    count = len(state)
    clouds = [[Particle(requests.open(row, engine)) for _ in range(n)] for row in range(count)]
    evidence, resampled = [0.0] * count, [0] * count
    live = [(row, slot) for row in range(count) for slot in range(n)]
    state, requests = (part.select([row for row, _ in live]) for part in (state, requests))
    choose = proposal or tempered(alpha)
    while live:
        context = requests.at(state)
        streams = torch.tensor([slot for _, slot in live], device=requests.streams.device)
        processed = requests.rows.apply(state.logits, context)
        particles = [clouds[row][slot] for row, slot in live]
        texts = [list(particle.request.stopper.token_ids) for particle in particles]
        tokens, gained = choose(
            processed.log_softmax(-1), texts, Keys(requests.seeds, context.positions, streams)
        )
        lost, tokens = tokens < 0, tokens.clamp(min=0)
        raw = logprob_of(state.logits, tokens)
        logprobs = logprob_of(processed, tokens).masked_fill(lost, torch.nan)
        told = [x.tolist() for x in (tokens, raw, logprobs)]
        events = [push(particle.request, *each) for particle, *each in zip(particles, *told, strict=True)]
        ended = [event.finish is not None for event in events]
        values = [0.0] * len(live)
        if twist is not None:
            values = list(twist([[*text, t] for text, t in zip(texts, told[0], strict=True)], ended))
        for i, particle in enumerate(particles):
            particle.result = events[i].generation
            dead = events[i].finish == "error" or values[i] == -math.inf
            particle.weight += -math.inf if dead else float(gained[i]) + float(values[i]) - particle.twist
            particle.twist = float(values[i])
        requests, places = requests.accept(tokens, context), {place: i for i, place in enumerate(live)}
        live, sources = [], []
        for row, cloud in enumerate(clouds):
            weights, ancestors = [particle.weight for particle in cloud], list(range(n))
            running = any(particle.result is None for particle in cloud)
            if running and max(weights) > -math.inf and effective(weights) < threshold * n:
                step = max(len(particle.request.stopper.token_ids) for particle in cloud)
                u = float(coin(*(torch.tensor([key]) for key in (cloud[0].request.seed, step, RESAMPLE))))
                ancestors = systematic(normalised(weights), u)
                evidence[row] += log_mean(weights)
                resampled[row] += 1
                clouds[row] = [cloud[a].fork(0.0) for a in ancestors]
            for slot, ancestor in enumerate(ancestors):
                if clouds[row][slot].result is None:
                    live.append((row, slot))
                    sources.append(places[row, ancestor])
        if live:
            state, requests = state.select(sources), requests.select(sources)
            state = engine.step(state, tokens[sources])
    return [
        result for row, cloud in enumerate(clouds) for result in weighed(cloud, evidence[row], resampled[row])
    ]


def tempered(alpha: float) -> Proposal:
    """Draws from p^alpha renormalised; its normaliser is the weight."""

    def propose(logprobs, texts, keys):
        logits = logprobs * alpha
        tokens = draw(logits, keys.seeds, keys.positions, keys.streams)
        return tokens, logits.logsumexp(-1)

    return propose


def weighed(cloud: list[Particle], evidence: float, resampled: int) -> list[Generation]:
    """A prompt's particles with their weights."""
    weights = [particle.weight for particle in cloud]
    total = evidence + log_mean(weights)
    for slot, (particle, weight) in enumerate(zip(cloud, normalised(weights), strict=True)):
        particle.result.sample = slot
        particle.result.extra |= {"weight": weight, "log_evidence": total, "resampled": resampled}
    return [particle.result for particle in cloud]
