"""Rows: the per-row parameters and memory of a pipeline, and the draw of one token a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from handloom.errors import ParameterError
from handloom.kernels import dispatch
from handloom.kernels.rules import Rule
from handloom.kernels.sample import sample
from handloom.processors.base import Context, Keep, Processor, guarded, values_of
from handloom.processors.temperature import Temperature


@dataclasses.dataclass
class Drawn:
    """One drawn token a row.

    tokens: [B] int64. raw_logprobs: [B] float32, log_softmax of the logits as the model gave them, at the
    token.
    logprobs: [B] float32, the same after all processors (greedy rows: without temperature and truncation).
    processed: [B, V] float32, or None where it was never written. A row whose logits are NaN, or which has no
    token left, has NaN in a log-probability (and an arbitrary valid token).
    """

    tokens: Tensor
    raw_logprobs: Tensor
    logprobs: Tensor
    processed: Tensor | None


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


@dataclasses.dataclass
class Plan:
    """Where the members of a `Rows` run: the first `unfused` members one by one, then the fused sampler.

    temperature: [B] float32, 0 for greedy rows; None: no row needs one. rules: truncation rules in order.
    """

    unfused: list[int]
    temperature: Tensor | None
    rules: tuple[Rule, ...]


def split_tail(processors: Sequence[Processor], device_type: str = "cpu") -> int:
    """How many of `processors` come before what the fused sampler runs: temperature, then keep rules."""
    first = len(processors)
    while (
        first and isinstance(processors[first - 1], Keep) and not processors[first - 1].unfused(device_type)
    ):
        first -= 1
    return first - 1 if first and isinstance(processors[first - 1], Temperature) else first


class Rows:
    """What a `Pipeline` keeps for B rows: made by `Pipeline.bind`.

    `accept` and `select` return new values and leave the old ones usable (fork, rewind). `fill` and `clear`
    change one row of this object; they are for the loop, which owns its rows. Processors that no row uses
    cost nothing.
    """

    def __init__(self, pipeline: Any, size: int, site: Context):
        self.pipeline, self.site, self.size = pipeline, site, size
        self.params: list[Any] = [None] * size
        self.chains: list[Any] = [None] * size
        self.members: list[Member] = []
        self.greedy = [True] * size  # an empty row must not cost the others a draw
        self._greedy_tensor: Tensor | None = None
        self._plan: Plan | None = None
        self._merged: list[Any] = []  # the chains whose processors `members` holds

    def __len__(self) -> int:
        return self.size

    def fill(
        self, row: int, params: Any, prompt_ids: Sequence[int] = (), seed: int = 0, stream: int = 0
    ) -> None:
        """Give `row` to a new request, with fresh memory; ParameterError for a field that nobody reads."""
        chain = self.pipeline.for_params(params)
        chain.check(params)
        if not 0 <= row < self.size:
            raise ParameterError(f"row {row} does not exist; rows are 0 to {self.size - 1}")
        self.params[row], self.chains[row], self._plan = params, chain, None
        self._place(row, chain, params)
        stateful = [m for m in self.members if m.on[row] and type(m.processor).start is not Processor.start]
        if stateful:
            site = self._site_of(params, prompt_ids, seed, stream)
            for member in stateful:
                self._start(member, row, site)

    def _site_of(self, params: Any, prompt_ids: Sequence[int], seed: int, stream: int) -> Context:
        """The Context of a single row before its first token."""

        def tensor(values):
            return torch.tensor(values, dtype=torch.int64, device=self.site.device)

        return dataclasses.replace(
            self.site,
            params=[params],
            tokens=tensor([list(prompt_ids)]).view(1, -1),
            lengths=tensor([len(prompt_ids)]),
            prompt_lengths=tensor([len(prompt_ids)]),
            seeds=tensor([seed]),
            streams=tensor([stream]),
        )

    def clear(self, row: int) -> None:
        """Take `row` back: no processor runs for it until it is filled again."""
        self.params[row], self.chains[row], self._plan = None, None, None
        for member in self.members:
            if member.on[row]:
                member.set(row, member.settings[row], False)
        self._set_greedy(row, True)

    def _place(self, row: int, chain: Any, params: Any) -> None:
        """Switch the row's processors on, and everyone else's off for this row."""
        chains = list({id(other): other for other in self.chains if other is not None}.values())
        if [id(other) for other in chains] != [id(other) for other in self._merged]:
            old = {id(member.processor): member for member in self.members}
            self.members = [old.get(id(p)) or Member(p, self.size) for p in merge(chains)]
            self._merged = chains
        greedy = chain.greedy(params, row)
        mine = {id(processor) for processor in chain}
        for member in self.members:
            processor, on = member.processor, False
            settings = processor.settings(params, row) if id(processor) in mine else None
            if settings is not None:
                skipped = greedy and processor.sampling_only and not chain.chain_when_greedy
                on = processor.on(settings) and not skipped
            if on or member.on[row]:
                member.set(row, settings or member.settings[row], on)
        self._set_greedy(row, greedy)

    def _set_greedy(self, row: int, value: bool) -> None:
        if self.greedy[row] != value:
            self.greedy[row], self._greedy_tensor = value, None

    def _start(self, member: Member, row: int, site: Context) -> None:
        """Fresh memory for one row of one member."""
        values = values_of(member.processor, [member.settings[row]], [True], site)
        fresh = member.processor.start(site.view(member.processor, values, None))
        if fresh is None:
            return
        if member.memory is None:
            member.memory = select_memory(fresh, torch.zeros(self.size, dtype=torch.int64))
        else:
            member.memory = put_memory(member.memory, row, fresh)

    def active(self) -> list[Member]:
        """The members that are on for at least one row, in order."""
        return [member for member in self.members if any(member.on)]

    def _view(self, member: Member, context: Context) -> Context:
        """The step as one member sees it."""
        view = context.view(member.processor, member.ready(self.site), member.memory)
        view.vocab_size, view.eos_token_ids = self.site.vocab_size, self.site.eos_token_ids
        view.device = self.site.device
        return view

    def plan(self) -> Plan:
        """Which active members run where in `sample`; made anew when rows have changed."""
        if self._plan is None:
            chosen = [i for i, member in enumerate(self.members) if any(member.on)]
            first = split_tail([self.members[i].processor for i in chosen], self.site.device.type)
            temperature, rules = None, []
            for i in chosen[first:]:
                member = self.members[i]
                values = member.ready(self.site)
                if isinstance(member.processor, Temperature):
                    temperature = values.temperature[:, 0]
                else:
                    rules.append(member.processor.rule(self.site.view(member.processor, values, None)))
            if any(self.greedy):
                temperature = (
                    torch.ones(self.size, device=self.site.device) if temperature is None else temperature
                )
                temperature = torch.where(self.greedy_rows(), 0.0, temperature)
            self._plan = Plan(chosen[:first], temperature, tuple(rules))
        return self._plan

    def apply(self, logits: Tensor, context: Context) -> Tensor:
        """Processed logits [B, V] float32; `logits` itself, which is never written to, when all are off."""
        for member in self.active():
            logits = guarded(member.processor, logits, self._view(member, context))
        return logits

    def accept(self, tokens: Tensor, context: Context, *, every_row: bool = False) -> Rows:
        """Rows after `tokens` [B] int64 were committed; give the Context that `apply` or `sample` saw.

        A token of -1 says that its row accepts nothing in this step: its memory stays as it is. `every_row`
        says that there is none, so that nothing has to be read on the host.
        """
        stateful = [member for member in self.active() if member.memory is not None]
        if not stateful:
            return self
        idle = [] if every_row else (tokens < 0).nonzero().flatten().tolist()
        changed = {}
        for member in stateful:
            view = self._view(member, context)
            memory = member.processor.accept(member.memory, tokens.clamp(min=0), view)
            for row in idle:
                memory = put_memory(memory, row, select_memory(member.memory, torch.tensor([row])))
            changed[id(member)] = member.copy(memory=memory)
        return self._with([changed.get(id(member), member) for member in self.members])

    def _with(self, members: list[Member]) -> Rows:
        other = Rows.__new__(Rows)
        other.__dict__.update(self.__dict__)
        other.members = members
        return other

    def select(self, index: Sequence[int] | Tensor) -> Rows:
        """Rows `index` [N] in that order: fork, reorder or drop. Forked memory is independent."""
        index = torch.as_tensor(index, dtype=torch.int64).flatten()
        rows = index.tolist()
        pick = lambda values: [values[i] for i in rows]  # noqa: E731
        other = self._with(
            [
                member.copy(
                    settings=pick(member.settings),
                    on=pick(member.on),
                    values=None,
                    memory=select_memory(member.memory, index),
                )
                for member in self.members
            ]
        )
        other.size, other.params, other.chains = len(rows), pick(self.params), pick(self.chains)
        other.greedy, other._greedy_tensor, other._plan = pick(self.greedy), None, None
        return other

    def sample(self, logits: Tensor, context: Context) -> Drawn:
        """Process raw `logits` [B, V] float32 and draw one token a row.

        Temperature and the truncation rules at the end of the pipeline run inside `kernels.sample` together
        with the draw, with the tokens that `apply` and `kernels.draw` would give.
        """
        if all(self.greedy):
            processed = self.apply(logits, context)
            tokens = processed.argmax(-1)
            raw = logprob_of(logits, tokens)
            return Drawn(
                tokens, raw, raw if processed is logits else logprob_of(processed, tokens), processed
            )
        plan, processed = self.plan(), logits
        for i in plan.unfused:
            member = self.members[i]
            processed = guarded(member.processor, processed, self._view(member, context))
        drawn = sample(
            processed,
            seeds=context.seeds,
            positions=context.positions,
            streams=context.streams,
            temperature=plan.temperature,
            rules=plan.rules,
            logprobs="chosen",
            kernels=implementation(logits.device),
        )
        tokens = drawn.tokens.clamp(
            min=0
        )  # -1 marks a row without a drawable token; its log-probabilities are NaN
        final = drawn.logprob
        if any(self.greedy):  # by the formula of a batch without sampling rows, to the last bit
            final = torch.where(self.greedy_rows(), logprob_of(processed, tokens), final)
        return Drawn(tokens, logprob_of(logits, tokens), final, None)

    def greedy_rows(self) -> Tensor | None:
        """[B] bool: rows that take the argmax; None when there are none."""
        if not any(self.greedy):
            return None
        if self._greedy_tensor is None:
            self._greedy_tensor = torch.tensor(self.greedy, device=self.site.device)
        return self._greedy_tensor


def implementation(device: torch.device) -> str | None:
    """Which kernels `sample` is asked for: on a CPU the interpreter of Triton runs only for those
    who name it.
    """
    return "torch" if device.type == "cpu" and dispatch.requested() == "auto" else None


def logprob_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """log_softmax(logits [B, V]) at tokens [B], [B] float32; NaN for rows of NaN or of -inf alone."""
    return logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


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
