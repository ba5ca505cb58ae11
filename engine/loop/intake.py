"""What callers ask for, as requests: prompts encoded, parameters read and validated, nothing computed."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module

import torch

from ..errors import HandloomError, ParameterError
from ..kernels import dispatch
from ..loading.parallel import fresh_seed, is_split
from ..params.aliases import MODES
from ..params.reading import asks
from ..params.sampling_params import SamplingParams
from ..pipeline.foreign.huggingface import for_row
from ..text.detokenizer import special_tokens
from ..text.prompts import Prompt, encode_prompts
from .request import Prefilled, Request


class Arrivals:
    """Requests that come and go while the loop runs, from any thread; the loop asks for them between two steps.

    `engine.stream(arrivals)` ends when all that came is done. So one thread decodes for many:

        while arrivals.wait():
            for event in engine.stream(arrivals):
                ...                               # event.request is the number that `submit` gave

    Args:
        engine: whose loop will run them; it validates what is submitted.
    """

    def __init__(self, engine):
        self.engine = engine
        self._changed = threading.Condition()
        self._come: list[Request] = []
        self._gone: list[Request] = []
        self._numbers, self._closed = 0, False

    def submit(self, prompts, params=None, **overrides) -> list[Request]:
        """Validate as `Engine.generate` does, and hand over: one Request a sample, prompts with numbers of their own.

        Raises:
            PromptError, ParameterError: nothing was handed over. HandloomError: after `close`.
        """
        requests = self.engine.requests(prompts, params, **overrides)
        self.add(requests)
        return requests

    def add(self, requests: list[Request]) -> None:
        """Hand over what `Engine.requests` gave; its numbers move behind those that came before."""
        with self._changed:
            if self._closed:
                raise HandloomError("no more requests are taken: these arrivals are closed")
            for request in requests:
                request.index += self._numbers
            self._numbers = 1 + max((r.index for r in requests), default=self._numbers - 1)
            self._come += requests
            self._changed.notify_all()

    def cancel(self, requests: list[Request]) -> None:
        """End requests before their next token, wherever they are; those that have ended stay as they are."""
        with self._changed:
            self._gone += requests

    def close(self) -> None:
        """Take no more; what came is still decoded."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until something has come; False once nothing can come any more, or after `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._come or self._closed, timeout)
            return bool(self._come)

    def take(self) -> tuple[list[Request], list[Request]]:
        """What has come since the last time, and what is to end; for the loop."""
        with self._changed:
            taken, self._come, self._gone = (self._come, self._gone), [], []
        return taken


def encoded(engine, prompts) -> tuple[list[Prompt], bool]:
    """The prompts as ids or embeddings, and whether a single one was given."""
    vocab_size, hidden_size = engine.model.get_input_embeddings().weight.shape
    return encode_prompts(
        engine.tokenizer,
        prompts,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        max_length=engine.max_length,
    )


def requests_of(engine, prompts, params, defaults, overrides) -> tuple[list[Request], bool]:
    """One Request a sample, in request order, and whether a single prompt was given; see `Engine.requests`."""
    given, single = encoded(engine, prompts)
    wanted = _params(engine, params, len(given), defaults, overrides)
    requests, known = [], {}  # parameters that were resolved already, by the object that was given
    for index, (prompt, asked) in enumerate(zip(given, wanted, strict=True)):
        try:
            asked = checked(engine, asked, len(prompt), known)
        except ParameterError as error:
            raise ParameterError(f"request {index}: {error}") from error
        seed = seed_of(engine, asked.seed, index)
        shared = Prefilled(waiting=asked.n)
        requests += [Request(index, sample, prompt, asked, seed, shared) for sample in range(asked.n)]
    for number, request in enumerate(requests):
        request.params = for_row(request.params, number, len(requests))
    return requests, single


def another_strategy(engine, params, defaults, overrides):
    """The strategy that arguments of `Engine.generate` ask for, as num_beams=4 does, ready to run; None for the loop.

    Strategies lie above the engine: what leads to them is looked up by name, and only when one is asked for.
    """
    given = [overrides, *(params if isinstance(params, list | tuple) else [params])]
    given += [engine.model.generation_config] if defaults == "model" else []
    mappings = [
        g if isinstance(g, Mapping) else vars(g)
        for g in given
        if hasattr(g, "to_diff_dict") or isinstance(g, Mapping)
    ]
    if not any(asks(name, each[name]) for each in mappings for name in each.keys() & MODES):
        return None
    return import_module("...strategies.modes", __name__).routed(engine, params, defaults, overrides)


def seed_of(engine, asked: int | str | None, number: int) -> int:
    """The seed of request `number`: the one that was asked for, a fresh one, or one derived from a base."""
    if asked is None:
        return fresh_seed(engine.model)
    if isinstance(asked, int):
        return asked
    word, mask = int(asked.partition(":")[2]) + (number + 1) * 0x9E3779B97F4A7C15, 2**64 - 1
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        word = ((word & mask) ^ (word & mask) >> shift) * factor & mask
    return (word ^ word >> 31) >> 1


def checked(engine, asked: SamplingParams, prompt_length: int, known: dict) -> SamplingParams:
    """The parameters with every string as ids, or a ParameterError; `known` keeps what was found for an object."""
    if asked.stop and engine.tokenizer is None:
        raise ParameterError(f"stop={asked.stop!r} needs a tokenizer; use stop_token_ids")
    if asked.stop and asked.skip_special_tokens:
        _check_stops(asked.stop, engine.tokenizer)
    if asked.max_length is not None and asked.max_length <= prompt_length:
        raise ParameterError(
            f"max_length={asked.max_length} counts the prompt, which has {prompt_length} tokens"
        )
    if asked.max_time is not None and is_split(engine.model):
        raise ParameterError(
            f"max_time={asked.max_time} is read from each rank's own clock, and a rank that stops alone leaves "
            "the others waiting for ever; use max_new_tokens"
        )
    if id(asked) not in known:
        resolved = asked.resolve(engine.tokenizer)
        resolved.check_vocabulary(engine.vocab_size)
        engine.pipeline.for_params(resolved).check(resolved)
        known[id(asked)] = resolved
    return known[id(asked)]


def _check_stops(strings, tokenizer) -> None:
    """Refuse stop strings that hold a special token beside text: skipped tokens are not in the text."""
    ids = special_tokens(tokenizer)
    for string in strings:
        inside = [] if string in ids else [token for token in ids if token in string]
        if inside and {ids[token] for token in inside} & {
            *tokenizer.encode(string, add_special_tokens=False)
        }:
            raise ParameterError(
                f"stop={string!r} holds the special token {inside[0]!r}, which is not in the text while special "
                "tokens are skipped: pass skip_special_tokens=False, or that token alone"
            )


def _params(engine, params, count: int, defaults: str, overrides) -> list[SamplingParams]:
    if defaults not in ("none", "model"):
        raise ParameterError(f'defaults={defaults!r} is not "none" or "model"')
    if not isinstance(params, list | tuple | Iterator):
        return [one_params(engine, params, defaults == "model", overrides)] * count
    listed = list(params)
    if len(listed) != count:
        raise ParameterError(f"{len(listed)} params for {count} prompts; give one, or one for each")
    return [one_params(engine, item, defaults == "model", overrides) for item in listed]


def one_params(engine, item, model_defaults: bool, overrides) -> SamplingParams:
    """The parameters of one prompt, from anything that `Engine.generate` takes."""
    if isinstance(item, SamplingParams):
        return item.replace(**overrides) if overrides else item
    if item is not None and not isinstance(item, dict):
        if not hasattr(item, "to_diff_dict"):
            raise ParameterError(
                f"params={item!r} is not SamplingParams, a GenerationConfig, a dict, or a list of one per prompt"
            )
        return SamplingParams.from_generation_config(item, **overrides)
    named = {**(item or {}), **overrides}
    if not model_defaults:
        return SamplingParams(**named)
    # the model's own ends are the engine's already, and the engine may know more
    config = engine.model.generation_config
    return SamplingParams.from_generation_config(config, **{"eos_token_ids": None, **named})


def rehearsals(engine, params, rows, tokens) -> Iterator[list[Request]]:
    """Requests that use what these parameters, numbers of rows and prompt lengths will use; a few tokens tell."""
    kinds = params if isinstance(params, list | tuple) else [params]
    kinds = [one_params(engine, kind, False, {}) for kind in kinds]
    compile_sampler(engine, kinds)
    endless = {"max_length": None, "max_time": None, "ignore_eos": True, "n": 1, "stop": (), "criteria": ()}
    kinds = [kind.replace(**endless) for kind in kinds]
    alone = [[kind] for kind in kinds]
    counts = {1, engine.slots} if rows is None else {rows} if isinstance(rows, int) else set(rows)
    # The most rows first: a pool that grows afterwards would drop what was recorded.
    for count, length in itertools.product(sorted(counts)[::-1], sorted(set(tokens))[::-1]):
        length = max(1, min(length, engine.max_length - 5))
        # Prompts that differ from their first token on: none is known from another.
        prompts = [
            [(row + place * place) % engine.vocab_size for place in range(length)] for row in range(count)
        ]
        for mixed in [*alone, kinds] if count > 1 and len(kinds) > 1 else alone:
            asked = [mixed[row % len(mixed)] for row in range(count)]
            yield requests_of(engine, prompts, asked, "none", {})[0]


def compile_sampler(engine, kinds: Sequence[SamplingParams]) -> None:
    """Compile the kernels of the sampler side by side, for requests like these and for what is common: counts, masses,
    min-p, temperatures by the entropy, masks, edits and penalties, and up to 16 alternatives.
    """
    if dispatch.select("sample", engine.device) != "triton" or dispatch.interpreting():
        return
    from ..kernels import penalties_triton
    from ..kernels.sampling.fused import warm_up

    for n_top in {1, *(min(asked.logprobs or 1, engine.vocab_size) for asked in kinds)}:
        for edits in (False, True):
            warm_up(
                engine.device, engine.vocab_size, logprobs="chosen", edits=edits, n_top=n_top, adaptive=True
            )
    penalties_triton.warm_up(torch.zeros(1, engine.vocab_size, device=engine.device))
