"""Rows: the per-row parameters and memory of a pipeline."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..cache.transfer import upload
from ..errors import HandloomError, ParameterError
from ..kernels.sampling.rules import Rule
from .drawing import Drawn, draw_rows
from .edits import Edits
from .forms import Context, Edit, Keep, Processor, guarded, is_ours, values_of
from .members import (
    Member,
    Plan,
    Quick,
    alike,
    divides,
    joined,
    merge,
    put_memory,
    reasons,
    remembers,
    select_memory,
)
from .processors.temperature import AdaptiveTemperature

NEG_INF = float("-inf")


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
        self.changes = 0  # how often what the rows ask for has changed
        self._merged: list[Any] = []  # the chains whose processors `members` holds
        self._quick = Quick([])

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
        self.params[row], self.chains[row] = params, chain
        self._place(row, chain, params)
        stateful = [m for m in self.members if m.on[row] and remembers(m.processor)]
        if stateful:
            site = self._site_of(params, prompt_ids, seed, stream)
            for member in stateful:
                self._start(member, row, site)
            self._changed()

    def _changed(self) -> None:
        self._plan, self.changes = None, self.changes + 1

    def _site_of(self, params: Any, prompt_ids: Sequence[int], seed: int, stream: int) -> Context:
        """The Context of a single row before its first token."""

        def tensor(values):
            return upload(values, self.site.device)

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
        self.params[row], self.chains[row] = None, None
        for member in self.members:
            if member.on[row]:
                member.set(row, member.settings[row], False)
                self._changed()
        self._set_greedy(row, True)

    def _place(self, row: int, chain: Any, params: Any) -> None:
        """Switch the row's processors on, and everyone else's off for this row."""
        if len(self._merged) != 1 or self._merged[0] is not chain:
            self._merge()
        greedy = chain.greedy(params, row)
        mine = {id(processor) for processor in chain}
        for member, told_off in zip(self.members, self._quick.off(params), strict=True):
            if told_off and not member.on[row]:
                continue
            processor, on = member.processor, False
            settings = processor.settings(params, row) if id(processor) in mine else None
            if settings is not None:
                skipped = greedy and processor.sampling_only and not chain.chain_when_greedy
                on = processor.on(settings) and not skipped
            if on != member.on[row] or (on and not alike(settings, member.settings[row])):
                member.set(row, settings or member.settings[row], on)
                self._changed()
        self._set_greedy(row, greedy)

    def _merge(self) -> None:
        """Members of all chains that the rows have, in one order."""
        chains = list({id(other): other for other in self.chains if other is not None}.values())
        if [id(other) for other in chains] != [id(other) for other in self._merged]:
            old = {id(member.processor): member for member in self.members}
            self.members = [old.get(id(p)) or Member(p, self.size) for p in merge(chains)]
            self._merged, self._quick = chains, Quick([member.processor for member in self.members])
            self._changed()

    def _set_greedy(self, row: int, value: bool) -> None:
        if self.greedy[row] != value:
            self.greedy[row], self._greedy_tensor = value, None
            self._changed()

    def _start(self, member: Member, row: int, site: Context) -> None:
        """Fresh memory for one row of one member."""
        values = values_of(member.processor, [member.settings[row]], [True], site)
        try:
            fresh = member.processor.start(site.view(member.processor, values, None))
        except (HandloomError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            name = member.processor.name
            raise ParameterError(f"processor {name!r} raised {type(error).__name__}: {error}") from error
        if fresh is None:
            return
        if member.memory is None:
            member.memory = select_memory(fresh, torch.zeros(self.size, dtype=torch.int64))
        else:
            member.memory = put_memory(member.memory, row, fresh)

    def active(self) -> list[Member]:
        """The members that are on for at least one row, in order."""
        return [member for member in self.members if any(member.on)]

    def view(self, member: Member, context: Context) -> Context:
        """The step as one member sees it."""
        view = context.view(member.processor, member.ready(self.site), member.memory)
        view.vocab_size, view.eos_token_ids = self.site.vocab_size, self.site.eos_token_ids
        view.device = self.site.device
        return view

    def plan(self) -> Plan:
        """Which active members run where in `sample`; made anew when rows have changed."""
        if self._plan is None:
            chosen = [i for i, member in enumerate(self.members) if any(member.on)]
            members = [self.members[i] for i in chosen]
            settings = [[s for s, on in zip(m.settings, m.on, strict=True) if on] for m in members]
            greedy = [any(g and on for g, on in zip(self.greedy, m.on, strict=True)) for m in members]
            kind, on = self.site.device.type, [m.on for m in members]
            found = reasons([m.processor for m in members], settings, kind, greedy, on)
            fused = [i for i, reason in zip(chosen, found, strict=True) if not reason]
            keeps = [i for i in fused if isinstance(self.members[i].processor, Keep)]
            dividing = [i for i in fused if divides(self.members[i].processor)]
            self._plan = Plan(
                unfused=chosen[: len(chosen) - len(fused)],
                edits=[i for i in fused if i not in keeps and i not in dividing],
                remembering=[i for i in keeps if remembers(self.members[i].processor)],
                foreign=[i for i in keeps if self._is_foreign(self.members[i].processor)],
            )
            self._plan.temperature = self._temperature([i for i in dividing if not self._is_adaptive(i)])
            self._plan.adaptive = self._adaptive([i for i in dividing if self._is_adaptive(i)])
            if not all(self.greedy):
                self._plan.rules = [i if i in self._plan.remembering else self.rule(i) for i in keeps]
            if not self._plan.plain or not all(self.greedy):
                self._plan.untouched = self._untouched()
        return self._plan

    def forget_plan(self) -> None:
        """Plan the next draw anew."""
        self._plan = None

    def _is_foreign(self, rule: Processor) -> bool:
        return isinstance(rule, Keep) and rule.limit in ("level", "mass") and not is_ours(rule)

    def _is_adaptive(self, index: int) -> bool:
        return isinstance(self.members[index].processor, AdaptiveTemperature)

    def _temperature(self, members: list[int]) -> Tensor | None:
        """What the sampler divides by, 0 for greedy rows; `members`: the temperatures that are fused."""
        temperature = None
        for i in members:
            own = self.members[i].ready(self.site).temperature[:, 0]
            temperature = (
                own if temperature is None else temperature * own
            )  # no row has two; 1 where it is off
        if any(self.greedy):
            temperature = (
                torch.ones(self.size, device=self.site.device) if temperature is None else temperature
            )
            temperature = torch.where(self.greedy_rows(), 0.0, temperature)
        return temperature

    def _adaptive(self, members: list[int]) -> Tensor | None:
        """The fused temperatures that follow a row's entropy, [4, B] with columns of 0 for other rows."""
        found = None
        for i in members:
            view = self.site.view(self.members[i].processor, self.members[i].ready(self.site), None)
            own, on = view.key.adaptive(view), view.values.rows_on
            own = own if on is None else torch.where(on[:, 0], own, 0.0)
            found = own if found is None else found + own  # no row has two
        return found

    def rule(self, index: int, context: Context | None = None) -> Rule:
        """The truncation rule of a member, in a step if it has memory."""
        member = self.members[index]
        if context is not None:
            return member.processor.rule(self.view(member, context))
        return member.processor.rule(self.site.view(member.processor, member.ready(self.site), None))

    def _untouched(self) -> Tensor | None:
        active = [member.on for member in self.active()]
        rows = [greedy and not any(on[i] for on in active) for i, greedy in enumerate(self.greedy)]
        return upload(rows, self.site.device, None) if any(rows) else None

    def apply(self, logits: Tensor, context: Context) -> Tensor:
        """Processed logits [B, V] float32; `logits` itself, which is never written to, when all are off."""
        return self.run([i for i, member in enumerate(self.members) if any(member.on)], logits, context)

    def one_by_one(self, logits: Tensor, context: Context) -> Tensor:
        """Processed logits by every processor's own `apply`, in order: what defines `apply` and `sample`."""
        for _, left in self.stages(logits, context):
            logits = left
        return logits

    def stages(self, logits: Tensor, context: Context) -> Iterator[tuple[Processor, Tensor]]:
        """What each active processor leaves of logits [B, V], in order."""
        for member in self.active():
            logits = guarded(member.processor, logits, self.view(member, context))
            yield member.processor, logits

    def run(self, members: Sequence[int], logits: Tensor, context: Context) -> Tensor:
        """Members one by one; neighbours that can edit in place share one copy of the logits."""
        buffer = None
        for i in members:
            member = self.members[i]
            processor, view = member.processor, self.view(member, context)
            if isinstance(processor, Edit) and processor.in_place:
                if buffer is None:
                    buffer = torch.nn.functional.pad(logits, (0, 1))
                    logits = buffer[:, :-1]
                with self._blaming(member, view) as failed:
                    processor.edit_in_place(buffer, view)
            else:
                with self._blaming(member, view) as failed:
                    logits, buffer = guarded(processor, logits, view), None
            if failed:
                logits, buffer = logits.masked_fill(failed[0], NEG_INF), None
        return logits.contiguous()  # a softmax over a strided view is several times slower

    @contextmanager
    def _blaming(self, member: Member, context: Context) -> Iterator[list[Tensor]]:
        """Where the context forgives, what is raised ends the member's rows: then the list gets them, [B, 1] bool."""
        failed: list[Tensor] = []
        try:
            yield failed
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if not context.forgiving:
                raise
            told = isinstance(error, ParameterError) and repr(member.processor.name) in str(error)
            name = f"processor {member.processor.name!r}"
            for row, on in enumerate(member.on):
                if on:
                    context.fail(
                        row, str(error) if told else f"{name} raised {type(error).__name__}: {error}"
                    )
            failed.append(torch.tensor(member.on, device=self.site.device)[:, None])

    def edits(self, logits: Tensor, context: Context) -> Edits | None:
        """The fused edits of a step, for logits [B, V] that the unfused members have processed; None: none."""
        members = [self.members[i] for i in self.plan().edits]
        if not members:
            return None
        return Edits(logits, [(member.processor, self.view(member, context)) for member in members])

    def accept(self, tokens: Tensor, context: Context, *, every_row: bool = False) -> Rows:
        """Rows after `tokens` [B] int64 were committed; give the Context that `apply` or `sample` saw.

        A token of -1 says that its row accepts nothing in this step: its memory stays as it is. `every_row`
        says that there is none, so that nothing has to be read on the host. Rows whose memory could not follow are
        in `context.cache["lost"]`, [B] bool each.
        """
        stateful = [member for member in self.active() if member.memory is not None]
        if not stateful:
            return self
        idle = [] if every_row else (tokens < 0).nonzero().flatten().tolist()
        changed = {}
        for member in stateful:
            view, memory = self.view(member, context), member.memory
            with self._blaming(member, view) as failed:
                memory = member.processor.accept(memory, tokens if every_row else tokens.clamp(min=0), view)
            if failed:
                context.cache.setdefault("lost", []).append(failed[0][:, 0])
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

    @classmethod
    def concat(cls, parts: Sequence[Rows]) -> Rows:
        """The rows of several values that were selected from one, in order."""
        other = parts[0]._with([joined(members) for members in zip(*(p.members for p in parts), strict=True)])
        for name in ("params", "chains", "greedy"):
            setattr(other, name, [each for part in parts for each in getattr(part, name)])
        other.size, other._greedy_tensor, other._plan = len(other.params), None, None
        return other

    def sample(self, logits: Tensor, context: Context, n_top: int = 0) -> Drawn:
        """Process raw `logits` [B, V] float32 and draw one token a row; n_top: how many alternatives to tell."""
        return draw_rows(self, logits, context, n_top)

    def greedy_rows(self) -> Tensor | None:
        """[B] bool: rows that take the argmax; None when there are none."""
        if not any(self.greedy):
            return None
        if self._greedy_tensor is None:
            self._greedy_tensor = upload(self.greedy, self.site.device, None)
        return self._greedy_tensor
