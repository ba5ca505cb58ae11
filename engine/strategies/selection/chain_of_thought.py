"""CoT-decoding (arXiv 2402.10200): greedy paths from the k best first tokens, judged by their answer's certainty."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from ...errors import ParameterError
from ...loop.generation import Generation
from ..kit.decode import decode


def chain_of_thought(
    engine, prompts, params=None, *, k=10, answer: Callable[[Generation], tuple[Hashable, slice]] | None = None,
    aggregate=True, **options,
) -> list[Generation]:  # fmt: skip
    """k paths a prompt: path j begins with the j-th most probable token and goes on greedily.

    A path's certainty Delta is the mean over its answer's tokens of p(first) - p(second) choice. A token costs one
    pass of k rows for each prompt, which is prefilled once.

    Args:
        prompts, params, options: as for `decode`, at temperature 0.
        k: paths a prompt, >= 1; 1 is greedy decoding.
        answer: path -> its answer, and where that stands in `token_ids`; None: all of the text.
        aggregate: sum Delta over the paths of an answer, rather than take the most certain path.

    Returns:
        The chosen path of each prompt; `extra`: "delta", "gaps" of each token, and "answers" {answer: Delta}.
    """
    if k < 1:
        raise ParameterError(f"CoT-decoding takes k >= 1, got {k}")
    find = answer or (lambda path: (tuple(path.token_ids), slice(None)))

    def step(now):
        if not all(now.requests.rows.greedy):
            raise ParameterError("CoT-decoding takes temperature 0")
        best, ids = now.logprobs.topk(min(max(k, 2), now.logits.shape[1]))
        for request, gap in zip(now.live, (best[:, 0].exp() - best[:, 1].exp()).tolist(), strict=True):
            request.extra.setdefault("gaps", []).append(gap)
        first = [0 if request.stopper.token_ids else request.sample for request in now.live]
        rank = torch.tensor(first, device=ids.device).clamp(max=ids.shape[1] - 1)
        return ids.gather(1, rank[:, None])[:, 0]

    paths: dict[int, list[Generation]] = {}
    for path in decode(engine, prompts, params, step=step, n=k, **options):
        paths.setdefault(path.request, []).append(path)
    return [certain(group, find, aggregate) for group in paths.values()]


def certain(paths: list[Generation], find, aggregate: bool) -> Generation:
    """The path to take."""
    sums: dict = {}
    for path in paths:
        path.extra["answer"], where = find(path)
        gaps = path.extra.get("gaps", [])[where]
        path.extra["delta"] = sum(gaps) / len(gaps) if gaps else 0.0
        sums[path.extra["answer"]] = sums.get(path.extra["answer"], 0.0) + path.extra["delta"]
    value = (
        (lambda p: (sums[p.extra["answer"]], p.extra["delta"])) if aggregate else (lambda p: p.extra["delta"])
    )
    best = max(paths, key=value)
    best.extra["answers"] = sums
    return best
