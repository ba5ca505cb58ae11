"""The cache-free, batch-1 twin of the decode loop: slow, simple, and what the engine is tested against.

Every token costs one forward pass over its whole sequence through the transformers model itself. Pipeline,
draw and stop decision are the engine's own, so a difference in tokens comes from the loop or the cache.
"""

from __future__ import annotations

import math

import torch

from ..loop.generation import Generation
from ..loop.request import Request
from ..pipeline.pipeline import Context


def generate(engine, prompts, params=None, **overrides) -> list[Generation]:
    """What `Engine.generate` gives, as a list, computed one sequence and one token at a time, uncached.

    Args:
        engine: its model, tokenizer, pipeline and limits are used.
        prompts, params, overrides: as for `Engine.generate`; top and prompt log-probabilities are left out.
    """
    requests = engine.requests(prompts, params, **{**overrides, "logprobs": None})
    return [run(engine, request) for request in requests]


@torch.no_grad()
def run(engine, request: Request) -> Generation:
    """Decode one sample of one request to its end."""
    prompt, device = request.prompt, engine.model.device
    rows = engine.pipeline.bind(
        [request.params],
        [prompt.ids],
        device=device,
        vocab_size=engine.vocab_size,
        eos_token_ids=engine.eos_token_ids,
        seeds=[request.seed],
        streams=[request.sample],
    )
    request.start(engine)
    assert request.stopper is not None
    while True:
        ids = prompt.ids + request.stopper.token_ids
        logits = next_logits(engine.model, [ids], prompt.embeddings)
        context = Context(
            tokens=torch.tensor([ids], device=device),
            lengths=torch.tensor([len(ids)], device=device),
            prompt_lengths=torch.tensor([len(prompt.ids)], device=device),
            seeds=torch.tensor([request.seed], device=device),
            streams=torch.tensor([request.sample], device=device),
            params=[request.params],
            vocab_size=engine.vocab_size,
            eos_token_ids=engine.eos_token_ids,
            device=device,
        )
        drawn = rows.sample(logits, context)
        raw, processed = float(drawn.raw_logprobs), float(drawn.logprobs)
        if math.isnan(raw) or math.isnan(processed):
            event = request.end("error", "the logits are NaN or all -inf")
        else:
            event = request.push(int(drawn.tokens), raw, processed, None)
        if event.generation is not None:
            return event.generation
        rows = rows.accept(drawn.tokens, context)


@torch.no_grad()
def next_logits(model, ids: list[list[int]], embeddings: torch.Tensor | None = None) -> torch.Tensor:
    """Logits float32 [B, V] behind B sequences of equal length, by one forward pass without a cache.

    Args:
        model: a transformers causal LM.
        ids: token ids of each sequence, equally many.
        embeddings: [T, D], in place of the first T ids of every sequence.
    """
    tokens = torch.tensor(ids, device=model.device)
    if embeddings is None:
        return model(input_ids=tokens, use_cache=False).logits[:, -1].float()
    head = embeddings.to(model.device)[None].expand(len(ids), -1, -1)
    tail = model.get_input_embeddings()(tokens[:, embeddings.shape[0] :])
    return model(inputs_embeds=torch.cat([head, tail], 1), use_cache=False).logits[:, -1].float()
