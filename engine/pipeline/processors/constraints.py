"""Constraints on single tokens: biases, bans, allowed sets, lengths."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...cache.transfer import upload
from ...errors import ParameterError
from ..forms import NEG_INF, Context, Edit


def table_width(rows: list[list[int]]) -> int:
    """The least power of two that holds the longest row."""
    return 1 << (max([1, *(len(row) for row in rows)]) - 1).bit_length()


def id_table(rows: list[list[int]], device, fill: int) -> Tensor:
    """Ragged lists of ids as one [B, K] int64 tensor, padded with `fill`; K is a power of two, so
    that few differ.
    """
    width = table_width(rows)
    return upload([list(row) + [fill] * (width - len(row)) for row in rows], device, None)


def check_ids(name: str, ids, vocab_size: int | None) -> list[int]:
    """The ids as a sorted list without repeats; raises ParameterError for ids outside the vocabulary."""
    result = sorted({int(i) for i in ids})
    if result and (result[0] < 0 or (vocab_size is not None and result[-1] >= vocab_size)):
        wrong = result[0] if result[0] < 0 else result[-1]
        raise ParameterError(f"{name} holds token id {wrong}; valid ids are 0 to {(vocab_size or 0) - 1}")
    return result


def packed_rows(rows: list[Iterable[int]], vocab_size: int, device) -> Tensor:
    """Lists of ids below `vocab_size` as packed rows [B, ceil(V / 32)] int32: bit id % 32 of word id // 32."""
    words = np.zeros((len(rows), -(-vocab_size // 32)), dtype=np.uint32)
    for row, ids in zip(words, rows, strict=True):
        ids = np.fromiter(ids, dtype=np.int64)
        np.bitwise_or.at(row, ids >> 5, np.uint32(1) << (ids & 31).astype(np.uint32))
    return torch.from_numpy(words.view(np.int32)).to(device)


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
            "bias": upload(bias, context.device, None),
        }

    def listed(self, context: Context) -> Tensor:
        return context.values.ids

    def change(self, values: Tensor, ids: Tensor, context: Context) -> Tensor:
        return values + context.values.bias


class Ban(Edit):
    """Base of the bans: what `ids_of` a row's settings lists is excluded, in the steps in which a row is `banning`."""

    identity_when_off = True

    def ids_of(self, settings: dict[str, Any], context: Context) -> list[int]:
        """The ids that one row bans."""
        return check_ids(self.name, settings[self.fields[0]] or (), context.vocab_size)

    def pack(self, rows, context):
        lists = [self.ids_of(row, context) for row in rows]
        return {
            "ids": id_table(lists, context.device, context.vocab_size),
            "mask": ~packed_rows(lists, context.vocab_size, context.device),
        }

    def banning(self, context: Context) -> Tensor | None:
        """[B, 1] bool, rows whose ban is in force now; None: all."""
        return None

    def mask(self, context: Context) -> Tensor:
        now = self.banning(context)
        return context.values.mask if now is None else torch.where(now, context.values.mask, -1)

    def exclude(self, buffer: Tensor, context: Context) -> None:
        ids, now = context.values.ids, self.banning(context)
        buffer.scatter_(1, ids if now is None else torch.where(now, ids, buffer.shape[1] - 1), NEG_INF)


class BannedTokens(Ban):
    """Never draw these tokens (-inf). Off when empty."""

    name = "banned_tokens"
    defaults = {"banned_tokens": ()}

    def on(self, settings: dict[str, Any]) -> bool:
        return len(settings[self.fields[0]] or ()) > 0


class SuppressFirst(BannedTokens):
    """Tokens that may not be the first token of the output (`begin_suppress_tokens`). Off when empty."""

    name = "suppress_first"
    defaults = {"suppress_first": ()}

    def banning(self, context: Context) -> Tensor:
        return (context.output_lengths == 0)[:, None]


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
        return {
            "ids": id_table(lists, context.device, context.vocab_size),
            "mask": packed_rows(lists, context.vocab_size, context.device),
        }

    def mask(self, context: Context) -> Tensor:
        return context.values.mask

    def exclude(self, buffer: Tensor, context: Context) -> None:
        ids, rows_on = context.values.ids, context.values.rows_on
        kept = buffer.gather(1, ids)
        buffer.masked_fill_(rows_on, NEG_INF) if rows_on is not None else buffer.fill_(NEG_INF)
        buffer.scatter_(1, ids, kept)


class MinNewTokens(Ban):
    """Mask every end-of-sequence id and every `stop_token_ids` until `min_new_tokens` are out. Off at 0."""

    name = "min_new_tokens"
    defaults = {"min_new_tokens": 0, "stop_token_ids": (), "eos_token_ids": None}

    def ids_of(self, settings: dict[str, Any], context: Context) -> list[int]:
        ends = context.ends(settings)
        return check_ids("stop_token_ids", [*settings["stop_token_ids"], *ends], context.vocab_size)

    def pack(self, rows, context):
        least = upload([[row["min_new_tokens"]] for row in rows], context.device, None)
        return super().pack(rows, context) | {"min_new_tokens": least}

    def banning(self, context: Context) -> Tensor:
        return context.output_lengths[:, None] < context.values.min_new_tokens
