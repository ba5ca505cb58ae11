"""Speculative decoding: a cheap draft proposes tokens, one forward pass checks them, the law stays."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...errors import ParameterError
from ...loop.generation import Event
from ..kit.requests import Requests, limit, stop_ids
from .acceptance import RULES
from .drafting.drafts import Drafts
from .drafting.proposers import Proposers
from .drafting.texts import prompt_lookup
from .verify import Speculation, verify


def speculative(
    engine, prompts, params=None, *, draft=prompt_lookup, num_draft=4, rule="ratio", stream=False, **overrides
) -> list[Speculation]:
    """Decode like `Engine.generate` in fewer forward passes; each row accepts its own number of draft tokens.

    The tokens have exactly the law that plain decoding gives them, all processors included; greedy rows get
    exactly the same tokens. A pass has one row for each prompt, and as many positions as there are drafts and one more;
    a draft model takes a pass of its own for each depth.

    Args:
        prompts, params, overrides: as for `Engine.generate`.
        draft: an Engine with the same vocabulary (`early_exit` makes one of the model itself), or a function (tokens
            of a row, count) -> draft tokens, or several lines of them, such as `prompt_lookup`, a `SuffixDraft` or a
            `JacobiDraft`. Its method `observe`, if it has one, is told after each pass over a line what was fed and
            what the model found most probable. Or a list of them, whose drafts are merged into one tree (SpecInfer).
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
    proposers = Proposers(draft if isinstance(draft, list | tuple) else [draft], engine.vocab_size)
    events = rounds(engine, *Requests.start(engine, prompts, params, **overrides), proposers, widths, rule)
    if stream:
        return events
    found = [event.generation for event in events if event.generation is not None]
    return sorted(found, key=lambda result: (result.request, result.sample))


@torch.no_grad()
def rounds(engine, state, requests, proposers, widths, rule) -> Iterator[Event]:
    """Draft, check and commit until all rows have ended; an Event for every token."""
    live = [requests.open(i, engine) for i in range(len(state))]
    tallies = [{"drafted": 0, "accepted": 0, "passes": 1} for _ in live]
    tokens, drafts, logits = state.tokens, Drafts(len(live)), state.logits[:, None]
    while True:
        requests, new, paths, events = verify(requests, live, tokens, drafts, logits, rule)
        keep = [row for row, own in enumerate(events) if own[-1].generation is None]
        for row, own in enumerate(events):
            tallies[row]["accepted"] += len(paths[row])
            if own[-1].generation is not None:  # the drafts' fate goes with it
                result = Speculation(**vars(own[-1].generation), **tallies[row])
                own[-1] = own[-1]._replace(generation=result)
            yield from own
        if not keep:
            return
        if state.drafts is not None:
            state = state.keep_path([[0, *(place + 1 for place in path)] for path in paths])
        elif state.all_logits is not None:
            state = state.keep([len(row) for row in new])  # the last new token was drawn, not fed
        if len(keep) < len(live):
            state, requests = state.select(keep), requests.select(keep)
            proposers.select(keep)
        live, tallies = [live[i] for i in keep], [tallies[i] for i in keep]
        tokens = [tokens[i] + new[i] for i in keep]
        room = [limit(request, engine) - len(request.stopper.token_ids) for request in live]
        depths = [min(len(widths), left - 1) for left in room]
        drafts = proposers.propose(tokens, requests, widths, depths, rule, state.logits)
        if rule == "block":
            drafts.cut([stop_ids(request, engine) for request in live])
        fed = [row[-1:] + ids for row, ids in zip(tokens, drafts.tokens, strict=True)]
        if drafts.lines:
            state = engine.extend(state, fed)
        else:
            state = engine.tree_step(state, fed, [[-1, *(p + 1 for p in own)] for own in drafts.parents])
        logits = state.all_logits
        proposers.observe(tokens, drafts, logits)
        for tally, ids in zip(tallies, drafts.tokens, strict=True):
            tally["drafted"] += len(ids)
            tally["passes"] += 1
