"""Reports of a run: tables, plots and one HTML file that opens offline; no number without n and an interval."""

from __future__ import annotations

import base64
import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import ParameterError
from .compare import Comparison, by_model, compare_records, grouped, mean_of
from .metrics import METRICS, Metric, find
from .statistics import Interval, share_interval

Table = dict[str, dict[str, Interval | None]]  # setting -> metric -> mean over prompts
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito


def table_of(records: Sequence[Mapping[str, Any]], metrics: Sequence[Metric]) -> Table:
    """Means of metrics over prompts for every setting, with their intervals."""
    return {
        name: {m.name: mean_of(m, prompts) for m in metrics} for name, prompts in grouped(records).items()
    }


def markdown(table: Table) -> str:
    """A table in Markdown; every cell is `mean [low, high] (n)`."""
    names = list(next(iter(table.values())))
    lines = ["| setting | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for setting, row in table.items():
        lines.append(
            f"| {setting} | " + " | ".join("" if row[n] is None else str(row[n]) for n in names) + " |"
        )
    return "\n".join(lines) + "\n"


def csv_text(table: Table) -> str:
    """A table as CSV: one line a setting and metric."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["setting", "metric", "mean", "low", "high", "n"])
    for setting, row in table.items():
        for name, found in row.items():
            if found is not None:
                writer.writerow([setting, name, found.value, found.low, found.high, found.n])
    return out.getvalue()


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other beats in both coordinates (more is better), by the first coordinate."""
    best = [
        name
        for name, (x, y) in points.items()
        if not any((a >= x and b >= y and (a, b) != (x, y)) for a, b in points.values())
    ]
    return sorted(best, key=lambda name: points[name])


def tradeoff(table: Table, quality: str, diversity: str):
    """Figure: quality over diversity, a point with intervals a setting, and the Pareto front between them."""
    axes, figure = _axes(diversity, quality)
    points = {}
    for colour, (setting, row) in zip(_colours(len(table)), table.items(), strict=True):
        x, y = row[diversity], row[quality]
        if x is None or y is None:
            continue
        points[setting] = (x.value, y.value)
        axes.errorbar(
            x.value, y.value, xerr=_bars(x), yerr=_bars(y), fmt="o", capsize=3, color=colour, label=setting
        )
    front = [points[name] for name in pareto(points)]
    axes.plot(*zip(*front, strict=True), color="0.6", linewidth=1, zorder=0) if len(front) > 1 else None
    axes.legend(fontsize="small", frameon=False)
    return figure


def over(records: Sequence[Mapping[str, Any]], metric: Metric, parameter: str):
    """Figure: a metric over a numeric parameter of the settings, a line for each combination of the others."""
    axes, figure = _axes(parameter, metric.name)
    groups, values = grouped(records), {r["setting"]: r["params"] for r in records}
    lines: dict[str, list[tuple[float, Interval]]] = {}
    for setting, prompts in groups.items():
        found = mean_of(metric, prompts)
        if found is not None and isinstance(values[setting].get(parameter), int | float):
            rest = setting.replace(f"{parameter}={values[setting][parameter]}", "").strip() or metric.name
            lines.setdefault(rest, []).append((values[setting][parameter], found))
    _draw_lines(axes, lines)
    return figure


def throughput(records: Sequence[Mapping[str, Any]], slots: Mapping[str, int]):
    """Figure: tokens a second over the batch, a line for each setting; of models that were run with several batches.

    A batch's rate is that of a row, with its interval over prompts, times the rows.

    Args:
        records: of several models, named by `by_model`. slots: model -> rows that ran together.
    """
    axes, figure = _axes("batch", "tokens/s")
    rate = METRICS["tokens_per_second"]
    lines: dict[str, list[tuple[float, Interval]]] = {}
    for setting, prompts in grouped(records).items():
        model = next(iter(prompts.values()))[0].get("of_model", "")
        found = mean_of(rate, prompts)
        if found is not None and model in slots:
            line = lines.setdefault(setting.removeprefix(f"{model} "), [])
            line.append((slots[model], found.times(slots[model])))
    _draw_lines(axes, lines)
    return figure


def survival(comparison: Comparison):
    """Figure: the share of paired samples that still agree with the baseline after so many tokens, with the 95 % band
    of a share (Wilson) for as many independent samples."""
    axes, figure = _axes("tokens", f"share still equal to {comparison.baseline}")
    longest = max((len(record["token_ids"]) for record in comparison.records), default=1)
    for colour, pair in zip(_colours(len(comparison.pairs)), comparison.pairs, strict=True):
        at = range(longest + 1)
        shares = [sum(d is None or d >= t for d in pair.diverged) / max(len(pair.diverged), 1) for t in at]
        axes.step(list(at), shares, where="post", color=colour, label=f"{pair.name} (n={pair.samples})")
        ends = [share_interval(round(share * pair.samples), pair.samples) for share in shares]
        low, high = zip(*((found.low, found.high) for found in ends), strict=True)
        axes.fill_between(list(at), low, high, step="post", color=colour, alpha=0.15, linewidth=0)
    axes.set_ylim(0, 1.02)
    axes.legend(fontsize="small", frameon=False)
    return figure


def report(
    records: Sequence[Mapping[str, Any]],
    folder: Path,
    metrics: Sequence[Any] = ("logprob", "diversity"),
    header: Mapping[str, Any] | None = None,
    baseline: str | None = None,
) -> list[Path]:
    """Write report.md, report.csv, plots (PNG and SVG) and report.html into a folder; returns their paths.

    Args:
        records: those of several models count as settings of their own.
        metrics: the first two also make the plot of quality over diversity.
        header: of the results file, for the HTML; its `slots` make the plot of speed over batch.
        baseline: of the comparison; None is the first setting.

    Raises:
        ParameterError: no records, or a metric that none of them has.
    """
    chosen, records = find(metrics), by_model(records)
    table = table_of(records, chosen)
    if not table:
        raise ParameterError("report: there are no records")
    for metric in chosen:
        if all(row[metric.name] is None for row in table.values()):
            raise ParameterError(f"report: no record has what the metric {metric.name!r} needs")
    figures = {}
    if len(chosen) > 1:
        figures["tradeoff"] = tradeoff(table, chosen[0].name, chosen[1].name)
    for name in _numeric_parameters(records):
        figures[f"{chosen[0].name}_over_{name}"] = over(records, chosen[0], name)
    slots = (header or {}).get("slots") or {}
    if len(set(slots.values())) > 1 and any(record.get("of_model") in slots for record in records):
        figures["tokens_per_second_over_batch"] = throughput(records, slots)
    comparison = compare_records(records, chosen, baseline) if len(table) > 1 else None
    if comparison is not None:
        figures["survival"] = survival(comparison)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "report.md", folder / "report.csv", folder / "report.html"]
    text = markdown(table) + ("" if comparison is None else f"\n```\n{comparison}\n```\n")
    paths[0].write_text(text, encoding="utf-8")
    paths[1].write_text(csv_text(table), encoding="utf-8")
    images = {}
    for name, figure in figures.items():
        for kind in ("png", "svg"):
            path = folder / f"{name}.{kind}"
            figure.savefig(
                path, dpi=150, bbox_inches="tight", metadata={"Date": None} if kind == "svg" else None
            )
            paths.append(path)
        images[name] = (folder / f"{name}.png").read_bytes()
    paths[2].write_text(page(table, comparison, images, header or {}), encoding="utf-8")
    return paths


def page(
    table: Table, comparison: Comparison | None, images: Mapping[str, bytes], header: Mapping[str, Any]
) -> str:
    """One HTML page with everything in it."""
    names = list(next(iter(table.values())))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("setting", *names))
    body = ""
    for setting, row in table.items():
        cells = "".join(f"<td>{'' if row[n] is None else html.escape(str(row[n]))}</td>" for n in names)
        body += f"<tr><th>{html.escape(setting)}</th>{cells}</tr>"
    shown = "".join(
        f'<figure><img alt="{html.escape(name)}" src="{_inline(data)}"></figure>'
        for name, data in images.items()
    )
    told = "" if comparison is None else f"<pre>{html.escape(str(comparison))}</pre>"
    facts = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in header.items())
    style = (
        "body{font:15px system-ui;max-width:70em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
        "td,th{padding:.3em .7em;border-bottom:1px solid #8884;text-align:left}img{max-width:100%}"
        "pre{overflow:auto}dt{font-weight:600}@media(prefers-color-scheme:dark){body{background:#181818;color:#eee}"
        "img{background:#fff}}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>handloom report</title><style>{style}</style><h1>Report</h1><p>Means over prompts with 95 % intervals."
        f"</p><table><tr>{head}</tr>{body}</table>{told}{shown}<h2>Run</h2><dl>{facts}</dl></html>\n"
    )


def _numeric_parameters(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Parameters with several numeric values over the settings."""
    values: dict[str, set] = {}
    for params in {record["setting"]: record["params"] for record in records}.values():
        for name, value in params.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                values.setdefault(name, set()).add(value)
    return sorted(name for name, found in values.items() if len(found) > 1)


def _draw_lines(axes, lines: Mapping[str, list[tuple[float, Interval]]]) -> None:
    """Points with intervals, a line for each name."""
    for colour, (name, found) in zip(_colours(len(lines)), lines.items(), strict=True):
        found.sort(key=lambda pair: pair[0])
        x, y = [at for at, _ in found], [interval.value for _, interval in found]
        bars = [[sum(_bars(i)[side]) for _, i in found] for side in (0, 1)]
        axes.errorbar(
            x, y, yerr=bars, marker="o", capsize=3, color=colour, label=f"{name} (n={found[0][1].n})"
        )
    axes.legend(fontsize="small", frameon=False)


def _inline(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def _axes(x: str, y: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return axes, figure


def _colours(n: int) -> list[str]:
    return [PALETTE[i % len(PALETTE)] for i in range(n)]


def _bars(found: Interval) -> list[list[float]]:
    """Lengths of the bars below and above a point; none where the interval is unknown."""
    if math.isnan(found.low):
        return [[0.0], [0.0]]
    return [[max(found.value - found.low, 0.0)], [max(found.high - found.value, 0.0)]]
