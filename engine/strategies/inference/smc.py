"""Sequential Monte Carlo over sequences: steering (arXiv 2306.03081), twists (2404.17546), particle filtering."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...errors import ParameterError
from ...kernels.sampling.draw import coin, draw
from ...loop.generation import Generation
from ...pipeline.drawing import logprob_of
from ..kit.drawing import Keys
from ..kit.particles import Cloud
from ..kit.requests import Requests, push

RESAMPLE = 2**27  # noise stream of the resampling
Twist = Callable[[Sequence[list[int]], Sequence[bool]], Sequence[float]]
Proposal = Callable[[Tensor, Sequence[list[int]], Keys], tuple[Tensor, Tensor]]


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
    clouds = [Cloud([requests.open(row, engine) for _ in range(n)]) for row in range(len(state))]
    live = [(row, slot) for row in range(len(state)) for slot in range(n)]
    choose, seeds, step = proposal or tempered(alpha), requests.seeds, 0
    state, requests = (part.select([row for row, _ in live]) for part in (state, requests))
    while live:
        step += 1
        context, particles = requests.at(state), [clouds[row].particles[slot] for row, slot in live]
        streams = torch.tensor([slot for _, slot in live], device=requests.streams.device)
        processed = requests.rows.apply(state.logits, context)
        texts = [list(particle.request.stopper.token_ids) for particle in particles]
        keys = Keys(requests.seeds, context.positions, streams)
        tokens, gained = choose(processed.log_softmax(-1), texts, keys)
        lost, tokens = tokens < 0, tokens.clamp(min=0)
        logprobs = logprob_of(processed, tokens).masked_fill(lost, torch.nan)
        told = torch.stack([logprob_of(state.logits, tokens), logprobs, gained.float()], 1).tolist()
        texts = [[*text, token] for text, token in zip(texts, tokens.tolist(), strict=True)]
        pushed = zip(particles, texts, told, strict=True)
        events = [push(each.request, text[-1], *laws[:2]) for each, text, laws in pushed]
        ended = [event.finish is not None for event in events]
        values = [0.0] * len(live) if twist is None else map(float, twist(texts, ended))
        for particle, event, laws, value in zip(particles, events, told, values, strict=True):
            particle.weigh(event, laws[2], value)
        places, live, sources = {place: i for i, place in enumerate(live)}, [], []
        u = coin(seeds, torch.full_like(seeds, step), torch.full_like(seeds, RESAMPLE)).tolist()
        for row, cloud in enumerate(clouds):
            ancestors = cloud.resample(threshold, u[row])
            live += [(row, slot) for slot in cloud.live()]
            sources += [places[row, ancestors[slot]] for slot in cloud.live()]
        if live:
            requests = requests.accept(tokens, context).select(sources)
            state = engine.step(state.select(sources), tokens[sources])
    return [result for cloud in clouds for result in cloud.results()]


def tempered(alpha: float) -> Proposal:
    """Draws from p^alpha renormalised; its normaliser is the weight."""

    def propose(logprobs, texts, keys):
        logits = logprobs * alpha
        tokens = draw(logits, keys.seeds, keys.positions, keys.streams)
        return tokens, logits.logsumexp(-1)

    return propose
