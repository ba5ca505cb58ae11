"""Soft thinking (arXiv 2505.15778) and mixture of inputs (arXiv 2505.14827): the expected embedding is fed."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ParameterError
from ...loop.generation import Generation
from ..kit.decode import decode


def soft_thinking(
    engine,
    prompts,
    params=None,
    *,
    end=None,
    stop_entropy=0.1,
    stop_length=256,
    most=None,
    stream=False,
    **options,
) -> list[Generation]:
    """Think in concept tokens: feed sum_v p(v) e(v), p what the pipeline leaves, until the thought ends; then decode.

    A thought ends with the token `end`, where the most probable token is it; or after `stop_length` tokens in a row
    below `stop_entropy`, when `end` is put in (the paper's cold stop). Its tokens are told as the most probable ones.
    A token costs one forward pass of one row for each prompt.

    Args:
        prompts, params, options: as for `decode`; the pipeline's top_k and top_p (the paper's 15, 0.95) cut the
            mixture, and its temperature shapes it.
        end: id of the token that ends a thought, such as that of `</think>`; None: all of the output is thought.
        stop_entropy: nats. stop_length: tokens, >= 1.
        most: tokens of a thought before `end` is put in; None: no limit.

    Returns:
        One Generation for each sample of each prompt; `extra["thought"]`: how many tokens were soft.
    """
    if stop_length < 1 or (most is not None and most < 1):
        raise ParameterError(f"soft thinking takes stop_length and most >= 1, got {stop_length} and {most}")
    sure: dict = {}
    over = set()

    def step(now):
        p = now.logprobs.exp()
        entropy = now.entropy.tolist()
        hard, soft = now.draw(), now.logprobs.argmax(-1)
        thinking = []
        for row, request in enumerate(now.live):
            sure[request] = sure.get(request, 0) + 1 if entropy[row] < stop_entropy else 0
            length = len(request.stopper.token_ids)
            if request not in over and end is not None and (
                sure[request] >= stop_length or (most is not None and length >= most)
            ):  # fmt: skip
                soft[row] = end
            thinking.append(request not in over)
            request.extra["thought"] = request.extra.get("thought", 0) + thinking[-1]
            if end is not None and int(soft[row]) == end:
                over.add(request)
        inside = torch.tensor(thinking, device=soft.device)
        tokens = torch.where(inside, soft, hard)
        mixed = inside if end is None else inside & (tokens != end)
        return tokens, fed(now, tokens, p, mixed)

    return decode(engine, prompts, params, step=step, stream=stream, **options)


def mixture_of_inputs(engine, prompts, params=None, *, beta=1.0, stream=False, **options) -> list[Generation]:
    """Draw tokens as usual, and feed sum_v w(v) e(v) with w = (H p + (beta + 1 - H) y) / (beta + 1).

    H is the entropy of p, what the pipeline leaves, as a share of its largest; y is 1 at the token that was drawn. A
    token costs one forward pass of one row for each prompt.

    Args:
        prompts, params, options: as for `decode`.
        beta: weight of the drawn token, >= 0; the larger, the nearer to plain decoding.
    """
    if beta < 0:
        raise ParameterError(f"mixture of inputs takes beta >= 0, got {beta}")

    def step(now):
        tokens, p = now.draw(), now.logprobs.exp()
        size = torch.tensor(float(p.shape[1])).log()
        share = (now.entropy[:, None] / size).clamp(0, 1)
        drawn = torch.zeros_like(p).scatter(1, tokens.clamp(min=0)[:, None], 1.0)
        mixture = (share * p + (beta + 1 - share) * drawn) / (beta + 1)
        return tokens, fed(now, tokens, mixture, torch.ones_like(tokens, dtype=torch.bool))

    return decode(engine, prompts, params, step=step, stream=stream, **options)


def fed(now, tokens: Tensor, weights: Tensor, mixed: Tensor):
    """The State after embeddings mixed by `weights [B, V]`; rows that are not `mixed [B]` get their token's own."""
    words = now.engine.runner.module.get_input_embeddings()
    ids = tokens.clamp(min=0)
    own = words(ids.to(words.weight.device))
    table = words.weight.float()
    average = weights[:, : len(table)].to(table.device).float() @ table[: weights.shape[1]] * scale_of(words)
    mixture = torch.where(mixed[:, None].to(own.device), average.to(own.dtype), own)
    return now.engine.step(now.state, ids, embeddings=mixture)


def scale_of(words) -> float | Tensor:
    """What an embedding layer multiplies its rows by (Gemma's do)."""
    return getattr(words, "embed_scale", 1.0)
