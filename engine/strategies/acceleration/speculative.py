"""Speculative decoding: a cheap draft proposes tokens, one forward pass checks them, the law stays."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import ParameterError
from ...loop.generation import Event, Generation
from ...pipeline.drawing import logprob_of
from ..kit.requests import Requests, limit, push, stop_ids
from .acceptance import DRAFT, RULES, block
from .drafting import DraftModel, Drafts, prompt_lookup

ROUND = 0x9E3779B97F4A7C15 - 2**64  # odd: seeds of one request's rounds apart from those of its neighbours


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


def speculative(
    engine, prompts, params=None, *, draft=prompt_lookup, num_draft=4, rule="ratio", stream=False, **overrides
) -> list[Speculation]:
    """Decode like `Engine.generate` in fewer forward passes; each row accepts its own number of draft tokens.

    The tokens have exactly the law that plain decoding gives them, all processors included; greedy rows get
    exactly the same tokens.

    Args:
        prompts, params, overrides: as for `Engine.generate`.
        draft: an Engine with the same vocabulary (`early_exit` makes one of the model itself), or a function (tokens
            of a row, count) -> draft tokens, or several lines of them, such as `prompt_lookup`, a `SuffixDraft` or a
            `JacobiDraft`. Its method `observe`, if it has one, is told after each pass over a line what was fed and
            what the model found most probable.
        num_draft: draft tokens a round and row, >= 0; or how many candidates an Engine drafts behind each token at
            every depth, as in (3, 2, 1), whose tree is checked in one pass (SpecInfer, arXiv 2305.09781).
        rule: "ratio" accepts a draft token with probability min(1, p/q) and else draws from max(p - q, 0)
            (arXiv 2211.17192, 2302.01318), one candidate after the other (arXiv 2402.14160). "block" judges a line
            of drafts as a whole, and accepts more of it (arXiv 2403.10444). "coupled" draws as plain decoding would,
            and accepts a draft token that equals what was drawn: with the same seed the text is that of
            `Engine.generate`, whatever the draft (arXiv 2408.07978). "typical" is not lossless: it accepts what is
            probable enough (arXiv 2401.10774).
        stream: return an iterator of Events, one for each token, instead of the results.

    Returns:
        One Speculation for each sample of each prompt, in order.
    """
    widths = [1] * num_draft if isinstance(num_draft, int) else list(num_draft)
    if rule not in (*RULES, "block") or (isinstance(num_draft, int) and num_draft < 0) or 0 in widths:
        raise ParameterError(
            f"rule={rule!r} is none of {', '.join(RULES)}, block, or num_draft={num_draft} is below 0 or holds a 0"
        )
    model = DraftModel(draft, engine.vocab_size) if hasattr(draft, "prefill") else None
    events = rounds(engine, *Requests.start(engine, prompts, params, **overrides), draft, model, widths, rule)
    if stream:
        return events
    found = [event.generation for event in events if event.generation is not None]
    return sorted(found, key=lambda result: (result.request, result.sample))


@torch.no_grad()
def rounds(engine, state, requests, draft, model, widths, rule) -> Iterator[Event]:
    """Draft, check and commit until all rows have ended; an Event for every token."""
    live = [requests.open(i, engine) for i in range(len(state))]
    tallies = [{"drafted": 0, "accepted": 0, "passes": 1} for _ in live]
    tokens, drafts, logits = (
        state.tokens,
        Drafts.certain([[]] * len(live), [0] * len(live)),
        state.logits[:, None],
    )
    while True:
        planned = block(requests, tokens, drafts, logits) if rule == "block" else RULES[rule]
        requests, new, paths, events = verify(requests, live, tokens, drafts, logits, planned)
        keep = [row for row, own in enumerate(events) if own[-1].generation is None]
        for row, own in enumerate(events):
            tallies[row]["accepted"] += len(paths[row])
            yield from own[:-1]
            yield own[-1] if row in keep else told(own[-1], tallies[row])
        if not keep:
            return
        if state.drafts is not None:
            state = state.keep_path([[0, *(place + 1 for place in path)] for path in paths])
        elif state.all_logits is not None:
            state = state.keep([len(row) for row in new])  # the last new token was drawn, not fed
        if len(keep) < len(live):
            state, requests = state.select(keep), requests.select(keep)
            if model is not None:
                model.select(keep)
        live, tallies = [live[i] for i in keep], [tallies[i] for i in keep]
        tokens = [tokens[i] + new[i] for i in keep]
        room = [limit(request, engine) - len(request.stopper.token_ids) for request in live]
        depths = [min(len(widths), left - 1) for left in room]
        if model is not None:
            drafts = model.propose(tokens, requests, widths, depths, *noise(requests, tokens, rule))
        else:
            drafts = Drafts.certain(
                [draft(row, count) for row, count in zip(tokens, depths, strict=True)], depths
            )
        if rule == "block":
            drafts.cut([stop_ids(request, engine) for request in live])
        fed = [row[-1:] + ids for row, ids in zip(tokens, drafts.tokens, strict=True)]
        if drafts.lines:
            state = engine.extend(state, fed)
        else:
            state = engine.tree_step(state, fed, [[-1, *(p + 1 for p in own)] for own in drafts.parents])
        logits = state.all_logits
        if hasattr(draft, "observe") and drafts.lines:
            for row, ids, found in zip(tokens, drafts.tokens, logits.argmax(-1).tolist(), strict=True):
                draft.observe(row, ids, found[: len(ids) + 1])
        for tally, ids in zip(tallies, drafts.tokens, strict=True):
            tally["drafted"] += len(ids)
            tally["passes"] += 1


def told(event: Event, tally: dict) -> Event:
    """The last Event of a row, with its drafts' fate."""
    return replace(event, generation=Speculation(**vars(event.generation), **tally))


def noise(requests, tokens, rule) -> tuple[Tensor, Tensor]:
    """Seeds and streams [B] that drafts are drawn with.

    "ratio" looks at no draft behind the one that it rejects, so the next round may draw with its noise; "block" has
    looked, and "coupled" wants the noise of the draw itself.
    """
    if rule != "block":
        return requests.seeds, requests.streams + (DRAFT if rule == "ratio" else 0)
    begun = torch.tensor([len(row) for row in tokens], device=requests.seeds.device)
    return requests.seeds + begun * ROUND, requests.streams + DRAFT


def verify(requests, live, tokens, drafts, logits, rule):
    """Commit the draft tokens that a rule accepts, and one token more, or as many as it takes to end a row.

    Args:
        requests, live: of the rows; tokens are pushed to `live`.
        tokens: committed ids of each row.
        drafts: what is proposed behind them.
        logits: [B, n + 1, V] after the committed tokens, and after each draft token.

    Returns:
        The requests after it, each row's newly committed tokens, the places of its accepted drafts, and its Events.
    """
    new, paths, events = ([[] for _ in live] for _ in range(3))
    active, rows = list(range(len(live))), torch.arange(len(live), device=logits.device)
    while active:
        seen = [row + more for row, more in zip(tokens, new, strict=True)]
        lengths = torch.tensor([len(row) for row in seen], device=logits.device)
        context = requests.context(lambda seen=seen: seen, lengths)
        at = [path[-1] if path else -1 for path in paths]
        here = torch.tensor(at, device=logits.device) + 1
        raw, q = logits[rows, here], None if drafts.laws is None else drafts.laws[rows, here]
        processed = requests.rows.apply(raw, context)
        below = [drafts.below(row, place) for row, place in enumerate(at)]
        width = max(1, *map(len, below))
        ids = [[drafts.tokens[i][place] for place in places] for i, places in enumerate(below)]
        proposed = torch.tensor([row + [-1] * (width - len(row)) for row in ids], device=logits.device)
        chosen, place = rule(processed, proposed, q, context, requests.rows.greedy_rows())
        chosen = chosen.clamp(min=0)  # without a drawable token the log-probability is NaN, and the row ends
        told = [x.tolist() for x in (chosen, logprob_of(raw, chosen), logprob_of(processed, chosen), place)]
        kept = torch.full_like(chosen, -1)
        kept[active] = chosen[active]
        requests = requests.accept(kept, context)
        for i, token, logprob, other, accepted in [(i, *(column[i] for column in told)) for i in active]:
            events[i].append(push(live[i], token, logprob, other, failure=context.failures.get(i)))
            new[i].append(token)
            paths[i] += below[i][accepted : accepted + 1] if accepted >= 0 else []
        active = [i for i in active if told[3][i] >= 0 and events[i][-1].generation is None]
    return requests, new, paths, events
