"""Beam search and beam sampling, token for token what transformers' `generate(num_beams=...)` gives."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...kernels.noise.philox import gumbel
from ...loop.generation import Generation
from ..kit.requests import Requests
from .hypotheses import NEVER, Beams, Hypotheses


@torch.no_grad()
def beam_search(
    engine, prompts, params=None, *, num_beams=None, length_penalty=None, early_stopping=None,
    num_return_sequences=None, renormalize_logits=None, **overrides,
) -> list[Generation]:  # fmt: skip
    """The most probable sequences that a beam finds; sampled beams where temperature > 0.

    Processors act on log-probabilities, as in transformers; `logprobs` of the results are what they gave. A
    sequence scores sum(logprobs) / length ** length_penalty. Sampled candidates are drawn without replacement
    from all beams of a prompt, by Gumbel-top-k (arXiv 1903.06059).

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
        `num_return_sequences` Generations for each prompt, in order.
    """
    if overrides.get("defaults") == "model" and params is None:
        params = engine.model.generation_config
        overrides |= {"defaults": "none"}
    asked = Beams(num_beams, length_penalty, early_stopping, num_return_sequences, renormalize_logits)
    asked, params = asked.read(params)
    num_beams = asked.num_beams
    state, requests = Requests.start(engine, prompts, params, **overrides)
    rule = (num_beams, asked.length_penalty, asked.early_stopping)
    searches = [Hypotheses(requests, row, engine, *rule) for row in range(len(state))]
    fan = [row for row in range(len(state)) for _ in range(num_beams)]
    state, requests, live, trails = state.select(fan), requests.select(fan), searches, [[]] * len(fan)
    scores = torch.full((len(live), num_beams), NEVER, device=state.logits.device)
    scores[:, 0] = 0.0  # at first the beams of a prompt are equal: only one may go on
    while live:
        raw = state.logits.log_softmax(-1)
        least = torch.tensor([search.least for search in live], device=raw.device)
        context = replace(
            requests.at(state), beams=num_beams, least=least.repeat_interleave(num_beams)[:, None]
        )
        processed = requests.rows.apply(raw, context)
        if asked.renormalize_logits:
            processed = processed.log_softmax(-1)
        total = (processed.unflatten(0, (-1, num_beams)) + scores[..., None]).flatten(1)
        noisy = total + noise(requests, context, num_beams)
        values, parents, tokens, steps = candidates(raw, processed, total, noisy, least * num_beams)

        def trail(i, j):
            return [*trails[parents[i][j]], (tokens[i][j], *steps[i][j])]  # noqa: B023 - called in this round only

        ended = torch.tensor([search.advance(row) for search, row in zip(live, tokens, strict=True)])
        for i, j in ended[:, :num_beams].nonzero().tolist():
            if values[i, j] > NEVER:
                live[i].offer(values[i, j], trail(i, j))
        scores, order = (values + ended.to(values.device) * NEVER).topk(num_beams)
        going = [
            i
            for i, search in enumerate(live)
            if search.open(scores[i, 0], ended[i, : search.least * num_beams])
        ]
        picks = [(i, j) for i in going for j in order[i].tolist()]
        live, scores, trails = [live[i] for i in going], scores[going], [trail(i, j) for i, j in picks]
        if live:
            beams = [parents[i][j] for i, j in picks]
            chosen = torch.tensor([tokens[i][j] for i, j in picks], device=raw.device)
            state, requests = requests.branch(engine, state, beams, chosen, raw)
    return [result for search in searches for result in search.results(asked.num_return_sequences)]


def candidates(raw: Tensor, processed: Tensor, total: Tensor, noisy: Tensor, widths: Tensor):
    """The best, or sampled, continuations of the beams of each prompt.

    Args:
        raw, processed: [P * beams, V] log-probabilities, and what the processors made of them.
        total, noisy: [P, beams * V] scores of the continuations, and what they are chosen by.
        widths: [P], how many continuations of each prompt; the widest is K.

    Returns:
        Their scores [P, K], NEVER beyond a prompt's own width, and lists [P][K] of the row that each continues,
        its token, and that token's raw and processed log-probability.
    """
    best = noisy.topk(min(int(widths.max()), total.shape[1])).indices
    beams = total.shape[1] // raw.shape[1]
    parents = best // raw.shape[1] + torch.arange(len(best), device=best.device)[:, None] * beams
    tokens = best % raw.shape[1]
    steps = torch.stack([raw[parents, tokens], processed[parents, tokens]], -1)
    within = torch.arange(best.shape[1], device=best.device) < widths[:, None]
    values = torch.where(within, total.gather(1, best), NEVER)
    return values, parents.tolist(), tokens.tolist(), steps.tolist()


def noise(requests: Requests, context, num_beams: int) -> Tensor | float:
    """Gumbel noise [P, beams * V] for the rows that sample, a stream for each beam; 0 for the others."""
    if all(requests.rows.greedy):
        return 0.0
    streams = torch.arange(num_beams, device=context.seeds.device).repeat(len(requests) // num_beams)
    tokens = torch.arange(context.vocab_size, device=context.seeds.device)
    values = gumbel(context.seeds, context.positions, streams, tokens)
    greedy = torch.tensor(requests.rows.greedy, device=values.device)
    return values.masked_fill(greedy[:, None], 0.0).unflatten(0, (-1, num_beams)).flatten(1)
