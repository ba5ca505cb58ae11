"""Diverse beam search (arXiv 1610.02424), token for token as transformers 4.49 had it."""

from __future__ import annotations

import torch

from ...errors import ParameterError
from ...loop.generation import Generation
from ..kit.requests import Requests
from .hypotheses import NEVER, Hypotheses


@torch.no_grad()
def diverse_beam_search(
    engine, prompts, params=None, *, num_beams=4, num_beam_groups=2, diversity_penalty=0.5, length_penalty=1.0,
    early_stopping=False, num_return_sequences=1, **overrides,
) -> list[Generation]:  # fmt: skip
    """Beam search in groups: a token that earlier groups chose in this step costs diversity_penalty a beam.

    The penalty is taken from the log-probabilities before the processors, and stays in the score. A token costs one
    forward pass of num_beams rows for each prompt.

    Args:
        prompts, params, overrides, length_penalty, early_stopping, num_return_sequences: as for `beam_search`.
        num_beams: live sequences a prompt, a multiple of num_beam_groups; groups of one beam are the extreme.
        num_beam_groups: 1 is beam search.
        diversity_penalty: lambda; 0 makes all groups equal. The paper uses 0.2 to 0.8.

    Returns:
        `num_return_sequences` Generations for each prompt, the best of all groups first; `extra["score"]`.
    """
    size, uneven = divmod(num_beams, num_beam_groups) if num_beam_groups >= 1 else (0, 1)
    if uneven or not size or diversity_penalty < 0 or not 1 <= num_return_sequences <= num_beams:
        raise ParameterError(
            f"num_beams={num_beams} is a multiple of num_beam_groups={num_beam_groups}, num_return_sequences="
            f"{num_return_sequences} from 1 to it, and diversity_penalty={diversity_penalty} at least 0"
        )
    state, requests = Requests.start(engine, prompts, params, **overrides)
    rule, count = (size, length_penalty, early_stopping), len(state)
    searches = [
        [Hypotheses(requests, row, engine, *rule) for _ in range(num_beam_groups)] for row in range(count)
    ]
    live = [(row, group) for row in range(count) for group in range(num_beam_groups)]
    fan = [row for row, _ in live for _ in range(size)]
    state, requests, trails = state.select(fan), requests.select(fan), [[]] * len(fan)
    scores = torch.full((len(live), size), NEVER, device=state.logits.device)
    scores[:, 0] = 0.0  # at first the beams of a group are equal: only one may go on
    while live:
        raw, context = state.logits.log_softmax(-1), requests.at(state)
        taken, picks, going = raw.new_zeros(count, raw.shape[1]), [], []
        owners = torch.tensor([row for row, _ in live for _ in range(size)], device=raw.device)
        for group in range(num_beam_groups):
            penalised = raw - diversity_penalty * taken[owners]
            processed = requests.rows.apply(penalised, context)
            total = (processed.unflatten(0, scores.shape) + scores[..., None]).flatten(1)
            for i, (row, own) in enumerate(live):
                if own != group:
                    continue
                search = searches[row][group]
                values, best = total[i].topk(min(max(2, 1 + len(search.stops)) * size, total.shape[1]))
                parents, tokens = (best // raw.shape[1] + i * size).tolist(), (best % raw.shape[1]).tolist()
                grown = [
                    [*trails[p], (t, *torch.stack([raw[p, t], processed[p, t]]).tolist())]
                    for p, t in zip(parents, tokens, strict=True)
                ]
                ended = torch.tensor(search.advance(tokens), device=raw.device)
                for j in ended[:size].nonzero().flatten().tolist():
                    if values[j] > NEVER:
                        search.offer(values[j], grown[j])
                stops = torch.tensor([token in search.stops for token in tokens], device=raw.device)
                kept, order = (values + stops * NEVER).topk(size)
                chosen = torch.tensor([tokens[j] for j in order.tolist()], device=raw.device)
                taken[row].index_add_(0, chosen, torch.ones_like(chosen, dtype=taken.dtype))
                if search.open(kept[0], ended):
                    going.append((row, group))
                    picks += [
                        (parents[j], tokens[j], grown[j], kept[n]) for n, j in enumerate(order.tolist())
                    ]
        live = going
        if live:
            beams, tokens, trails, values = zip(*picks, strict=True)
            scores, tokens = torch.stack(values).view(-1, size), torch.tensor(tokens, device=raw.device)
            state, requests = requests.branch(engine, state, beams, tokens, raw)
            live, scores, order = _sorted(live, scores)
            rows = [i * size + b for i in order for b in range(size)]
            state, requests, trails = state.select(rows), requests.select(rows), [trails[r] for r in rows]
    return [result for groups in searches for result in _best(groups, num_return_sequences)]


def _sorted(live, scores):
    """Groups of a prompt side by side again."""
    order = sorted(range(len(live)), key=live.__getitem__)
    return [live[i] for i in order], scores[order], order


def _best(groups: list[Hypotheses], count: int) -> list[Generation]:
    """The best finished sequences of all groups of a prompt."""
    first = groups[0]
    first.finished = sorted((pair for group in groups for pair in group.finished), key=lambda pair: -pair[0])
    results = first.results(count)
    for result, (score, _) in zip(results, first.finished, strict=False):
        result.extra["score"] = score
    return results
