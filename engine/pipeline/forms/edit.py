"""Edits: rules that change logits one by one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels.sampling.rules import unpack_mask
from .context import Context
from .processor import NEG_INF, Processor


class Edit(Processor):
    """A rule that changes logits one by one. In one of three forms it runs in the fused sampler; write

      sparse     listed(context) -> [B, N] int64: ids whose logits may change, `vocab_size` where there is none;
                 change(values, ids, context) -> [B, N]: their new logits. Equal ids must get equal values.
      mask       mask(context) -> [B, ceil(V / 32)] int32: a clear bit id % 32 of word id // 32 excludes a token.
      pointwise  point(logits, ids, value) -> logits: each logit alone, from its id [V] and the rule's first
                 parameter [B, 1]; the off value must give back the same bits, and -inf stays -inf in any case.
                 `device`: the same as a Triton function (logit, id, value) -> logit, for CUDA.

    or, for anything else, `edit(logits, context)`, which runs in torch. A rule may be sparse and a mask; the mask
    acts first. Parameters are `context.values.<field>`, each [B, 1]; rows that are off are handled here.

    Where the defaults are too slow, a sparse rule may replace `write`, and a mask `exclude`: both change a private
    buffer in place, and then have to leave rows alone that are off. `identity_when_off = True` says that the off
    value gives back the same bits, which saves a selection.
    """

    kind = "edit"
    leaves_off_rows = True
    identity_when_off = False
    listed = mask = point = None
    device: Any = None
    penalty: str | None = None  # which one of `kernels.penalties` this class is

    @functools.cached_property
    def form(self) -> str:
        """ "sparse", "mask", "sparse mask", "pointwise", or "dense" for an edit in none of these forms."""
        own = type(self)
        if own.edit is not Edit.edit or own.apply is not Edit.apply:
            return "dense"
        if self.point is not None:
            return "pointwise"
        names = ("sparse", self.listed), ("mask", self.mask)
        return " ".join(name for name, method in names if method is not None) or "dense"

    @functools.cached_property
    def in_place(self) -> bool:
        """Whether the edit can be made in a buffer of its caller."""
        return self.form not in ("dense", "pointwise")

    def unfused(self, device_type: str = "cpu", rows: Sequence[dict] = ()) -> str:
        """Why this edit cannot run in the fused sampler; empty when it can. rows: settings of the rows in use."""
        if self.form == "pointwise":
            return "" if device_type == "cpu" or self.device is not None else "it has no device function"
        if self.in_place:
            return ""
        formless = self.listed is None and self.mask is None and self.point is None
        return "it is neither sparse, a mask, nor pointwise" if formless else "it has an edit() of its own"

    def change(self, values: Tensor, ids: Tensor, context: Context) -> Tensor:
        """New logits [B, N] of the tokens ids [B, N] from their logits; a sparse edit defines it, or `write`."""
        raise NotImplementedError(
            f"{type(self).__name__} lists tokens, and defines neither change() nor write()"
        )

    def write(self, buffer: Tensor, ids: Tensor, context: Context) -> None:
        """Make a sparse edit in `buffer` [B, V + 1], in which only the logits of `ids` may be read or written.

        ids: what `listed` gave; its entries of V stand for the last column, which nobody reads.
        """
        rows_on = context.values.rows_on
        if rows_on is not None and not self.identity_when_off:
            ids = torch.where(rows_on, ids, buffer.shape[1] - 1)
        buffer.scatter_(1, ids, self.change(buffer.gather(1, ids), ids, context))

    def exclude(self, buffer: Tensor, context: Context) -> None:
        """Set what the mask excludes to -inf in `buffer` [B, V + 1]."""
        allowed = unpack_mask(self.bits(context), buffer.shape[1] - 1)
        buffer[:, :-1].masked_fill_(~allowed, NEG_INF)

    def bits(self, context: Context) -> Tensor:
        """The mask with all bits set in rows that are off."""
        mask, rows_on = self.mask(context), context.values.rows_on
        return mask if rows_on is None or self.identity_when_off else torch.where(rows_on, mask, -1)

    def edit_in_place(self, buffer: Tensor, context: Context) -> None:
        """Make a sparse or mask edit in `buffer` [B, V + 1] of logits and one column to spare."""
        if self.mask is not None:
            self.exclude(buffer, context)
        if self.listed is not None:
            self.write(buffer, self.listed(context), context)

    def edit(self, logits: Tensor, context: Context) -> Tensor:
        """Edited logits [B, V] float32; a rule that replaces it runs in torch."""
        if self.point is not None:
            ids = torch.arange(logits.shape[1], device=logits.device)
            edited = self.point(logits, ids, getattr(context.values, self.fields[0]))
            return torch.where(logits == NEG_INF, logits, edited)
        if self.listed is None and self.mask is None:
            raise NotImplementedError(f"{type(self).__name__} defines no edit()")
        buffer = torch.nn.functional.pad(logits, (0, 1))
        self.edit_in_place(buffer, context)
        return buffer[:, :-1]

    def apply(self, logits: Tensor, context: Context) -> Tensor:
        result = self.edit(logits, context)
        rows_on = context.values.rows_on
        if rows_on is None or self.identity_when_off or self.in_place:
            return result
        return torch.where(rows_on, result, logits)
