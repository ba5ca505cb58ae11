"""Trees of drafts behind rows: several candidate continuations whose cells lie side by side until one is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import HandloomError
from .pool import Table
from .sequence import Row


@dataclass(frozen=True, eq=False)
class Drafts:
    """A tree of drafts a row: its tokens, each one's parent (-1: the row's last token), and where their cells are."""

    tokens: tuple[tuple[int, ...], ...]
    parents: tuple[tuple[int, ...], ...]
    tables: tuple[Table, ...]

    def select(self, numbers: Sequence[int]) -> Drafts:
        """The trees of some rows."""
        return Drafts(*(tuple(part[i] for i in numbers) for part in (self.tokens, self.parents, self.tables)))

    def along(self, rows: Sequence[Row], paths: Sequence[Sequence[int]]) -> list[Row]:
        """Each row longer by the drafts of one path, whose cells move to where the row goes on; nothing else changes.

        Raises:
            HandloomError: a path does not lead from the row's last token from parent to child.
        """
        check_paths(paths, self.parents)
        longer, sources, targets = [], [], []
        for row, path, tokens, table in zip(rows, paths, self.tokens, self.tables, strict=True):
            begin, pool = row.length, table.pool
            held = table if path == list(range(len(path))) else pool.writable(table, begin, len(path))
            if held is not table:
                sources += [pool.cell(table, begin + place) for place in path]
                targets += [pool.cell(held, begin + at) for at in range(len(path))]
            history = row.history.extended([tokens[place] for place in path])
            longer.append(replace(row, table=held if path else row.table, history=history))
        if sources:
            self.tables[0].pool.move(sources, targets)
        return longer


def check_paths(paths: Sequence[Sequence[int]], trees: Sequence[Sequence[int]]) -> None:
    """Raise HandloomError unless every path leads from a row's last token from parent to child."""
    if len(paths) != len(trees):
        raise HandloomError(f"{len(paths)} paths for a State of {len(trees)} rows")
    for i, (path, parents) in enumerate(zip(paths, trees, strict=True)):
        above = -1
        for place in path:
            if not 0 <= place < len(parents):
                raise HandloomError(f"row {i}: draft {place} is not in 0..{len(parents) - 1}")
            if parents[place] != above:
                raise HandloomError(
                    f"row {i}: draft {place} hangs on {parents[place]}, not on {above}, so {list(path)} is no path"
                )
            above = place


def check_trees(tokens: Sequence[Sequence[int]], trees: Sequence[Sequence[int]]) -> None:
    """Raise HandloomError unless each row has a parent before each of its drafts, or -1."""
    if len(trees) != len(tokens):
        raise HandloomError(f"{len(trees)} rows of parents for {len(tokens)} rows of tokens")
    for i, (row, parents) in enumerate(zip(tokens, trees, strict=True)):
        if len(parents) != len(row):
            raise HandloomError(f"row {i}: {len(parents)} parents for {len(row)} drafts")
        for place, parent in enumerate(parents):
            if not -1 <= parent < place:
                raise HandloomError(
                    f"row {i}: the parent of draft {place} is {parent}; it must come before, or be -1 for none"
                )
