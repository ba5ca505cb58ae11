"""Settings side by side on the same prompts with the same noise: paired differences, and where texts part."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from ...engine import Engine
from ...errors import HandloomError, ParameterError
from ...loop.generation import Generation
from ..plan import Plan, Unit
from ..ranks import drawer_of
from ..records import read_results
from ..run import run
from ..samples import load_engine, record_of
from .metrics import Metric, find
from .statistics import Interval, mcnemar, mean_interval, paired_difference, sign_test

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Pair:
    """One setting against the baseline.

    Args:
        name: of the setting. differences: metric -> setting minus baseline, over prompts.
        p_value: McNemar's for `correct` or a right number, None where nothing says what is right.
        diverged: first step at which the two differ, one a shared sample; None where they never do.
        likelier, unlikelier: samples in which the setting's token there is more, or less, probable under the model than
            the baseline's, behind the same prefix. sign_p: two-sided sign test that either is as frequent; None where
            no record tells log-probabilities.
        parted: mean step of the divergence, over prompts; None where they never differ.
        equal: share of positions with equal tokens, of the longer answer. samples: shared ones.
    """

    name: str
    differences: Mapping[str, Interval]
    p_value: float | None
    diverged: Sequence[int | None]
    equal: Interval
    samples: int
    parted: Interval | None = None
    likelier: int = 0
    unlikelier: int = 0
    sign_p: float | None = None


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; prints as a table.

    Args:
        baseline: name of the setting that all others are compared with. values: setting -> metric -> its mean.
    """

    baseline: str
    values: Mapping[str, Mapping[str, Interval]]
    pairs: Sequence[Pair]
    records: Records = field(default=(), repr=False)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> list[str]:
        lines = [
            f"{name}: " + ", ".join(f"{m} {v}" for m, v in row.items()) for name, row in self.values.items()
        ]
        for pair in self.pairs:
            parted = sorted(step for step in pair.diverged if step is not None)
            where = (
                f"first differ at step {parted[len(parted) // 2]} (median), {pair.parted} (mean over prompts)"
                if parted
                else "never differ"
            )
            title = f"{pair.name} against {self.baseline}, {pair.samples} samples in pairs"
            lines += ["", f"{title}: {where}, tokens equal {pair.equal}"]
            lines += [f"  {name}: {difference}" for name, difference in pair.differences.items()]
            lines += [] if pair.p_value is None else [f"  McNemar p = {pair.p_value:.3g}"]
            if pair.sign_p is not None:
                lines.append(
                    f"  where they part, its token is likelier in {pair.likelier} and less likely in {pair.unlikelier} "
                    f"samples, sign test p = {pair.sign_p:.3g}"
                )
        return lines

    def text(self, setting: str, prompt: str, sample: int = 0) -> str:
        """A sample of the baseline and of a setting as one text: {-only in the first-}{+only in the second+}."""
        sides = []
        for name in (self.baseline, setting):
            key = (name, str(prompt), sample)
            found = next((r["text"] for r in self.records if identity(r) == key), None)
            if found is None:
                raise ParameterError(f"there is no sample {sample} of prompt {prompt!r} by {name!r}")
            sides.append(found)
        return marked(sides[0], sides[1])


def identity(record: Mapping[str, Any]) -> tuple[str, str, int]:
    """What names a record in a comparison: setting, prompt, sample."""
    return record["setting"], str(record["prompt_id"]), record["sample"]


def compare_records(records: Records, metrics: Sequence[Any], baseline: str | None = None) -> Comparison:
    """Compare the settings in the records of a run.

    Args:
        records: of one model. metrics: names, `Metric`s, or functions of a record. baseline: a setting's name; None is
            the first.

    Raises:
        ParameterError: fewer than two settings, or an unknown name.
    """
    names = list(dict.fromkeys(record["setting"] for record in records))
    baseline = names[0] if baseline is None and names else baseline
    if baseline is None or baseline not in names or len(names) < 2:
        raise ParameterError(
            f"compare: baseline {baseline!r} and another are needed; the records have {', '.join(names)}"
        )
    if len({record.get("model") for record in records}) > 1:
        raise ParameterError(
            "compare: the records are of several models; choose those of one, or name settings by `by_model`"
        )
    chosen, groups = find(metrics), grouped(records)
    values = {name: {m.name: v for m in chosen if (v := mean_of(m, groups[name]))} for name in names}
    pairs = [_pair(name, groups[baseline], groups[name], chosen) for name in names if name != baseline]
    return Comparison(baseline, values, pairs, records)


def compare(
    engine: Engine,
    prompts: Any,
    settings: Mapping[str, Mapping[str, Any]],
    metrics: Sequence[Any] = ("logprob",),
    *,
    samples: int = 1,
    seed: int = 0,
    params: Mapping[str, Any] | None = None,
    chat: bool = False,
) -> Comparison:
    """Draw from several settings on the same prompts with the same noise, and compare.

    Args:
        engine: that draws. prompts: as `read_items` takes them. settings: name -> parameters, a library's strategy
            under `strategy`; the first is the baseline. metrics: see `compare_records`.
        samples: of each prompt. seed: base of all seeds. params: of all settings.
        chat: whether texts go through the chat template.
    """
    source = {"model": "engine", "prompts": prompts, "settings": settings, "params": params or {}}
    plan = Plan.of(source | {"samples": samples, "seed": seed, "chat": chat})
    records = [record_of(*each) for each in drawn(plan, "engine", lambda **_: engine)]
    return compare_records(records, metrics)


def read_sides(
    files: Sequence[Path], options: Mapping[str, Any], load: Callable[..., Engine] | None = None
) -> tuple[Records, Sequence[str]]:
    """The records to compare in results, plans and presets, and the metrics that a plan asks for.

    Args:
        files: results (those of one plan are put together); plans (.yaml with `prompts`), which are drawn beside their
            file, or go on there; and presets, YAML with one setting's parameters and perhaps its `strategy`, which are
            drawn here. With several plans or presets, settings have the file's name before their own.
        options: `model`, `prompts` and other fields of a plan for the presets. load: see `run`.

    Raises:
        HandloomError: a file that is missing or wrong, or presets without a model or prompts.
    """
    presets: dict[str, Any] = {}
    sides: dict[str, tuple[str, list[Path]]] = {}
    metrics: Sequence[str] = ()
    for path in map(Path, files):
        source = _yaml(path) if path.suffix in (".yaml", ".yml") else None
        if isinstance(source, Mapping) and "prompts" not in source:
            presets[path.stem] = source
            continue
        if source is not None:
            run(Plan.read(path), path := path.with_suffix(".jsonl"), load=load)
        header = read_results([path])[0]
        metrics = metrics or header.get("metrics", ())
        sides.setdefault(str([header.get("same", path), header.get("plan")]), (path.stem, []))[1].append(path)
    found = [(name, read_results(paths)[1]) for name, paths in sides.values()]
    if presets:
        missing = [name for name in ("model", "prompts") if not options.get(name)]
        if missing:
            raise ParameterError(
                f"compare: {', '.join(presets)} are settings, and {' and '.join(missing)} must be named"
            )
        plan = Plan.of({**options, "settings": presets})
        (model, *_) = plan.models
        found.append(("", [record_of(*each) for each in drawn(plan, model, load or load_engine)]))
    elif any(options.values()):
        raise ParameterError(
            f"compare: {', '.join(n for n, v in options.items() if v)}: for files of settings alone"
        )
    if len(found) < 2:
        return found[0][1], metrics
    told = [{**r, "setting": f"{name} {r['setting']}".strip()} for name, records in found for r in records]
    return told, metrics


def _yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ParameterError(f"{path} is no YAML file: {error}") from error


def drawn(
    plan: Plan, model: str, load: Callable[..., Engine]
) -> list[tuple[Unit, Generation | HandloomError]]:
    """Every unit of a small plan with its sample; those alike are drawn once."""
    units = list(plan.units())
    drawer = drawer_of(plan.models[model], load)
    found = {
        u.id: outcome for u, outcome in drawer.outcomes(list({u.id: u for u in units}.values()), plan.chat)
    }
    drawer.close()
    return [(unit, found[unit.id]) for unit in units]


def by_model(records: Records) -> list[Mapping[str, Any]]:
    """The records; those of several models with the model's name before the setting's, as settings of their own."""
    if len({record.get("model") for record in records}) < 2:
        return list(records)
    return [
        {**r, "setting": f"{r['model']} {r['setting']}", "model": None, "of_model": r["model"]}
        for r in records
    ]


def grouped(records: Records) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """Setting -> prompt -> its samples in order."""
    groups: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for record in sorted(records, key=lambda record: record["sample"]):
        groups[record["setting"]][str(record["prompt_id"])].append(record)
    return groups


def mean_of(metric: Metric, prompts: Mapping[str, Records]) -> Interval | None:
    """A metric's mean over prompts, each the mean of its samples; None where it applies to none of them."""
    means = [sum(found) / len(found) for samples in prompts.values() if (found := metric.of(samples))]
    return mean_interval(means) if means else None


def _pair(
    name: str, first: Mapping[str, Records], second: Mapping[str, Records], metrics: Sequence[Metric]
) -> Pair:
    differences = {}
    for metric in metrics:
        a, b = ({prompt: metric.of(samples) for prompt, samples in side.items()} for side in (first, second))
        if any(a[prompt] and b.get(prompt) for prompt in a):
            differences[metric.name] = paired_difference(a, b)
    partner = {(p, r["sample"]): r for p, samples in second.items() for r in samples}
    both = [
        (r, partner[p, r["sample"]]) for p, rs in first.items() for r in rs if (p, r["sample"]) in partner
    ]
    if not both:
        raise ParameterError(f"compare: {name!r} and the baseline share no sample of a prompt")
    steps = [first_difference(a["token_ids"], b["token_ids"]) for a, b in both]
    shares: dict[str, list[float]] = defaultdict(list)
    parted: dict[str, list[int]] = defaultdict(list)
    signs: list[int] = []
    for (one, other), step in zip(both, steps, strict=True):
        shares[str(one["prompt_id"])].append(equal_share(one["token_ids"], other["token_ids"]))
        if step is not None:
            parted[str(one["prompt_id"])].append(step)
            signs += _sign(one, other, step)
    equal = mean_interval([sum(found) / len(found) for found in shares.values()])
    where = mean_interval([sum(found) / len(found) for found in parted.values()]) if parted else None
    up = signs.count(1)
    found = (where, up, len(signs) - up, sign_test(up, len(signs) - up) if signs else None)
    return Pair(name, differences, _correctness(both), steps, equal, len(both), *found)


def _sign(first: Mapping, second: Mapping, step: int) -> list[int]:
    """[1] or [-1]: whether the second's token at a step is the likelier one; [] where nothing says it."""
    sides = [record.get("raw_logprobs") or () for record in (first, second)]
    if any(len(side) <= step for side in sides) or sides[0][step] == sides[1][step]:
        return []
    return [1 if sides[1][step] > sides[0][step] else -1]


def _correctness(both: Sequence[tuple[Mapping, Mapping]]) -> float | None:
    for name in ("correct", "numeric_match", "exact_match"):
        (metric,) = find([name])
        outcomes = [(metric.of([a]), metric.of([b])) for a, b in both]
        known = [(bool(a[0]), bool(b[0])) for a, b in outcomes if a and b]
        if known:
            return mcnemar(*zip(*known, strict=True))
    return None


def first_difference(first: Sequence[int], second: Sequence[int]) -> int | None:
    """The first step, from 0, at which two answers differ, one's end included; None where they are equal."""
    if list(first) == list(second):
        return None
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def equal_share(first: Sequence[int], second: Sequence[int]) -> float:
    """Share of positions of the longer answer at which both have the same token."""
    longer = max(len(first), len(second))
    return sum(a == b for a, b in zip(first, second, strict=False)) / longer if longer else 1.0


def marked(first: str, second: str) -> str:
    """Two texts as one, word by word: {-only in the first-}{+only in the second+}."""
    a, b = first.split(" "), second.split(" ")
    parts = []
    for kind, i, j, k, m in difflib.SequenceMatcher(a=a, b=b, autojunk=False).get_opcodes():
        if kind == "equal":
            parts.append(" ".join(a[i:j]))
            continue
        gone, new = " ".join(a[i:j]), " ".join(b[k:m])
        parts.append((f"{{-{gone}-}}" if gone else "") + (f"{{+{new}+}}" if new else ""))
    return " ".join(parts)
