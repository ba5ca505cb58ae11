"""Running a plan: one engine after another, units share passes, every sample is kept as soon as it is there."""

from __future__ import annotations

import hashlib
import logging
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

from .. import strategies
from ..engine import Engine
from ..errors import HandloomError, ParameterError
from ..loop.generation import Generation
from ..params.sampling_params import SamplingParams
from .plan import Plan, Unit, digest
from .records import ResultFile

log = logging.getLogger("handloom")
CHUNK = 256  # units that are handed to an engine at once; what is finished is written meanwhile
EVERY = 30.0  # seconds between two lines of the log
Draw = Callable[[Plan, str, Iterator[Unit]], Iterator[dict[str, Any]]]
PACKAGES = ("handloom", "torch", "transformers", "triton", "numpy")


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
    last bits of log-probabilities may depend on what shared a pass, unless the model's arguments have `slots: 1`.

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
    alike = {digest([s.strategy, s.values]): s.name for s in plan.settings}
    if len(alike) < len(plan.settings):
        twice = next(s.name for s in plan.settings if s.name not in alike.values())
        raise ParameterError(f"setting {twice!r} is another one under a second name; leave one of them out")
    with ResultFile(Path(output)) as results:
        same = digest([plan.models, plan.seed, plan.chat])
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
            results.begin(next(drawn) | {"same": same})
            for record in drawn:
                results.write(record)
                failed += record["finish_reason"] == "error"
                clock.tick()
        clock.end(failed)
    return failed


def load_engine(name_or_path: str, **arguments: Any) -> Engine:
    """`Engine.from_pretrained`, where the name `demo` stands for the small default model."""
    from ..loading import demo

    return Engine.from_pretrained(demo.locate() if name_or_path == "demo" else name_or_path, **arguments)


def draw_here(
    plan: Plan, model: str, units: Iterator[Unit], load: Callable[..., Engine] = load_engine
) -> Iterator[dict[str, Any]]:
    """The header's facts and then a record of each unit, drawn by one engine in this process."""
    engine = load(**plan.models[model])
    yield header_of(plan, engine)
    while chunk := list(islice(units, CHUNK)):
        for unit, outcome in outcomes(engine, chunk, plan.chat):
            yield record_of(unit, outcome)


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


def outcomes(
    engine: Engine, units: Sequence[Unit], chat: bool
) -> Iterator[tuple[Unit, Generation | HandloomError]]:
    """The samples of units of one model, as they finish; an error belongs to its unit alone."""
    plain = [unit for unit in units if unit.setting.strategy is None]
    if plain:
        yield from _isolated(engine, plain, chat, _stream)
    others = sorted((u for u in units if u.setting.strategy is not None), key=lambda unit: unit.setting.name)
    for _, alike in groupby(others, key=lambda unit: unit.setting.name):
        yield from _isolated(engine, list(alike), chat, _strategy)


def _isolated(engine: Engine, units: list[Unit], chat: bool, runner: Callable) -> Iterator:
    """What `runner` makes of units; where they are refused together, of each alone."""
    finished: set[str] = set()
    try:
        for unit, generation in runner(engine, units, chat):
            finished.add(unit.id)
            yield unit, generation
    except HandloomError as error:
        if len(units) == 1:
            yield units[0], error
            return
        for unit in units:
            if unit.id not in finished:
                yield from _isolated(engine, [unit], chat, runner)


def _stream(engine: Engine, units: list[Unit], chat: bool) -> Iterator[tuple[Unit, Generation]]:
    prompts = [prompt_of(engine, unit, chat) for unit in units]
    for event in engine.stream(prompts, [params_of(unit) for unit in units]):
        if event.generation is not None:
            yield units[event.request], event.generation


def _strategy(engine: Engine, units: list[Unit], chat: bool) -> Iterator[tuple[Unit, Generation]]:
    setting = units[0].setting
    assert setting.strategy is not None
    prompts = [prompt_of(engine, unit, chat) for unit in units]
    found = strategies.named(setting.strategy)(
        engine, prompts, [params_of(unit) for unit in units], **setting.options
    )
    for unit, generation in zip(units, found, strict=True):
        if not isinstance(generation, Generation):
            raise ParameterError(
                f"strategy {setting.strategy!r} gave {generation!r:.80} in place of a Generation"
            )
        yield unit, generation


def prompt_of(engine: Engine, unit: Unit, chat: bool) -> Any:
    """What the engine is given: text as it is, or as a user's message where the plan says `chat`."""
    content = unit.item.content
    return [{"role": "user", "content": content}] if chat and isinstance(content, str) else content


def params_of(unit: Unit) -> SamplingParams:
    """The unit's parameters with its seed."""
    return SamplingParams(**{**unit.setting.params, "seed": unit.seed, "n": 1})


def record_of(unit: Unit, outcome: Generation | HandloomError) -> dict[str, Any]:
    """One line of the results: what was asked, what came out, and how long it took."""
    record = {
        "id": unit.id, "sample": unit.sample, "key": unit.id, "model": unit.model, "setting": unit.setting.name,
        "strategy": unit.setting.strategy, "params": dict(unit.setting.values), "prompt_id": unit.item.id,
        "prompt_hash": unit.item.hash, "prompt": unit.item.content, "seed": unit.seed,
    }  # fmt: skip
    record |= {} if unit.item.target is None else {"target": unit.item.target}
    record |= {"task": dict(unit.item.rest)} if unit.item.rest else {}
    if isinstance(outcome, HandloomError):
        return record | {"token_ids": [], "text": "", "finish_reason": "error", "error": str(outcome)}
    made = outcome.to_dict()
    record["prompt_tokens"] = len(made["prompt_token_ids"])
    kept = (
        "token_ids",
        "text",
        "finish_reason",
        "stop_reason",
        "error",
        "raw_logprobs",
        "logprobs",
        "timings",
        "extra",
    )
    return record | {name: made[name] for name in kept if made.get(name) not in (None, {}, [])} | {
        "token_ids": made["token_ids"], "text": made["text"]
    }  # fmt: skip


def header_of(plan: Plan, engine: Engine) -> dict[str, Any]:
    """What all records of a file have in common."""
    defaults = {name: value for name, value in SamplingParams().to_dict().items() if name != "processors"}
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    device = engine.device
    name = device.type
    if device.type == "cuda":
        import torch

        name = torch.cuda.get_device_name(device)
    return {
        "models": plan.models, "settings": [setting.name for setting in plan.settings],
        "weights": weights_hash(engine), "seed": plan.seed, "defaults": defaults,
        "versions": {"python": platform.python_version(), **found}, "device": name,
    }  # fmt: skip


def weights_hash(engine: Engine) -> str:
    """Names the weights: shapes, dtypes and a few values of every parameter, which costs no pass over all of them."""
    import torch

    seen = hashlib.sha256()
    for name, tensor in sorted(engine.model.state_dict().items()):
        flat = tensor.reshape(-1)
        count = min(len(flat), 8)
        at = torch.arange(count, device=flat.device) * (len(flat) - 1) // max(count - 1, 1)
        values = flat[at].float().tolist() if flat.is_floating_point() else flat[at].tolist()
        seen.update(repr((name, tuple(tensor.shape), str(tensor.dtype), values)).encode())
    return seen.hexdigest()[:16]
