"""Penalties on tokens that occurred before; they read the history, and cost its length rather than the
vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from handloom.errors import ParameterError
from handloom.processors.base import Context, Edit

SCOPES = ("auto", "prompt", "output", "all")


def scope_bounds(scopes: list[str], windows: list[int], default: str, device) -> dict[str, Tensor]:
    """Packed scope of every row: flags for where it starts and ends, and the window (0 = none),
    each [B, 1].
    """
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown:
        raise ParameterError(f"penalty_scope={unknown[0]!r} is not one of {', '.join(SCOPES)}")
    scopes = [default if scope == "auto" else scope for scope in scopes]
    return {
        "skip_prompt": torch.tensor([[scope == "output"] for scope in scopes], device=device),
        "skip_output": torch.tensor([[scope == "prompt"] for scope in scopes], device=device),
        "window": torch.tensor([[window] for window in windows], device=device),
    }


def in_scope(context: Context, vocab_size: int) -> Tensor:
    """Which cells of the history count for the running penalty, [B, T] bool."""
    v, history = context.values, context.history
    lengths, prompts = context.lengths[:, None], context.prompt_lengths[:, None]
    end = torch.where(v.skip_output, prompts, lengths)
    start = torch.where(v.skip_prompt, prompts, 0)
    start = torch.where(v.window > 0, torch.maximum(start, lengths - v.window), start)
    cell = torch.arange(history.shape[1], device=history.device)
    return (cell >= start) & (cell < end) & (history >= 0) & (history < vocab_size)


def edit_seen(logits: Tensor, context: Context, change) -> Tensor:
    """Replace the logits of tokens in scope by `change(their logits, cell ids, mask)`, all [B, T].

    Cells out of scope write to a spare column, so that equal ids always write equal values and order cannot
    matter.
    """
    vocab = logits.shape[-1]
    mask = in_scope(context, vocab)
    ids = torch.where(mask, context.history, vocab)
    spare = torch.nn.functional.pad(logits, (0, 1))
    return spare.scatter_(1, ids, change(spare.gather(1, ids), ids, mask))[:, :vocab]


def counts_at(ids: Tensor, vocab_size: int) -> Tensor:
    """How often each cell's id occurs among the ids [B, T] of its row, float32 [B, T]."""
    counts = torch.zeros(ids.shape[0], vocab_size + 1, device=ids.device)
    return counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=torch.float32)).gather(1, ids)


class Penalty(Edit):
    """Base of the penalties on seen tokens, in a scope and optionally among the last n tokens."""

    needs_history = True
    identity_when_off = True
    auto_scope = "output"

    def pack(self, rows, context):
        strength = [[float(row[self.fields[0]])] for row in rows]
        scopes, windows = [row["penalty_scope"] for row in rows], [row["penalty_window"] for row in rows]
        packed = scope_bounds(scopes, windows, self.auto_scope, context.device)
        return packed | {"strength": torch.tensor(strength, device=context.device)}


class RepetitionPenalty(Penalty):
    """Divide positive and multiply negative logits of seen tokens by r (CTRL, 1909.05858).

    Each token once, however often it occurred. "auto" scope: prompt and output. Off at 1.
    """

    name = "repetition_penalty"
    defaults = {"repetition_penalty": 1.0, "penalty_scope": "auto", "penalty_window": 0}
    auto_scope = "all"

    def edit(self, logits: Tensor, context: Context) -> Tensor:
        r = context.values.strength
        return edit_seen(logits, context, lambda x, ids, mask: torch.where(x < 0, x * r, x / r))


class PresencePenalty(Penalty):
    """Subtract a constant from the logits of seen tokens (OpenAI API). "auto" scope: output only.
    Off at 0.
    """

    name = "presence_penalty"
    defaults = {"presence_penalty": 0.0, "penalty_scope": "auto", "penalty_window": 0}

    def edit(self, logits: Tensor, context: Context) -> Tensor:
        return edit_seen(logits, context, lambda x, ids, mask: x - context.values.strength)


class FrequencyPenalty(Penalty):
    """Subtract a constant times the number of occurrences (OpenAI API). "auto" scope: output only.
    Off at 0.
    """

    name = "frequency_penalty"
    defaults = {"frequency_penalty": 0.0, "penalty_scope": "auto", "penalty_window": 0}

    def edit(self, logits: Tensor, context: Context) -> Tensor:
        strength, vocab = context.values.strength, logits.shape[-1]
        return edit_seen(logits, context, lambda x, ids, mask: x - strength * counts_at(ids, vocab))
