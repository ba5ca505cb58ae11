"""Result rows as Markdown tables, one a kind and hardware, each under a line that says where it was measured."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC

from benchmarks.report.rows import CASES, Row, is_number

OURS = "handloom"
LONG = 24  # lines from which on a table is folded away
BEGIN, END = "<!-- results -->", "<!-- /results -->"


@dataclass(frozen=True)
class Column:
    """A column: its heading, the field it shows, and how a value is written."""

    heading: str
    field: str
    write: Callable[[object], str]


@dataclass(frozen=True)
class Section:
    """A kind's tables.

    Attributes:
        title: heading of the section.
        columns: without a pivot one line a row; with it these come first and describe the case.
        pivot: writes one row as the cell of its side, so that a case is one line; None for one line a row.
        after: columns behind the sides, filled from our row.
    """

    title: str
    columns: tuple[Column, ...]
    pivot: Callable[[Row], str] | None = None
    after: tuple[Column, ...] = ()


def plain(value) -> str:
    """Text as it is, numbers in three digits: 0.0123, 1.23, 12.3, 123, 1,234."""
    if not is_number(value):
        return str(value)
    if value != value:
        return "nan"
    rounded = abs(float(f"{value:.3g}"))
    if isinstance(value, int) or rounded >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if rounded >= 10 else f"{value:.2f}" if rounded >= 1 else f"{value:.3g}"


def count(value) -> str:
    """A size that is part of a name, without separators."""
    return str(value)


def without_sizes(case) -> str:
    """A case's name without "batch 8" and "context 512+32" in it, which have columns and axes of their own."""
    text = re.sub(r"\b(batch|context) \d+(\+\d+)?", "", str(case))
    return ", ".join(part.strip() for part in text.split(",") if part.strip())


def percent(value) -> str:
    """A share of one."""
    return f"{100 * value:.0f} %"


def times(value) -> str:
    """A ratio."""
    return f"{plain(float(value))}x"


def size(value) -> str:
    """Bytes."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 2**power:
            return f"{plain(value / 2**power)} {unit}"
    return f"{plain(value)} B"


def _time_cell(row: Row) -> str:
    if "skipped" in row.fields:
        return "skipped"
    text = plain(row.fields["p50"])
    return f"{text} ({times(row.fields['ratio'])})" if row.number("ratio") is not None else text


def _spread_cell(row: Row) -> str:
    middle, least, most = (row.number(name) for name in ("median", "min", "max"))
    return (
        plain(middle)
        if least is None or most is None
        else f"{plain(middle)} ({plain(least)} to {plain(most)})"
    )


def _columns(*described: tuple) -> tuple[Column, ...]:
    return tuple(Column(*(part if len(part) == 3 else (*part, plain))) for part in described)


EXACT = _columns(("launches", "launches"), ("operations", "operations"), ("bytes read", "bytes_read", size))
EXACT += _columns(("bytes written", "bytes_written", size), ("passes", "passes"))
EXACT += _columns(("of bandwidth", "bandwidth_share", percent))
DEVICE, BATCH, HOW = ("device", "device"), ("B", "batch", count), (("dtype", "dtype"), ("cache", "cache"))
MODEL = _columns(("model", "model"), ("dtype", "dtype"))
SECTIONS = {
    "decode": Section(
        "Decoding",
        MODEL
        + _columns(
            DEVICE, ("mode", "mode"), ("case", "case", without_sizes), ("batch", "batch", count),
            ("context", "context", count), ("new", "new_tokens", count), ("side", "side"),
            ("tokens/s", "tokens_per_s"), ("handloom over it", "ratio", times), ("first token, ms", "ttft_ms"),
            ("ms/token", "tpot_p50_ms"), ("p99", "tpot_p99_ms"), ("of bandwidth", "mbu", percent),
            ("peak memory", "peak_bytes", size), ("launches/token", "launches_per_token"),
            ("syncs/token", "syncs_per_token"), ("waits/token", "waits_per_token"),
            ("operations/token", "operations_per_token"), ("skipped", "skipped"),
        ),
    ),
    "throughput": Section(
        "Whole answers: median (smallest to largest)",
        MODEL + _columns(("case", "case"), ("unit", "unit")),
        _spread_cell,
        _columns(("ratio", "ratio", times), ("wanted", "limit", times)),
    ),
    "cpu": Section(
        "Decoding on a CPU",
        _columns(
            ("model", "model"), ("case", "case"), ("side", "side"), ("tokens/s, best", "best"), ("median", "median"),
            ("CPU ms/token", "cpu_ms"), ("generate float32", "over_float32", times),
            ("generate, same dtype", "over_same_dtype", times), ("llama.cpp", "over_llama_cpp", times),
            ("perplexity", "perplexity"),
        ),
    ),
    "counts": Section(
        "Cost of a step outside the forward",
        _columns(
            ("case", "case"), ("side", "side"), ("operations", "operations_per_step"), ("limit", "limit"),
            ("Python calls", "python_calls_per_step"), ("CPU us", "us_per_step"),
        ),
    ),
    "memory": Section(
        "Memory",
        _columns(
            ("case", "case"), ("quantity", "quantity"), ("value", "value"), ("expected", "expected"),
            ("ratio", "ratio", times), ("limit", "limit", times),
        ),
    ),
    "sampling": Section(
        "Sampling: microseconds a call, median (times ours)",
        _columns(DEVICE, ("mode", "mode"), ("rows", "rows"), BATCH, ("V", "vocab", count), *HOW),
        _time_cell,
        EXACT,
    ),
    "attention": Section(
        "Decode attention of one layer: microseconds a call, median (times ours)",
        _columns(DEVICE, ("heads", "shape"), ("lengths", "rows"), BATCH, ("context", "context", count), *HOW),
        _time_cell,
        EXACT,
    ),
    "nf4": Section(
        "4-bit linear layers: microseconds a call, median (times ours)",
        _columns(DEVICE, ("layer", "layer"), BATCH, *HOW),
        _time_cell,
        EXACT,
    ),
    "checks": Section(
        "Checks",
        _columns(("check", "check"), ("failed", "failed"), ("seconds", "seconds")),
    ),
    "figures": Section("Figures", _columns(("figure", "figure"), ("value", "value"), ("greedy, ms", "greedy_ms"))),
    "aims": Section(
        "Aims", _columns(("aim", "target"), ("wanted", "wanted"), ("measured", "measured"), ("met", "met"))
    ),
}  # fmt: skip


def tables(rows: Iterable[Row]) -> str:
    """Markdown of all rows: a section a kind, in it a table a hardware.

    Args:
        rows: what `report_rows.newest` left.
    """
    groups = defaultdict(list)
    for row in rows:
        groups[row.kind, row.hardware].append(row)
    parts = []
    for kind, section in SECTIONS.items():
        together = [groups[key] for key in sorted(groups, key=_accelerators_first) if key[0] == kind]
        parts += [f"### {section.title}"] if together else []
        parts += [part for group in together for part in (circumstances(group), _table(section, group))]
    return "\n\n".join(parts) + "\n" if parts else ""


def _accelerators_first(group: tuple[str, str]) -> tuple[bool, str]:
    hardware = group[1]
    return '"gpu"' not in hardware, hardware


def circumstances(rows: list[Row]) -> str:
    """Hardware, versions, commits and days of rows that share their hardware, in one line."""
    hardware = dict(rows[0].fields["hardware"])
    words = []
    if "gpu" in hardware:
        memory = hardware.pop("gpu_memory_gib", None)
        words.append(hardware.pop("gpu") + (f" ({memory:.0f} GiB)" if is_number(memory) else ""))
    words += [str(hardware.pop("cpu"))] if "cpu" in hardware else []
    for name in ("cores", "threads"):
        number = hardware.pop(name, None)
        words += [f"{number} {name if number != 1 else name[:-1]}"] if number is not None else []
    words += [f"{name} {value}" for name, value in hardware.items()]
    drivers = _distinct(
        row.fields["driver"].rpartition(",")[2].strip() for row in rows if row.fields.get("driver")
    )
    words += [f"driver {' / '.join(drivers)}"] if drivers else []
    names = _distinct(name for row in rows for name in row.fields["versions"])
    versions = [
        f"{'Python' if name == 'python' else name} "
        + " / ".join(
            _distinct(str(row.fields["versions"][name]) for row in rows if name in row.fields["versions"])
        )
        for name in names
    ]
    days = sorted({row.time.astimezone(UTC).date().isoformat() for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    commits = _distinct(_short(row.fields["commit"]) for row in sorted(rows, key=lambda row: row.time))
    changed = " (+: with changes that are in no commit)" if any("+" in commit for commit in commits) else ""
    plural = "s" if len(commits) > 1 else ""
    return f"{', '.join(words)}; {', '.join(versions)}; commit{plural} {', '.join(commits)}{changed}, {when}."


def _short(commit: str) -> str:
    return commit[:7] + ("+" if commit.endswith("+") and len(commit) > 7 else "")


def _distinct(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def _table(section: Section, rows: list[Row]) -> str:
    rows = in_order(rows)
    headings, lines = (_by_row if section.pivot is None else _by_case)(section, rows)
    if len({row.fields["commit"] for row in rows}) > 1:
        firsts = rows if section.pivot is None else [same[0] for same in _cases(rows)]
        headings = [*headings, "commit"]
        lines = [[*line, _short(row.fields["commit"])] for line, row in zip(lines, firsts, strict=True)]
    kept = [i for i in range(len(headings)) if any(line[i] for line in lines)]
    text = [[headings[i] for i in kept], ["---"] * len(kept), *([line[i] for i in kept] for line in lines)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in text)
    if len(lines) < LONG:
        return table
    return f"<details><summary>{len(lines)} lines</summary>\n\n{table}\n\n</details>"


def _cell(row: Row | None, column: Column) -> str:
    value = None if row is None else row.fields.get(column.field)
    if value is None:
        return ""
    return (
        column.write(value)
        if column.write in (plain, count, without_sizes) or is_number(value)
        else str(value)
    )


def _by_row(section: Section, rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    return [column.heading for column in section.columns], [
        [_cell(row, column) for column in section.columns] for row in rows
    ]


def _by_case(section: Section, rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """A line a case, a column a side: ours first, the others in the order in which they appear."""
    sides = _distinct(row.fields.get("side", "") for row in rows)
    sides.sort(key=lambda side: not side.startswith(OURS))
    lines = []
    for same in _cases(rows):
        by_side = {row.fields.get("side", ""): row for row in same}
        ours = next((row for row in same if row.fields.get("side", "").startswith(OURS)), None)
        cells = [section.pivot(by_side[side]) if side in by_side else "" for side in sides]
        lines.append(
            [_cell(same[0], column) for column in section.columns]
            + cells
            + [_cell(ours, column) for column in section.after]
        )
    named = [column.heading for column in (*section.columns, *section.after)]
    place = len(section.columns)
    return [*named[:place], *sides, *named[place:]], lines


def _cases(rows: list[Row]) -> list[list[Row]]:
    """Rows of the same case together."""
    same = defaultdict(list)
    for row in rows:
        same[row.case].append(row)
    return list(same.values())


def in_order(rows: list[Row]) -> list[Row]:
    """Rows sorted by what was measured: sizes by value, names in the order in which they first appear."""
    places = defaultdict(dict)

    def key(row):
        found = []
        for name in CASES[row.kind]:
            value = row.fields.get(name)
            number = is_number(value)
            found.append(
                (not number, value if number else places[name].setdefault(str(value), len(places[name])))
            )
        return found

    keys = [key(row) for row in rows]
    return [rows[i] for i in sorted(range(len(rows)), key=keys.__getitem__)]


def insert(text: str, block: str) -> str:
    """A README with the lines between its two markers replaced by a block.

    Raises:
        ValueError: the markers are missing, doubled or in the wrong order.
    """
    for marker in (BEGIN, END):
        if text.count(marker) != 1:
            raise ValueError(f"{text.count(marker)} times {marker}, expected once")
    before, _, rest = text.partition(BEGIN)
    if END not in rest:
        raise ValueError(f"{END} stands before {BEGIN}")
    return f"{before}{BEGIN}\n\n{block.strip()}\n\n{END}{rest.partition(END)[2]}"
