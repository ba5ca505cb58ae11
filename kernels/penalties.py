"""Penalties on the tokens of a text, as an edit list: torch reference, and the choice between it and Triton."""

from typing import NamedTuple

import torch

from . import dispatch
from .sampling.rules import Replaced, touched_bits

LONGEST = 1 << 20  # tokens of a history that the kernel can count


class Penalty(NamedTuple):
    """One penalty, its strength and scope for every row.

    strength: float32 [B, 1]. skip_prompt, skip_output: bool [B, 1], parts of the text that do not count. window: int64
    [B, 1], only so many of the last tokens count; 0 for all.
    """

    strength: torch.Tensor
    skip_prompt: torch.Tensor
    skip_output: torch.Tensor
    window: torch.Tensor


def penalised(
    logits, history, lengths, prompt_lengths, repetition=None, presence=None, frequency=None, kernels=None
):
    """The tokens of every row's text, each once, with their logits after three penalties, in this order.

    Args:
        logits: float32 [B, V]. history: int64 [B, T], T < LONGEST; ids outside 0 ... V - 1 are none.
        lengths, prompt_lengths: int64 [B], tokens of each history that are text, and those of its prompt.
        repetition: Penalty or None; divides positive and multiplies negative logits (arXiv 1909.05858).
        presence: Penalty or None; is subtracted. frequency: the same, times the number of occurrences.
        kernels: "auto", "triton", "torch" or None (see `dispatch`).

    Returns:
        Replaced, with T columns. Values of padding are arbitrary.
    """
    given = logits, history, lengths, prompt_lengths, repetition, presence, frequency
    if dispatch.select("penalised", logits.device, kernels) == "torch":
        return penalised_reference(*given)
    from .penalties_triton import launch

    return launch(*given)


def penalised_reference(
    logits, history, lengths, prompt_lengths, repetition=None, presence=None, frequency=None
):
    """Defines `penalised`, whose arguments it shares."""
    rows, vocab = logits.shape
    place = torch.arange(history.shape[1], device=logits.device).expand_as(history)
    text = (history >= 0) & (history < vocab) & (place < lengths[:, None])
    cells = torch.where(text, history, vocab)
    first = torch.full((rows, vocab + 1), history.shape[1], device=logits.device)
    first.scatter_reduce_(1, cells, place, "amin")
    ids = torch.where(text & (first.gather(1, cells) == place), history, -1).to(torch.int32)
    values = logits.gather(1, cells.clamp(max=vocab - 1))
    for number, rule in enumerate((repetition, presence, frequency)):
        if rule is None:
            continue
        start = torch.where(rule.skip_prompt, prompt_lengths[:, None], 0)
        windowed = torch.maximum(start, lengths[:, None] - rule.window)
        start = torch.where(rule.window > 0, windowed, start)
        end = torch.where(rule.skip_output, prompt_lengths[:, None], lengths[:, None])
        counts = torch.zeros(rows, vocab + 1, device=logits.device)
        counts.scatter_add_(1, cells, ((place >= start) & (place < end)).float())
        counts, by = counts.gather(1, cells), rule.strength
        if number == 0:
            changed = torch.where(values < 0, values * by, values / by)
        else:
            changed = values - (by if number == 1 else by * counts)
        values = torch.where(counts > 0, changed, values)
    return Replaced(ids, values, touched_bits(ids, vocab))
