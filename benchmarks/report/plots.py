"""Result rows as plots: throughput, time per token, share of the ceiling, sampling time; each a PNG and an SVG."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from benchmarks.report.rows import Row
from benchmarks.report.tables import OURS, circumstances, without_sizes

COLOURS = ("#1b6ca8", "#d1495b", "#66a182", "#8d6a9f", "#edae49", "#5b5b5b", "#2e4057", "#a05195")
THEIRS = "transformers"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "handloom",
    "font.size": 9,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


@dataclass(frozen=True)
class Series:
    """A line: points (x, y) by rising x; colour: an index; dashed: whether it is another's."""

    label: str
    points: tuple[tuple[float, float], ...]
    colour: int
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Axes with their lines."""

    title: str
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Plot:
    """A figure before it is drawn.

    Attributes:
        name: of its files. note: where it was measured. limit: a horizontal line, or None.
    """

    name: str
    title: str
    note: str
    x: str
    y: str
    panels: tuple[Panel, ...]
    logarithmic: bool = False
    limit: float | None = None


def plots(rows: Iterable[Row]) -> tuple[list[Plot], list[str]]:
    """Every plot that the rows have points for, and in words those that they have none for."""
    rows = list(rows)
    found, missing = [], []
    for make, what in (
        (throughput, "throughput over batch: no decode row has batch and tokens_per_s"),
        (time_per_token, "time per token over context: no decode row has context and tpot_p50_ms"),
        (ceiling, "share of the ceiling: no decode row has batch and mbu"),
        (sampling, f"sampling time over batch: no sampling row of {OURS} or {THEIRS}"),
    ):
        made = make(rows)
        found += made
        missing += [] if made else [what]
    return _distinct_names(found), missing


def throughput(rows: list[Row]) -> list[Plot]:
    """Tokens a second over batch, a line a side."""
    return _decode_plots(rows, "throughput", "Throughput", ("batch", "rows decoded together"),
                         ("tokens_per_s", "tokens a second"), apart="context")  # fmt: skip


def time_per_token(rows: list[Row]) -> list[Plot]:
    """Median time a token over context, a line a side and batch."""
    return _decode_plots(rows, "time-per-token", "Time per token", ("context", "cells of a row"),
                         ("tpot_p50_ms", "milliseconds a token, median"), apart="batch")  # fmt: skip


def ceiling(rows: list[Row]) -> list[Plot]:
    """Share of the measured bandwidth over batch, a line a side."""
    return _decode_plots(rows, "ceiling", "Share of the bandwidth ceiling", ("batch", "rows decoded together"),
                         ("mbu", "share of measured bandwidth, %"), apart="context", factor=100.0,
                         limit=100.0)  # fmt: skip


def _decode_plots(rows, name, title, x, y, *, apart, factor=1.0, limit=None) -> list[Plot]:
    """A plot for every hardware, model, dtype, case and mode; `apart` tells lines of one side from each other."""
    groups = defaultdict(list)
    for row in rows:
        if row.kind == "decode" and None not in (row.number(x[0]), row.number(y[0])):
            groups[row.hardware, _about(row)].append(row)
    found = []
    for (_, about), together in groups.items():
        several = len({row.number(apart) for row in together}) > 1
        lines = defaultdict(list)
        for row in together:
            side, value = str(row.fields.get("side", "")), row.number(apart)
            label = f"{side}, {apart} {value:.0f}" if several and value is not None else side
            lines[label].append((row.number(x[0]), factor * row.number(y[0])))
        words = list(about)
        series = tuple(
            Series(label, tuple(sorted(points)), i, not label.startswith(OURS))
            for i, (label, points) in enumerate(lines.items())
        )
        found.append(
            Plot(
                _slug(name, *words),
                ": ".join([title, ", ".join(words)]) if words else title,
                circumstances(together),
                x[1],
                y[1],
                (Panel("", series),),
                limit=limit,
            )
        )
    return found


def _about(row: Row) -> tuple[str, ...]:
    """What the points of one plot share, in words."""
    fields = row.fields
    words = [fields.get(name) for name in ("model", "dtype", "device", "mode")]
    words += [re.sub(r"^\d+ ragged requests, .*", "ragged requests", without_sizes(fields.get("case") or ""))]
    words += [f"{fields['new_tokens']} new tokens"] if fields.get("new_tokens") else []
    words += [fields["preset"]] if fields.get("preset", "standard") != "standard" else []
    return tuple(str(word) for word in words if word)


def sampling(rows: list[Row]) -> list[Plot]:
    """Time of a sampling call over batch, a colour a vocabulary, transformers dashed; a panel a kind of rows."""
    groups = defaultdict(list)
    for row in rows:
        if (
            row.kind == "sampling"
            and row.fields.get("side") in (OURS, THEIRS)
            and row.number("p50") is not None
        ):
            about = tuple(row.fields.get(field) for field in ("device", "mode", "dtype", "cache"))
            groups[row.hardware, about].append(row)
    found = []
    for (_, about), together in groups.items():
        vocabularies = sorted({row.fields["vocab"] for row in together})
        kinds = defaultdict(lambda: defaultdict(list))
        for row in together:
            line = vocabularies.index(row.fields["vocab"]), row.fields["side"]
            kinds[row.fields.get("rows", "")][line].append((row.fields["batch"], row.number("p50")))
        panels = tuple(
            Panel(f"{kind} rows" if kind else "", tuple(
                Series(f"{side}, V={vocabularies[i]}", tuple(sorted(points)), i, side == THEIRS)
                for (i, side), points in sorted(lines.items())
            ))
            for kind, lines in kinds.items()
        )  # fmt: skip
        words = [str(word) for word in about if word is not None]
        found.append(
            Plot(
                _slug("sampling", *words),
                f"Sampling: {', '.join(words)}",
                circumstances(together),
                "rows",
                "microseconds a call, median",
                panels,
                logarithmic=True,
            )
        )
    return found


def _slug(*words: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", "-".join(words).lower().replace("+", " and ")).strip("-")


def _distinct_names(found: list[Plot]) -> list[Plot]:
    """Plots of one name (other hardware) get a number."""
    seen, named = defaultdict(int), []
    for plot in found:
        seen[plot.name] += 1
        number = seen[plot.name]
        named.append(plot if number == 1 else Plot(**{**vars(plot), "name": f"{plot.name}-{number}"}))
    return named


def draw(plot: Plot, folder: Path) -> list[Path]:
    """Write a plot as PNG and SVG, the same bytes for the same rows; returns the two paths."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(6.4, 4.0 * len(plot.panels)), 4.6), layout="constrained")
        axes = figure.subplots(1, len(plot.panels), sharey=True, squeeze=False)[0]
        for axis, panel in zip(axes, plot.panels, strict=True):
            _fill(axis, panel, plot)
        axes[0].set_ylabel(plot.y)
        figure.suptitle(_wrapped(plot.title, 30 + 50 * len(plot.panels)), fontsize=11)
        figure.supxlabel(_wrapped(plot.note, 60 + 50 * len(plot.panels)), fontsize=6)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{plot.name}.png", folder / f"{plot.name}.svg"]
        figure.savefig(paths[0], dpi=150, metadata={"Software": None})
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _fill(axis, panel: Panel, plot: Plot) -> None:
    for number, series in enumerate(panel.series):
        axis.plot(
            [x for x, _ in series.points], [y for _, y in series.points], label=series.label,
            color=COLOURS[series.colour % len(COLOURS)], marker="s" if series.dashed else "o", markersize=4,
            linestyle="--" if series.dashed else "-", gid=f"series-{number}-{_slug(panel.title, series.label)}",
        )  # fmt: skip
    places = sorted({x for series in panel.series for x, _ in series.points})
    if places[0] > 0:
        axis.set_xscale("log", base=2)
    axis.set_xticks(places, [f"{x:,.0f}" for x in places])
    axis.minorticks_off()
    if plot.logarithmic:
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0, top=None if plot.limit is None else 1.1 * max(plot.limit, _highest(panel)))
    if plot.limit is not None:
        axis.axhline(plot.limit, color="black", linewidth=0.8, gid="limit")
    axis.set_xlabel(plot.x)
    axis.set_title(panel.title)
    axis.legend(fontsize=7)


def _highest(panel: Panel) -> float:
    return max(y for series in panel.series for _, y in series.points)


def _wrapped(text: str, width: int) -> str:
    """Text in lines of about this many characters."""
    words, lines = text.split(" "), [""]
    for word in words:
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


__all__ = ["Panel", "Plot", "Series", "draw", "plots"]
