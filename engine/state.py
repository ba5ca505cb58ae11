"""State: a batch of sequences at one moment, as an immutable value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from .cache.drafts import Drafts
from .cache.pool import BlockPool
from .cache.sequence import Row
from .cache.transfer import upload
from .errors import CapabilityError, HandloomError


@dataclass(frozen=True, eq=False, repr=False)
class State:
    """A batch of `B` sequences; keep it and it can be continued at any time, any number of times.

    Args:
        rows: the sequences.
        logits: `[B, V]` float32, for the token after each row's last one.
        all_logits: `[B, n, V]` float32 after each token of the last `extend`, or None.
        counts: how many tokens the forward that made this State fed to each row.
        hidden_states: one `[B, n, D]` per layer (embeddings first) when they were asked for.
        states: recurrent states, `[B, ...]` each; empty for models that have none.
        steps: recurrent states before the last `extend` and after each of its tokens, for `keep`.
        before: `[B, V]` the logits before the last `extend`, for `keep`.
        drafts: the tree that `Engine.tree_step` scored, for `keep_path`; the rows are still those before it.
    """

    rows: tuple[Row, ...]
    logits: torch.Tensor
    all_logits: torch.Tensor | None = None
    counts: tuple[int, ...] = ()
    hidden_states: tuple[torch.Tensor, ...] | None = None
    states: tuple[torch.Tensor, ...] = ()
    steps: tuple[tuple[torch.Tensor, ...], ...] = ()
    before: torch.Tensor | None = None
    drafts: Drafts | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"State(rows={len(self)}, lengths={[row.length for row in self.rows]})"

    @property
    def lengths(self) -> torch.Tensor:
        """`[B]` int64 tokens of each row, which is the position of its next token."""
        return upload([row.length for row in self.rows], self.logits.device)

    @property
    def prompt_lengths(self) -> torch.Tensor:
        """`[B]` int64 tokens of each row's prompt."""
        return upload([row.prompt_length for row in self.rows], self.logits.device)

    @property
    def tokens(self) -> list[list[int]]:
        """Token ids of each row, prompt included; -1 where an embedding was given."""
        return [row.history.tolist() for row in self.rows]

    @property
    def new_tokens(self) -> list[list[int]]:
        """Token ids of each row behind its prompt."""
        return [row.history.tolist()[row.prompt_length :] for row in self.rows]

    @classmethod
    def concat(cls, states: Sequence[State]) -> State:
        """The rows of several States of one engine, in order; what `keep` goes back to is forgotten.

        Args:
            states: at least one; empty ones add nothing. Hidden states stay where all of them have some.
        """
        states = list(states)
        if not states:
            raise HandloomError("concat takes at least one State")
        filled = [state for state in states if len(state)] or states[:1]
        for other in filled[1:]:
            check_owner(other, filled[0].rows[0].table.pool)
        if len(filled) == 1:
            return replace(filled[0], all_logits=None, steps=(), before=None, drafts=None)
        hidden = None
        if all(state.hidden_states is not None for state in filled):
            layers = zip(*(state.hidden_states for state in filled), strict=True)
            hidden = tuple(stacked(layer) for layer in layers)
        return cls(
            rows=tuple(row for state in filled for row in state.rows),
            logits=torch.cat([state.logits for state in filled]),
            counts=tuple(count for state in filled for count in state.counts),
            hidden_states=hidden,
            states=tuple(torch.cat(parts) for parts in zip(*(s.states for s in filled), strict=True)),
        )

    def select(self, index) -> State:
        """Fork, reorder or drop rows; keys and values are shared, not copied.

        Args:
            index: row numbers, repeated ones fork, none give an empty State; or a `[B]` bool mask.
        """
        picked = torch.as_tensor(index)
        if picked.is_floating_point() and picked.numel():
            raise HandloomError(f"rows are chosen by whole numbers or a bool mask, got {index!r}")
        if picked.dtype == torch.bool:
            if picked.shape != (len(self),):
                raise HandloomError(f"a mask of shape {list(picked.shape)} for a State of {len(self)} rows")
            picked = picked.nonzero().flatten()
        numbers = [int(i) for i in picked.flatten().tolist()]
        wrong = [i for i in numbers if not -len(self) <= i < len(self)]
        if wrong:
            raise HandloomError(f"row {wrong[0]} is not in a State of {len(self)} rows")
        numbers = [i % len(self) for i in numbers]
        where = upload(numbers, self.logits.device)

        def take(tensors):
            return tuple(t.index_select(0, where.to(t.device)) for t in tensors)

        return State(
            rows=tuple(self.rows[i] for i in numbers),
            logits=self.logits.index_select(0, where),
            all_logits=None if self.all_logits is None else self.all_logits.index_select(0, where),
            counts=tuple(self.counts[i] for i in numbers),
            hidden_states=None if self.hidden_states is None else take(self.hidden_states),
            states=take(self.states),
            steps=tuple(take(step) for step in self.steps),
            before=None if self.before is None else self.before.index_select(0, where),
            drafts=None if self.drafts is None else self.drafts.select(numbers),
        )

    def keep(self, counts) -> State:
        """Keep only the first `counts[i]` tokens of the last `extend` in row i, as after a speculative check.

        Args:
            counts: `[B]` int, from 0 (before the extension) to the number of tokens that row was extended by.
        """
        numbers = [int(c) for c in torch.as_tensor(counts).tolist()]
        if self.drafts is not None:
            raise HandloomError("keep goes back along a line; of a tree keep_path commits one path")
        if self.all_logits is None or len(numbers) != len(self):
            raise HandloomError(
                f"keep needs a State made by extend and one count per row, got {len(numbers)} counts"
            )
        for i, (count, fed) in enumerate(zip(numbers, self.counts, strict=True)):
            if not 0 <= count <= fed:
                raise HandloomError(
                    f"keep: row {i} was extended by {fed} tokens, count {count} is not in 0..{fed}"
                )
        assert self.before is not None
        kept = upload(numbers, self.logits.device)
        each = torch.arange(len(self), device=self.logits.device)
        logits = self.all_logits[each, (kept - 1).clamp(min=0)]
        if 0 in numbers:
            logits = torch.where(kept[:, None] > 0, logits, self.before)
        states = self.states
        if self.steps:
            states = tuple(
                torch.stack([after[count][row] for row, count in enumerate(numbers)])
                for after in zip(*self.steps, strict=True)
            )
        rows = tuple(
            row.cut(row.length - fed + count)
            for row, fed, count in zip(self.rows, self.counts, numbers, strict=True)
        )
        return replace(self, rows=rows, logits=logits, counts=tuple(numbers), states=states)

    @torch.no_grad()
    def keep_path(self, paths) -> State:
        """Commit one path of the tree that `Engine.tree_step` scored; the others are forgotten, and this State stays.

        Args:
            paths: for each row the places of its drafts along the path, from a child of the row's last token on; empty
                to commit none. A tensor `[B, m]` may end rows with -1.

        Returns:
            A State as `extend` would have made it from the paths' tokens.
        """
        if self.drafts is None:
            raise HandloomError("keep_path needs a State made by tree_step")
        given = paths.tolist() if torch.is_tensor(paths) else [list(path) for path in paths]
        chosen = [[int(place) for place in path if place != -1] for path in given]
        if not self.rows:
            return self._along(self.drafts.along((), chosen), chosen)
        pool = self.rows[0].table.pool
        with pool.turns("keep_path", pool.owner):
            rows = self.drafts.along(self.rows, chosen)
        return self._along(rows, chosen)

    def _along(self, rows, chosen) -> State:
        """What was computed at the drafts of each row's path."""
        device, counts = self.logits.device, [len(path) for path in chosen]
        width = max(1, *counts)
        assert self.all_logits is not None  # with drafts there are
        assert self.before is not None
        where = upload([path + [0] * (width - len(path)) for path in chosen], device)
        each = torch.arange(len(rows), device=device)[:, None]
        logits = self.all_logits[each, where]
        final = logits[each[:, 0], upload([max(count - 1, 0) for count in counts], device)]
        if 0 in counts:
            final = torch.where(upload(counts, device)[:, None] > 0, final, self.before)
        layers = self.hidden_states
        if layers is not None:
            layers = tuple(h[each.to(h.device), where.to(h.device)] for h in layers)
        return replace(
            self, rows=tuple(rows), logits=final, all_logits=logits, counts=tuple(counts), hidden_states=layers,
            drafts=None,
        )  # fmt: skip

    def hidden(self, layer: int = -1) -> torch.Tensor:
        """`[B, n, D]` hidden states of the tokens that the last forward fed, rows left-aligned, zero beyond `counts`.

        So `hidden()[:, -1]` is a zero vector for the shorter rows of a ragged batch: `last_hidden` is what is meant.

        Args:
            layer: index into the model's hidden states: 0 the embeddings, -1 the last (normed) layer.

        Raises:
            HandloomError: they were not asked for with `hidden=True`, or there is no such layer.
        """
        states = self._layer(layer)
        fed = upload(list(self.counts), states.device)[:, None]
        real = torch.arange(states.shape[1], device=states.device) < fed
        return states.masked_fill(~real[..., None], 0)

    def last_hidden(self, layer: int = -1) -> torch.Tensor:
        """`[B, D]` hidden states of each row's last token, from which its `logits` come; see `hidden`."""
        states = self._layer(layer)
        if 0 in self.counts:
            raise HandloomError(
                f"row {self.counts.index(0)} keeps nothing of the last extension: its last token came before"
            )
        last = upload([count - 1 for count in self.counts], states.device)
        return states[torch.arange(len(self), device=states.device), last]

    def _layer(self, layer: int) -> torch.Tensor:
        if self.hidden_states is None:
            raise HandloomError("hidden states were not kept: pass hidden=True to prefill, step or extend")
        count = len(self.hidden_states)
        if not isinstance(layer, int) or not -count <= layer < count:
            raise HandloomError(
                f"layer={layer!r} is none of the {count} hidden states: {-count} to {count - 1}"
            )
        return self.hidden_states[layer]


def check_owner(state: State, pool: BlockPool) -> None:
    """Raise HandloomError unless all rows lie in this pool."""
    for i, row in enumerate(state.rows):
        if row.table.pool is not pool:
            raise HandloomError(
                f"row {i} of the State was made by {row.table.pool.owner}, and this is {pool.owner}: a State goes on "
                "only in the engine that made it; prefill its tokens here"
            )


def continuations(
    state: State, tokens, counts, pool: BlockPool, vocab_size: int, max_length: int
) -> list[list[int]]:
    """The ids that each row of a State of a pool is to be fed, or an error that names the row."""
    check_owner(state, pool)
    if not torch.is_tensor(tokens) and (
        not isinstance(tokens, Iterable) or isinstance(tokens, str | Mapping)
    ):
        raise HandloomError(f"tokens must be [B, n] ids or one list of ids per row, got {tokens!r}")
    if torch.is_tensor(tokens) and tokens.dim() == 2 and tokens.device.type != "cpu":
        tokens = tokens.cpu()  # at once, not row by row
    rows = [whole_numbers(row, f"row {i}") for i, row in enumerate(tokens)]
    if counts is not None:
        wanted = whole_numbers(counts, "counts")
        if len(wanted) != len(rows):
            raise HandloomError(f"{len(wanted)} counts for {len(rows)} rows of tokens")
        for i, (n, row) in enumerate(zip(wanted, rows, strict=True)):
            if not 1 <= n <= len(row):
                raise HandloomError(f"row {i}: count {n} is not in 1..{len(row)}")
        rows = [row[:n] for row, n in zip(rows, wanted, strict=True)]
    check_rows(state, list(map(len, rows)), max_length)
    check_ids(rows, vocab_size)
    return rows


def check_rows(state: State, counts: list[int], max_length: int) -> None:
    """Raise unless every row can take as many tokens as it is given."""
    if len(counts) != len(state):
        raise HandloomError(f"{len(counts)} rows of tokens for a State of {len(state)} rows")
    for i, (count, row) in enumerate(zip(counts, state.rows, strict=True)):
        if not count:
            raise HandloomError(f"row {i} is given no token; select the rows that go on first")
        if row.length + count > max_length:
            raise CapabilityError(
                f"row {i} would have {row.length + count} tokens, more than max_length={max_length}"
            )


def check_ids(rows: list[list[int]], vocab_size: int) -> None:
    """Raise HandloomError for the first id that is no token."""
    for i, row in enumerate(rows):
        wrong = [t for t in row if not 0 <= t < vocab_size]
        if wrong:
            raise HandloomError(f"row {i}: token id {wrong[0]} is not in 0..{vocab_size - 1}")


def whole_numbers(values, what: str) -> list[int]:
    """A flat list of ints from integers of any kind: a tensor, an array, a list, a map or a generator."""
    tensor = values if torch.is_tensor(values) else None
    if tensor is None:
        if not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping | set | frozenset):
            raise HandloomError(f"{what} must be a list of token ids, got {values!r}")
        values = list(values)
        wrong = [v for v in values if isinstance(v, bool) or not hasattr(v, "__index__")]
        if wrong:
            raise HandloomError(f"{what}: {wrong[0]!r} is not an integer token id")
        return [int(v) for v in values]
    if not tensor.numel():
        return []
    if tensor.is_floating_point() or tensor.dtype == torch.bool or tensor.dim() > 1:
        shape = list(tensor.shape)
        raise HandloomError(f"{what} must be integer token ids, got {tensor.dtype} of shape {shape}")
    return tensor.reshape(-1).tolist()


def stacked(parts) -> torch.Tensor:
    """`[B, n, D]` of several widths n in one, padded with zeros on the right."""
    width = max(part.shape[1] for part in parts)
    pad = torch.nn.functional.pad
    return torch.cat([pad(part, (0, 0, 0, width - part.shape[1])) for part in parts])
