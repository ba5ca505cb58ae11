"""Speculative decoding: a cheap draft proposes tokens, one forward pass checks them, the law stays."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...errors import ParameterError
from ...loop.generation import Generation
from ...pipeline.rows import logprob_of
from ..kit.requests import Requests, limit, push
from .acceptance import DRAFT, RULES
from .drafting import DraftModel, prompt_lookup


@dataclass(kw_only=True, repr=False)
class Speculation(Generation):
    """A Generation and its drafts' fate: tokens proposed, accepted, and forward passes of the model."""

    drafted: int = 0
    accepted: int = 0
    passes: int = 0

    @property
    def acceptance(self) -> float:
        """Share of draft tokens accepted; NaN without drafts."""
        return self.accepted / self.drafted if self.drafted else float("nan")


@torch.no_grad()
def speculative(
    engine, prompts, params=None, *, draft=prompt_lookup, num_draft=4, rule="ratio", **overrides
) -> list[Speculation]:
    """Decode like `Engine.generate` in fewer forward passes; each row accepts its own number of draft tokens.

    The tokens have exactly the law that plain decoding gives them, all processors included; greedy rows get
    exactly the same tokens.

    Args:
        prompts, params, overrides: as for `Engine.generate`.
        draft: an Engine with the same vocabulary (`early_exit` makes one of the model itself), or a function (tokens
            of a row, count) -> draft tokens, such as `prompt_lookup`, a `SuffixDraft` or a `JacobiDraft`. Its method
            `observe`, if it has one, is told after each pass what was fed and what the model found most probable.
        num_draft: draft tokens a round and row, >= 0.
        rule: "ratio" accepts a draft token with probability min(1, p/q) and else draws from max(p - q, 0)
            (arXiv 2211.17192, 2302.01318). "coupled" draws as plain decoding would, and accepts a draft token
            that equals what was drawn: with the same seed the text is that of `Engine.generate`, whatever the
            draft (arXiv 2408.07978). "typical" is not lossless: it accepts what is probable enough (arXiv
            2401.10774).

    Returns:
        One Speculation for each sample of each prompt, in order.
    """
    if rule not in RULES or num_draft < 0:
        raise ParameterError(
            f"rule={rule!r} is none of {', '.join(RULES)}, or num_draft={num_draft} is below 0"
        )
    state, requests = Requests.start(engine, prompts, params, **overrides)
    model = DraftModel(draft, engine.vocab_size) if hasattr(draft, "prefill") else None
    results, live = {}, [requests.open(i, engine) for i in range(len(state))]
    tallies = [{"drafted": 0, "accepted": 0, "passes": 1} for _ in live]
    tokens, drafts, laws, logits = state.tokens, [[] for _ in live], None, state.logits[:, None]
    while True:
        requests, new, done = verify(requests, live, tokens, drafts, laws, logits, RULES[rule])
        for row, tally in enumerate(tallies):
            tally["accepted"] += sum(a == b for a, b in zip(new[row], drafts[row], strict=False))
            if done[row] is not None:
                results[live[row].index, live[row].sample] = Speculation(**vars(done[row]), **tally)
        keep = [i for i, result in enumerate(done) if result is None]
        if not keep:
            return [results[key] for key in sorted(results)]
        if state.all_logits is not None:
            state = state.keep([len(row) for row in new])  # the last new token was drawn, not fed
        if len(keep) < len(live):
            state, requests = state.select(keep), requests.select(keep)
            if model is not None:
                model.select(keep)
        live, tallies = [live[i] for i in keep], [tallies[i] for i in keep]
        tokens = [tokens[i] + new[i] for i in keep]
        room = [limit(request, engine) - len(request.stopper.token_ids) for request in live]
        counts = [min(num_draft, left - 1) for left in room]
        if model is not None:
            streams = requests.streams + (DRAFT if rule == "ratio" else 0)
            drafts, laws = model.propose(tokens, requests, counts, streams)
        else:
            drafts = [draft(row, count)[:count] for row, count in zip(tokens, counts, strict=True)]
        state = engine.extend(state, [row[-1:] + list(ids) for row, ids in zip(tokens, drafts, strict=True)])
        logits = state.all_logits
        if hasattr(draft, "observe"):
            best = logits.argmax(-1).tolist()
            for row, ids, found in zip(tokens, drafts, best, strict=True):
                draft.observe(row, list(ids), found[: len(ids) + 1])
        for tally, ids in zip(tallies, drafts, strict=True):
            tally["drafted"] += len(ids)
            tally["passes"] += 1


def verify(requests, live, tokens, drafts, laws, logits, rule) -> tuple[Requests, list[list[int]], list]:
    """Commit the draft tokens that a rule accepts, and one token more, or as many as it takes to end a row.

    Args:
        requests, live: of the rows; tokens are pushed to `live`.
        tokens, drafts: committed and proposed ids of each row.
        laws: [B, n, V] what drafts were drawn from; None if they are certain.
        logits: [B, n + 1, V] after the committed tokens, and after each draft token.

    Returns:
        The requests after it, each row's newly committed tokens, and the Generation of each row that ended.
    """
    new, done, active = [[] for _ in live], [None for _ in live], list(range(len(live)))
    for j in range(logits.shape[1]):
        seen = [row + more for row, more in zip(tokens, new, strict=True)]
        lengths = torch.tensor([len(row) for row in seen], device=logits.device)
        context = requests.context(lambda seen=seen: seen, lengths)
        processed = requests.rows.apply(logits[:, j], context)
        proposed = torch.tensor([ids[j] if j < len(ids) else -1 for ids in drafts], device=logits.device)
        q = laws[:, j] if laws is not None and j < laws.shape[1] else None
        chosen, accepted = rule(processed, proposed, q, context, requests.rows.greedy_rows())
        chosen = chosen.clamp(min=0)  # without a drawable token the log-probability is NaN, and the row ends
        told = [x.tolist() for x in (chosen, logprob_of(logits[:, j], chosen), logprob_of(processed, chosen))]
        kept = torch.full_like(chosen, -1)
        kept[active] = chosen[active]
        requests = requests.accept(kept, context)
        for i in active:
            row = (column[i] for column in told)
            done[i] = push(live[i], *row, failure=context.failures.get(i)).generation
            new[i].append(told[0][i])
        active = [i for i in active if accepted[i] and done[i] is None]
        if not active:
            break
    return requests, new, done
