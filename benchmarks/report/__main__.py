"""Tables and plots of the result rows; see --help."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.report.rows import CASES, Row, RowError, newest, read
from benchmarks.report.tables import insert, tables

RESULTS = Path(__file__).resolve().parents[1] / "results"


def chosen(rows: list[Row], sections: list[str], where: list[str]) -> list[Row]:
    """Rows of these kinds without those that have other values in these fields.

    Several values of one field are alternatives; a row that has no such field is kept.
    """
    unknown = set(sections) - set(CASES)
    if unknown:
        raise typer.BadParameter(f"--section {', '.join(sorted(unknown))}: expected {', '.join(CASES)}")
    wanted = {}
    for pair in where:
        name, equals, value = pair.partition("=")
        if not equals:
            raise typer.BadParameter(f"--where {pair}: expected FIELD=VALUE")
        wanted.setdefault(name, set()).add(value)
    return [
        row
        for row in rows
        if (not sections or row.kind in sections)
        and all(name not in row.fields or str(row.fields[name]) in values for name, values in wanted.items())
    ]


def say(text: str) -> None:
    """Print what is no result."""
    print(text, file=sys.stderr)


def make_plots(rows: list[Row], folder: Path) -> None:
    """Draw what the rows have points for, and say what they have none for."""
    try:
        from benchmarks.report.plots import draw, plots
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"report: plots need {error.name} (the extra [bench] has it); or --no-plots"
        ) from None
    found, missing = plots(rows)
    for plot in found:
        draw(plot, folder)
    for what in missing:
        say(f"nothing to plot: {what}")
    if found:
        say(f"{len(found)} plots, each as PNG and SVG, in {folder}")


def main(
    files: Annotated[
        list[Path] | None, typer.Argument(help="JSON-lines files; default: all of benchmarks/results")
    ] = None,
    commit: Annotated[
        str | None, typer.Option(help="this commit's rows; default: every case's newest commit")
    ] = None,
    section: Annotated[list[str] | None, typer.Option(help=f"only {', '.join(CASES)}; repeatable")] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="FIELD=VALUE, such as mode=p: no rows with another value there; repeatable"),
    ] = None,
    write: Annotated[
        Path | None,
        typer.Option(help="put the tables between <!-- results --> and <!-- /results --> of this file"),
    ] = None,
    plots: Annotated[bool, typer.Option(help="draw PNG and SVG files")] = True,
    folder: Annotated[Path, typer.Option(help="where plots go (the default is ignored by git)")] = RESULTS
    / "plots",
) -> None:
    """Turn result rows into Markdown tables on standard output, and into plots.

    Every case is shown with its newest commit. Rows of different hardware never share a table or a plot.
    """
    paths = files or sorted(RESULTS.glob("*.jsonl"))
    try:
        rows, unknown = read(paths)
        if unknown:
            say(f"{len(unknown)} rows of no known kind left out, the first at {unknown[0]}")
        rows = newest(chosen(rows, section or [], where or []), commit)
        if not rows:
            asked = f" of commit {commit}" if commit else ""
            asked += " with these --section and --where" if section or where else ""
            raise RowError(f"no result rows{asked} in {len(paths)} files")
        text = tables(rows)
        if write is None:
            print(text, end="")
        else:
            write.write_text(insert(write.read_text(encoding="utf-8"), text), encoding="utf-8")
            say(f"tables written to {write}")
    except RowError as error:
        raise SystemExit(f"report: {error}") from None
    except ValueError as error:  # of `insert`
        raise SystemExit(f"report: {write}: {error}") from None
    except OSError as error:
        raise SystemExit(f"report: {error.filename}: {error.strerror}") from None
    if plots:
        make_plots(rows, folder)


if __name__ == "__main__":
    typer.run(main)
