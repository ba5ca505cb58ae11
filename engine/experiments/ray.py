"""Ray: the units of a plan on the actors of a cluster, and a callable class for `Dataset.map_batches`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np

from ..errors import HandloomError, ParameterError
from ..loop.generation import Generation
from ..params.sampling_params import SamplingParams
from .plan import Plan, Setting, Unit, derived_seed, digest
from .prompts import CONTENT, Item
from .ranks import ROUNDS, drawer_of
from .run import Draw
from .samples import record_of


class Generate:
    """Rows in, rows out: one engine an actor of `ray.data`, such as

        dataset.map_batches(Generate, fn_constructor_kwargs={"model": "demo"}, concurrency=4, num_gpus=1)

    A row's own mapping `sampling_params` wins over `params`. Noise is that of the row's `id`, or of its prompt where it
    has none, so batches and actors may be divided in any way. It adds `generated_text`, `generated_tokens`,
    `finish_reason`, `logprobs` (raw) and `error` to every row.

    Args:
        model: folder, hub id or `demo`; or arguments of `Engine.from_pretrained`, the model as `name_or_path`.
        params: fields of SamplingParams; `strategy` and its options may be among them.
        prompt: the column of prompts; None is the first of prompt, messages, token_ids, text, instruction, prefix_text.
        seed: base of the rows' seeds. chat: whether texts go through the chat template.
        tp: processes among which a model that is larger than a GPU is divided; give the actor `num_gpus=tp`.
    """

    def __init__(
        self,
        model: str | Mapping[str, Any],
        params: Mapping[str, Any] | None = None,
        *,
        prompt: str | None = None,
        seed: int = 0,
        chat: bool = False,
        tp: int = 1,
    ):
        self.params, self.prompt, self.seed, self.chat = dict(params or {}), prompt, seed, chat
        SamplingParams(**_setting(self.params).params)  # what is wrong in it is said before a model is loaded
        named = model if isinstance(model, Mapping) else {"name_or_path": model}
        self.drawer = drawer_of({"tp": tp, **named})

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """A batch of columns with what was generated for each row."""
        column = self.prompt or next((name for name in CONTENT if name in batch), None)
        if column is None or column not in batch:
            raise ParameterError(
                f"rows have the columns {', '.join(batch)}; expected {column or ', '.join(CONTENT)}"
            )
        own = batch.get("sampling_params", [None] * len(batch[column]))
        names = batch.get("id", [None] * len(own))
        units = []
        for place, (content, params, name) in enumerate(zip(batch[column], own, names, strict=True)):
            item = Item("" if name is None else str(name), _plain(content))
            given = {key: value for key, value in (params or {}).items() if value is not None}
            setting = _setting({**self.params, **given})
            units.append(Unit(str(place), "", setting, item, 0, derived_seed(self.seed, item, 0)))
        found = {unit.id: outcome for unit, outcome in self.drawer.outcomes(units, self.chat)}
        made = [_told(found[unit.id]) for unit in units]
        return (
            {**batch, **{name: _column([row[name] for row in made]) for name in made[0]}}
            if made
            else dict(batch)
        )


def _setting(values: dict[str, Any]) -> Setting:
    rest = dict(values)
    strategy = rest.pop("strategy", None)
    return Setting(digest(values), strategy, rest)


def _told(outcome: Generation | HandloomError) -> dict[str, Any]:
    if isinstance(outcome, HandloomError):
        return {
            "generated_text": "", "generated_tokens": [], "finish_reason": "error", "logprobs": [],
            "error": str(outcome),
        }  # fmt: skip
    return {
        "generated_text": outcome.text, "generated_tokens": list(outcome.token_ids),
        "finish_reason": outcome.finish_reason, "logprobs": list(outcome.raw_logprobs or ()), "error": outcome.error,
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """Arrays as lists, all the way down."""
    if isinstance(value, np.ndarray):
        return [_plain(each) for each in value.tolist()]
    return value


def _column(values: list[Any]) -> np.ndarray:
    """A column of anything, lists of different length too."""
    column = np.empty(len(values), dtype=object)
    column[:] = [np.asarray(each) if isinstance(each, list) else each for each in values]
    return column


# -- plans


@contextmanager
def on_ray(
    address: str | None = None, workers: int | None = None, gpus: float | None = None
) -> Iterator[Draw]:
    """Draw the units of a plan on a cluster, one engine an actor: `with on_ray() as draw: run(plan, path, draw=draw)`.

    This process alone writes the records, so a run goes on where it was as without Ray. The units of an actor that is
    lost are drawn again by the one that replaces it. Records are those of one process; the last bits of
    log-probabilities may depend on what shared a pass, unless the model's arguments have `fixed_slots: true`.

    Args:
        address: of the cluster; None is that of RAY_ADDRESS, a running one, or a new one on this machine. One that this
            process has joined already is used as it is.
        workers: actors for a model; None is as many as the cluster's GPUs allow, without any as it has machines.
        gpus: of an actor; None is one for each process of its model (`tp`), or none where the cluster has none.
    """
    import ray

    joined = ray.is_initialized()
    if not joined:
        ray.init(address=address)
    there = ray.cluster_resources()
    machines = sum(bool(node["Alive"]) for node in ray.nodes())

    def actors_of(plan: Plan, model: str) -> list:
        own = plan.models[model].get("tp", 1) if there.get("GPU") else 0.0
        each = float(own if gpus is None else gpus)
        count = workers or max(1, int(there.get("GPU", 0.0) // each) if each else machines)
        options = {"num_gpus": each, "num_cpus": max(1, int(there.get("CPU", 1.0) // count))}
        worker = ray.remote(Worker).options(**options, max_restarts=3, max_task_retries=3)
        return [worker.remote(plan, model) for _ in range(count)]

    def draw(plan: Plan, model: str, units: Iterator[Unit]) -> Iterator[dict[str, Any]]:
        actors = actors_of(plan, model)
        try:
            header, slots = ray.get(actors[0].ready.remote())
            yield header
            running = {}
            for actor in actors:
                if chunk := list(islice(units, ROUNDS * slots)):
                    running[actor.draw.remote(chunk)] = actor
            while running:
                (ready, *_), _ = ray.wait(list(running), num_returns=1)
                actor = running.pop(ready)
                if chunk := list(islice(units, ROUNDS * slots)):  # it goes on while its records are written
                    running[actor.draw.remote(chunk)] = actor
                yield from ray.get(ready)
        finally:
            for actor in actors:
                ray.kill(actor)

    try:
        yield draw
    finally:
        if not joined:
            ray.shutdown()


class Worker:
    """What an actor is: an engine of one of a plan's models, or the ranks that divide it.

    Args:
        plan: whose units it draws. model: its name in the plan.
    """

    def __init__(self, plan: Plan, model: str):
        self.plan, self.model, self.drawer = plan, model, drawer_of(plan.models[model])

    def ready(self) -> tuple[dict[str, Any], int]:
        """What all records have in common, and the engine's slots."""
        return self.drawer.header(self.plan, self.model), self.drawer.slots

    def draw(self, units: Sequence[Unit]) -> list[dict[str, Any]]:
        """The records of some units."""
        return [record_of(unit, outcome) for unit, outcome in self.drawer.outcomes(units, self.plan.chat)]
