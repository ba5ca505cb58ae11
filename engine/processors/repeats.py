"""Rules against repeated sequences: DRY and no-repeat-ngram. Both are pure functions of the history."""

from __future__ import annotations

import torch
from torch import Tensor

from handloom.errors import ParameterError
from handloom.processors.base import NEG_INF, Context, Edit
from handloom.processors.constraints import id_table


def recent(context: Context, depth: int) -> Tensor:
    """The last tokens of every row, newest first: [B, depth] int64, -2 before the beginning."""
    back = context.lengths[:, None] - 1 - torch.arange(depth, device=context.lengths.device)
    history = context.history
    found = history.gather(1, back.clamp(0, history.shape[1] - 1))
    return torch.where(back >= 0, found, -2)


def suffix_match(context: Context, depth: int, stops: Tensor | None = None) -> Tensor:
    """How long the text up to each cell agrees with the end of the row's text, [B, T] int64, at most `depth`.

    0 in cells at or beyond the row's last token. `stops` [B, K]: ids (-1 = none) that end a match.
    """
    history, newest = context.history, recent(context, depth)
    rows, cells = history.shape
    padded = torch.cat([history.new_full((rows, depth - 1), -3), history], dim=1)
    windows = padded.unfold(1, depth, 1).flip(-1)  # [B, T, depth]: the cell itself, the one before it, ...
    agree = (windows == newest[:, None]) & (windows >= 0)
    if stops is not None:
        agree &= ~(newest[:, None, :, None] == stops[:, None, None]).any(-1)
    before = torch.arange(cells, device=history.device) < context.lengths[:, None] - 1
    return agree.long().cumprod(-1).sum(-1) * before


def successors(context: Context) -> Tensor:
    """The token after each cell, [B, T] int64; -1 after the last cell."""
    return torch.nn.functional.pad(context.history[:, 1:], (0, 1), value=-1)


class NoRepeatNGram(Edit):
    """Ban every token that would repeat an n-gram of the row's text (Paulus et al. 2017,
    1705.04304). Off at 0.
    """

    name = "no_repeat_ngram"
    defaults = {"no_repeat_ngram_size": 0}
    needs_history = True
    identity_when_off = True

    def pack(self, rows, context):
        sizes = [row["no_repeat_ngram_size"] for row in rows]
        return {"size": torch.tensor(sizes, device=context.device)[:, None], "depth": max(sizes) - 1}

    def edit(self, logits: Tensor, context: Context) -> Tensor:
        v, vocab, history = context.values, logits.shape[-1], context.history
        if not history.shape[1]:
            return logits
        cells = torch.arange(history.shape[1], device=history.device)
        seen = (v.size == 1) & (cells < context.lengths[:, None])
        following = torch.where(seen, history, vocab)
        if v.depth > 0:
            hit = (v.size > 1) & (suffix_match(context, v.depth) >= v.size - 1)
            following = torch.where(hit, successors(context), following)
        following = torch.where((following >= 0) & (following < vocab), following, vocab)
        spare = torch.nn.functional.pad(logits, (0, 1))
        return spare.scatter_(1, following, NEG_INF)[:, :vocab]


class DRY(Edit):
    """Don't repeat yourself (p-e-w 2024): a token that would extend a repeat of length n >= allowed_length
    loses multiplier * base^(n - allowed_length). Off at multiplier 0.

    The longest repeat that a token would extend counts, at most 50 tokens, looking back `dry_window`
    tokens (0 = all of the text). Breakers (token ids) end repeats and are never penalised.
    """

    name = "dry"
    defaults = {
        "dry_multiplier": 0.0,
        "dry_base": 1.75,
        "dry_allowed_length": 2,
        "dry_window": 0,
        "dry_breakers": (),
    }
    needs_history = True
    identity_when_off = True
    longest = 50

    def pack(self, rows, context):
        packed = {}
        for field in ("dry_multiplier", "dry_base"):
            packed[field] = torch.tensor([[float(row[field])] for row in rows], device=context.device)
        for field in ("dry_allowed_length", "dry_window"):
            packed[field] = torch.tensor([[row[field]] for row in rows], device=context.device)
        breakers = [breaker_ids(row["dry_breakers"]) for row in rows]
        packed["breakers"] = id_table(breakers, context.device, -1)
        return packed

    def edit(self, logits: Tensor, context: Context) -> Tensor:
        v, vocab, history = context.values, logits.shape[-1], context.history
        if not history.shape[1]:
            return logits
        match = suffix_match(context, self.longest, v.breakers)
        cells = torch.arange(history.shape[1], device=history.device)
        start = torch.where(v.dry_window > 0, context.lengths[:, None] - v.dry_window, 0).clamp(min=0)
        match = torch.minimum(match, cells - start + 1)  # a match may not reach back beyond the window
        following = successors(context)
        broken = (following[..., None] == v.breakers[:, None]).any(-1)
        hit = (match >= v.dry_allowed_length) & (match > 0) & (v.dry_multiplier > 0) & ~broken
        hit &= (following >= 0) & (following < vocab)
        loss = v.dry_multiplier * v.dry_base ** (match - v.dry_allowed_length)
        ids = torch.where(hit, following, vocab)
        spare = torch.nn.functional.pad(logits, (0, 1))
        return spare.scatter_reduce(1, ids, spare.gather(1, ids) - loss, "amin")[:, :vocab]


def breaker_ids(breakers) -> list[int]:
    """Breakers as token ids; raises ParameterError for strings, which need a tokenizer."""
    for breaker in breakers:
        if not isinstance(breaker, int):
            raise ParameterError(
                f"dry_breakers holds {breaker!r}: the pipeline takes token ids; strings are turned into ids "
                "by params.resolve(tokenizer)"
            )
    return sorted(set(breakers))
