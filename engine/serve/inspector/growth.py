"""The passes of a strategy as a tree that grows: what every row holds, and what it tries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from ...engine import Engine
from ...loop.generation import Generation
from ...state import State


class Growth:
    """A tree of token ids behind a prefix, told pass by pass; node 0 is the prefix.

    Beams, particles and drafts are rows of States, whatever the strategy, so its passes tell them: what a row holds
    before a pass was kept, what the pass feeds to it is tried, and what no later row holds was given up.

    Args:
        engine: whose tokenizer shows tokens. prefix: ids; other rows, such as those of another prompt, are left out.
        tell: called with `{"pass", "kind", "nodes": [[number, parent, id, probability]], "rows": [[kept, tried]],
            "texts"}` for every pass: the nodes that are new, and for each row the last node that it held and the last
            one it was fed.
    """

    def __init__(self, engine: Engine, prefix: Sequence[int], tell: Callable[[dict[str, Any]], None]):
        self.engine, self.prefix, self.tell = engine, list(prefix), tell
        self.passes, self._known = 0, dict[tuple[int, int], int]()
        self._new: list[list[Any]] = []
        self._texts: dict[int, str] = {}

    def look(self, name: str, arguments: tuple, after: Any) -> None:
        """See one pass of the engine's."""
        if name not in ("step", "extend", "tree_step"):
            return
        before: State = arguments[0]
        after_logits = None if name == "step" else after.all_logits
        rows = []
        for row, (kept, fed, parents) in enumerate(_fed(name, arguments, after)):
            if kept[: len(self.prefix)] != self.prefix:
                continue
            base = self._path(0, kept[len(self.prefix) :])
            places, tips = [], {base}
            for token, parent in zip(fed, parents, strict=True):
                logits = before.logits[row] if parent < 0 else after_logits[row, parent]
                above = base if parent < 0 else places[parent]
                places.append(self._node(above, token, logits))
                tips = (tips - {above}) | {places[-1]}
            rows += [[base, tip] for tip in sorted(tips)]
        self.passes += 1
        nodes, self._new = self._new, []
        self.tell(
            {"pass": self.passes, "kind": name, "nodes": nodes, "rows": rows, "texts": self._shown(nodes)}
        )

    def end(self, result: Generation) -> dict[str, Any]:
        """A result: its last node, the nodes that no pass has shown, how it ended and what the strategy tells of it."""
        last = self._path(0, result.token_ids)
        nodes, self._new = self._new, []
        extra = {
            name: value for name, value in result.to_dict()["extra"].items() if isinstance(value, int | float)
        }
        return {
            "last": last,
            "nodes": nodes,
            "texts": self._shown(nodes),
            "finish": result.finish_reason,
            "extra": extra,
        }

    def _path(self, node: int, ids: Sequence[int]) -> int:
        for token in ids:
            node = self._node(node, token)
        return node

    def _node(self, parent: int, token: int, logits: Tensor | None = None) -> int:
        number = self._known.get((parent, token))
        if number is None:
            number = self._known[parent, token] = len(self._known) + 1
            p = None if logits is None else math.exp(float(logits[token] - logits.logsumexp(-1)))
            self._new.append([number, parent, token, p and float(f"{p:.3g}")])
        return number

    def _shown(self, nodes: Sequence[Sequence[Any]]) -> dict[int, str]:
        if self.engine.tokenizer is None:
            return {}
        fresh = {node[2] for node in nodes} - self._texts.keys()
        shown = {i: self.engine.decode([i], skip_special_tokens=False) for i in sorted(fresh)}
        self._texts |= shown
        return shown


def _fed(name: str, arguments: tuple, after: State) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """What each row held before a pass, what it was fed, and behind which of these each token stands (-1: the row)."""
    before = arguments[0].tokens
    if name == "tree_step":
        for kept, fed, parents in zip(before, arguments[1], arguments[2], strict=True):
            yield kept, [int(i) for i in fed], [int(i) for i in parents]
        return
    for kept, now in zip(before, after.tokens, strict=True):
        fed = now[len(kept) :]
        yield kept, fed, [*range(-1, len(fed) - 1)]
