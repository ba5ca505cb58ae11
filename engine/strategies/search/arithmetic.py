"""Arithmetic sampling (arXiv 2210.15458): samples from evenly spread codes, diverse and exact."""

from __future__ import annotations

import torch

from ...errors import ParameterError
from ...kernels.sampling.draw import coin
from ...loop.generation import Generation
from ..kit.decode import decode

CODE = 2**29  # noise stream of the codes
FRESH = 2.0**-30  # a code this much spent is drawn anew: its digits are at an end


def arithmetic_sampling(engine, prompts, params=None, *, n=8, stream=False, **options) -> list[Generation]:
    """Sample i of a prompt decodes the code i / n + u mod 1, u uniform and common: it takes the token in whose share
    of [0, 1) the code lies, and goes on with the code's place in that share.

    Every sample has the pipeline's law; together they spread over the sequences, so means over them vary less. A
    token costs one forward pass of n rows for each prompt.

    Args:
        prompts, params, options: as for `decode`, with temperature > 0.
        n: samples a prompt, >= 1.

    Returns:
        n Generations for each prompt, with `extra["code"]`.
    """
    codes: dict = {}

    def step(now):
        if any(now.requests.rows.greedy):
            raise ParameterError("arithmetic sampling needs temperature > 0")
        seeds, zeros = now.requests.seeds, torch.zeros_like(now.requests.seeds)
        shift = coin(seeds, zeros, zeros + CODE).double()
        again = coin(seeds, now.context.positions, now.requests.streams + CODE + 1).double()
        for row, request in enumerate(now.live):
            if request not in codes:
                request.extra["code"] = (request.sample / n + float(shift[row])) % 1
                codes[request] = request.extra["code"], 1.0
            elif codes[request][1] < FRESH:
                codes[request] = float(again[row]), 1.0
        code = torch.tensor([codes[r][0] for r in now.live], dtype=torch.float64, device=now.logits.device)
        shares = now.processed.double().softmax(-1)
        ends = shares.cumsum(-1)
        tokens = (ends <= code[:, None] * ends[:, -1:]).sum(-1)
        held = shares.gather(1, tokens[:, None].clamp(max=shares.shape[1] - 1))[:, 0] > 0
        tokens = torch.where(held, tokens, shares.argmax(-1))  # rounding at a border
        rows = torch.arange(len(now), device=tokens.device)
        share = shares[rows, tokens]
        left = ((code * ends[:, -1] - (ends[rows, tokens] - share)) / share).clamp(0, 1)
        for request, place, mass in zip(now.live, left.tolist(), share.tolist(), strict=True):
            codes[request] = place, codes[request][1] * mass
        return tokens

    return decode(engine, prompts, params, step=step, n=n, stream=stream, **options)
