"""What a request may ask for besides the loop: a strategy's results, the trace of a sample."""

from __future__ import annotations

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
    """A strategy's results, in order, and what it tells beside them.

    Raises:
        HandloomError: of the strategy. Refusal: it cannot work with its options.
    """
    firsts = [request for request in asked.requests if request.sample == 0]
    prompts, params = [request.prompt for request in firsts], [request.params for request in firsts]
    name = asked.strategy.__name__
    try:
        results = asked.strategy(engine, prompts, params, **asked.options)
    except WRONG as error:
        if isinstance(error, HandloomError):
            raise
        raise Refusal(f"strategy {name}: {type(error).__name__}: {error}", param="strategy") from error
    results = [results] if isinstance(results, Generation) else list(results)
    asked.samples = asked.returned = 1  # a strategy returns what it returns
    return results, [{"extra": result.to_dict()["extra"]} for result in results]


def traced(engine: Engine, asked: Asked) -> tuple[list[Generation], list[dict[str, Any]]]:
    """One sample with every step's distributions."""
    (request,) = asked.requests
    found = trace(engine, request.prompt, request.params, seed=request.seed)
    return [found.generation], [{"trace": found.data()}]
