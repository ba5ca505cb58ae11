"""The edits of one step in the form that the fused sampler takes; built on the device, nothing is read back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..kernels import dispatch
from ..kernels.penalties import Penalty, penalised
from ..kernels.sampling.rules import Pointwise, Replaced, touched_bits
from .forms import NEG_INF, Context, Edit

PENALTIES = ("repetition", "presence", "frequency")  # in the order in which `penalised` makes them


class Edits:
    """Sparse, mask and pointwise edits of logits [B, V] float32, for `kernels.sample`.

    Sparse edits work, in the user's order, on a buffer of which only the listed cells are ever read or written; a
    mask reaches these cells at its place in the order, and all others in the sampler. So any order of sparse edits
    and masks gives the bits of one rule after the other. Pointwise edits must stand behind all sparse ones.

    steps: (edit, its view of the step), in order.
    """

    def __init__(self, logits: Tensor, steps: Iterable[tuple[Edit, Context]]):
        self.logits, self.vocab = logits, logits.shape[1]
        self.points: list[Pointwise] = []
        self.buffer = self.bitmask = self.sparse = None
        steps = list(steps)
        rules = penalties_of(steps)
        if rules and dispatch.select("penalised", logits.device) == "triton":
            context = steps[0][1]
            where = context.history, context.lengths, context.prompt_lengths
            self.sparse = penalised(logits, *where, **rules)
            return
        steps = [(edit, view, None if edit.listed is None else edit.listed(view)) for edit, view in steps]
        cells = self._cells([ids for _, _, ids in steps if ids is not None])
        for edit, view, ids in steps:
            if edit.point is not None:
                value = getattr(view.values, edit.fields[0])[:, 0].to(torch.float32)
                self.points.append(Pointwise(value, edit.point, edit.device))
            if edit.mask is not None:
                self._mask(edit.bits(view), cells)
            if ids is not None and cells is not None:
                edit.write(self.buffer, ids, view)
        if cells is not None:
            self._list(cells)

    def _cells(self, lists: list[Tensor]) -> Tensor | None:
        """All listed ids [B, N], with repeats, and the buffer with their logits; None: no edit lists any."""
        # several edits may list the same tensor, and an edit none
        lists = list({id(ids): ids for ids in lists if ids.shape[1]}.values())
        if not lists:
            return None
        cells = lists[0] if len(lists) == 1 else torch.cat(lists, 1)
        self.buffer = torch.empty(len(cells), self.vocab + 1, device=cells.device)
        self.buffer.scatter_(1, cells, self.logits.gather(1, cells.clamp(max=self.vocab - 1)))
        return cells

    def _mask(self, bits: Tensor, cells: Tensor | None) -> None:
        """Exclude the tokens whose bit is clear."""
        self.bitmask = bits if self.bitmask is None else self.bitmask & bits
        if cells is not None:
            allowed = bit_of(bits, cells.clamp(max=self.vocab - 1))
            self.buffer.scatter_(1, cells, self.buffer.gather(1, cells).masked_fill(~allowed, NEG_INF))

    def _list(self, cells: Tensor) -> None:
        """The listed tokens, each once, with their new logits; the bitmask leaves them alone."""
        place = torch.arange(cells.shape[1], dtype=torch.int32, device=cells.device).expand_as(cells)
        first = place.new_empty(len(cells), self.vocab + 1)  # only the cells that are listed matter
        first = first.scatter_reduce_(1, cells, place, "amin", include_self=False).gather(1, cells)
        ids = torch.where((first == place) & (cells < self.vocab), cells, -1).to(torch.int32)
        self.sparse = Replaced(ids, self.buffer.gather(1, cells), touched_bits(ids, self.vocab))
        if self.bitmask is not None:
            self.bitmask = self.bitmask | self.sparse.touched

    def arguments(self) -> dict[str, Any]:
        """The arguments of `kernels.sample` and `kernels.sample_reference.apply_edits`."""
        return {"edits": self.sparse, "bitmask": self.bitmask, "pointwise": tuple(self.points)}

    def at(self, tokens: Tensor) -> Tensor:
        """Edited logits [B] of tokens [B]."""
        ids = tokens[:, None]
        values = self.logits.gather(1, ids)
        if self.sparse is not None and self.buffer is None:
            same = self.sparse.ids == ids
            listed = self.sparse.values.masked_fill(~same, NEG_INF).amax(1, keepdim=True)
            values = torch.where(same.any(1, keepdim=True), listed, values)
        elif self.sparse is not None:
            values = torch.where(bit_of(self.sparse.touched, ids), self.buffer.gather(1, ids), values)
        if self.bitmask is not None:
            values = values.masked_fill(~bit_of(self.bitmask, ids), NEG_INF)
        for point in self.points:
            edited = point.edit(values, ids, point.parameter[:, None])
            values = torch.where(values == NEG_INF, values, edited)
        return values[:, 0]


def penalties_of(steps: list[tuple[Edit, Context]]) -> dict[str, Penalty] | None:
    """The edits of a step as penalties on its text; None where there are others, or another order."""
    found = {}
    for edit, view in steps:
        kind, values = type(edit).__dict__.get("penalty"), view.values
        if kind is None or any(PENALTIES.index(kind) <= PENALTIES.index(other) for other in found):
            return None
        found[kind] = Penalty(values.strength, values.skip_prompt, values.skip_output, values.window)
    return found


def bit_of(words: Tensor, ids: Tensor) -> Tensor:
    """Bits of ids [B, N] in packed rows [B, W] int32, as bool."""
    return ((words.gather(1, ids >> 5) >> (ids & 31)) & 1).bool()


def text_ids(context: Context) -> Tensor:
    """The ids of every row's text, [B, T] int64 with `vocab_size` in cells without a token; made once a step."""
    cache = context.cache
    if "text_ids" not in cache:
        history, vocab = context.history, context.vocab_size
        inside = (history >= 0) & (history < vocab) & (text_cells(context) < context.lengths[:, None])
        cache["text_ids"] = torch.where(inside, history, vocab)
    return cache["text_ids"]


def text_cells(context: Context) -> Tensor:
    """0 ... T - 1, [T] int64; made once a step."""
    cache = context.cache
    if "text_cells" not in cache:
        cache["text_cells"] = torch.arange(context.history.shape[1], device=context.history.device)
    return cache["text_cells"]
