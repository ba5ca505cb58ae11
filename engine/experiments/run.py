"""Running a plan: one engine after another, units share passes, every sample is kept as soon as it is there."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

from ..engine import Engine
from ..errors import HandloomError, ParameterError
from .plan import Plan, Unit, digest
from .ranks import drawer_of
from .records import ResultFile, joined
from .samples import load_engine, record_of

log = logging.getLogger("handloom")
CHUNK = 256  # units that are handed to an engine at once; what is finished is written meanwhile
EVERY = 30.0  # seconds between two lines of the log
Draw = Callable[[Plan, str, Iterator[Unit]], Iterator[dict[str, Any]]]


def run(
    plan: Plan,
    output: str | Path,
    *,
    shard: tuple[int, int] = (0, 1),
    load: Callable[..., Engine] | None = None,
    draw: Draw | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> int:
    """Draw every sample of a plan that `output` does not hold yet; returns how many of them failed.

    A run that was stopped in any way, `kill -9` included, goes on where it was: nothing is lost or drawn twice. A unit
    that fails is a record with `finish_reason` "error" and its message. Tokens depend on nothing but their unit; the
    last bits of log-probabilities may depend on what shared a pass, unless the model's arguments have
    `fixed_slots: true`, which makes records equal to the byte, times and memory aside, in whatever pieces they were
    drawn. Prompts are then computed one by one, and strategies run one sample at a time. On a CPU torch's SiLU rounds
    the last few numbers of a tensor otherwise, so an MLP's width (or its product with the slots) must be a multiple of
    32, as it is in published models.

    Args:
        plan: what to draw. output: JSONL file, a header and then one line a sample, appended to.
        shard: (i, n) for one of n parts, which may run at the same time into files of their own; see `merge`.
        load: makes an engine of a model's arguments; None is `load_engine`.
        draw: where to draw: (plan, model, units) -> the header's facts, then records as they come; None is `draw_here`.
        progress: called with (done, all, seconds since the start) after each sample.

    Raises:
        HandloomError: the file belongs to another plan, or is in use.
    """
    draw, started, failed = draw or partial(draw_here, load=load or load_engine), time.monotonic(), 0
    alike = {digest([s.strategy, s.values, s.model]): s.name for s in plan.settings}
    if len(alike) < len(plan.settings):
        twice = next(s.name for s in plan.settings if s.name not in alike.values())
        raise ParameterError(f"setting {twice!r} is another one under a second name; leave one of them out")
    with ResultFile(Path(output)) as results:
        same = digest([plan.models, plan.seeds, plan.chat])
        if results.header is not None and results.header.get("same") != same:
            raise HandloomError(
                f"{output} holds the samples of another plan (models, seed or chat differ); name another"
            )
        held = Counter((unit.id, unit.sample) in results.done for unit in plan.units(shard))
        clock = _Clock(held[True], held.total(), started, progress)
        for model, units in groupby(plan.units(shard), key=lambda unit: unit.model):
            pending = (unit for unit in units if (unit.id, unit.sample) not in results.done)
            first = next(pending, None)
            if first is None:
                continue
            drawn = draw(plan, model, chain([first], pending))
            results.begin(joined(results.header or {}, next(drawn) | {"same": same}))
            for record in drawn:
                results.write(record)
                failed += record["finish_reason"] == "error"
                clock.tick()
        clock.end(failed)
    return failed


def draw_here(
    plan: Plan, model: str, units: Iterator[Unit], load: Callable[..., Engine] = load_engine
) -> Iterator[dict[str, Any]]:
    """The header's facts and then a record of each unit, drawn by one engine in this process or in ranks of its own."""
    drawer = drawer_of(plan.models[model], load)
    try:
        yield drawer.header(plan, model)
        while chunk := list(islice(units, CHUNK)):
            for unit, outcome in drawer.outcomes(chunk, plan.chat):
                yield record_of(unit, outcome)
    finally:
        drawer.close()


class _Clock:
    """Says how far a run is: to a function after every sample, to the log twice a minute and at the end."""

    def __init__(
        self, done: int, total: int, started: float, progress: Callable[[int, int, float], None] | None
    ):
        self.before, self.done, self.total = done, done, total
        self.started, self.progress, self.said = started, progress, started

    def tick(self) -> None:
        self.done += 1
        now = time.monotonic()
        if self.progress is not None:
            self.progress(self.done, self.total, now - self.started)
        if now - self.said >= EVERY:
            self.said = now
            rate = (self.done - self.before) / (now - self.started)
            left = (self.total - self.done) / rate
            log.info("%d of %d samples, %.2f a second, %.0f s left", self.done, self.total, rate, left)

    def end(self, failed: int) -> None:
        drawn, seconds = self.done - self.before, time.monotonic() - self.started
        log.info(
            "%d samples drawn in %.0f s, %d kept from before, %d failed", drawn, seconds, self.before, failed
        )
