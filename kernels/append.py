"""The end of a step's draw: what the host is told, and where every row stands, in one launch."""

import torch

from . import dispatch


def append(
    tokens, logprobs, top, *, results, ids, fed, history, table, block_size, positions, active, limits, stops,
    kernels=None,
):  # fmt: skip
    """Append a drawn token to every row, and test whether the row goes on; everything is changed in place.

    Args:
        tokens: int64 [B], the drawn ones; -1 where there is none, for which 0 is fed.
        logprobs: two float32 [B], as the model and as the processors left them.
        top: (ids int64 [B, n], log-probabilities float32 [B, n]) of the most probable tokens, or None.
        results: float64 [B, 3 + 2 n], receives tokens, log-probabilities and top.
        ids: int64 [B], receives the tokens.
        fed: int64 [3, B], receives position and cell of each token, and how many cells its row then has.
        history: int64 [B, T]; the token goes to its row's position.
        table: int32 [B, M], the blocks of each row. block_size: positions in a block; position p of a row has cell
            table[p // block_size] * block_size + p % block_size.
        positions: int64 [B, 1], where the token goes; rows that go on move to the next.
        active: int64 [B, 1], 1 for a row that goes on, 0 from its last token on.
        limits: int64 [B, 1], tokens that a row may have. stops: int64 [B, S], ids that end it, padded with -1.
        kernels: "auto", "triton", "torch" or None (see `dispatch`).

    Raises:
        dispatch.KernelUnavailable: kernels="triton" cannot run here.
    """
    rows = positions, active, limits, stops
    given = tokens, logprobs, top, results, ids, fed, history, table, block_size, *rows
    if dispatch.select("append", tokens.device, kernels) == "torch":
        return append_reference(*given)
    from .append_triton import launch

    return launch(*given)


def append_reference(
    tokens, logprobs, top, results, ids, fed, history, table, block_size, positions, active, limits, stops
):
    """Defines `append`, whose arguments it shares."""
    torch.clamp(tokens, min=0, out=ids)
    columns = [ids[:, None], *(part[:, None] for part in logprobs), *(top or ())]
    start = 0
    for column in columns:
        results[:, start : start + column.shape[1]].copy_(column)
        start += column.shape[1]
    history.scatter_(1, positions, ids[:, None])
    fed[0].copy_(positions[:, 0])
    blocks = table.gather(1, positions // block_size).long()
    fed[1].copy_((blocks * block_size + positions % block_size)[:, 0])
    torch.add(fed[0], 1, out=fed[2])
    stopped = (ids[:, None] == stops).any(1, keepdim=True)
    stopped |= fed[2][:, None] >= limits
    active.masked_fill_(stopped, 0)
    positions.add_(active)
