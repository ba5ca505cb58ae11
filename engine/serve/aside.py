"""What a request may ask for besides the loop: a strategy's results, the trace of a sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..engine import Engine
from ..errors import HandloomError
from ..experiments.analysis.trace import trace
from ..loop.generation import Generation
from .protocol.reading import Asked
from .protocol.refusals import Refusal

WRONG = (
    TypeError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    RuntimeError,
)  # of options of the wrong kind


def strategic(engine: Engine, asked: Asked) -> tuple[list[Generation], list[dict[str, Any]]]:
    """A strategy's results, in order, and what it tells beside them."""
    firsts = [request for request in asked.requests if request.sample == 0]
    prompts, params = [request.prompt for request in firsts], [request.params for request in firsts]
    results = run_strategy(engine, asked.strategy, asked.options, prompts, params)
    asked.samples = asked.returned = 1  # a strategy returns what it returns
    return results, [{"extra": result.to_dict()["extra"]} for result in results]


def run_strategy(
    engine: Engine, strategy: Callable[..., Any], options: dict, prompts, params
) -> list[Generation]:
    """The results of a strategy whose options came over a wire.

    Raises:
        HandloomError: of the strategy. Refusal: it cannot work with its options.
    """
    try:
        results = strategy(engine, prompts, params, **options)
    except WRONG as error:
        if isinstance(error, HandloomError):
            raise
        raise Refusal(
            f"strategy {strategy.__name__}: {type(error).__name__}: {error}", param="strategy"
        ) from error
    return [results] if isinstance(results, Generation) else list(results)


def traced(engine: Engine, asked: Asked) -> tuple[list[Generation], list[dict[str, Any]]]:
    """One sample with every step's distributions."""
    (request,) = asked.requests
    found = trace(engine, request.prompt, request.params, seed=request.seed)
    return [found.generation], [{"trace": found.data()}]
