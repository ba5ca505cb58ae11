"""What a model says of its own ends: the tokens that end a text, and how long one may be."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch

from ..errors import ParameterError

log = logging.getLogger("handloom")
UNBOUNDED = 1 << 20  # positions of a model that names no limit


def eos_token_ids(model, tokenizer, given: Iterable[int] | None) -> frozenset[int]:
    """The ids that end a text: those given, or the generation config's alone, as in transformers."""
    if given is not None:
        return frozenset(int(i) for i in given)
    source = getattr(model, "generation_config", None) or model.config
    ids = source.eos_token_id
    found = frozenset([ids] if isinstance(ids, int) else ids or ())
    end = getattr(tokenizer, "eos_token_id", None)
    if end is not None and end not in found:
        log.info(
            "the tokenizer's end token %d ends no text, because the generation config names %s; "
            "Engine(eos_token_ids=...) adds it",
            end,
            sorted(found) or "none",
        )
    return found


def longest(model, max_length: int | None) -> int:
    """Most tokens of prompt and output together: what is asked for, checked, or else the model's own limit."""
    config = model.config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")
    limits = [getattr(config, name, None) for name in names]
    own = next((n for n in limits if isinstance(n, int) and n > 0), UNBOUNDED)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":
        own = int(own * rope.get("factor", 1.0))
    if max_length is None:
        return own
    if not isinstance(max_length, int) or max_length < 2:
        raise ParameterError(f"max_length={max_length!r} must be a whole number of at least 2")
    if max_length > own:
        if _learned_positions(model, own):
            raise ParameterError(
                f"max_length={max_length} is beyond the {own} positions this model has learned"
            )
        log.warning("max_length=%d is beyond the %d tokens this model was made for", max_length, own)
    return max_length


def _learned_positions(model, limit: int) -> bool:
    words = model.get_input_embeddings()
    tables = (m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m is not words)
    # Some models keep a few rows in front for padding positions.
    return any(limit <= table.num_embeddings <= limit + 2 for table in tables)
