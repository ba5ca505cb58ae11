"""Diverse beam search (arXiv 1610.02424), token for token as transformers 4.49 had it."""

from __future__ import annotations

import torch

from ...errors import ParameterError
from ...loop.generation import Generation
from ..kit.beams import Beams
from ..kit.hypotheses import Hypotheses


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
    rule = size, length_penalty, early_stopping
    beams = Beams(engine, prompts, params, *rule, groups=num_beam_groups, **overrides)
    group = {search: number % num_beam_groups for number, search in enumerate(beams.searches)}
    while beams.live:
        raw, _, context = beams.look()
        taken = {search.row: torch.zeros_like(raw[0]) for search in beams.live}
        picks = [[]] * len(beams.live)
        for number in range(num_beam_groups):
            cost = torch.stack([taken[search.row] for search in beams.live]).repeat_interleave(size, 0)
            processed = beams.requests.rows.apply(raw - diversity_penalty * cost, context)
            for i, found in enumerate(beams.candidates(raw, processed)):
                if group[search := beams.live[i]] == number:
                    picks[i] = beams.settle(search, found)
                    for each in picks[i]:
                        taken[search.row][each.token] += 1
        beams.go(picks, raw)
    groups = [beams.searches[i : i + num_beam_groups] for i in range(0, len(group), num_beam_groups)]
    return [result for own in groups for result in best(own, num_return_sequences)]


def best(groups: list[Hypotheses], count: int) -> list[Generation]:
    """The best finished sequences of all groups of a prompt."""
    found = [pair for group in groups for pair in group.finished]
    groups[0].finished = sorted(found, key=lambda pair: -pair[0])
    return groups[0].results(count)
