"""Stochastic beam search (arXiv 1903.06059): several sequences without replacement, by Gumbel-top-k on the tree."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ParameterError
from ...kernels.noise.philox import gumbel
from ...loop.generation import Generation
from ...pipeline.drawing import logprob_of
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
    count = len(state)
    zero = torch.zeros(1, dtype=torch.long, device=state.logits.device)
    perturbed = gumbel(requests.seeds, state.lengths, zero.expand(count) + ROOT, zero)[:, 0]
    live = [
        (row, requests.open(row, engine)) for row in range(count)
    ]  # prompt and running request of each row
    logp, done = torch.zeros_like(perturbed), [[] for _ in range(count)]
    while live:
        context, owners = requests.at(state), [owner for owner, _ in live]
        processed = requests.rows.apply(state.logits, context)
        grown = logp[:, None] + processed.log_softmax(-1)  # [R, V]
        slots = torch.tensor([owners[:i].count(owner) for i, owner in enumerate(owners)], device=grown.device)
        noise = gumbel(
            requests.seeds, context.positions, slots, torch.arange(grown.shape[1], device=grown.device)
        )
        scores = conditioned(grown + noise, perturbed)
        picks = []
        for owner in sorted(set(owners)):
            rows = [i for i, other in enumerate(owners) if other == owner]
            value, where = scores[rows].flatten().topk(min(k + 1, len(rows) * grown.shape[1]))
            found = [
                (float(g), rows[w // grown.shape[1]], w % grown.shape[1])
                for g, w in zip(value, where.tolist(), strict=True)
            ]
            old = [(g, None, entry) for g, entry in done[owner]]
            best = sorted([each for each in found if each[0] > -torch.inf] + old, key=lambda each: -each[0])[
                : k + 1
            ]
            done[owner] = [(g, entry) for g, row, entry in best if row is None]
            picks += [(row, token) for _, row, token in best if row is not None]
        rows = [row for row, _ in picks]
        tokens = torch.tensor([token for _, token in picks], dtype=torch.long, device=grown.device)
        if not rows:
            break
        laws = state.logits[rows], processed[rows]
        told = [tokens.tolist(), *(logprob_of(law, tokens).tolist() for law in laws)]
        branches = [live[row][1].fork() for row in rows]
        events = [push(branch, *each) for branch, *each in zip(branches, *told, strict=True)]
        logp, perturbed = grown[rows, tokens], scores[rows, tokens]
        for i, event in enumerate(events):
            if event.finish:
                done[owners[rows[i]]].append((float(perturbed[i]), (float(logp[i]), event.generation)))
        keep = [i for i, event in enumerate(events) if not event.finish]
        live = [(owners[rows[i]], branches[i]) for i in keep]
        if live:
            state, requests = requests.branch(engine, state, [rows[i] for i in keep], tokens[keep])
            logp, perturbed = logp[keep], perturbed[keep]
    return [result for found in done for result in weighed(sorted(found, key=lambda each: -each[0]), k)]


def conditioned(noisy: Tensor, limit: Tensor) -> Tensor:
    """Perturbed log-probabilities `[R, V]`, given that their maximum in each row is `limit [R]` (appendix B.3)."""
    top = noisy.amax(-1, keepdim=True)
    v = limit[:, None] - noisy + torch.log1p(-(noisy - top).exp())
    result = limit[:, None] - v.clamp(min=0) - torch.log1p((-v.abs()).exp())
    return torch.where(noisy == top, limit[:, None], result).masked_fill(noisy == -torch.inf, -torch.inf)


def weighed(found: list, k: int) -> list[Generation]:
    """The k best with their weights."""
    kappa = found[k][0] if len(found) > k else -torch.inf
    for rank, (g, (logp, generation)) in enumerate(found[:k]):
        inclusion = -torch.expm1(-torch.tensor(logp - kappa, dtype=torch.float64).exp())
        generation.sample, generation.extra["perturbed"] = rank, g
        generation.extra["weight"] = float(torch.tensor(logp, dtype=torch.float64).exp() / inclusion)
    return [generation for _, (_, generation) in found[:k]]
