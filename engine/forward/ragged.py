"""What lets transformers' own parts answer for rows of different length: masks, and rotations of long contexts."""

from __future__ import annotations

import torch
from torch import nn
from transformers.masking_utils import AttentionMaskInterface

from .twin.twin import replace


def install_mask_hook() -> None:
    """Let transformers' own mask functions answer for rows of different length.

    The registered functions are wrapped once for the whole process; a call whose query offset is not a tensor
    `[B, Q]` passes straight through, so `model.generate` is not affected.
    """
    for name, additive in (("sdpa", False), ("eager", True)):
        original = AttentionMaskInterface._global_mapping[name]
        if not getattr(original, "handloom", False):
            AttentionMaskInterface.register(name, _ragged_mask(original, additive))


def _ragged_mask(original, additive: bool):
    def mask(*args, **kwargs):
        positions = kwargs.get("q_offset", 0)
        if not (torch.is_tensor(positions) and positions.dim() == 2):
            return original(*args, **kwargs)
        device, (rows, queries) = positions.device, positions.shape
        batch = torch.arange(rows, device=device)[:, None, None, None]
        head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
        cell = torch.arange(kwargs["kv_length"], device=device)[None, None, None]
        seen = kwargs["mask_function"](batch, head, positions[:, None, :, None], cell)
        seen = seen.expand(rows, 1, queries, kwargs["kv_length"])
        if not additive:
            return seen
        dtype = kwargs["dtype"]
        return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)

    mask.handloom = True
    return mask


def row_wise_ropes(module) -> list[RowWise]:
    """Rotary embeddings whose frequencies depend on the longest row; in the twin they answer row by row from now on."""
    found = [part for part in module.modules() if isinstance(part, RowWise)]
    wrapped = {id(part.part) for part in found}
    for part in list(module.modules()):
        kinds = getattr(part, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        changing = any(kind and ("dynamic" in kind or kind == "longrope") for kind in kinds)
        if changing and id(part) not in wrapped and not isinstance(part, RowWise):
            found.append(RowWise(part))
            replace(module, part, found[-1])
    return found


class RowWise(nn.Module):
    """A rotary embedding that gives each row the rotation it would have alone.

    Args:
        part: the twin's rotary embedding. It writes its frequencies to its buffers, so those become its own.
    """

    def __init__(self, part: nn.Module):
        super().__init__()
        part.__dict__["_buffers"] = dict(part._buffers)
        self.part = part

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("part"), name)

    def forward(self, x, position_ids, *args, **kwargs):
        """Cosines and sines of `position_ids [B, Q]`."""
        kinds = self.part.rope_type
        prefixes = [f"{kind}_" for kind in kinds] if isinstance(kinds, dict) else [""]
        prefixes = [p for p in prefixes if hasattr(self.part, f"{p}original_inv_freq")]
        rows = []
        for positions in position_ids.split(1):
            # The frequencies of a longer neighbour must not outlive its turn.
            _reset_rope(self.part, prefixes, x.device)
            rows.append(self.part(x, positions, *args, **kwargs))
        return tuple(torch.cat(parts) for parts in zip(*rows, strict=True))


def _reset_rope(part, prefixes, device) -> None:
    for prefix in prefixes:
        original = getattr(part, f"{prefix}original_inv_freq").to(device).clone()
        setattr(part, f"{prefix}max_seq_len_cached", part.original_max_seq_len)
        setattr(part, f"{prefix}inv_freq", original)


def rope_switch(config) -> int | None:
    """The length beyond which a longrope model uses other frequencies for every position, or None."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope] + [v for v in rope.values() if isinstance(v, dict)]
    for kind in kinds:
        if kind.get("rope_type") == "longrope":
            return getattr(config, "original_max_position_embeddings", None) or kind.get(
                "original_max_position_embeddings"
            )
    return None
