"""Stochastic beam search (arXiv 1903.06059): several sequences without replacement, by Gumbel-top-k on the tree."""

from __future__ import annotations

import math

import torch

from ...errors import ParameterError
from ...kernels.noise.philox import gumbel
from ...loop.generation import Generation
from ...pipeline.drawing import logprob_of
from ..kit.drawing import conditioned
from ..kit.requests import Requests, push

ROOT = 2**29  # stream of the root's noise, clear of those of the beams


@torch.no_grad()
def stochastic_beam(engine, prompts, params=None, *, k=4, **overrides) -> list[Generation]:
    """k different sequences of each prompt: the k largest of all log-probabilities perturbed by Gumbel noise.

    A token costs one forward pass of at most k + 1 rows for each prompt; the last one gives the threshold kappa.

    Args:
        prompts, params, overrides: as for `Engine.generate`, with temperature > 0.
        k: sequences a prompt, >= 1; 1 samples as plain decoding does (with other noise).

    Returns:
        k Generations for each prompt (fewer where fewer are possible), by their perturbed log-probability. Their
        `extra` holds it ("perturbed"), and "weight" = p / P(p's perturbation > kappa), with which
        sum_i weight_i f(y_i) is an unbiased estimate of the mean of f.
    """
    if k < 1:
        raise ParameterError(f"stochastic beam search takes k >= 1, got {k}")
    state, requests = Requests.start(engine, prompts, params, **overrides)
    if any(requests.rows.greedy) or any(r.params.n != 1 for r in requests.asked):
        raise ParameterError("stochastic beam search takes temperature > 0 and n=1: k says how many")
    count, zero = len(state), torch.zeros_like(state.lengths)
    perturbed = gumbel(requests.seeds, state.lengths, zero + ROOT, zero[:1])[:, 0]
    live = [
        (row, requests.open(row, engine)) for row in range(count)
    ]  # prompt and running request of each row
    logp, done = torch.zeros_like(perturbed), [[] for _ in range(count)]
    while live:
        context, owners = requests.at(state), [owner for owner, _ in live]
        processed = requests.rows.apply(state.logits, context)
        grown = logp[:, None] + processed.log_softmax(-1)  # [R, V]
        slots = torch.tensor([owners[:i].count(owner) for i, owner in enumerate(owners)], device=grown.device)
        ids = torch.arange(grown.shape[1], device=grown.device)
        scores = conditioned(grown + gumbel(requests.seeds, context.positions, slots, ids), perturbed)
        rows, chosen = [], []
        for owner in sorted(set(owners)):
            mine = [row for row, other in enumerate(owners) if other == owner]
            values, where = scores[mine].flatten().topk(min(k + 1, len(mine) * len(ids)))
            found = [(g, divmod(w, len(ids))) for g, w in zip(values.tolist(), where.tolist(), strict=True)]
            found = [(g, place) for g, place in found if g > -torch.inf] + done[owner]
            found = sorted(found, key=lambda each: -each[0])[: k + 1]
            done[owner] = [each for each in found if not isinstance(each[1], tuple)]
            rows += [mine[each[1][0]] for each in found if isinstance(each[1], tuple)]
            chosen += [each[1][1] for each in found if isinstance(each[1], tuple)]
        if not rows:
            break
        tokens = torch.tensor(chosen, device=grown.device)
        logp, perturbed = grown[rows, tokens], scores[rows, tokens]
        laws = logprob_of(state.logits[rows], tokens), logprob_of(processed[rows], tokens), logp, perturbed
        live, keep, branches = [], [], [(owners[row], live[row][1].fork()) for row in rows]
        told = torch.stack(laws, 1).tolist()
        for i, ((owner, request), token, own) in enumerate(zip(branches, chosen, told, strict=True)):
            result = push(request, token, *own[:2]).generation
            if result is None:
                live.append((owner, request))
                keep.append(i)
            else:
                result.extra |= {"logp": own[2], "perturbed": own[3]}
                done[owner].append((own[3], result))
        if live:
            state, requests = requests.branch(engine, state, [rows[i] for i in keep], tokens[keep])
            logp, perturbed = logp[keep], perturbed[keep]
    return [result for found in done for result in weighed(sorted(found, key=lambda each: -each[0]), k)]


def weighed(found: list, k: int) -> list[Generation]:
    """The k best of pairs (perturbed log-probability, result), with their weights."""
    kappa = found[k][0] if len(found) > k else -math.inf
    for rank, (_, result) in enumerate(found[:k]):
        logp = result.extra.pop("logp")
        result.sample = rank  # P(logp + Gumbel noise > kappa) = 1 - exp(-exp(logp - kappa))
        inclusion = -math.expm1(-math.exp(min(logp - kappa, 700.0)))
        result.extra["weight"] = math.exp(logp) / inclusion
    return [result for _, result in found[:k]]
