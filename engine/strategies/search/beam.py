"""Beam search and beam sampling, token for token what transformers' `generate(num_beams=...)` gives."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ParameterError
from ...kernels.noise.philox import gumbel
from ...loop.generation import Generation
from ..kit.requests import Requests
from .hypotheses import NEVER, Hypotheses


@torch.no_grad()
def beam_search(
    engine, prompts, params=None, *, num_beams=4, length_penalty=1.0, early_stopping=False,
    num_return_sequences=1, **overrides,
) -> list[Generation]:  # fmt: skip
    """The most probable sequences that a beam finds; sampled beams where temperature > 0.

    Processors act on log-probabilities, as in transformers; `logprobs` of the results are what they gave. A
    sequence scores sum(logprobs) / length ** length_penalty. Sampled candidates are drawn without replacement
    from all beams of a prompt, by Gumbel-top-k (arXiv 1903.06059).

    Args:
        prompts, params, overrides: as for `Engine.generate`, but sequences end by tokens and lengths alone.
        num_beams: live sequences a prompt, >= 1.
        length_penalty: exponent; above 0 favours longer sequences.
        early_stopping: True ends a prompt at `num_beams` finished sequences; False when its best live beam
            scores no better than the worst of them at its present length, "never" at the best length.
        num_return_sequences: results a prompt, best first, 1 to `num_beams`.

    Returns:
        `num_return_sequences` Generations for each prompt, in order.
    """
    if not 1 <= num_return_sequences <= num_beams:
        raise ParameterError(
            f"num_return_sequences={num_return_sequences} is not from 1 to num_beams={num_beams}"
        )
    if early_stopping not in (True, False, "never"):
        raise ParameterError(f'early_stopping={early_stopping!r} is none of True, False, "never"')
    state, requests = Requests.start(engine, prompts, params, **overrides)
    rule = (num_beams, length_penalty, early_stopping)
    searches = [Hypotheses(requests, row, engine, *rule) for row in range(len(state))]
    fan = [row for row in range(len(state)) for _ in range(num_beams)]
    state, requests, live, trails = state.select(fan), requests.select(fan), searches, [[]] * len(fan)
    scores = torch.full((len(live), num_beams), NEVER, device=state.logits.device)
    scores[:, 0] = 0.0  # at first the beams of a prompt are equal: only one may go on
    while live:
        raw = state.logits.log_softmax(-1)
        width = max(2, 1 + max(len(search.stops) for search in live)) * num_beams
        values, parents, tokens, steps = candidates(requests, raw, requests.at(state), scores, width)

        def trail(i, j):
            return [*trails[parents[i][j]], (tokens[i][j], *steps[i][j])]  # noqa: B023 - called in this round only

        ended = torch.tensor([search.advance(row) for search, row in zip(live, tokens, strict=True)])
        for i, j in ended[:, :num_beams].nonzero().tolist():
            if values[i, j] > NEVER:
                live[i].offer(values[i, j], trail(i, j))
        scores, order = (values + ended.to(values.device) * NEVER).topk(num_beams)
        going = [i for i, search in enumerate(live) if search.open(scores[i, 0], ended[i])]
        picks = [(i, j) for i in going for j in order[i].tolist()]
        live, scores, trails = [live[i] for i in going], scores[going], [trail(i, j) for i, j in picks]
        if live:
            beams = [parents[i][j] for i, j in picks]
            chosen = torch.tensor([tokens[i][j] for i, j in picks], device=raw.device)
            state, requests = state.select(beams), requests.select(beams)
            context = requests.at(state)
            requests.rows.apply(raw[beams], context)  # memory advances with the context that apply saw
            requests, state = requests.accept(chosen, context), engine.step(state, chosen)
    return [result for search in searches for result in search.results(num_return_sequences)]


def candidates(requests: Requests, raw: Tensor, context, scores: Tensor, width: int):
    """The best, or sampled, continuations of the beams of each prompt.

    Args:
        requests, context: of the P * beams rows.
        raw: [P * beams, V] log-probabilities.
        scores: [P, beams] of the beams so far.
        width: how many continuations of each prompt, K.

    Returns:
        Their scores [P, K], and lists [P][K] of the row that each continues, its token, and that token's raw and
        processed log-probability.
    """
    processed = requests.rows.apply(raw, context)
    prompts, beams = scores.shape
    total = (processed.unflatten(0, (prompts, beams)) + scores[..., None]).flatten(1)  # [P, beams * V]
    best = (total + noise(requests, context, beams)).topk(min(width, total.shape[1])).indices
    parents = best // raw.shape[1] + torch.arange(prompts, device=best.device)[:, None] * beams
    tokens = best % raw.shape[1]
    steps = torch.stack([raw[parents, tokens], processed[parents, tokens]], -1)
    return total.gather(1, best), parents.tolist(), tokens.tolist(), steps.tolist()


def noise(requests: Requests, context, num_beams: int) -> Tensor | float:
    """Gumbel noise [P, beams * V] for the rows that sample, a stream for each beam; 0 for the others."""
    if all(requests.rows.greedy):
        return 0.0
    streams = torch.arange(num_beams, device=context.seeds.device).repeat(len(requests) // num_beams)
    tokens = torch.arange(context.vocab_size, device=context.seeds.device)
    values = gumbel(context.seeds, context.positions, streams, tokens)
    greedy = torch.tensor(requests.rows.greedy, device=values.device)
    return values.masked_fill(greedy[:, None], 0.0).unflatten(0, (-1, num_beams)).flatten(1)
