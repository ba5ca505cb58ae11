"""Pipeline: an ordered tuple of processors that prints itself, checks itself and binds to rows."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cache.transfer import upload
from ..errors import ParameterError
from .chains import chain_of
from .drawing import Drawn
from .foreign.huggingface import HFProcessor, TransformersWatermark, is_huggingface
from .forms import Adapted, Context, Edit, Function, Keep, Processor
from .members import divides, reasons, unfused_alone
from .processors import DEFAULT_ORDER
from .rows import Rows

__all__ = [
    "Context",
    "Drawn",
    "Edit",
    "Keep",
    "Pipeline",
    "PipelineWarning",
    "Processor",
    "Rows",
    "as_processor",
]


ORDERS = 64  # profiles and orders that a pipeline keeps for the requests to come


class PipelineWarning(UserWarning):
    """An order of processors that rarely means what was intended."""


@functools.cache
def _built_in() -> tuple[Processor, ...]:
    """One instance of every built-in rule, to ask whether a request uses it."""
    return tuple(rule() for rule in DEFAULT_ORDER)


def as_processor(rule: Any) -> Processor:
    """A `Processor` from whatever a user hands in.

    A `Processor` is taken as it is, a class of processors is constructed without values, an object with
    `apply(logits, context)` or a Hugging Face `LogitsProcessor` is adapted, and any other
    callable is called as `rule(logits, context)`. Raises ParameterError for anything else.
    """
    if isinstance(rule, Processor):
        return rule
    if isinstance(rule, type) and issubclass(rule, Processor):
        return rule()
    if callable(getattr(rule, "apply", None)):
        return Adapted(rule)
    if is_huggingface(rule):
        return HFProcessor(rule)
    if callable(rule):
        return Function(rule)
    raise ParameterError(
        f"{rule!r} is no processor: give a Processor or a function (logits, context) -> logits"
    )


class Pipeline(tuple):
    """Processors in the order in which they run; the user's order is the order, and nothing is added to it.

    processors: processors, or functions (logits [B, V], context) -> logits. Without any: the default order.
    chain_when_greedy: run truncation rules for greedy rows too, and take the argmax of what is left
    (llama.cpp).
    own_place: index at which a request's own `before_temperature` processors are put (None: before the
        first one that concerns sampling); own_all_here: put all its processors there.
    """

    def __new__(cls, processors: Iterable[Any] | None = None, **options: Any) -> Pipeline:
        if processors is None:
            processors = [rule() for rule in DEFAULT_ORDER]
        return super().__new__(cls, [as_processor(rule) for rule in processors])

    def __init__(
        self,
        processors: Iterable[Any] | None = None,
        *,
        name: str = "custom",
        tested_against: str = "",
        chain_when_greedy: bool = False,
        own_place: int | None = None,
        own_all_here: bool = False,
    ):
        self.name = "default" if processors is None else name
        self.tested_against, self.chain_when_greedy = tested_against, chain_when_greedy
        self.own_place, self.own_all_here = own_place, own_all_here
        self.profiles: dict[tuple, Pipeline] = {}
        seen = set()
        for processor in self:
            if id(processor) in seen:
                raise ParameterError(f"{processor!r} is in the pipeline twice; construct a second one")
            seen.add(id(processor))
        if self.name == "custom":
            for message in self.lint():
                warnings.warn(message, PipelineWarning, stacklevel=2)

    @classmethod
    def default(cls) -> Pipeline:
        """All built-in rules in their default order; each is off until a request asks for it."""
        return cls(None)

    @classmethod
    def profile(cls, name: str, params: Any = None) -> Pipeline:
        """The pipeline of another engine; `params` matter where its chain depends on the request.

        Raises ParameterError for an unknown name.
        """
        if name == "default":
            return cls.default()
        chain = chain_of(name, params)
        return cls(
            [*chain.before, *chain.after],
            name=chain.name,
            tested_against=chain.tested_against,
            chain_when_greedy=chain.chain_when_greedy,
            own_place=len(chain.before) if chain.own_between else None,
            own_all_here=chain.own_between,
        )

    def __call__(self, state: Any, context: Context | None = None) -> Tensor:
        """Processed logits [B, V] of a `State` (or of raw logits [B, V]); stateful members start afresh."""
        logits = state if isinstance(state, Tensor) else state.logits
        if context is None:
            context = Context() if isinstance(state, Tensor) else context_of(state)
        params = context.params or [None] * logits.shape[0]
        prompts = [[]] * logits.shape[0]
        if context.prompt_lengths is not None and any(processor.needs_history for processor in self):
            counts = context.prompt_lengths.tolist()
            prompts = [row[:n].tolist() for row, n in zip(context.history, counts, strict=True)]
        rows = self.bind(
            list(params),
            prompts,
            device=logits.device,
            vocab_size=logits.shape[-1],
            eos_token_ids=context.eos_token_ids,
        )
        return rows.apply(logits, context)

    def bind(
        self,
        params: Sequence[Any],
        prompts: Sequence[Sequence[int]],
        *,
        device: Any = "cpu",
        vocab_size: int,
        eos_token_ids: Iterable[int] = (),
        capacity: int | None = None,
        seeds: Sequence[int] | None = None,
        streams: Sequence[int] | None = None,
    ) -> Rows:
        """Rows for `params` (one SamplingParams or None a row) and their prompts' ids; >= `capacity` rows."""
        if len(params) != len(prompts):
            raise ParameterError(f"{len(params)} params for {len(prompts)} prompts; give one for each")
        site = Context(
            vocab_size=vocab_size, device=torch.device(device), eos_token_ids=frozenset(eos_token_ids)
        )
        rows = Rows(self, max(capacity or 0, len(params)), site)
        for i, (request, prompt) in enumerate(zip(params, prompts, strict=True)):
            seed = seeds[i] if seeds is not None else getattr(request, "seed", None) or 0
            rows.fill(i, request, prompt, seed, streams[i] if streams is not None else 0)
        return rows

    def for_params(self, params: Any) -> Pipeline:
        """The pipeline of one request: this or the profile it names, in its own order, with its own processors put in.

        Own processors with `before_temperature` go before the temperature, the others to the end; a profile
        may have one place for all of them.
        """
        base = self
        profile, order = getattr(params, "profile", "default"), getattr(params, "order", ())
        if profile != "default" or order:
            variant = (profile, bool(getattr(params, "mirostat", 0)), order)
            if variant not in self.profiles:
                base = base if profile == "default" else Pipeline.profile(profile, params)
                if len(self.profiles) == ORDERS:  # rows that run keep theirs
                    del self.profiles[next(iter(self.profiles))]
                self.profiles[variant] = base.ordered(order) if order else base
            base = self.profiles[variant]
        own = [as_processor(rule) for rule in getattr(params, "processors", ())]
        return base.with_own(own) if own else base

    def ordered(self, names: Sequence[str]) -> Pipeline:
        """Copies of these members alone, in this order; ParameterError for a name that no member has."""
        known, named = {processor.name: processor for processor in self}, dict.fromkeys(names)
        unknown = [name for name in named if name not in known]
        if unknown:
            raise ParameterError(
                f"order={list(names)!r}: the pipeline {self.name!r} has no {unknown[0]!r}; it has {', '.join(known)}"
            )
        return Pipeline(
            [copy.copy(known[name]) for name in named],
            name=f"{self.name}, reordered",
            chain_when_greedy=self.chain_when_greedy,
            own_all_here=self.own_all_here,
        )

    def with_own(self, own: Sequence[Processor]) -> Pipeline:
        """This pipeline with a request's own processors at their places."""
        place = self.temperature_place() if self.own_place is None else self.own_place
        early = [p for p in own if self.own_all_here or getattr(p, "before_temperature", False)]
        late = [p for p in own if not any(p is other for other in early)]
        return Pipeline(
            [*self[:place], *early, *self[place:], *late],
            name=f"{self.name}+own",
            tested_against=self.tested_against,
            chain_when_greedy=self.chain_when_greedy,
        )

    def temperature_place(self) -> int:
        """Index of the first processor that only concerns sampling, or the length."""
        return next((i for i, p in enumerate(self) if getattr(p, "sampling_only", False)), len(self))

    def greedy(self, params: Any, row: int = 0) -> bool:
        """True when the row takes the argmax: its temperature, explicit here or else in `params`, is 0."""
        if self._own_temperature is not None:
            return self._own_temperature.settings(None, row)["temperature"] == 0
        return params is not None and params.temperature == 0

    @functools.cached_property
    def _own_temperature(self) -> Processor | None:
        """The first member with a temperature of its own."""
        return next((p for p in self if "temperature" in getattr(p, "explicit", ())), None)

    def check(self, params: Any) -> None:
        """Raise ParameterError when the request sets a field that no member of this pipeline reads."""
        if params is None:
            return
        for rule in self._unread:
            if not rule.active(params):
                continue
            field = rule.fields[0]
            members = ", ".join(processor.name for processor in self) or "none"
            raise ParameterError(
                f"{field}={getattr(params, field)!r} has no effect: no processor of the pipeline "
                f"{self.name!r} reads it (members: {members}); add handloom.processors.{type(rule).__name__}() "
                "or choose another profile"
            )

    @functools.cached_property
    def _unread(self) -> list[Processor]:
        """The built-in rules whose field no member reads."""
        read: set[str] = set()
        for processor in self:
            read.update(set(getattr(processor, "fields", ())) - set(getattr(processor, "gives_way_to", ())))
        return [rule for rule in _built_in() if rule.fields[0] not in read]

    def lint(self) -> list[str]:
        """Sentences about orders that rarely mean what was intended; empty when nothing is odd."""
        return lint_order(list(self))

    def explain(self, params: Any = None) -> str:
        """A table of the members: form, parameters, where each runs and why; `params`: for one request."""
        chain = self.for_params(params) if params is not None else self
        return explain_table(chain, params)

    def __repr__(self) -> str:
        return f"Pipeline[{self.name}]({' > '.join(repr(p) if p.explicit else p.name for p in self)})"


def context_of(state: Any) -> Context:
    """The Context of a `State`, with no request parameters; the history is built on first use."""

    def history() -> Tensor:
        longest = max(map(len, state.tokens))
        padded = [row + [-1] * (longest - len(row)) for row in state.tokens]
        return upload(padded, state.logits.device, None)

    zeros = torch.zeros(len(state.tokens), dtype=torch.int64, device=state.logits.device)
    return Context(
        tokens=history,
        lengths=state.lengths,
        prompt_lengths=state.prompt_lengths,
        seeds=zeros,
        streams=zeros,
        vocab_size=state.logits.shape[-1],
        device=state.logits.device,
    )


def lint_order(chain: list[Processor]) -> list[str]:
    """The linter's rules, for processors in the given order."""
    place = {}
    for i, processor in enumerate(chain):
        place.setdefault(processor.name, i)
    cuts = [i for i, p in enumerate(chain) if p.kind == "keep"]
    warm = [i for i, p in enumerate(chain) if p.sampling_only and p.kind == "edit"]
    found = []
    for i, processor in enumerate(chain):
        if (
            processor.kind == "keep"
            or processor.sampling_only
            or isinstance(processor, TransformersWatermark)
        ):
            continue
        if cuts and cuts[0] < i:
            found.append(
                f"{processor.name} runs after the truncation rule {chain[cuts[0]].name}: it cannot bring "
                "back what was cut, and bans may leave a row without a token"
            )
        elif warm and warm[0] < i and processor.kind == "edit":
            found.append(
                f"{processor.name} runs after {chain[warm[0]].name}: its strength changes with temperature"
            )
    if "temperature" in place and any(i < place["temperature"] for i in cuts):
        first = chain[min(cuts)].name
        if first != "top_n_sigma" or sum(i < place["temperature"] for i in cuts) > 1:
            found.append(
                f"temperature runs after {first}: the kept set is chosen at temperature 1 (as in llama.cpp)"
            )
    if "top_n_sigma" in place and any(i < place["top_n_sigma"] for i in cuts):
        found.append(
            "top_n_sigma runs after another truncation rule: its deviation is over the kept tokens alone"
        )
    if "mirostat" in place and any(i > place["mirostat"] for i in cuts):
        found.append(
            "a truncation rule runs after mirostat, whose feedback then aims at another distribution"
        )
    return found


def places(
    chain: Sequence[Processor], settings: Sequence[dict], certain: bool, greedy: bool = False
) -> list[str]:
    """Where each processor runs and why; `certain`: these processors are on together, and no others.

    Otherwise each is judged alone. settings: of each processor, for one row. greedy: whether that row is.
    """
    rows = [[own] for own in settings]

    def why_not(device_type: str) -> list[str]:
        if certain:
            return reasons(chain, rows, device_type, [greedy] * len(chain))
        return [unfused_alone(p, own, device_type) for p, own in zip(chain, rows, strict=True)]

    found = []
    for here, on_device in zip(why_not("cpu"), why_not("cuda"), strict=True):
        if here:
            found.append(f"torch ({here})")
        else:
            found.append(f"fused sampler; torch on CUDA ({on_device})" if on_device else "fused sampler")
    return found


def form_of(processor: Processor) -> str:
    """The form in which a processor is written."""
    if isinstance(processor, Keep):
        return f"keep by {processor.limit}"
    if divides(processor):
        return "temperature"
    return f"{processor.form} edit" if isinstance(processor, Edit) else processor.kind


def explain_table(chain: Pipeline, params: Any) -> str:
    """The text of `Pipeline.explain`."""
    shown = [p for p in chain if params is None or p.on(p.settings(params))]
    certain = params is not None or all(processor.explicit for processor in shown)
    head = f"pipeline {chain.name!r}" + (
        f", tested against {chain.tested_against}" if chain.tested_against else ""
    )
    lines = [
        head,
        "in the order in which they run; a member costs nothing while no row uses it",
        "fused sampler: the kernels on CUDA; on a CPU, edits share one copy of the logits, and the draw does the rest",
    ]
    lines += (
        [] if certain else ["where each one runs depends on what else is on; here it is told for each alone"]
    )
    chosen = [processor.settings(params) for processor in shown]
    greedy = params is not None and chain.chain_when_greedy and chain.greedy(params)
    for i, (processor, place) in enumerate(zip(shown, places(shown, chosen, certain, greedy), strict=True)):
        settings = chosen[i]
        values = [
            f"{field}={settings[field]!r}" if params is not None or field in processor.explicit else field
            for field in processor.fields
        ]
        traits = {
            "keeps argmax": processor.keeps_argmax,
            "reads history": processor.needs_history,
            "not speculative-safe": not processor.speculative_safe,
        }
        form = form_of(processor)
        marks = "; ".join(mark for mark, yes in traits.items() if yes)
        tail = ", ".join(values) + (f"  [{marks}]" if marks else "")
        lines.append(f"{i:3d} {processor.name:20s} {form:18s} {place:40s} {tail}")
    if params is not None and chain.greedy(params):
        lines.append("  greedy: members that only concern sampling are skipped, and the argmax is taken")
    lines += [f"  ! {message}" for message in lint_order(shown)] if certain else []
    return "\n".join(lines)
