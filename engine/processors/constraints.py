"""Constraints on single tokens: biases, bans, allowed sets, lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from handloom.errors import ParameterError
from handloom.processors.base import NEG_INF, Context, Edit


def table_width(rows: list[list[int]]) -> int:
    """The least power of two that holds the longest row."""
    return 1 << (max([1, *(len(row) for row in rows)]) - 1).bit_length()


def id_table(rows: list[list[int]], device, fill: int) -> Tensor:
    """Ragged lists of ids as one [B, K] int64 tensor, padded with `fill`; K is a power of two, so
    that few differ.
    """
    width = table_width(rows)
    return torch.tensor([list(row) + [fill] * (width - len(row)) for row in rows], device=device)


def check_ids(name: str, ids, vocab_size: int | None) -> list[int]:
    """The ids as a sorted list without repeats; raises ParameterError for ids outside the vocabulary."""
    result = sorted({int(i) for i in ids})
    if result and (result[0] < 0 or (vocab_size is not None and result[-1] >= vocab_size)):
        wrong = result[0] if result[0] < 0 else result[-1]
        raise ParameterError(f"{name} holds token id {wrong}; valid ids are 0 to {(vocab_size or 0) - 1}")
    return result


def ban_table(logits: Tensor, table: Tensor) -> Tensor:
    """Copy of `logits` [B, V] with the ids of `table` [B, K] at -inf; entries of V are padding."""
    spare = torch.nn.functional.pad(logits, (0, 1))
    return spare.scatter_(1, table, NEG_INF)[:, : logits.shape[-1]]


class LogitBias(Edit):
    """Add a constant to the logits of chosen tokens (OpenAI API): `{token id: bias}`. Off when empty."""

    name = "logit_bias"
    defaults = {"logit_bias": {}}
    identity_when_off = True

    def on(self, settings: dict[str, Any]) -> bool:
        return bool(settings["logit_bias"])

    def pack(self, rows, context):
        tables = [row["logit_bias"] or {} for row in rows]
        for table in tables:
            check_ids(self.name, table, context.vocab_size)
        ids = [[int(i) for i in table] for table in tables]
        width = table_width(ids)
        bias = [[float(b) for b in table.values()] + [0.0] * (width - len(table)) for table in tables]
        return {
            "ids": id_table(ids, context.device, context.vocab_size),
            "bias": torch.tensor(bias, device=context.device),
        }

    def edit(self, logits: Tensor, context: Context) -> Tensor:
        spare = torch.nn.functional.pad(logits, (0, 1))
        return spare.scatter_add_(1, context.values.ids, context.values.bias)[:, : logits.shape[-1]]


class BannedTokens(Edit):
    """Never draw these tokens (-inf). Off when empty."""

    name = "banned_tokens"
    defaults = {"banned_tokens": ()}
    identity_when_off = True

    def on(self, settings: dict[str, Any]) -> bool:
        return len(settings[self.fields[0]] or ()) > 0

    def pack(self, rows, context):
        lists = [check_ids(self.name, row[self.fields[0]] or (), context.vocab_size) for row in rows]
        return {"ids": id_table(lists, context.device, context.vocab_size)}

    def edit(self, logits: Tensor, context: Context) -> Tensor:
        return ban_table(logits, context.values.ids)


class SuppressFirst(BannedTokens):
    """Tokens that may not be the first token of the output (`begin_suppress_tokens`). Off when empty."""

    name = "suppress_first"
    defaults = {"suppress_first": ()}

    def edit(self, logits: Tensor, context: Context) -> Tensor:
        first = (context.output_lengths == 0)[:, None]
        return ban_table(logits, torch.where(first, context.values.ids, logits.shape[-1]))


class AllowedTokens(Edit):
    """Draw from these tokens only; all others become -inf. Off at None."""

    name = "allowed_tokens"
    defaults = {"allowed_tokens": None}

    def on(self, settings: dict[str, Any]) -> bool:
        return settings["allowed_tokens"] is not None

    def pack(self, rows, context):
        lists = [check_ids(self.name, row["allowed_tokens"] or (), context.vocab_size) for row in rows]
        for row, ids in zip(rows, lists, strict=True):
            if row["allowed_tokens"] is not None and not ids:
                raise ParameterError(
                    "allowed_tokens is empty: a row must be allowed at least one token, or None"
                )
        return {"ids": id_table(lists, context.device, context.vocab_size)}

    def edit(self, logits: Tensor, context: Context) -> Tensor:
        ids = context.values.ids
        result = logits.new_full((logits.shape[0], logits.shape[1] + 1), NEG_INF)
        kept = torch.nn.functional.pad(logits, (0, 1), value=NEG_INF).gather(1, ids)
        return result.scatter_(1, ids, kept)[:, : logits.shape[-1]]


class MinNewTokens(Edit):
    """Mask every end-of-sequence id and every `stop_token_ids` until `min_new_tokens` are out. Off at 0."""

    name = "min_new_tokens"
    defaults = {"min_new_tokens": 0, "stop_token_ids": ()}
    identity_when_off = True

    def pack(self, rows, context):
        eos = [i for i in context.eos_token_ids if i < context.vocab_size]
        stops = [
            check_ids("stop_token_ids", [*row["stop_token_ids"], *eos], context.vocab_size) for row in rows
        ]
        least = [[row["min_new_tokens"]] for row in rows]
        return {
            "ids": id_table(stops, context.device, context.vocab_size),
            "min_new_tokens": torch.tensor(least, device=context.device),
        }

    def edit(self, logits: Tensor, context: Context) -> Tensor:
        early = context.output_lengths[:, None] < context.values.min_new_tokens
        return ban_table(logits, torch.where(early, context.values.ids, logits.shape[-1]))
