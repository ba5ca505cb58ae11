"""The Gumbel or exponential watermark (Aaronson 2022; arXiv 2307.15593): keyed noise draws the tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...errors import ParameterError
from ...kernels.noise.philox import gumbel
from ...kernels.sampling.draw import draw
from ...loop.generation import Generation
from ..kit.decode import decode
from .detection import Detection, windows

MARK, MULTIPLIER = 2**23, 6364136223846793005


def exponential_watermark(
    engine, prompts, params=None, *, key=42, width=4, stream=False, **options
) -> list[Generation]:
    """Draw argmax_v log p(v) + g(v), p the pipeline's distribution, g Gumbel noise of the key and the last tokens.

    Over keys, every text has the pipeline's law; for one key, a context always goes on in the same way. Contexts that
    a text has had already (and those that reach before its output) are drawn with ordinary noise. A token costs one
    forward pass of one row for each prompt.

    Args:
        prompts, params, options: as for `decode`, with temperature > 0.
        key: the secret, an integer. width: output tokens of a context, >= 1.
    """
    if width < 1:
        raise ParameterError(f"the exponential watermark takes width >= 1, got {width}")

    def step(now):
        if any(now.requests.rows.greedy):
            raise ParameterError("the exponential watermark needs temperature > 0")
        tokens = now.draw()
        fresh = [row for row, text in enumerate(now.state.new_tokens) if unused(text, width)]
        if fresh:
            contexts = [tuple(now.state.new_tokens[row][-width:]) for row in fresh]
            tokens[fresh] = draw(now.processed[fresh], *noise_keys(key, contexts, now.logits.device))
        return tokens

    return decode(engine, prompts, params, step=step, stream=stream, **options)


def unused(text: list[int], width: int) -> bool:
    """Whether the context at the end of an output is whole, and the first of its kind."""
    last = text[-width:]
    return len(text) >= width and all(text[i : i + width] != last for i in range(len(text) - width))


def noise_keys(key: int, contexts: list[tuple[int, ...]], device) -> tuple[Tensor, Tensor, Tensor]:
    """Seeds, positions and streams `[N]` of the noise behind contexts."""
    seeds = []
    for context in contexts:
        value = key
        for token in context:
            value = ((value + token + 1) * MULTIPLIER + 1) % 2**64
            value ^= value >> 29
        seeds.append(value - 2**64 if value >= 2**63 else value)
    zeros = torch.zeros(len(contexts), dtype=torch.long, device=device)
    return torch.tensor(seeds, device=device), zeros, zeros + MARK


def detect_exponential(tokens, *, key=42, width=4) -> Detection:
    """Sum of -log(1 - u) over a text's distinct contexts; without the mark it is Gamma distributed.

    Args:
        tokens: output ids, or a Generation. key, width: as for `exponential_watermark`.
    """
    first: dict = {}
    for text in windows(tokens, width + 1):
        first.setdefault(text[:-1], text[-1])
    if not first:
        return Detection(0.0, 0, 0.0, 1.0)
    g = gumbel(*noise_keys(key, list(first), "cpu"), torch.tensor(list(first.values()))[:, None])[
        :, 0
    ].double()
    score = float(-torch.log(-torch.expm1(-(-g).exp())).sum())  # u = exp(-exp(-g))
    shape = torch.tensor([float(len(first)), score], dtype=torch.float64)
    p_value = float(torch.special.gammaincc(shape[0], shape[1]))
    return Detection(score, len(first), (score - len(first)) / math.sqrt(len(first)), p_value)
