"""How the checks run a strategy or a request, and compare what it gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import zip_longest

import torch
from torch import Tensor

from ..loop.request import Request
from ..params.sampling_params import SamplingParams
from ..pipeline.pipeline import Context, Rows
from . import naive


def ids_of(result) -> list[int]:
    return [int(token) for token in getattr(result, "token_ids", result)]


def fields_of(options: dict) -> dict:
    """The options that are fields of SamplingParams."""
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    return {name: value for name, value in options.items() if name in names}


def part(params, i: int):
    return params[i : i + 1] if isinstance(params, list | tuple) else params


def run(strategy: Callable, engine, prompts, params, options: dict) -> list:
    results = (
        strategy(engine, prompts, **options)
        if params is None
        else strategy(engine, prompts, params, **options)
    )
    return [results] if hasattr(results, "token_ids") else list(results)


def compare(law: str, here: str, got: list, there: str, want: list, note: Callable | None = None) -> None:
    """Raise AssertionError at the first token that differs."""
    assert len(got) == len(want), f"{law}: {len(got)} results {here}, {len(want)} {there}"
    for index, (one, other) in enumerate(zip(got, want, strict=True)):
        for at, (a, b) in enumerate(zip_longest(ids_of(one), ids_of(other))):
            if a == b:
                continue
            extra = note(index, at, a, b) if note is not None and a is not None and b is not None else ""
            a, b = (f"token {x}" if x is not None else "the end" for x in (a, b))
            raise AssertionError(
                f"{law}: result {index} differs first at output position {at}: {a} {here}, {b} {there}{extra}"
            )
        ends = getattr(one, "finish_reason", None), getattr(other, "finish_reason", None)
        if None not in ends:
            assert ends[0] == ends[1], f"{law}: result {index} ends by {ends[0]} {here}, by {ends[1]} {there}"


def bind(engine, request: Request) -> Rows:
    return engine.pipeline.bind(
        [request.params],
        [request.prompt.ids],
        device=engine.device,
        vocab_size=engine.vocab_size,
        eos_token_ids=engine.eos_token_ids,
        seeds=[request.seed],
    )


def context_of(request: Request, ids: list[list[int]], prompt_length: int, engine) -> Context:
    def filled(value: int) -> Tensor:
        return torch.full((len(ids),), value, device=engine.device)

    return Context(
        tokens=torch.tensor(ids, device=engine.device),
        lengths=filled(len(ids[0])),
        prompt_lengths=filled(prompt_length),
        seeds=filled(request.seed),
        streams=filled(0),
        params=[request.params] * len(ids),
        vocab_size=engine.vocab_size,
    )


def replay(engine, request: Request, tokens: list[int]):
    """Cache-free processed logits [V] before each of the tokens."""
    rows, prompt = bind(engine, request), request.prompt
    for at, token in enumerate(tokens):
        ids = [prompt.ids + tokens[:at]]
        context = context_of(request, ids, len(prompt), engine)
        processed = rows.apply(naive.next_logits(engine.model, ids, prompt.embeddings), context)
        yield processed[0]
        rows = rows.accept(torch.tensor([token], device=engine.device), context)
