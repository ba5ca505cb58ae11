"""Rotary embeddings as one launch: tables that the model's own module has filled, looked up by position."""

from __future__ import annotations

import copy
import operator

import torch
from torch import nn

from ...kernels.layer.rope import look_up
from .parts import bypassed

LEAST = 4096  # positions of a first table, and most that are computed at once
# Positions at which a module must give the same alone as beside all others; the last is beyond any context.
PROBED = (0, 1, 2, 7, 100, 2047, 4095, 33333, 2**20 - 1)
PLAIN = (bool, int, float, str, type(None))  # arguments beside the positions that a table may stand for


class RotaryTable:
    """Cosines and sines of every position, as a rotary embedding of a twin gives them, to the bit.

    A table is `[N, 2, W]` in the dtype that the module gives; N is a power of two, at least 4096, and enough for the
    rows of every pass so far. What was outgrown stays where it is, for recorded passes read it: together less than
    `4 * N * W` numbers for each way of calling the module. That is 2 MB for up to 4096 positions and W = 128 in
    bfloat16, and less than 135 MB for 131,072, where keys and values of one row of Llama 3.1 8B take 17 GB.

    Args:
        part: the twin's rotary embedding, with its own class.
        x: what it is called with, of which it reads dtype and device.
        ways: its further arguments, as `read_call` gives them.
    """

    def __init__(self, part: nn.Module, x: torch.Tensor, ways: list[tuple]):
        self.part, self.plain, self.like = part, type(part), (x.dtype, x.device, x.shape[-1])
        self.positions = 0  # that a pass may have now; none outside of one
        self.tables: dict[tuple, list[torch.Tensor]] = {way: [] for way in ways}
        self._grow(LEAST)

    def __call__(self, x, positions, way) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Cosines and sines `[B, Q, W]` of positions `[B, Q]`; None where the module itself has to give them."""
        tables = self.tables.get(way)
        if (
            tables is None
            or not self.positions
            or positions.dim() != 2
            or (x.dtype, x.device) != self.like[:2]
        ):
            return None
        return look_up(tables[-1], positions)

    def aim(self, positions: int) -> None:
        """Have tables for the positions below a number; with 0 the module runs plain, as outside of a pass."""
        self.positions = positions
        if positions > LEAST:
            self._grow(1 << (positions - 1).bit_length())

    def renew(self) -> None:
        """Fill the tables as the module is now, where they lie."""
        for way, tables in self.tables.items():
            for table in tables:
                for mine, piece in zip(table.split(LEAST), self._pieces(way, len(table)), strict=True):
                    mine.copy_(piece)

    def fits(self, other: RotaryTable) -> bool:
        """Whether this one's tables may be filled with what another one holds."""
        kinds = [
            {way: (tables[0].shape, tables[0].dtype) for way, tables in each.tables.items()}
            for each in (self, other)
        ]
        return self.like == other.like and kinds[0] == kinds[1]

    def wrong(self) -> str:
        """Why a table is not what the module computes, in words; empty if it is."""
        for way, (table,) in self.tables.items():
            together = self.computed(way, torch.tensor([PROBED]))[0]
            for place, position in enumerate(PROBED):
                alone = self.computed(way, torch.tensor([[position]]))[0, 0]
                known = table[position] if position < len(table) else alone
                if not torch.equal(alone, together[place]) or not torch.equal(alone, known):
                    return "its angles at a position depend on the others in a pass"
        return ""

    @torch.no_grad()
    def computed(self, way, positions) -> torch.Tensor:
        """Cosines and sines of positions `[B, Q]` by the module itself, without its hooks: `[B, Q, 2, W]`."""
        dtype, device, size = self.like
        alone = copy.copy(self.part)  # it may write to its buffers, whose table is the user's
        alone.__dict__["_buffers"] = dict(self.part._buffers)
        x = torch.empty(1, 1, 1, dtype=dtype, device=device).expand(*positions.shape, size)
        rest, named = way
        return torch.stack(self.plain.forward(alone, x, positions.to(device), *rest, **dict(named)), -2)

    def _grow(self, count: int) -> None:
        for way, tables in self.tables.items():
            if not tables or len(tables[-1]) < count:
                tables.append(torch.cat([*self._pieces(way, count)]))

    def _pieces(self, way, count):
        for begin in range(0, count, LEAST):
            yield self.computed(way, torch.arange(begin, begin + LEAST)[None])[0]


class FusedRotary:
    """What the class of a rotary embedding becomes in a twin."""

    structure: RotaryTable

    def forward(self, *args, **named):
        """As the embedding's own."""
        call = None if torch.compiler.is_compiling() else read_call(args, named)
        turns = call and self.structure(*call)
        return super().forward(*args, **named) if turns is None else turns

    def renew(self) -> None:
        """Follow values of the module that have changed."""
        self.structure.renew()


class Heard:
    """What the class of a rotary embedding becomes while its calls are noted: arguments and results."""

    structure: list[tuple]

    def forward(self, *args, **named):
        """As the embedding's own."""
        out = super().forward(*args, **named)
        self.structure.append((args, named, out))
        return out


def rotary_embeddings(module: nn.Module, layers) -> dict[str, nn.Module]:
    """The modules outside of some layers, by their names, that hold frequencies and nothing else."""
    return {
        name: part
        for name, part in module.named_modules()
        if any("inv_freq" in buffer for buffer in part._buffers)
        and not part._modules
        and not part._parameters
        and not any(name.startswith(f"{layer}.") for layer in layers)
    }


def read_call(args, named) -> tuple | None:
    """Hidden states, positions and a hashable of all other arguments of a call; None where it is none that is known."""
    if len(args) == 1 and "position_ids" in named:
        named = dict(named)
        args = (*args, named.pop("position_ids"))
    if len(args) < 2 or not all(isinstance(value, PLAIN) for value in (*args[2:], *named.values())):
        return None
    return args[0], args[1], (tuple(args[2:]), tuple(named.items()))


def read_rotary(part: nn.Module, calls: list[tuple], known: RotaryTable | None = None) -> RotaryTable | str:
    """The table that gives what a module gave in a pass, or why there is none, in words.

    Args:
        part: the module. calls: arguments and results of its calls in a pass.
        known: the table it had before, which is kept if it can be: recorded passes read it.
    """
    reason = bypassed(part)
    if reason:
        return reason
    read = [read_call(args, named) for args, named, _ in calls]
    if not calls or None in read:
        return "it is called in another way" if calls else "it was not called"
    if any(positions.dim() != 2 for _, positions, _ in read):
        return "its positions are not one number a token"
    for (_, positions, _), (_, _, out) in zip(read, calls, strict=True):
        if not isinstance(out, tuple) or len(out) != 2 or not all(map(torch.is_tensor, out)):
            return "it does not give cosines and sines"
        if out[0].shape != out[1].shape or out[0].shape[:2] != positions.shape or out[0].dim() != 3:
            return "its angles are not those of single tokens"
    try:
        table = RotaryTable(part, read[0][0], [way for *_, way in read])
        reason = table.wrong()
        if reason:
            return reason
        for (_, positions, way), (_, _, out) in zip(read, calls, strict=True):
            if not torch.equal(table.computed(way, positions), torch.stack(out, -2)):
                return "alone it gives other angles than in a pass"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever it trips over, the module itself works
        return f"{type(error).__name__}: {error}".split("\n")[0][:160]
    if known is None or not known.fits(table):
        return table
    known.renew()
    return known


def tables_of(module: nn.Module) -> list[RotaryTable]:
    """Of all rotary embeddings in a twin that look their angles up."""
    found = (part for part in module.modules() if isinstance(part, FusedRotary))
    return [*map(operator.attrgetter("structure"), found)]
