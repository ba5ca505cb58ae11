"""Self-consistency (arXiv 2203.11171): the answer that most samples give; sampling ends once it cannot change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable

from ...errors import ParameterError
from ...loop.generation import Generation
from ..kit.decode import decode


def self_consistency(
    engine, prompts, params=None, *, answer: Callable[[Generation], Hashable], n=40, early=True, **options
) -> list[Generation]:
    """The majority's answer among n samples of each prompt, which is prefilled once.

    A token costs one pass of as many rows as run. With `early`, a prompt's other samples are cancelled when the
    leading answer has more votes ahead than samples are left: the winner is the same, for fewer tokens.

    Args:
        prompts, params, options: as for `decode`, with temperature > 0.
        answer: of a finished sample; None abstains.
        n: samples a prompt, >= 1.

    Returns:
        For each prompt its most probable sample (mean log-probability) with the winning answer, the earliest answer
        on ties; `extra`: "answer", "votes" {answer: count}, "samples" that voted.
    """
    running = decode(engine, prompts, params, n=n, stream=True, **options)
    if any(request.params.greedy for request in running.asked) and n > 1:
        raise ParameterError("self-consistency needs temperature > 0: greedy samples are all alike")
    found: dict[int, list[Generation]] = {request.index: [] for request in running.asked}
    decided = set()
    for event in running:
        if event.generation is None or event.request in decided:
            continue
        found[event.request].append(event.generation)
        left = n - len(found[event.request])
        if early and left and lead([answer(each) for each in found[event.request]]) > left:
            decided.add(event.request)
            running.cancel(event.request)
    return [elected(samples, answer) for _, samples in sorted(found.items())]


def lead(answers: list) -> int:
    """How many votes the first answer is ahead of the second."""
    best = Counter(a for a in answers if a is not None).most_common(2)
    return best[0][1] - (best[1][1] if len(best) > 1 else 0) if best else 0


def elected(samples: list[Generation], answer, weight=lambda sample: 1) -> Generation:
    """The representative of the answer with the largest sum of weights."""
    samples = sorted(samples, key=lambda sample: sample.sample)
    votes: dict = {}
    for sample in samples:
        sample.extra["answer"] = answer(sample)
        if sample.extra["answer"] is not None:
            votes[sample.extra["answer"]] = votes.get(sample.extra["answer"], 0) + weight(sample)
    winner = max(votes, key=votes.get) if votes else None
    best = max(
        (sample for sample in samples if sample.extra["answer"] == winner),
        key=lambda sample: sample.cumulative_logprob / max(1, sample.n_new),
    )
    best.extra |= {"votes": votes, "samples": len(samples)}
    return best
