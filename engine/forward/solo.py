"""Models that cannot share a forward pass or a pool: one sequence at a time through transformers' own cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache

from ..cache.pool import BlockPool
from ..cache.sequence import History, Row
from ..errors import CapabilityError
from .capabilities import Capabilities, Capability
from .model import longer_rows
from .passes import Output, accepted, padded
from .twin.twin import capture_hidden_states


@dataclass(eq=False)
class Session:
    """A transformers cache and how many tokens went into it; the row of that length owns it."""

    cache: object
    length: int = 0


class SoloModel:
    """The same operations as `Model`, always right, never batched.

    A row keeps the cache that made it. Whoever continues a row whose cache has moved on pays for computing the row
    again from its tokens, so old States stay valid.

    Args:
        module: the transformers model, or its twin.
        pool: marks the rows as this model's; no cell of it is used.
        reason: why it is run this way.
        exclusive: the model keeps state in its own modules, so only the cache used last is usable.
    """

    path, restart, recurrent, paged, shares_prefixes, alone = "solo", None, False, False, False, True
    compiled, recorded, packs, hooked = None, None, False, False

    def __init__(self, module, pool: BlockPool, reason: str, exclusive: bool = False):
        self.module, self.pool, self.reason, self.exclusive = module, pool, reason, exclusive
        self.config = module.config.get_text_config(decoder=True)
        self._arguments = accepted(module)
        self._live: Session | None = None

    def records(self, rows: int) -> bool:
        """See `Model.records`."""
        return False

    @property
    def device(self) -> torch.device:
        """Where input ids go."""
        return self.module.get_input_embeddings().weight.device

    def prefill(self, tokens, embeddings=None, *, hidden=False, every=False, room=0) -> tuple[Row, Output]:
        """See `Model.prefill`."""
        session = self._fresh()
        out = self._feed(session, tokens, embeddings, hidden)
        history = History(tokens if embeddings is None else [-1] * len(tokens))
        if not every:
            out = Output(out.logits[:, -1:], out.hidden)
        return Row(self.pool.table(), history, len(tokens), session), out

    def extend(
        self, rows, tokens, states=(), *, hidden=False, embeddings=None
    ) -> tuple[tuple[Row, ...], Output]:
        """See `Model.extend`; rows are computed one after the other."""
        if embeddings is not None:
            raise CapabilityError("this model recomputes its rows from token ids: embeddings cannot be fed")
        longer, logits, layers = [], [], []
        width = max(len(t) for t in tokens)
        for row, new in zip(rows, tokens, strict=True):
            session = self._session(row)
            parts = [self._feed(session, [token], None, hidden) for token in new]
            logits.append(padded(torch.cat([p.logits for p in parts], 1), width))
            if hidden:
                joined = [torch.cat(h, 1) for h in zip(*(p.hidden for p in parts), strict=True)]
                layers.append([padded(h, width) for h in joined])
            row = Row(row.table, row.history, row.prompt_length, session)
            longer += longer_rows([row], [row.table], [new])
        joined = tuple(torch.cat(parts) for parts in zip(*layers, strict=True)) if hidden else None
        return tuple(longer), Output(torch.cat(logits), joined)

    def _session(self, row: Row) -> Session:
        session = row.session
        if session.length == row.length and (not self.exclusive or self._live is session):
            return session
        fresh = self._fresh()
        self._feed(fresh, row.history.tolist(), None, False)
        return fresh

    def _fresh(self) -> Session:
        if self.exclusive:
            # A pass without cache is what makes such a model forget the sequence before.
            self.module(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)
        return Session(DynamicCache(config=self.config))

    def _feed(self, session, tokens, embeddings, hidden) -> Output:
        positions = torch.arange(session.length, session.length + len(tokens), device=self.device)[None]
        arguments = {"use_cache": True}
        if embeddings is None:
            arguments["input_ids"] = torch.tensor([list(tokens)], device=self.device)
        else:
            words = self.module.get_input_embeddings().weight
            arguments["inputs_embeds"] = embeddings[None].to(device=words.device, dtype=words.dtype)
        arguments["cache_params" if "cache_params" in self._arguments else "past_key_values"] = session.cache
        if "position_ids" in self._arguments:
            arguments["position_ids"] = positions
        if hidden:
            capture_hidden_states(self.module)
            arguments["output_hidden_states"] = True
        out = self.module(**arguments)
        session.length += len(tokens)
        self._live = session
        return Output(out.logits.float(), tuple(out.hidden_states) if hidden else None)

    def capabilities(self) -> Capabilities:
        """What this model supports: everything but sharing."""
        no = Capability(False, self.reason)
        slow = Capability(True, "an older State is computed again from its tokens")
        return Capabilities("solo", no, slow, slow, Capability(True, "one forward pass per token"), no, no)
