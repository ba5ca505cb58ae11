"""The adapter between a Hugging Face causal LM and the block pool: rows of prompts and what continues them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..cache.feed import Feed
from ..cache.paged import ATTENTION, EMPTY, HYBRID, RECURRENT, PagedCache, layer_plan
from ..cache.sequence import EMBEDDING, Row
from ..errors import CapabilityError
from ..loading.eightbit import EightBitLinear
from .capabilities import Capabilities, Capability
from .filling import Filling, advance
from .passes import LONG, Output, Pass, padded

MANY = 1024  # new tokens of all rows up to which a pass with all their logits is recorded


class Model(Pass):
    """Ragged, paged forward passes over any causal LM whose cache transformers describes.

    Args:
        module: the transformers model, in evaluation mode.
        pool: the block pool to use.
        path: `attention`, `mask` or `rows`, see `Capabilities`.
        prefill_chunk: most prompt tokens in one forward pass.
    """

    # -- rows

    def records(self, rows: int) -> bool:
        """Whether a pass over so many rows, a token each, is recorded."""
        return self.recorded is not None and not self.hooked and rows <= MANY

    def prefill(self, tokens, embeddings=None, *, hidden=False, every=False, room=0) -> tuple[Row, Output]:
        """A new row that holds a prompt, computed alone and unpadded.

        Args:
            tokens: the prompt's ids, at least one.
            embeddings: `[T, D]` instead; `tokens` then only gives the length.
            room: blocks that the row may grow to, a hint for placing it.
            hidden, every: return hidden states, or logits, of every prompt token. Turns prefix sharing off.

        Returns:
            The row, and its Output: logits `[1, 1, V]`, or `[1, T, V]` with `every`.
        """
        prompt = Filling(tokens, embeddings, room, hidden, every)
        if not self.recurrent:
            self.fill([prompt])
            return prompt.row(), prompt.output()
        self.layout = PagedCache(self.plan, self.pool, self.path)
        prompt.table = self._writable(self.pool.table(), 0, len(tokens), room)
        given = None if embeddings is None else self.embedded(embeddings[None])
        feed = Feed.build([tokens], [0], [prompt.table], self.pool.block_size, self.device, given)
        return prompt.row(), self.forward(feed, self.layout, hidden=hidden, last_only=not every)

    def fill(self, prompts: Sequence[Filling]) -> None:
        """Compute prompts, several in a pass where the model packs; not for a recurrent one."""
        while waiting := [prompt for prompt in prompts if prompt.left]:
            advance(self, waiting, self.prefill_chunk if self.shares_prefixes else waiting[0].left)
        for prompt in prompts:
            if prompt.claim:
                self.pool.unclaim(prompt.claim)

    def extend(
        self, rows, tokens, states=(), *, hidden=False, embeddings=None
    ) -> tuple[tuple[Row, ...], Output]:
        """Feed each row its own number of tokens.

        Args:
            rows: the rows to continue; they stay as they are.
            tokens: a list of at least one id for each row.
            states: recurrent states of the rows, `[B, ...]` each.
            hidden: return hidden states.
            embeddings: `[B, n, D]` fed in place of the tokens' own.

        Returns:
            The longer rows, and an Output with logits `[B, n, V]`, n the largest count.
        """
        if self.restart and any(
            r.length <= self.restart < r.length + len(t) for r, t in zip(rows, tokens, strict=True)
        ):
            return self._recompute(rows, tokens, hidden)
        if embeddings is not None:
            if self.restart:
                raise CapabilityError(
                    "this model may recompute its keys from token ids: embeddings cannot be fed"
                )
            embeddings = self.embedded(embeddings)
        if self.recurrent:
            return self._extend_stepwise(rows, tokens, states, hidden, embeddings)
        tables, out = self.branch(rows, tokens, None, hidden=hidden, embeddings=embeddings)
        return longer_rows(rows, tables, tokens), out

    def branch(
        self, rows, tokens, parents, *, hidden=False, embeddings=None, ids=None
    ) -> tuple[list, Output]:
        """Feed each row a tree of drafts behind what it holds, or with `parents=None` a line.

        Args:
            rows, tokens, hidden, embeddings: as for `extend`.
            parents: for each row the place of every token's parent among them, before it; -1 for none.
            ids: `[B]` single tokens on the device, in place of `tokens`, where passes are recorded.

        Returns:
            Tables that hold the drafts in the cells behind each row, and an Output with logits `[B, n, V]`.
        """
        begins = [row.length for row in rows]
        tables = [self._writable(r.table, r.length, len(t)) for r, t in zip(rows, tokens, strict=True)]
        width = max(map(len, tokens))
        if embeddings is None and width <= LONG and self.records(width * len(rows)):
            return tables, self.recorded.grid(
                self, tokens, begins, tables, parents=parents, hidden=hidden, ids=ids
            )
        size, device = self.pool.block_size, self.device
        return tables, self.forward(
            Feed.build(tokens, begins, tables, size, device, embeddings, parents), hidden=hidden
        )

    def embedded(self, embeddings):
        """Embeddings on the device and in the dtype of the model's own."""
        words = self.module.get_input_embeddings().weight
        return embeddings.to(device=words.device, dtype=words.dtype)

    def _writable(self, table, start, count, room=0):
        return self.pool.writable(table, start, count, room) if self.paged else table

    def _extend_stepwise(self, rows, tokens, states, hidden, embeddings=None):
        """One token at a time: the only way that is right for every recurrent layer."""
        rows, states = list(rows), tuple(t.clone() for t in states)
        logits, layers, steps = [], [], []
        for j in range(max(len(t) for t in tokens)):
            active = [i for i, t in enumerate(tokens) if j < len(t)]
            where = torch.tensor(active, device=states[0].device)
            cache = PagedCache(self.plan, self.pool, self.path)
            cache.load_states(tuple(t.index_select(0, where) for t in states), self.layout)
            picked, new = [rows[i] for i in active], [[tokens[i][j]] for i in active]
            tables = [self._writable(r.table, r.length, 1) for r in picked]
            given = None if embeddings is None else embeddings[where, j : j + 1]
            starts = [r.length for r in picked]
            feed = Feed.build(new, starts, tables, self.pool.block_size, self.device, given)
            out = self.forward(feed, cache, hidden=hidden)
            states = tuple(t.index_copy(0, where, s) for t, s in zip(states, out.states, strict=True))
            steps.append(states)
            for i, row in zip(active, longer_rows(picked, tables, new), strict=True):
                rows[i] = row
            logits.append(_scattered(out.logits, where, len(rows)))
            layers.append([_scattered(h, where, len(rows)) for h in out.hidden or ()])
        joined = tuple(torch.cat(parts, 1) for parts in zip(*layers, strict=True)) if hidden else None
        return tuple(rows), Output(torch.cat(logits, 1), joined, states, tuple(steps))

    def _recompute(self, rows, tokens, hidden):
        """Prefill again where a row passes the length at which the model changes all its rotations."""
        longer, logits, layers = [], [], []
        width = max(len(t) for t in tokens)
        for row, new in zip(rows, tokens, strict=True):
            if EMBEDDING in row.history:
                raise CapabilityError(
                    f"a prompt of embeddings cannot grow past {self.restart} tokens: this model then recomputes "
                    "every key from token ids"
                )
            if row.length <= self.restart < row.length + len(new):
                fresh, out = self.prefill(row.history.tolist() + list(new), hidden=hidden, every=True)
                fresh = Row(fresh.table, fresh.history, row.prompt_length)
                keep = slice(row.length, None)
            else:
                (fresh,), out = self.extend([row], [new], hidden=hidden)
                keep = slice(None)
            longer.append(fresh)
            logits.append(padded(out.logits[:, keep], width))
            layers.append([padded(h[:, keep], width) for h in out.hidden or ()])
        joined = tuple(torch.cat(parts) for parts in zip(*layers, strict=True)) if hidden else None
        return tuple(longer), Output(torch.cat(logits), joined)

    # -- what it can do

    def capabilities(self) -> Capabilities:
        """What this model supports on its path."""
        yes = Capability(True)
        note = {
            "attention": "",
            "mask": "its own attention over gathered cells",
            "rows": "one forward pass per row: it takes positions from the whole batch",
        }[self.path]
        if not self.paged:
            note = "recurrent states only, no keys and values"
        if self._ropes:
            note = "rotations are computed row by row"
        extend = Capability(True, "one forward pass per token: recurrent layers" if self.recurrent else "")
        tree = Capability(self.packs, "" if self.packs else self._no_tree())
        return Capabilities(self.path, Capability(True, note), yes, yes, extend, tree, self._graph())

    def _no_tree(self) -> str:
        """Why drafts cannot branch: positions of a tree are not those of its cells."""
        if self.recurrent:
            return "recurrent layers"
        if self.path != "attention":
            return f"{self.path} path: its masks know lines only"
        return (
            "rotations depend on the longest row" if self._ropes or self.restart else "it takes no positions"
        )

    def _graph(self) -> Capability:
        if self.path == "rows":
            return Capability(False, "rows path: the host loops over rows")
        if self._ropes or self.restart:
            return Capability(False, "rotations depend on lengths that only the host knows")
        reason = uncapturable(self.module)
        if reason:
            return Capability(False, reason)
        return Capability(True, "captured on CUDA; the same program runs uncaptured elsewhere")


def uncapturable(module) -> str:
    """What in a model's layers keeps its step from being captured, in words; empty if nothing does."""
    places = {p.device for p in module.parameters()}
    if len(places) > 1:
        return f"the model lies on {len(places)} devices, and a graph belongs to one"
    passed_by = {part.layer for part in module.modules() if isinstance(part, EightBitLinear)}
    for layer in module.modules():
        state = getattr(layer, "state", None)  # bitsandbytes' Linear8bitLt
        threshold = getattr(state, "threshold", 0) if type(layer).__name__ == "Linear8bitLt" else 0
        if threshold > 0 and layer not in passed_by:
            return (
                f"bitsandbytes int8 asks the host for outliers above {threshold:g} in every layer; "
                "llm_int8_threshold=0 does not, nor do nf4 and fp4"
            )
    return ""


def longer_rows(rows, tables, tokens):
    """The rows with their new tokens and blocks."""
    return tuple(
        Row(table, row.history.extended(new), row.prompt_length, row.session)
        for row, table, new in zip(rows, tables, tokens, strict=True)
    )


def _scattered(part, where, rows):
    full = part.new_zeros(rows, *part.shape[1:])
    return full.index_copy_(0, where.to(part.device), part)


def supported_layers(config) -> str:
    """Empty when every layer type is known, else the reason why the model cannot use the pool."""
    known = ATTENTION | RECURRENT | HYBRID | EMPTY
    unknown = sorted({kind for kind, _ in layer_plan(config)} - known)
    return f"layer type {', '.join(unknown)} is not known" if unknown else ""
