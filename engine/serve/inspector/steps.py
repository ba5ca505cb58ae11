"""The inspector's one question: what does every member of a pipeline do to the distribution, here and from here on?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ...engine import Engine
from ...experiments.analysis.trace import RAW, Step, followed, rounded
from ...loop.generation import Event
from ...params.sampling_params import SamplingParams
from ...pipeline.members import remembers
from ...strategies.kit.decode import prompt_logprobs
from ...strategies.kit.requests import Requests, push
from ..aside import Watched, run_strategy
from ..protocol.reading import Fields, conversation, strategy_of
from ..protocol.refusals import Refusal, refusal_of_result
from ..worker import Aside
from .growth import Growth

MOST = 64  # candidates


@dataclass(frozen=True)
class Question:
    """A body of the inspector's, read.

    Args:
        prompt: its ids. output: ids behind it that are taken as drawn. params: of the sample, with its seed.
        steps: to draw. first: output position from which steps are told. candidates: of the model's most probable
            tokens. strategy, options: that draw the steps instead of the loop. stream: whether its passes are
            told as they come. prompt_logprobs: whether the prompt's own tokens are judged.
    """

    prompt: list[int]
    output: list[int]
    params: SamplingParams
    steps: int
    first: int
    candidates: int
    strategy: Callable[..., Any] | None
    options: dict[str, Any]
    stream: bool
    prompt_logprobs: bool


def read(engine: Engine, body: Mapping[str, Any]) -> Question:
    """A body: `prompt` (text), `messages` or `prompt_ids`, and the fields of `Question` but for those.

    Raises:
        Refusal, HandloomError: something in it is not usable.
    """
    fields = Fields(body)
    fields.take("model", str)
    given = fields.take("prompt_ids", list)
    if given is None:
        given = conversation(engine, fields) if "messages" in fields.left else fields.take("prompt", str, "")
    output = fields.take("output_ids", list, [])
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < engine.vocab_size for i in output):
        raise Refusal("output_ids must be token ids of this model", param="output_ids")
    numbers = {"steps": (1, 0, 2048), "first": (len(output), 0, len(output)), "candidates": (12, 1, MOST)}
    for name, (default, low, high) in numbers.items():
        value = fields.take(name, int, default)
        if not low <= value <= high:
            raise fields.refused(name, value, f"a whole number of {low} to {high}")
        numbers[name] = value
    flags = {name: fields.take(name, bool, False) for name in ("stream", "prompt_logprobs")}
    strategy, options = strategy_of(fields.take("strategy", (str, dict)))
    params = SamplingParams(
        **{"seed": 0, "max_new_tokens": engine.max_length} | fields.take("params", dict, {})
    )
    for name in fields.left:
        raise Refusal(f"unknown field {name!r}", param=name)
    request = engine.requests([given], params.replace(n=1))[0]
    if len(request.prompt) + len(output) >= engine.max_length:
        raise Refusal(f"{len(request.prompt)} + {len(output)} tokens leave no room in {engine.max_length}")
    return Question(
        request.prompt.ids, output, request.params, **numbers, strategy=strategy, options=options, **flags
    )


def answer(aside: Aside, engine: Engine, asked: Question) -> dict[str, Any]:
    """Steps of one sample, each with what every member of its pipeline left.

    Returns:
        `prompt_ids`, `output_ids`, `steps`, `texts` of every id in them, `finish`, `members` of the pipeline in order,
        `active` ones, and `warnings` of the linter about those; `results` of a strategy, best first as it gives them.

    Raises:
        Refusal, HandloomError: it cannot be answered.
    """
    told, output, steps = {}, asked.output, asked.steps
    if asked.strategy and steps:
        prefix = [*asked.prompt, *output]
        growth = Growth(engine, prefix, aside.tell) if asked.stream else None
        watched = Watched(engine, lambda: aside.left, growth and growth.look)
        params = asked.params.replace(max_new_tokens=steps)
        results = run_strategy(watched, asked.strategy, asked.options, [prefix], [params])
        for result in results:
            if result.error is not None:
                raise refusal_of_result(result.error)
        told = {
            "finish": results[0].finish_reason,
            "results": [growth.end(r) for r in results] if growth else [],
        }
        output, steps = [*output, *results[0].token_ids], 0
    watched = Watched(engine, lambda: aside.left)
    walk = Walk(watched, asked.prompt, asked.params, asked.candidates)
    return walk.told(output, asked.first, steps, asked.prompt_logprobs) | told


class Walk:
    """One row that is followed step by step, from a prefix that was drawn before or chosen by hand.

    Args:
        engine: the model. prompt: text or ids. params: of the sample, with its seed. candidates: that are followed.
    """

    def __init__(self, engine: Engine | Watched, prompt: Any, params: SamplingParams, candidates: int):
        self.engine, self.candidates = engine, candidates
        asked = engine.requests([prompt], params)
        self.prompt, self.params = asked[0].prompt.ids, asked[0].params
        self.requests = Requests.bind(engine, asked)
        self.request = self.requests.open(0, engine)
        self.steps: list[Step] = []

    def told(self, output: Sequence[int], first: int, count: int, judge: bool = False) -> dict[str, Any]:
        """Everything as JSON's types; with `judge` the log-probability of every prompt token, too."""
        judged = (
            {"prompt_logprobs": rounded(prompt_logprobs(self.engine, self.request.prompt))} if judge else {}
        )
        drawn = [*output, *self._run(list(output), first, count)]
        ids = {i for step in self.steps for i in step.candidates} | {*self.prompt, *drawn}
        known = self.engine.tokenizer is not None
        texts = {
            i: self.engine.decode([i], skip_special_tokens=False) if known else f"{i} " for i in sorted(ids)
        }
        chain = self.engine.pipeline.for_params(self.params)
        active = [member.processor for member in self.requests.rows.active()]
        return {
            "prompt_ids": self.prompt, "output_ids": drawn, "first": first,
            "finish": self.request.stopper.finish_reason, "texts": texts, "seed": self.request.seed,
            "steps": [rounded(asdict(step)) for step in self.steps],
            "members": [p.name for p in chain], "active": [p.name for p in active],
            "warnings": type(chain)(active, name="active").lint() if len(active) > 1 else [],
        } | judged  # fmt: skip

    @torch.no_grad()
    def _run(self, output: list[int], first: int, count: int) -> list[int]:
        """The tokens that are drawn behind `output`."""
        engine, start = self.engine, len(output)
        memory = any(remembers(member.processor) for member in self.requests.rows.active())
        begin = 0 if memory else first  # what remembers has seen every step
        state = engine.prefill([[*self.prompt, *output[:begin]]])
        logits = [state.logits]
        if output[begin:]:
            state = engine.extend(state, [output[begin:]])
            logits += list(state.all_logits.transpose(0, 1))
        ids = [*self.prompt, *output[:begin]]
        for at in range(begin, start + count):
            if at > start:
                state = engine.step(state, [ids[-1]])
            here = logits[at - begin] if at <= start else state.logits
            event = self._step(here, ids, output[at] if at < start else None, told=at >= first)
            ids.append(event.token_id)
            if at >= start and (event.finish or len(ids) >= engine.max_length):
                break
        return ids[len(self.prompt) + start :]

    def _step(self, logits: Tensor, ids: list[int], chosen: int | None, told: bool) -> Event:
        """Draw one token, or take the one that was chosen; tell what was left for it."""
        lengths = torch.tensor([len(ids)], device=logits.device)
        context = self.requests.context(lambda: [ids], lengths)
        drawn = self.requests.rows.sample(logits, context)
        token = int(drawn.tokens[0])
        taken = token if chosen is None else chosen
        if told:
            stages = self.requests.rows.stages(logits, self.requests.context(lambda: [ids], lengths))
            left = [(RAW, logits[0]), *((rule.name, after[0]) for rule, after in stages)]
            self.steps.append(followed(taken, left, self.candidates, token))
        self.requests = self.requests.accept(torch.tensor([taken], device=logits.device), context)
        if chosen is not None:
            return Event(0, 0, chosen, "")
        return push(self.request, token, float(drawn.raw_logprobs[0]), float(drawn.logprobs[0]))
