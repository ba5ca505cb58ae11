"""Penalties on tokens that occurred before; they read the history, and cost its length rather than the
vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...cache.transfer import upload
from ...errors import ParameterError
from ..edits import text_cells, text_ids
from ..forms import Context, Edit

SCOPES = ("auto", "prompt", "output", "all")


def scope_bounds(scopes: list[str], windows: list[int], default: str, device) -> dict[str, Tensor]:
    """Packed scope of every row: flags for where it starts and ends, and the window (0 = none), each [B, 1].

    `shared`: the scope of all rows where it is one and has no window, else None.
    """
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown:
        raise ParameterError(f"penalty_scope={unknown[0]!r} is not one of {', '.join(SCOPES)}")
    scopes = [default if scope == "auto" else scope for scope in scopes]
    return {
        "shared": scopes[0] if len(set(scopes)) == 1 and not any(windows) else None,
        "skip_prompt": upload([[scope == "output"] for scope in scopes], device, None),
        "skip_output": upload([[scope == "prompt"] for scope in scopes], device, None),
        "window": upload([[window] for window in windows], device, None),
    }


def scoped_ids(context: Context) -> Tensor:
    """The ids of the text that count for the running penalty, [B, T] int64; `vocab_size` elsewhere."""
    v, vocab, ids = context.values, context.vocab_size, text_ids(context)
    if v.shared == "all":
        return ids
    key = "ids of the", v.shared
    if v.shared is not None and key in context.cache:
        return context.cache[key]
    cell, prompts = text_cells(context), context.prompt_lengths[:, None]
    if v.shared == "output":
        inside = cell >= prompts
    elif v.shared == "prompt":
        inside = cell < prompts
    else:
        lengths = context.lengths[:, None]
        start = torch.where(v.skip_prompt, prompts, 0)
        start = torch.where(v.window > 0, torch.maximum(start, lengths - v.window), start)
        inside = (cell >= start) & (cell < torch.where(v.skip_output, prompts, lengths))
    ids = torch.where(inside, ids, vocab)
    if v.shared is not None:
        context.cache[key] = ids
    return ids


def counts_at(ids: Tensor, vocab_size: int) -> Tensor:
    """How often each cell's id occurs among the ids [B, T] of its row, float32 [B, T]."""
    counts = torch.empty(ids.shape[0], vocab_size + 1, device=ids.device)  # only the ids' cells are used
    counts.scatter_(1, ids, 0.0).scatter_add_(1, ids, torch.ones_like(ids, dtype=torch.float32))
    return counts.gather(1, ids)


class Penalty(Edit):
    """Base of the penalties on seen tokens, in a scope and optionally among the last n tokens."""

    needs_history = True
    identity_when_off = True
    auto_scope = "output"

    def pack(self, rows, context):
        strength = [[float(row[self.fields[0]])] for row in rows]
        scopes, windows = [row["penalty_scope"] for row in rows], [row["penalty_window"] for row in rows]
        packed = scope_bounds(scopes, windows, self.auto_scope, context.device)
        return packed | {"strength": upload(strength, context.device, None)}

    def listed(self, context: Context) -> Tensor:
        """The whole text, which all penalties share."""
        return text_ids(context)

    def write(self, buffer: Tensor, ids: Tensor, context: Context) -> None:
        super().write(buffer, scoped_ids(context), context)


class RepetitionPenalty(Penalty):
    """Divide positive and multiply negative logits of seen tokens by r (CTRL, 1909.05858).

    Each token once, however often it occurred. "auto" scope: prompt and output. Off at 1.
    """

    name, penalty = "repetition_penalty", "repetition"
    defaults = {"repetition_penalty": 1.0, "penalty_scope": "auto", "penalty_window": 0}
    auto_scope = "all"

    def change(self, values: Tensor, ids: Tensor, context: Context) -> Tensor:
        r = context.values.strength
        return torch.where(values < 0, values * r, values / r)


class PresencePenalty(Penalty):
    """Subtract a constant from the logits of seen tokens (OpenAI API). "auto" scope: output only.
    Off at 0.
    """

    name, penalty = "presence_penalty", "presence"
    defaults = {"presence_penalty": 0.0, "penalty_scope": "auto", "penalty_window": 0}

    def change(self, values: Tensor, ids: Tensor, context: Context) -> Tensor:
        return values - context.values.strength


class FrequencyPenalty(Penalty):
    """Subtract a constant times the number of occurrences (OpenAI API). "auto" scope: output only.
    Off at 0.
    """

    name, penalty = "frequency_penalty", "frequency"
    defaults = {"frequency_penalty": 0.0, "penalty_scope": "auto", "penalty_window": 0}

    def change(self, values: Tensor, ids: Tensor, context: Context) -> Tensor:
        return values - context.values.strength * counts_at(ids, context.vocab_size)
