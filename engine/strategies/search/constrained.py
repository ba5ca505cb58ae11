"""Constrained beam search: phrases that a text must hold (arXiv 1804.06609), as transformers 4.49 searched for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from ...errors import ParameterError
from ...loop.generation import Generation
from ..kit.beams import Beams, Candidate
from ..kit.hypotheses import NEVER, Hypotheses
from .phrases import Progress, spelled


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
        constraints: phrases that all must be said, in any order; or lists of phrases, any one of which will do. A
            phrase is a list of token ids, or a text with the space that it begins with, such as " Paris".
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
    nothing = Progress.start([spelled(engine, each) for each in constraints])
    beams = Beams(engine, prompts, params, num_beams, length_penalty, early_stopping, **overrides)
    progress = [nothing] * len(beams.state)
    spare: dict[Hypotheses, list] = {search: [] for search in beams.searches}
    while beams.live:
        raw, processed, _ = beams.look()
        said, picks, found = beams.state.new_tokens, [], beams.candidates(raw, processed)
        forced = [(row, token) for row, own in enumerate(progress) for token in own.next()]
        places = torch.tensor(forced, dtype=torch.long, device=raw.device).view(-1, 2).T
        wanted = beams.at(raw, processed, *places)
        for i, search in enumerate(beams.live):
            search.advance()
            for each in found[i][:num_beams]:
                if each.token in search.stops and progress[each.row].complete:
                    search.offer((each, beams.trails[each.row]))
            going = [each for each in found[i] if each.token not in search.stops][:num_beams]
            apart: dict[tuple, Candidate] = {}
            for each in going + [each for each in wanted if each.row // num_beams == i]:
                apart.setdefault((*said[each.row], each.token), each)
            picks.append(banked(apart.values(), progress)[:num_beams])
            for each in picks[i] if search.length >= search.limit else ():
                if progress[each.row].add(each.token).complete:
                    search.offer((each, beams.trails[each.row]))
                elif each.value > NEVER / 2:
                    spare[search].append((search.score(each.value), (each, beams.trails[each.row])))
            search.over = search.length >= search.limit or not search.open(found[i][0].value)
        progress = [progress[each.row].add(each.token) for each in beams.go(picks, raw)]
    return [
        result for search in beams.searches for result in best(search, spare[search], num_return_sequences)
    ]


def banked(beams: Iterable[Candidate], progress: Sequence[Progress]) -> list[Candidate]:
    """The best of each bank, the fullest bank first; then the second best of each, and so on."""
    bank = {each: progress[each.row].add(each.token).bank for each in beams}
    beams, ranks, seen = sorted(beams, key=lambda each: -(bank[each] * 100 + each.value)), [], Counter()
    for each in beams:
        ranks.append(seen[bank[each]])
        seen[bank[each]] += 1
    return [beams[i] for i in sorted(range(len(beams)), key=ranks.__getitem__)]


def best(search: Hypotheses, spare: list, count: int) -> list[Generation]:
    """The best finished sequences of a prompt; behind them, those that ran into their length."""
    satisfied = len(search.finished)
    search.finished += sorted(spare, key=lambda pair: -pair[0])
    results = search.results(count)
    for rank, result in enumerate(results):
        result.extra["satisfied"] = rank < satisfied
    return results
