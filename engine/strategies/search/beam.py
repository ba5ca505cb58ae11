"""Beam search and beam sampling, token for token what transformers' `generate(num_beams=...)` gives."""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.noise.philox import gumbel
from ...loop.generation import Generation
from ..kit.beams import Beams
from ..kit.requests import Requests
from .settings import BeamSettings


@torch.no_grad()
def beam_search(
    engine, prompts, params=None, *, num_beams=None, length_penalty=None, early_stopping=None,
    num_return_sequences=None, renormalize_logits=None, **overrides,
) -> list[Generation]:  # fmt: skip
    """The most probable sequences that a beam finds; sampled beams where temperature > 0.

    Processors act on log-probabilities, as in transformers; `logprobs` of the results are what they gave. A
    sequence scores sum(logprobs) / length ** length_penalty. Sampled candidates are drawn without replacement
    from all beams of a prompt, by Gumbel-top-k (arXiv 1903.06059). A token costs one forward pass of num_beams rows
    for each prompt.

    Args:
        prompts, params, overrides: as for `Engine.generate`, but sequences end by tokens and lengths alone. What
            a GenerationConfig or a dict there says of the arguments below holds where they are None.
        num_beams: live sequences a prompt, >= 1; 4 where nobody says.
        length_penalty: exponent; above 0 favours longer sequences; 1 where nobody says.
        early_stopping: True ends a prompt at `num_beams` finished sequences; False when its best live beam
            scores no better than the worst of them at its present length, "never" at the best length; False
            where nobody says.
        num_return_sequences: results a prompt, best first, 1 to `num_beams`; 1 where nobody says.
        renormalize_logits: what the processors gave becomes log-probabilities again before it is added up.

    Returns:
        `num_return_sequences` Generations for each prompt, in order, best first; `extra["score"]`.
    """
    if overrides.get("defaults") == "model" and params is None:
        params = engine.model.generation_config
        overrides |= {"defaults": "none"}
    asked = BeamSettings(num_beams, length_penalty, early_stopping, num_return_sequences, renormalize_logits)
    asked, params = asked.read(params)
    rule = asked.num_beams, asked.length_penalty, asked.early_stopping
    beams = Beams(engine, prompts, params, *rule, **overrides)
    while beams.live:
        raw, processed, context = beams.look()
        if asked.renormalize_logits:
            processed = processed.log_softmax(-1)
        found = beams.candidates(raw, processed, noise(beams.requests, context, asked.num_beams))
        beams.go([beams.settle(*each) for each in zip(beams.live, found, strict=True)], raw)
    return [result for search in beams.searches for result in search.results(asked.num_return_sequences)]


def noise(requests: Requests, context, num_beams: int) -> Tensor | float:
    """Gumbel noise [P, beams * V] for the rows that sample, a stream for each beam; 0 for the others."""
    if all(requests.rows.greedy):
        return 0.0
    streams = torch.arange(num_beams, device=context.seeds.device).repeat(len(requests) // num_beams)
    tokens = torch.arange(context.vocab_size, device=context.seeds.device)
    values = gumbel(context.seeds, context.positions, streams, tokens)
    greedy = torch.tensor(requests.rows.greedy, device=values.device)
    return values.masked_fill(greedy[:, None], 0.0).unflatten(0, (-1, num_beams)).flatten(1)
