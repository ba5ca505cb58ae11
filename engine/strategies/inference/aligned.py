"""Grammar-aligned decoding (ASAp, arXiv 2405.21047): a trie learns how much of each beginning can end as it must."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from ...errors import ParameterError
from ...loop.generation import Generation
from ..kit.decode import decode


def grammar_aligned(
    engine, prompts, params=None, *, allowed: Callable[[list[int]], Iterable[int] | Tensor], iterations=32, **options
) -> list[Generation]:  # fmt: skip
    """A sample of each prompt whose law tends to p(x | every token allowed) as iterations grow.

    Masking alone gives another law: it does not see that a beginning may hardly end as it must. Each iteration draws
    a sample from p times the mass that is known to remain behind each token (1 where nothing is known), and then
    lowers the masses along it. A token costs one pass of one row for each prompt and iteration.

    Args:
        prompts, params, options: as for `decode`, with temperature > 0.
        allowed: output ids -> ids that may come next, or a bool mask `[V]`.
        iterations: samples, of which the last one is returned, >= 1; 1 is plain masking.

    Returns:
        One Generation for each prompt; `extra`: "mass", the share of p's texts that may be, as far as it is known.
    """
    if iterations < 1:
        raise ParameterError(f"grammar-aligned decoding takes iterations >= 1, got {iterations}")
    asked = engine.requests(prompts, params, **options)
    if any(request.params.greedy or request.params.n != 1 for request in asked):
        raise ParameterError("grammar-aligned decoding takes temperature > 0 and n=1")
    seeds = [request.params.replace(seed=request.seed) for request in asked]
    given = [request.prompt for request in asked]
    trie: dict[
        tuple, tuple[Tensor, Tensor]
    ] = {}  # (prompt, *output) -> log p and log of the mass behind, [V] each

    def step(iteration, now):
        rows = []
        for request, law in zip(now.live, now.logprobs, strict=True):
            place = (request.index, *request.stopper.token_ids)
            if place not in trie:
                mask = torch.as_tensor(allowed(list(place[1:])), device=law.device)
                ids = mask.nonzero().flatten() if mask.dtype == torch.bool else mask.long()
                trie[place] = (
                    torch.full_like(law, -torch.inf).scatter(0, ids, law[ids]),
                    torch.zeros_like(law),
                )
            rows.append(sum(trie[place]))
        return now.draw(torch.stack(rows), streams=iteration)

    for iteration in range(iterations):
        results = decode(engine, given, seeds, step=partial(step, iteration))
        for result in results:
            text = (result.request, *result.token_ids)
            for end in range(len(text) - 1, 0, -1):
                if text[: end + 1] in trie:
                    trie[text[:end]][1][text[end]] = sum(trie[text[: end + 1]]).logsumexp(0)
            result.extra["mass"] = float(sum(trie[text[:1]]).exp().sum())
    return results
