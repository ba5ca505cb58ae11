"""Plans: models x prompts x settings x samples as units of work, each with an id that names all it depends on."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from .. import strategies
from ..errors import ParameterError
from ..params.sampling_params import SamplingParams
from .analysis.metrics import find
from .prompts import Item, read_items

KEYS = (
    "model",
    "models",
    "prompts",
    "settings",
    "grid",
    "zip",
    "params",
    "samples",
    "seed",
    "metrics",
    "chat",
)
SEEDS = 2**62


@dataclass(frozen=True)
class Setting:
    """One way to decode: a strategy's name (None: the loop of `Engine.generate`) and its parameters and options.

    `model` is the name of the one that it is for; None is every model of the plan.
    """

    name: str
    strategy: str | None
    values: Mapping[str, Any]
    model: str | None = None

    @cached_property
    def params(self) -> dict[str, Any]:
        """Those of the values that are fields of SamplingParams, under any of their names."""
        options = set(self.options)
        return {key: value for key, value in self.values.items() if key not in options}

    @cached_property
    def options(self) -> dict[str, Any]:
        """Those of the values that the strategy's own function takes."""
        if self.strategy is None:
            return {}
        known = inspect.signature(strategies.named(self.strategy)).parameters
        own = {name for name in known if name not in ("engine", "prompts", "params", "overrides")}
        sampling = {each.name for each in fields(SamplingParams)}
        return {key: value for key, value in self.values.items() if key in own - sampling}


@dataclass(frozen=True)
class Unit:
    """One sample to draw.

    Args:
        id: hash of all that the sample depends on. model: name in the plan. setting: how it is decoded.
        item: its prompt. sample: 0, 1, ... of its prompt. seed: of its noise: shared between settings, independent
            between prompts and samples.
    """

    id: str
    model: str
    setting: Setting
    item: Item
    sample: int
    seed: int


@dataclass(frozen=True)
class Plan:
    """What to run.

    Args:
        models: name -> arguments of `Engine.from_pretrained`, the model's path as `name_or_path`.
        items: prompts. settings: ways to decode, by unique names. samples: of each prompt, model and setting.
        seed: base of all seeds. metrics: names, for reports. chat: whether texts go through the chat template.
    """

    models: Mapping[str, Mapping[str, Any]]
    items: Sequence[Item]
    settings: Sequence[Setting]
    samples: int = 1
    seeds: Sequence[int] = (0,)
    metrics: Sequence[str] = ("logprob", "distinct_2", "diversity")
    chat: bool = False
    source: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def read(cls, path: str | Path) -> Plan:
        """The plan in a YAML or JSON file; relative paths in it begin at its folder.

        Raises:
            ParameterError, PromptError: what is wrong in it, with the names that would be valid.
        """
        import yaml

        path = Path(path)
        if not path.is_file():
            raise ParameterError(f"there is no plan {path}")
        try:
            source = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ParameterError(f"{path} is not YAML: {error}") from error
        return cls.of(source, path.parent)

    @classmethod
    def of(cls, source: Mapping[str, Any], folder: Path = Path()) -> Plan:
        """A plan from what its file would hold: see `docs/` for the fields.

        Args:
            source: `model` or `models`, `prompts`, and any of `settings` (name -> values, `strategy` and `model` among
                them), `grid` (name -> list: every combination), `zip` (name -> list of one length: in step), `params`
                (values of all settings), `samples`, `seed` (a number or several), `metrics`, `chat`.
            folder: where relative paths begin.
        """
        if not isinstance(source, Mapping):
            raise ParameterError(f"a plan is a mapping with {', '.join(KEYS)}; got {source!r:.80}")
        unknown = sorted(set(source) - set(KEYS))
        if unknown:
            raise ParameterError(f"plan: unknown {', '.join(unknown)}; expected {', '.join(KEYS)}")
        if "prompts" not in source:
            raise ParameterError("plan: prompts are missing")
        samples = source.get("samples", 1)
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ParameterError(f"plan: samples={samples!r} must be a whole number of at least 1")
        for name in ("settings", "grid", "zip", "params"):
            _mapping(source.get(name), name)
        metrics = source.get("metrics", cls.metrics)
        if not isinstance(metrics, list | tuple):
            raise ParameterError(f"plan: metrics={metrics!r} must be a list of names")
        find(metrics)
        settings = _settings(source)
        made = cls(
            models=_models(source, folder, [s.model for s in settings]),
            items=read_items(source["prompts"], folder),
            settings=settings,
            samples=samples,
            seeds=_seeds(source.get("seed", 0)),
            metrics=tuple(metrics),
            chat=bool(source.get("chat", False)),
            source=source,
        )
        for setting in made.settings:  # an unknown name or a value out of range is an error before any work
            SamplingParams(**setting.params)
            if own := sorted({"seed", "n"} & set(setting.params)):
                raise ParameterError(
                    f"plan: {own[0]} of setting {setting.name!r}: the plan's own seed and samples say it"
                )
            if setting.model not in (None, *made.models):
                raise ParameterError(
                    f"plan: no model {setting.model!r}; expected one of {', '.join(made.models)}"
                )
        return made

    def __len__(self) -> int:
        each = len(self.items) * self.samples * len(self.seeds)
        return sum(len(self.settings_of(model)) for model in self.models) * each

    def settings_of(self, model: str) -> list[Setting]:
        """The settings that a model is to be decoded with."""
        return [setting for setting in self.settings if setting.model in (None, model)]

    def units(self, shard: tuple[int, int] = (0, 1)) -> Iterator[Unit]:
        """Every unit, prompt by prompt, so that those which share one come together.

        Args:
            shard: (i, n) for the part of the prompts whose number leaves i when divided by n.
        """
        part, parts = shard
        if not 0 <= part < parts:
            raise ParameterError(f"shard {part}/{parts}: expected i/n with 0 <= i < n")
        for model, arguments in self.models.items():
            settings = self.settings_of(model)
            for item in self.items[part::parts]:
                for sample in range(self.samples * len(self.seeds)):
                    base = self.seeds[sample // self.samples]
                    seed = derived_seed(base, item, sample % self.samples)
                    for setting in settings:
                        facts = [
                            arguments,
                            setting.strategy,
                            setting.values,
                            item.hash,
                            self.chat,
                            sample,
                            seed,
                        ]
                        yield Unit(digest(facts), model, setting, item, sample, seed)


def digest(facts: Any) -> str:
    """Sixteen hexadecimal digits that name a JSON value."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def derived_seed(base: int, item: Item, sample: int) -> int:
    """Seed in 0 .. 2**62 - 1 of one sample of a prompt: independent over prompts and samples, shared by settings."""
    return int(digest([base, item.id, item.hash, sample]), 16) % SEEDS


def _mapping(given: Any, name: str) -> None:
    if given is not None and not isinstance(given, Mapping):
        raise ParameterError(
            f"plan: {name} is a mapping from names to values, such as {{min-p: {{min_p: 0.05}}}} for settings; "
            f"got {given!r:.80}"
        )


def _seeds(given: Any) -> tuple[int, ...]:
    """One base or several, each once."""
    seeds = tuple(given) if isinstance(given, list) else (given,)
    if not seeds or len(set(seeds)) < len(seeds) or any(type(seed) is not int for seed in seeds):
        raise ParameterError(f"plan: seed={given!r} must be a whole number, or a list of different ones")
    return seeds


def _models(
    source: Mapping[str, Any], folder: Path, named: Sequence[str | None]
) -> dict[str, dict[str, Any]]:
    """Models by name, or those that settings name; a path that exists below the plan's folder is taken from there."""
    both = [source[name] for name in ("models", "model") if source.get(name) is not None]
    given = both[0] if both else None
    if given is None and all(named):
        given = list(dict.fromkeys(named))
    if given is None or len(both) > 1:
        raise ParameterError("plan: expected a model, or models")
    listed = given if isinstance(given, list) else [given]
    if isinstance(given, Mapping) and "name_or_path" not in given:
        listed = [
            {"name": name, **(v if isinstance(v, Mapping) else {"name_or_path": v})}
            for name, v in given.items()
        ]
    models: dict[str, dict[str, Any]] = {}
    for each in listed:
        arguments = dict(each) if isinstance(each, Mapping) else {"name_or_path": each}
        if not isinstance(arguments.get("name_or_path"), str):
            raise ParameterError(f"plan: model {each!r:.80} needs a name_or_path")
        place = folder / arguments["name_or_path"]
        name = arguments.pop("name", arguments["name_or_path"])
        if place.exists():
            arguments["name_or_path"] = str(place.resolve())
        models[name] = arguments
    return models


def _settings(source: Mapping[str, Any]) -> list[Setting]:
    """Named settings times the grid times what goes in step; names say what differs."""
    named = source.get("settings") or {"default": {}}
    grid, steps = source.get("grid") or {}, source.get("zip") or {}
    for name, values in [*grid.items(), *steps.items()]:
        if not isinstance(values, list) or not values:
            raise ParameterError(f"plan: {name} in grid or zip must be a list of values, got {values!r:.80}")
    if len({len(values) for values in steps.values()}) > 1:
        lengths = ", ".join(f"{name}: {len(values)}" for name, values in steps.items())
        raise ParameterError(f"plan: lists in zip must have one length; they have {lengths}")
    crossed = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    stepped = [dict(zip(steps, values, strict=True)) for values in zip(*steps.values(), strict=True)] or [{}]
    settings: list[Setting] = []
    for (name, own), one, other in itertools.product(named.items(), crossed, stepped):
        varied = one | other
        _mapping(own, f"setting {name!r}")
        parts = [name] if name != "default" or not varied else []
        parts += [f"{key}={value}" for key, value in varied.items()]
        values = {**(source.get("params") or {}), **varied, **(own or {})}
        strategy, model = values.pop("strategy", None), values.pop("model", None)
        if strategy is not None:
            strategies.named(strategy)
        settings.append(Setting(" ".join(parts), strategy, values, model))
    return settings
