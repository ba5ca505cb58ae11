"""What a loaded model can do, and why not where it cannot."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Capability:
    """One ability: true or false, with the reason."""

    supported: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.supported


@dataclass(frozen=True)
class Capabilities:
    """How a model is run, and what follows from it.

    Args:
        path: `attention` (our attention function over the block pool), `mask` (the model's own attention over
            gathered cells, with a mask per row), `rows` (the same, one row per forward pass) or `solo` (one sequence
            at a time through transformers' cache).
        ragged: rows of different length in one forward pass.
        fork: `State.select` shares what was computed.
        rewind: an older State continues without recomputing.
        extend: several tokens per row in one forward pass.
        tree: several candidate continuations per row in one forward pass.
        graph: the decode step can be captured as a CUDA graph.
    """

    path: str
    ragged: Capability
    fork: Capability
    rewind: Capability
    extend: Capability
    tree: Capability
    graph: Capability

    def __repr__(self) -> str:
        lines = [f"path    {self.path}"]
        for f in fields(self)[1:]:
            ability = getattr(self, f.name)
            lines.append(f"{f.name:8}{'yes' if ability else 'no':4}{ability.reason}".rstrip())
        return "\n".join(lines)
