"""Rules against repeated sequences: DRY and no-repeat-ngram. Both are pure functions of the history."""

from __future__ import annotations

import torch
from torch import Tensor

from ...cache.transfer import upload
from ...errors import ParameterError
from ..edits import text_cells, text_ids
from ..forms import NEG_INF, Context, Edit
from .constraints import id_table


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
    padded = torch.nn.functional.pad(history, (depth - 1, 0), value=-3)
    windows = padded.unfold(1, depth, 1).flip(-1)  # [B, T, depth]: the cell itself, the one before it, ...
    agree = (windows == newest[:, None]) & (windows >= 0)
    if stops is not None:
        agree &= ~(newest[:, None, :, None] == stops[:, None, None]).any(-1)
    before = text_cells(context) < context.lengths[:, None] - 1
    return agree.long().cumprod(-1).sum(-1) * before


def after_each(ids: Tensor, vocab_size: int) -> Tensor:
    """The id in the cell after each one of ids [B, T]; `vocab_size` after the last one."""
    return torch.nn.functional.pad(ids[:, 1:], (0, 1), value=vocab_size)


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
        return {"size": upload(sizes, context.device, None)[:, None], "depth": max(sizes) - 1}

    def listed(self, context: Context) -> Tensor:
        """The whole text: a token that repeats an n-gram occurred before."""
        return text_ids(context)

    def write(self, buffer: Tensor, ids: Tensor, context: Context) -> None:
        v = context.values
        if not ids.shape[1]:
            return
        following = torch.where(v.size == 1, ids, context.vocab_size)
        if v.depth > 0:
            hit = (v.size > 1) & (suffix_match(context, v.depth) >= v.size - 1)
            following = torch.where(hit, after_each(ids, context.vocab_size), following)
        buffer.scatter_(1, following, NEG_INF)


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
            packed[field] = upload([[float(row[field])] for row in rows], context.device, None)
        for field in ("dry_allowed_length", "dry_window"):
            packed[field] = upload([[row[field]] for row in rows], context.device, None)
        breakers = [breaker_ids(row["dry_breakers"]) for row in rows]
        packed["breakers"] = id_table(breakers, context.device, -1)
        return packed

    def listed(self, context: Context) -> Tensor:
        """The whole text: a token that would extend a repeat occurred before."""
        return text_ids(context)

    def write(self, buffer: Tensor, ids: Tensor, context: Context) -> None:
        v, vocab = context.values, context.vocab_size
        if not ids.shape[1]:
            return
        match = suffix_match(context, self.longest, v.breakers)
        start = torch.where(v.dry_window > 0, context.lengths[:, None] - v.dry_window, 0).clamp(min=0)
        # a match may not reach back beyond the window
        match = torch.minimum(match, text_cells(context) - start + 1)
        following = after_each(ids, vocab)
        broken = (following[..., None] == v.breakers[:, None]).any(-1)
        hit = (match >= v.dry_allowed_length) & (match > 0) & (v.dry_multiplier > 0) & ~broken
        loss = v.dry_multiplier * v.dry_base ** (match - v.dry_allowed_length)
        following = torch.where(hit, following, vocab)
        buffer.scatter_reduce_(1, following, buffer.gather(1, following) - loss, "amin")


def breaker_ids(breakers) -> list[int]:
    """Breakers as token ids; raises ParameterError for strings, which need a tokenizer."""
    for breaker in breakers:
        if not isinstance(breaker, int):
            raise ParameterError(
                f"dry_breakers holds {breaker!r}: the pipeline takes token ids; strings are turned into ids "
                "by params.resolve(tokenizer)"
            )
    return sorted(set(breakers))
