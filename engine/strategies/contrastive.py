"""Contrastive search (SimCTG, arXiv 2202.06417): probable tokens whose hidden state is unlike all before."""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from ..errors import ParameterError
from ..loop.generation import Generation
from .kit.requests import Requests, push


@torch.no_grad()
def contrastive_search(engine, prompts, params=None, *, k=4, alpha=0.6, **overrides) -> list[Generation]:
    """Take the v of the k most probable tokens that maximises (1 - alpha) p(v) - alpha max_j cos(h_v, h_j).

    h_v is the last layer's hidden state at v when v is appended, h_j that of every token before it, prompt
    included. p is what the pipeline leaves; nothing is drawn. A step feeds k candidates for each prompt.

    Args:
        prompts, params, overrides: as for `Engine.generate`.
        k: candidates a step, >= 1.
        alpha: weight of the degeneration penalty, 0 (greedy search) to 1.

    Returns:
        One Generation for each prompt, in order.
    """
    if k < 1 or not 0 <= alpha <= 1:
        raise ParameterError(f"contrastive search takes k >= 1 and alpha in [0, 1], got k={k}, alpha={alpha}")
    state, requests = Requests.start(engine, prompts, params, hidden=True, **overrides)
    results, live = {}, [requests.open(i, engine) for i in range(len(state))]
    past = [normalize(h[:n].float(), dim=-1) for h, n in zip(state.hidden(), state.counts, strict=True)]
    while True:
        context = requests.at(state)
        raw = state.logits.log_softmax(-1)
        logprobs = requests.rows.apply(state.logits, context).log_softmax(-1)
        best, candidates = logprobs.topk(min(k, logprobs.shape[1]))  # [B, k]
        fan = [i for i in range(len(state)) for _ in range(best.shape[1])]
        tried = engine.step(state.select(fan), candidates.flatten(), hidden=True)
        hidden = normalize(tried.hidden()[:, 0].float(), dim=-1).unflatten(0, candidates.shape)  # [B, k, D]
        closest = torch.stack([(h @ seen.T).amax(-1) for h, seen in zip(hidden, past, strict=True)])
        # A candidate that the pipeline excluded (p = 0) must not win by being different.
        score = ((1 - alpha) * best.exp() - alpha * closest).masked_fill(best == -torch.inf, -torch.inf)
        choice = score.argmax(-1)
        tokens = candidates.gather(1, choice[:, None])
        told = [x.gather(1, tokens)[:, 0].tolist() for x in (raw, logprobs)]
        events = [push(*row) for row in zip(live, tokens[:, 0].tolist(), *told, strict=True)]
        results |= {(e.request, e.sample): e.generation for e in events if e.finish}
        keep = [i for i, event in enumerate(events) if not event.finish]
        if not keep:
            return [results[key] for key in sorted(results)]
        picked = [i * best.shape[1] + int(choice[i]) for i in keep]
        requests = requests.accept(tokens[:, 0], context).select(keep)
        past = [torch.cat([past[i], hidden[i, choice[i], None]]) for i in keep]
        state, live = tried.select(picked), [live[i] for i in keep]
