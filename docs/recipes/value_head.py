"""A value head on hidden states: the k best tokens are tried, and weighed by what a linear probe makes of them."""

import torch

from handloom import Engine, demo
from handloom.strategies import decode

engine = Engine.from_pretrained(demo.locate())
words = ("great, happy, kind", "awful, sad, cruel")
good, bad = (engine.prefill([text], hidden=True).hidden().mean((0, 1)) for text in words)
probe = torch.nn.functional.normalize(good - bad, dim=0)  # [D]


def valued(engine, prompts, params=None, *, k=4, weight=2.0, **options):
    """log p(v) + weight cos(h_v, probe) over the k best v; a token costs one pass of k rows a prompt."""

    def step(now):
        best, ids = now.logprobs.topk(k)  # [B, k]
        rows = torch.arange(len(now)).repeat_interleave(k)
        tried = now.engine.step(now.state.select(rows), ids.flatten(), hidden=True)
        worth = torch.cosine_similarity(tried.hidden()[:, 0], probe[None], dim=-1).view_as(best)
        choice = (best + weight * worth).argmax(-1)
        each = torch.arange(len(now))
        return ids[each, choice], tried.select(each * k + choice)

    return decode(engine, prompts, params, step=step, **options)


for weight in (0.0, 40.0):
    print(f"weight {weight}: {valued(engine, ['My day was'], weight=weight, max_new_tokens=10)[0].text!r}")
