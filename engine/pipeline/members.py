"""The members of a `Rows`: one processor's settings and memory of every row, and where each of them can run."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ParameterError
from ..kernels.sampling.rules import TAIL_TOKENS, Rule
from ..params.sampling_params import SamplingParams
from .forms import Context, Edit, Keep, Processor, values_of
from .processors.temperature import AdaptiveTemperature, Temperature
from .processors.truncation import TailFree, TopK


class Member:
    """One processor of a `Rows`: for which rows it is on, their settings, packed values and memory."""

    def __init__(self, processor: Processor, size: int):
        self.processor = processor
        self.settings: list[dict[str, Any]] = [processor.settings(None)] * size
        self.on = [False] * size
        self.memory: Any = None
        self.values: Any = None

    def copy(self, **changes: Any) -> Member:
        """A shallow copy with some attributes replaced."""
        other = Member.__new__(Member)
        other.__dict__.update(self.__dict__)
        other.__dict__.update(changes)
        return other

    def set(self, row: int, settings: dict[str, Any], on: bool) -> None:
        """Replace one row's settings; the packed values are rebuilt when they are next needed."""
        self.settings[row], self.on[row], self.values = settings, on, None

    def ready(self, site: Context) -> Any:
        """The packed values, built if a row has changed."""
        if self.values is None:
            self.values = values_of(self.processor, self.settings, self.on, site)
        return self.values


UNASKED = SamplingParams()
PLAIN = (bool, int, float, str, tuple, type(None))  # what tells by == whether it is the same


def alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows' settings of a processor are surely the same."""
    return one.keys() == other.keys() and all(
        value is other[name] or (type(value) is type(other[name]) in PLAIN and value == other[name])
        for name, value in one.items()
    )


def telling(processor: Processor) -> tuple[str, ...]:
    """The fields that say, by the values they have when nothing is asked, that a rule is off; none: look closer."""
    plain = type(processor).settings is Processor.settings and not processor.explicit
    known = all(field in SamplingParams.__dataclass_fields__ for field in processor.fields)
    return processor.fields if plain and known and not processor.on(processor.settings(UNASKED, 0)) else ()


class Quick:
    """A look at the fields of all processors at once, that tells which are off for some `SamplingParams`."""

    def __init__(self, processors: Sequence[Processor]):
        self.fields = [telling(processor) for processor in processors]
        named = [field for fields in self.fields for field in fields]
        self._read = operator.attrgetter(
            "temperature", "seed", *named
        )  # with two more, so that it reads a tuple
        self._off = [getattr(UNASKED, field) for field in named]
        self._all = [bool(fields) for fields in self.fields]
        self._ends = [*itertools.accumulate(map(len, self.fields), initial=0)]

    def off(self, params: Any) -> list[bool]:
        """Of every processor; False where it may be on."""
        if type(params) is not SamplingParams:
            return [False] * len(self.fields)
        values = [*self._read(params)][2:]
        if values == self._off:
            return self._all
        same = [value == off for value, off in zip(values, self._off, strict=True)]
        return [first < end and all(same[first:end]) for first, end in itertools.pairwise(self._ends)]


def select_memory(memory: Any, index: Tensor) -> Any:
    """Memory of the rows `index` [N] int64, in that order; repeated rows get memory of their own."""
    if memory is None:
        return None
    if isinstance(memory, dict):
        return {name: tensor.index_select(0, index.to(tensor.device)) for name, tensor in memory.items()}
    return memory.select(index.tolist())


def put_memory(memory: Any, row: int, fresh: Any) -> Any:
    """`memory` with one row replaced by the memory `fresh` of a single row."""
    if not isinstance(memory, dict):
        return memory.put(row, fresh)
    memory = {name: tensor.clone() for name, tensor in memory.items()}
    for name, tensor in memory.items():
        tensor[row] = fresh[name][0]
    return memory


def joined(parts: Sequence[Member]) -> Member:
    """One processor's rows of several values, in order; their memory, if any, is of one make."""
    settings, on = ([each for part in parts for each in getattr(part, name)] for name in ("settings", "on"))
    memory = parts[0].memory
    if isinstance(memory, dict):
        memory = {name: torch.cat([part.memory[name] for part in parts]) for name in memory}
    elif memory is not None:
        rows = [part.memory.select([i]) for part in parts for i in range(len(part.on))]
        memory = memory.select([0] * len(rows))
        for row, own in enumerate(rows):
            memory = memory.put(row, own)
    return parts[0].copy(settings=settings, on=on, values=None, memory=memory)


@dataclasses.dataclass
class Plan:
    """Where the members of a `Rows` run: the first `unfused` members one by one, then the fused sampler.

    edits: members that edit there. remembering: truncation rules there that have memory. rules: the truncation
    rules in order, a member's index where its parameter is in memory, and made in every step. foreign: rules by a level
    or a mass that somebody else has written, which may be NaN. temperature: [B] float32, 0 for greedy rows; None: no
    row needs one. adaptive: [4, B], of the rows whose temperature follows their entropy, or None. untouched: [B]
    bool, greedy rows for which no member is on; None: none. Where all rows are greedy, no rule is needed: what the
    sampler truncates by keeps the most probable token.
    """

    unfused: list[int]
    edits: list[int]
    remembering: list[int]
    foreign: list[int] = dataclasses.field(default_factory=list)
    rules: list[Rule | int] = dataclasses.field(default_factory=list)
    temperature: Tensor | None = None
    adaptive: Tensor | None = None
    untouched: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether greedy rows are drawn from what the model gave."""
        return not self.unfused and not self.edits


def reasons(
    processors: Sequence[Processor],
    settings: Sequence[Sequence[dict]],
    device_type: str = "cpu",
    greedy: Sequence[bool] | None = None,
    on: Sequence[Sequence[bool]] | None = None,
) -> list[str]:
    """Why each processor, on beside the others, cannot run in the fused sampler; "" for those that can.

    The sampler takes edits, then a temperature, then truncation rules, and nothing before it may come after it:
    so what it runs is the longest end of the pipeline in that order. A rule that keeps the same tokens at every
    temperature may stand before one.

    settings: of each processor, those of the rows for which it is on. greedy: whether it is on for a greedy row. on:
    for which rows it is, if not for the same ones.
    """
    found, follower, ends = [""] * len(processors), "", len(processors) - 1
    keeps, sparse, dividing, memory = True, "", set(), ""
    scaled = True  # by numbers known before, if at all
    for i in range(ends, -1, -1):
        processor = processors[i]
        own = unfused_alone(processor, settings[i], device_type)
        own = "" if is_short(i, processors, settings, on) else own
        if isinstance(processor, Keep) and not own and greedy and greedy[i] and not processor.keeps_argmax:
            own = "it may drop the most probable token of a greedy row, which the sampler takes"
        if not own and follower:
            own = f"runs before {follower}, which the sampler cannot follow"
        elif not own and isinstance(processor, Keep):
            if not (keeps or (scaled and processor.scale_free)):
                own = f"runs before {processors[i + 1].name}, and the sampler truncates last"
            elif i < ends and remembers(processor):
                own = f"runs before {processors[i + 1].name}, and remembers what it left itself"
        elif not own and divides(processor):
            rows = {0} if on is None else {row for row, own_row in enumerate(on[i]) if own_row}
            if not keeps and (not dividing or rows & dividing):
                own = f"runs before {processors[i + 1].name}, and the sampler edits first"
            elif memory and not isinstance(processor, Temperature):
                own = f"runs before {memory}, which remembers probabilities"
            keeps, dividing, scaled = False, dividing | rows, scaled and isinstance(processor, Temperature)
        elif not own:
            keeps, dividing, scaled = False, set(), False
            if processor.form == "pointwise" and sparse:
                own = f"runs before {sparse}, and the sampler edits listed tokens first"
            sparse = processor.name if processor.listed is not None else sparse
        memory = memory or (processor.name if isinstance(processor, Keep) and remembers(processor) else "")
        found[i], follower = own, follower or (processor.name if own else "")
    return found


def is_short(
    i: int,
    processors: Sequence[Processor],
    settings: Sequence[Sequence[dict]],
    on: Sequence[Sequence[bool]] | None,
) -> bool:
    """Whether the i-th processor is tail-free sampling behind a top-k, rules alone between, of few tokens in each row.

    Of so few the sampler takes second differences.
    """
    if type(processors[i]) is not TailFree:
        return False
    for j in range(i - 1, -1, -1):
        if type(processors[j]) is TopK:
            mine, its = (on[i], on[j]) if on else ([True] * len(settings[i]),) * 2
            counts = dict(zip(itertools.compress(itertools.count(), its), settings[j], strict=False))
            asked = [counts.get(row, {"top_k": 0})["top_k"] for row, there in enumerate(mine) if there]
            return all(0 < count <= TAIL_TOKENS for count in asked)
        if not isinstance(processors[j], Keep):
            return False
    return False


def divides(processor: Processor) -> bool:
    """Whether a processor is the sampler's temperature, of some rows."""
    return isinstance(processor, Temperature | AdaptiveTemperature)


def unfused_alone(processor: Processor, rows: Sequence[dict] = (), device_type: str = "cpu") -> str:
    """Why a processor cannot run in the fused sampler, whatever stands beside it; "" if it can.

    rows: settings of the rows for which it is on.
    """
    if isinstance(processor, Temperature) and type(processor).edit is Temperature.edit:
        return ""
    return processor.unfused(device_type, rows) if isinstance(processor, Edit | Keep) else "opaque"


def remembers(processor: Processor) -> bool:
    """Whether a processor has memory."""
    return type(processor).start is not Processor.start


def merge(chains: Sequence[Sequence[Processor]]) -> list[Processor]:
    """One order of all chains' processors that keeps the order of each; shared processors appear once.

    Raises ParameterError when two chains hold the same two processors in opposite orders.
    """
    merged: list[Processor] = []
    for chain in chains:
        place = 0
        for processor in chain:
            found = next((i for i, other in enumerate(merged) if other is processor), None)
            if found is None:
                merged.insert(place, processor)
                place += 1
            elif found < place:
                raise ParameterError(
                    f"{processor!r} stands at different places in the pipelines of this batch"
                )
            else:
                place = found + 1
    return merged
