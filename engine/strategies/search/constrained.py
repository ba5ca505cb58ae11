"""Constrained beam search: phrases that a text must hold (arXiv 1804.06609), as transformers 4.49 searched for them."""

from __future__ import annotations

import torch

from ...errors import ParameterError
from ...loop.generation import Generation
from ..kit.requests import Requests
from .hypotheses import NEVER, Hypotheses
from .phrases import Progress

OPEN = torch.tensor([False])


@torch.no_grad()
def constrained_beam_search(
    engine, prompts, params=None, *, constraints, num_beams=4, length_penalty=1.0, early_stopping=False,
    num_return_sequences=1, **overrides,
) -> list[Generation]:  # fmt: skip
    """Beam search that also tries the tokens which bring a constraint on, and shares its beams among the "banks" of
    sequences that have said equally much.

    Only complete sequences may end. A token costs one forward pass of num_beams rows for each prompt.

    Args:
        prompts, params, overrides, length_penalty, early_stopping, num_return_sequences: as for `beam_search`.
        constraints: phrases (lists of token ids) that all must be said, in any order; or lists of phrases, any one of
            which will do. Texts become ids with `engine.encode`.
        num_beams: live sequences a prompt, >= 2.

    Returns:
        `num_return_sequences` Generations for each prompt, best first; `extra["score"]`, and `extra["satisfied"]`:
        False for those that ran into their length before they had said everything, which come last.
    """
    if num_beams < 2 or not 1 <= num_return_sequences <= num_beams:
        raise ParameterError(
            f"constrained beam search takes num_beams >= 2 and num_return_sequences from 1 to it, got {num_beams} "
            f"and {num_return_sequences}"
        )
    nothing = Progress.start(constraints)
    state, requests = Requests.start(engine, prompts, params, **overrides)
    rule = (num_beams, length_penalty, early_stopping)
    searches = [Hypotheses(requests, row, engine, *rule) for row in range(len(state))]
    spare: dict[Hypotheses, list] = {search: [] for search in searches}
    fan = [row for row in range(len(state)) for _ in range(num_beams)]
    state, requests, live = state.select(fan), requests.select(fan), searches
    trails, progress = [[]] * len(fan), [nothing] * len(fan)
    scores = torch.full((len(live), num_beams), NEVER, device=state.logits.device)
    scores[:, 0] = 0.0  # at first the beams of a prompt are equal: only one may go on
    while live:
        raw, context = state.logits.log_softmax(-1), requests.at(state)
        processed = requests.rows.apply(raw, context)
        total, picks, going = processed.unflatten(0, scores.shape) + scores[..., None], [], []
        for i, search in enumerate(live):
            search.length += 1

            def grown(value, parent, token, i=i):
                row = i * num_beams + parent
                step = (token, float(raw[row, token]), float(processed[row, token]))  # noqa: B023 - of this round
                return float(value), row, [*trails[row], step], progress[row].add(token)  # noqa: B023

            width = max(2, 1 + len(search.stops)) * num_beams
            values, best = total[i].flatten().topk(min(width, total[i].numel()))
            beams = []
            for rank, (value, where) in enumerate(zip(values, best.tolist(), strict=True)):
                parent, token = divmod(where, raw.shape[1])
                if token not in search.stops and len(beams) < num_beams:
                    beams.append(grown(value, parent, token))
                elif token in search.stops and rank < num_beams and progress[i * num_beams + parent].complete:
                    search.offer(value, grown(value, parent, token)[2])
            seen = {_ids(trail) for _, _, trail, _ in beams}
            for parent in range(num_beams):
                state_of = progress[i * num_beams + parent]
                for token in [] if state_of.complete else state_of.next():
                    candidate = grown(total[i, parent, token], parent, token)
                    if _ids(candidate[2]) not in seen:
                        seen.add(_ids(candidate[2]))
                        beams.append(candidate)
            beams = banked(beams)[:num_beams]
            if search.length >= search.limit:
                for value, _, trail, said in beams:
                    if said.complete:
                        search.offer(torch.tensor(value), trail)
                    elif value > NEVER / 2:
                        spare[search].append((value / search.length**length_penalty, trail))
            elif search.open(values[0], OPEN):
                going.append(search)
                picks += beams
        live = going
        if live:
            scores = torch.tensor([pick[0] for pick in picks], device=raw.device).view(-1, num_beams)
            rows, trails, progress = ([pick[n] for pick in picks] for n in (1, 2, 3))
            tokens = torch.tensor([trail[-1][0] for trail in trails], device=raw.device)
            state, requests = requests.branch(engine, state, rows, tokens, raw)
    return [result for search in searches for result in _results(search, spare[search], num_return_sequences)]


def banked(beams: list) -> list:
    """The best of each bank, the fullest bank first; then the second best of each, and so on."""
    beams = sorted(beams, key=lambda beam: -(beam[3].bank * 100 + beam[0]))
    seen: dict[int, int] = {}
    ranks = []
    for beam in beams:
        ranks.append(seen.setdefault(beam[3].bank, 0))
        seen[beam[3].bank] += 1
    return [beams[i] for i in sorted(range(len(beams)), key=ranks.__getitem__)]


def _ids(trail: list) -> tuple[int, ...]:
    return tuple(step[0] for step in trail)


def _results(search: Hypotheses, spare: list, count: int) -> list[Generation]:
    satisfied = len(search.finished)
    search.finished += sorted(spare, key=lambda pair: -pair[0])
    results = search.results(count)
    for rank, (result, (score, _)) in enumerate(zip(results, search.finished, strict=False)):
        result.extra |= {"score": score, "satisfied": rank < satisfied}
    return results
