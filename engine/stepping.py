"""Stepping: what an engine does with States, one pass at a time."""

from __future__ import annotations

from dataclasses import replace

import torch

from .cache.drafts import Drafts, check_trees
from .cache.transfer import upload
from .errors import CapabilityError, HandloomError, PromptError
from .forward.filling import Filling
from .forward.head import Head
from .forward.model import longer_rows
from .loop.intake import encoded
from .running import Running
from .state import State, check_ids, check_owner, check_rows, continuations, stacked, whole_numbers


class Stepping(Running):
    """The part of an Engine that decodes by hand: prompts become States, and States longer ones."""

    @torch.no_grad()
    def prefill(self, prompts=None, *, embeddings=None, hidden: bool = False) -> State:
        """A State that holds prompts, computed unpadded, several in a pass where the model packs.

        Args:
            prompts: as for `generate`.
            embeddings: `[T, D]` or a list of them, instead of prompts.
            hidden: keep the hidden states of every prompt token (see `State.hidden`).

        Raises:
            PromptError: a prompt is not usable; PoolExhausted: it does not fit.
        """
        if (prompts is None) == (embeddings is None):
            raise PromptError("prefill takes prompts or embeddings, one of them")
        given = encoded(self, prompts if embeddings is None else embeddings)[0]
        with self._turn("prefill"):
            self._look()
            return prefilled(self.runner, given, hidden)

    def step(self, state: State, tokens, *, embeddings=None, hidden: bool = False) -> State:
        """The State after one more token per row.

        On CUDA tokens of the device, int64, are the fastest: as in the loop the host reads them while their pass runs.

        Args:
            state: where to continue; it stays valid.
            tokens: `[B]` token ids.
            embeddings: `[B, D]` fed in place of the tokens' own; the rows' history still names the tokens.
            hidden: keep hidden states.
        """
        with self._turn("step"):
            if embeddings is None and unread(tokens, self.runner):
                return stepped(self, state, tokens, hidden)
            ids = whole_numbers(tokens, "tokens")
            if embeddings is not None and embeddings.shape[:1] != (len(ids),):
                raise HandloomError(f"embeddings {[*embeddings.shape]} for {len(ids)} tokens; give [B, D]")
            longer = self._extended(state, [[t] for t in ids], None, hidden, embeddings)
        return replace(longer, all_logits=None, steps=(), before=None)

    def extend(self, state: State, tokens, counts=None, *, hidden: bool = False) -> State:
        """The State after several more tokens per row, with the logits behind each of them.

        Args:
            state: where to continue; it stays valid.
            tokens: `[B, n]` token ids, or one list of ids per row.
            counts: `[B]` how many of a row's `n` tokens are real, 1 to n; None for all.
            hidden: keep hidden states.

        Returns:
            A State with `all_logits [B, n, V]`; `state.keep(counts)` goes back to a part of the extension.
        """
        with self._turn("extend"):
            return self._extended(state, tokens, counts, hidden)

    @torch.no_grad()
    def _extended(self, state: State, tokens, counts, hidden: bool, embeddings=None) -> State:
        given = self._continuations(state, tokens, counts)
        return extended(self.runner, state, given, hidden, embeddings)

    @torch.no_grad()
    def tree_step(self, state: State, tokens, parents, *, hidden: bool = False) -> State:
        """Score a tree of drafts behind each row in one pass; `state.keep_path` of the result commits one path of it.

        Each draft sees its row, its ancestors and itself (SpecInfer, arXiv 2305.09781).

        Args:
            state: where the trees hang; it stays valid.
            tokens: `[B, n]` token ids, or one list of ids per row.
            parents: for each row the place of every draft's parent, which comes before it, or -1 for a child of the
                row's last token; one list of n for all rows.
            hidden: keep hidden states.

        Returns:
            A State whose rows and `logits` are those of `state`, with `all_logits [B, n, V]` behind each draft.

        Raises:
            CapabilityError: the model takes lines of drafts only (`capabilities.tree`).
        """
        if not self.capabilities.tree:
            raise CapabilityError(f"tree_step: {self.capabilities.tree.reason}; extend takes lines of drafts")
        given = self._continuations(state, tokens, None)
        with self._turn("tree_step"):
            return drafted(self.runner, state, given, parents, hidden)

    def _continuations(self, state: State, tokens, counts) -> list[list[int]]:
        return continuations(state, tokens, counts, self.pool, self.vocab_size, self.max_length)

    @torch.no_grad()
    def score(self, state: State, tokens, counts=None) -> torch.Tensor:
        """Log-probabilities of continuations; nothing is kept.

        Args:
            state: where the continuations begin.
            tokens, counts: as for `extend`.

        Returns:
            `[B, n]` float32, nats; 0 beyond a row's count.
        """
        given = self._continuations(state, tokens, counts)
        if not given:
            return state.logits.new_zeros(0, 0)
        if max(map(len, given)) == 1:
            return scored(given, state.logits[:, None])
        with self._turn("score"):
            longer = self._extended(state, [row[:-1] or row for row in given], None, False)
        assert longer.all_logits is not None
        return scored(given, torch.cat((state.logits[:, None], longer.all_logits), 1))

    def head(self, hidden: torch.Tensor, *, norm: bool = True) -> torch.Tensor:
        """The logits that hidden states of any layer would give: the model's final norm and output layer.

        Args:
            hidden: `[N, D]`, such as `state.hidden(layer)[:, -1]` of inner layers.
            norm: through the final norm first; False for the last layer's, which `State.hidden` gives normed.

        Returns:
            `[N, V]` float32, scaled and capped as the model does.

        Raises:
            CapabilityError: the model's logits are not a function of its last hidden state.
        """
        with self._turn("head"):
            if self._head is None:
                self._head = Head(self.model)
            return self._head(hidden.to(self.dtype), norm)


def unread(tokens, runner) -> bool:
    """Whether tokens are ids `[B]` where a recorded pass takes them, so that the host need not read them first."""
    if not isinstance(tokens, torch.Tensor) or tokens.dtype != torch.long or tokens.dim() != 1:
        return False
    count = tokens.shape[0]
    return count > 0 and runner.records(count) and tokens.device == runner.recorded.device


# -- what a pass makes of a State


def prefilled(runner, prompts, hidden: bool) -> State:
    """The State that holds prompts, computed in shared passes where the model packs."""
    if not runner.packs:
        filled = [runner.prefill(prompt.ids, prompt.embeddings, hidden=hidden) for prompt in prompts]
    else:
        fillings = [Filling(prompt.ids, prompt.embeddings, hidden=hidden) for prompt in prompts]
        runner.fill(fillings)
        filled = [(filling.row(), filling.output()) for filling in fillings]
    rows, outs = zip(*filled, strict=True)
    return State(
        rows=tuple(rows),
        logits=torch.cat([out.logits[:, -1] for out in outs]),
        counts=tuple(row.length for row in rows),
        hidden_states=tuple(map(stacked, zip(*(out.hidden for out in outs), strict=True)))
        if hidden
        else None,
        states=tuple(torch.cat(parts) for parts in zip(*(out.states for out in outs), strict=True)),
    )


def extended(runner, state: State, given: list[list[int]], hidden: bool, embeddings=None) -> State:
    """The State after the given ids of each row; embeddings [B, D] are fed in place of one id's own."""
    if not given:
        return replace(state, all_logits=state.logits[:, None], before=state.logits, drafts=None)
    embeddings = None if embeddings is None else embeddings[:, None]
    rows, out = runner.extend(state.rows, given, state.states, hidden=hidden, embeddings=embeddings)
    fed = tuple(map(len, given))
    logits = out.logits[:, -1]
    if min(fed) < max(fed):
        last = upload([count - 1 for count in fed], logits.device)
        logits = out.logits[torch.arange(len(rows), device=last.device), last]
    return State(
        rows=rows,
        logits=logits,
        all_logits=out.logits,
        counts=fed,
        hidden_states=out.hidden,
        states=out.states,
        steps=(state.states, *out.steps) if out.steps else (),
        before=state.logits,
    )


def stepped(engine, state: State, tokens: torch.Tensor, hidden: bool) -> State:
    """The State after one token a row, `[B]` on the device: the host reads them while the pass runs."""
    recorded = engine.runner.recorded
    tables, letter, out = recorded.again(state, tokens, hidden) or begun(engine, state, tokens, hidden)
    given = [[token] for token in letter.read()[0]]
    check_ids(given, engine.vocab_size)
    longer = State(
        rows=longer_rows(state.rows, tables, given),
        logits=out.logits[:, 0],
        counts=(1,) * len(given),
        hidden_states=out.hidden,
    )
    recorded.expect(longer, engine.max_length)
    return longer


@torch.no_grad()
def begun(engine, state: State, tokens: torch.Tensor, hidden: bool) -> tuple:
    """Tables, the tokens on their way to the host, and the Output of a step that was not made ready."""
    given = [[0]] * tokens.shape[0]
    check_owner(state, engine.pool)
    check_rows(state, [1] * len(given), engine.max_length)
    letter = engine.runner.recorded.mail.send(tokens)
    tables, out = engine.runner.branch(state.rows, given, None, hidden=hidden, ids=tokens)
    return tables, letter, out


def drafted(runner, state: State, given: list[list[int]], parents, hidden: bool) -> State:
    """The State with a scored tree of drafts behind each row; `parents` of all rows, or of each."""
    parents = list(parents.tolist() if torch.is_tensor(parents) else parents)
    shared = bool(parents) and all(hasattr(parent, "__index__") for parent in parents)
    parents = [whole_numbers(p, "parents") for p in ([parents] * len(given) if shared else parents)]
    check_trees(given, parents)
    if not given:
        return replace(
            state, all_logits=state.logits[:, None], before=state.logits, drafts=Drafts((), (), ())
        )
    tables, out = runner.branch(state.rows, given, parents, hidden=hidden)
    return replace(
        state,
        all_logits=out.logits,
        counts=tuple(map(len, given)),
        hidden_states=out.hidden,
        before=state.logits,
        drafts=Drafts(tuple(map(tuple, given)), tuple(map(tuple, parents)), tuple(tables)),
    )


def scored(given: list[list[int]], logits: torch.Tensor) -> torch.Tensor:
    """`[B, n]` log-probability of each given id under the logits `[B, n, V]` before it; 0 beyond a row's own."""
    width = max(map(len, given))
    ids = upload([row + [0] * (width - len(row)) for row in given], logits.device)
    fed = upload(list(map(len, given)), logits.device)[:, None]
    found = logits[:, :width].log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return found.masked_fill(torch.arange(width, device=logits.device) >= fed, 0.0)
