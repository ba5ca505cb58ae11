"""Laws of decoding: checks to run on your own strategy, engine or processor; AssertionError says what broke.

A strategy is any callable `strategy(engine, prompts, params=None, **options)` that gives Generations or lists
of token ids in the order of the prompts; `Engine.generate` is one. Where a check compares tokens, the message
names the first place where they differ.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch

from ..engine import Engine
from . import naive
from .enumeration import exact_distribution
from .runs import compare, fields_of, ids_of, part, replay, run


def batch_equals_solo(strategy: Callable, engine, prompts: Sequence, params=None, **options) -> None:
    """Each prompt's tokens are the same whatever shares its batch: all prompts, all in reverse, each alone.

    Args:
        strategy: the strategy to check.
        prompts: at least two, in a list.
        params: one for all, or a list with one for each; a seed if anything is drawn.
        options: fields of `SamplingParams`, and options of the strategy.
    """
    alone = [run(strategy, engine, prompts[i : i + 1], part(params, i), options) for i in range(len(prompts))]
    together = run(strategy, engine, prompts, params, options)
    backwards = params[::-1] if isinstance(params, list | tuple) else params
    reverse = run(strategy, engine, prompts[::-1], backwards, options)
    flat = [result for results in alone for result in results]
    flat_reverse = [result for results in alone[::-1] for result in results]
    compare("batch_equals_solo", "in a batch", together, "alone", flat)
    compare("batch_equals_solo", "in the reversed batch", reverse, "alone", flat_reverse)


def cached_equals_naive(
    engine, prompts, params=None, *, strategy: Callable = Engine.generate, **options
) -> None:
    """The tokens are those of `naive.generate`, which recomputes every sequence for every token.

    Args:
        prompts, params: as for `Engine.generate`; a seed if anything is drawn.
        strategy: what to compare, by default the engine's own loop.
        options: fields of `SamplingParams`, and options of the strategy.
    """
    fast = run(strategy, engine, prompts, params, options)
    slow = naive.generate(engine, prompts, params, **fields_of(options))

    def gap(index: int, at: int, one: int, other: int) -> str:
        ids = [*slow[index].prompt_token_ids, *slow[index].token_ids[:at]]
        if min(ids) < 0:
            return ""
        logits = naive.next_logits(engine.model, [ids])[0]
        return f"; cache-free their logits differ by {float(logits[one] - logits[other]):.2e}"

    compare("cached_equals_naive", "with the cache", fast, "without", slow, gap)


def temperature_zero_is_argmax(
    strategy: Callable, engine, prompts: Sequence, params=None, *, atol: float = 1e-4, **options
) -> None:
    """At temperature 0 every token has the largest cache-free processed logit, but for `atol`.

    Args:
        strategy: a strategy that gives one result for each prompt.
        prompts: a list of them.
        params: one for all prompts, or a list with one for each; their temperature is set to 0.
        atol: how far below the largest logit a token may be, for caches that round differently.
        options: fields of `SamplingParams`, and options of the strategy.
    """
    asked = engine.requests(prompts, params, **{**fields_of(options), "temperature": 0.0})
    options = {name: value for name, value in options.items() if name not in fields_of(options)}
    results = run(strategy, engine, prompts, [request.params for request in asked], options)
    assert len(results) == len(asked), (
        f"temperature_zero_is_argmax: {len(results)} results for {len(asked)} prompts; one for each is needed"
    )
    for request, result in zip(asked, results, strict=True):
        for at, (token, logits) in enumerate(
            zip(ids_of(result), replay(engine, request, ids_of(result)), strict=True)
        ):
            best = int(logits.argmax())
            assert float(logits[token]) >= float(logits[best]) - atol, (
                f"temperature_zero_is_argmax: prompt {request.index}, output position {at}: token {token} "
                f"has logit {float(logits[token]):.6g}, but token {best} has {float(logits[best]):.6g}"
            )


def lossless(
    strategy: Callable, engine, prompts: Sequence, params=None, *, test: dict | None = None, **options
):
    """A strategy that should only be faster gives what plain decoding gives.

    Greedy prompts must get the tokens of `Engine.generate`, sampled ones its law (`exact_distribution`).

    Args:
        strategy: such as `strategies.speculative`.
        prompts: a list of them.
        params: one for all prompts, or a list with one for each.
        test: arguments for `exact_distribution`.
        options: fields of `SamplingParams`, and options of the strategy.
    """
    asked = engine.requests(prompts, params, **fields_of(options))
    options = {name: value for name, value in options.items() if name not in fields_of(options)}
    greedy = [request for request in asked if request.params.greedy]
    if greedy:
        given = [request.prompt for request in greedy], [request.params for request in greedy]
        plain = run(Engine.generate, engine, *given, {})
        compare("lossless", "strategy", run(strategy, engine, *given, options), "plain decoding", plain)
    for request in asked:
        if not request.params.greedy:
            exact_distribution(strategy, engine, request.prompt, request.params, **(test or {}), **options)


@torch.no_grad()
def fork_and_rewind_equal_replay(
    engine, prompts: Sequence, *, steps: int = 24, seed: int = 0, atol: float = 1e-3
):
    """Continuing any older State, any number of times, gives the logits of prefilling its tokens afresh.

    Args:
        prompts: of the first State.
        steps: States to make, each from a random one of those before it, by step, extend and keep, or select.
        seed: of the random choices.
        atol: how far a logit may be from the replayed one.
    """
    rng = random.Random(seed)
    states = [engine.prefill(list(prompts))]

    def tokens(count: int) -> list[int]:
        return [rng.randrange(engine.vocab_size) for _ in range(count)]

    for number in range(steps):
        old = rng.choice(states)
        move = rng.choice(("step", "extend", "select"))
        if move == "step":
            new = engine.step(old, torch.tensor(tokens(len(old))))
        elif move == "extend":
            counts = [rng.randint(1, 4) for _ in range(len(old))]
            new = engine.extend(old, [tokens(n) for n in counts]).keep([rng.randint(1, n) for n in counts])
        else:
            new = old.select([rng.randrange(len(old)) for _ in range(rng.randint(1, len(old) + 1))])
        states.append(new)
        for where, state in (("new", new), ("old", old)):
            replayed = engine.prefill(state.tokens).logits
            error = (state.logits - replayed).abs().amax(-1)
            row = int(error.argmax())
            assert float(error[row]) <= atol, (
                f"fork_and_rewind_equal_replay: {where} State of {move} number {number}, row {row} "
                f"({len(state.tokens[row])} tokens): logits are {float(error[row]):.2e} from their replay"
            )
        engine.pool.check()
