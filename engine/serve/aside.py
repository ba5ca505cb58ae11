"""What a request may ask for besides the loop: a strategy's results as they come, the trace of a sample."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, NoReturn

from ..engine import Engine
from ..errors import HandloomError
from ..experiments.analysis.trace import trace
from ..loop.generation import Event, Generation, Results
from .protocol.reading import Asked
from .protocol.refusals import Refusal
from .worker import Aside

PASSES = ("prefill", "step", "extend", "tree_step", "score")  # what an engine computes for a strategy
WRONG = (
    TypeError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    RuntimeError,
)  # of options of the wrong kind


class Gone(Exception):
    """The caller has left: nobody waits for what a strategy would do next."""


class Watched:
    """An engine as a strategy on a server meets it: its passes are shown, and none is made for who has left.

    Args:
        engine: that does the work. left: whether the caller has left.
        look: called with a pass's name, arguments and result.
    """

    def __init__(
        self, engine: Engine, left: Callable[[], bool], look: Callable[[str, tuple, Any], None] | None = None
    ):
        self._engine, self._left, self._look = engine, left, look

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._engine, name)
        if name not in PASSES:
            return found

        def watched(*arguments: Any, **options: Any) -> Any:
            self._stay()
            result = found(*arguments, **options)
            if self._look is not None:
                self._look(name, arguments, result)
            return result

        return watched

    def _stay(self) -> None:
        if self._left():
            raise Gone

    def generate(self, prompts: Sequence, params: Any = None, **overrides: Any) -> Results:
        """As `Engine.generate` of a list of prompts, but step by step, so that others have their turn between."""
        found = {}
        with closing(self._engine.stream(prompts, params, **overrides)) as events:
            for event in events:
                self._stay()
                if event.generation is not None:
                    found[event.request, event.sample] = event.generation
        return Results(found[key] for key in sorted(found))


def strategic(aside: Aside, engine: Engine, asked: Asked) -> list[Generation]:
    """A strategy's results, in order; where they are streamed every Event is told as it comes."""
    firsts = [request for request in asked.requests if request.sample == 0]
    prompts, params = [request.prompt for request in firsts], [request.params for request in firsts]
    watched = Watched(engine, lambda: aside.left)
    if not asked.stream:
        return run_strategy(watched, asked.strategy, asked.options, prompts, params)
    results = []
    for event in events_of(watched, asked.strategy, asked.options, prompts, params):
        watched._stay()
        aside.tell(event)
        results += [] if event.generation is None else [event.generation]
    return results


def run_strategy(
    engine: Engine | Watched, strategy: Callable[..., Any], options: dict, prompts, params
) -> list[Generation]:
    """The results of a strategy whose options came over a wire.

    Raises:
        HandloomError: of the strategy. Refusal: it cannot work with its options.
    """
    try:
        results = strategy(engine, prompts, params, **options)
    except WRONG as error:
        refuse(strategy, error)
    return [results] if isinstance(results, Generation) else list(results)


def events_of(
    engine: Engine | Watched, strategy: Callable[..., Any], options: dict, prompts, params
) -> Iterator[Event]:
    """Every token of a strategy that can stream as it comes; of another each result when all are there."""
    if "stream" in inspect.signature(strategy).parameters:
        try:
            yield from strategy(engine, prompts, params, stream=True, **options)
        except WRONG as error:
            refuse(strategy, error)
        return
    for r in run_strategy(engine, strategy, options, prompts, params):
        yield Event(r.request, r.sample, None, r.text, finish=r.finish_reason, generation=r)


def refuse(strategy: Callable[..., Any], error: Exception) -> NoReturn:
    """Raise an error of a strategy as its caller should read it."""
    if isinstance(error, HandloomError):
        raise error
    raise Refusal(
        f"strategy {strategy.__name__}: {type(error).__name__}: {error}", param="strategy"
    ) from error


def traced(aside: Aside, engine: Engine, asked: Asked) -> list[Generation]:
    """One sample with every step's distributions."""
    (request,) = asked.requests
    found = trace(Watched(engine, lambda: aside.left), request.prompt, request.params, seed=request.seed)
    found.generation.extra["trace"] = found.data()
    return [found.generation]
