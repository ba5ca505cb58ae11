"""Samples of units by an engine in this process, and the records that tell them."""

from __future__ import annotations

import hashlib
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from typing import Any

import torch

from .. import strategies
from ..engine import Engine
from ..errors import HandloomError, ParameterError
from ..loop.generation import Generation
from ..params.sampling_params import SamplingParams
from .plan import Plan, Setting, Unit, digest

PACKAGES = ("handloom", "torch", "transformers", "triton", "numpy")
PEAK = "peak_mem_mb"


def load_engine(name_or_path: str, **arguments: Any) -> Engine:
    """`Engine.from_pretrained`, where the name `demo` stands for the small default model."""
    from ..loading import demo

    return Engine.from_pretrained(demo.locate() if name_or_path == "demo" else name_or_path, **arguments)


def outcomes(
    engine: Engine, units: Sequence[Unit], chat: bool
) -> Iterator[tuple[Unit, Generation | HandloomError]]:
    """The samples of units of one model, as they finish; an error belongs to its unit alone.

    Their `extra` tells `peak_mem_mb`, see `peak_memory`.
    """
    for unit, outcome in _drawn(engine, units, chat):
        if isinstance(outcome, Generation):
            outcome.extra[PEAK] = peak_memory(engine.device)
        yield unit, outcome


def peak_memory(device: torch.device) -> float | None:
    """Most MB (10**6 bytes) so far, of torch's allocator on CUDA and of this process elsewhere; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _drawn(engine: Engine, units: Sequence[Unit], chat: bool) -> Iterator:
    plain = [unit for unit in units if unit.setting.strategy is None]
    if plain:
        yield from _isolated(engine, plain, chat, _stream)
    others = sorted((u for u in units if u.setting.strategy is not None), key=lambda unit: unit.setting.name)
    for _, alike in groupby(others, key=lambda unit: unit.setting.name):
        group = list(alike)
        # A strategy's passes are as wide as its rows are many: where bits shall depend on nobody, each runs alone.
        for part in [[unit] for unit in group] if engine.fixed_slots else [group]:
            yield from _isolated(engine, part, chat, _strategy)


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
    prompts = [turned(unit.item.content, chat) for unit in units]
    for event in engine.stream(prompts, [params_of(unit) for unit in units]):
        if event.generation is not None:
            yield units[event.request], event.generation


def _strategy(engine: Engine, units: list[Unit], chat: bool) -> Iterator[tuple[Unit, Generation]]:
    setting = units[0].setting
    assert setting.strategy is not None
    prompts = [turned(unit.item.content, chat) for unit in units]
    found = strategies.named(setting.strategy)(
        engine, prompts, [params_of(unit) for unit in units], **setting.options
    )
    for unit, generation in zip(units, found, strict=True):
        if not isinstance(generation, Generation):
            raise ParameterError(
                f"strategy {setting.strategy!r} gave {generation!r:.80} in place of a Generation"
            )
        yield unit, generation


def turned(content: Any, chat: bool) -> Any:
    """What the engine is given: text as it is, or as a user's message where the plan says `chat`."""
    return [{"role": "user", "content": content}] if chat and isinstance(content, str) else content


def params_of(unit: Unit) -> SamplingParams:
    """The unit's parameters with its seed."""
    return SamplingParams(**{**unit.setting.params, "seed": unit.seed, "n": 1})


def chain_of(engine: Engine, setting: Setting) -> list[str]:
    """Names of the pipeline's members that a setting turns on, in the order in which they run."""
    params = SamplingParams(**setting.params)
    return [p.name for p in engine.pipeline.for_params(params) if p.on(p.settings(params))]


def record_of(unit: Unit, outcome: Generation | HandloomError) -> dict[str, Any]:
    """One line of the results: what was asked, what came out, and what it cost; `header_of` tells the rest once."""
    record = {
        "unit_id": unit.id, "model": unit.model, "setting": unit.setting.name, "strategy": unit.setting.strategy,
        "params": dict(unit.setting.values), "prompt_id": unit.item.id, "prompt_hash": unit.item.hash,
        "prompt": unit.item.content, "sample": unit.sample, "seed": unit.seed,
    }  # fmt: skip
    record |= {} if unit.item.target is None else {"target": unit.item.target}
    record |= {"task": dict(unit.item.rest)} if unit.item.rest else {}
    if isinstance(outcome, HandloomError):
        return record | {"token_ids": [], "text": "", "finish_reason": "error", "error": str(outcome)}
    made = outcome.to_dict()
    record |= {
        "prompt_tokens": len(made["prompt_token_ids"]),
        "token_ids": made["token_ids"],
        "text": made["text"],
    }
    told = {
        name: made[name] for name in ("finish_reason", "stop_reason", "error", "raw_logprobs", "logprobs")
    }
    for name, field in (("logprob_raw_sum", "raw_logprobs"), ("logprob_processed_sum", "logprobs")):
        told[name] = None if None in made[field] or not made[field] else math.fsum(made[field])
    told |= {"time": made["timings"], PEAK: made["extra"].pop(PEAK, None), "extra": made["extra"]}
    return record | {"n_new": made["n_new"]} | {k: v for k, v in told.items() if v not in (None, {}, [])}


def header_of(plan: Plan, engine: Engine, model: str) -> dict[str, Any]:
    """What all records of a file have in common, so that no line repeats it, and what is to be said of one model.

    `chains` names, for each setting, the pipeline's members in their order.
    """
    defaults = {name: value for name, value in SamplingParams().to_dict().items() if name != "processors"}
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "models": plan.models, "settings": [setting.name for setting in plan.settings],
        "chains": {setting.name: chain_of(engine, setting) for setting in plan.settings},
        "weights": {model: weights_hash(engine)}, "slots": {model: engine.slots},
        "revisions": {model: getattr(engine.model.config, "_commit_hash", None)},
        "seed": list(plan.seeds), "chat": plan.chat, "metrics": list(plan.metrics),
        "plan": digest([[s.name, s.strategy, s.values] for s in plan.settings]),
        "defaults": defaults, "versions": {"python": platform.python_version(), **found}, **hardware(engine.device),
    }  # fmt: skip


def hardware(device: torch.device) -> dict[str, Any]:
    """The device's name, and the machine that it is in."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "hardware": {"machine": platform.machine(), "cores": os.cpu_count()}}


def weights_hash(engine: Engine) -> str:
    """Names the weights: shapes, dtypes and a few values of every parameter, which costs no pass over all of them."""
    seen = hashlib.sha256()
    for name, tensor in sorted(engine.model.state_dict().items()):
        if hasattr(tensor, "full_tensor"):  # of a model that is divided among processes
            tensor = tensor.full_tensor()
        flat = tensor.reshape(-1)
        count = min(len(flat), 8)
        at = torch.arange(count, device=flat.device) * (len(flat) - 1) // max(count - 1, 1)
        values = flat[at].float().tolist() if flat.is_floating_point() else flat[at].tolist()
        seen.update(repr((name, tuple(tensor.shape), str(tensor.dtype), values)).encode())
    return seen.hexdigest()[:16]
