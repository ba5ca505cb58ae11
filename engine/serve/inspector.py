"""The inspector's one question: what does every member of a pipeline do to the distribution, here and from here on?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..engine import Engine
from ..experiments.analysis.trace import RAW, Step, followed, rounded
from ..loop.generation import Event
from ..params.sampling_params import SamplingParams
from ..pipeline.members import remembers
from ..strategies.kit.requests import Requests, push
from .aside import run_strategy
from .protocol.reading import Fields, Limits, conversation, strategy_of
from .protocol.refusals import Refusal, refusal_of_result

MOST = 64  # candidates


def inspect(engine: Engine, body: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Steps of one sample, each with what every member of its pipeline left.

    Args:
        body: `prompt` (text), `messages` or `prompt_ids`; `output_ids` that are taken as drawn; `params`, with a seed;
            `steps` to draw behind them; `first`, the output position from which steps are told (default: the first
            that is drawn); `candidates`, of the model's most probable tokens; `strategy`, a name or an object with its
            options, that draws the steps instead of the loop.

    Returns:
        `prompt_ids`, `output_ids`, `steps`, `texts` of every id in them, `finish`, `members` of the pipeline in order,
        `active` ones, and `warnings` of the linter about those.

    Raises:
        Refusal, HandloomError: something in the body is not usable.
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
    strategy, options = strategy_of(fields.take("strategy", (str, dict)))
    params = SamplingParams(
        **{"seed": 0, "max_new_tokens": engine.max_length} | fields.take("params", dict, {})
    )
    for name in fields.left:
        raise Refusal(f"unknown field {name!r}", param=name)
    walk = Walk(engine, given, params.replace(n=1), numbers["candidates"])
    if not strategy or not numbers["steps"]:
        return walk.told(output, numbers["first"], numbers["steps"])
    own = walk.params.replace(max_new_tokens=numbers["steps"])
    result = run_strategy(engine, strategy, options, [[*walk.prompt, *output]], [own])[0]
    if result.error is not None:
        raise refusal_of_result(result.error)
    return walk.told([*output, *result.token_ids], numbers["first"], 0) | {"finish": result.finish_reason}


class Walk:
    """One row that is followed step by step, from a prefix that was drawn before or chosen by hand.

    Args:
        engine: the model. prompt: text or ids. params: of the sample, with its seed. candidates: that are followed.
    """

    def __init__(self, engine: Engine, prompt: Any, params: SamplingParams, candidates: int):
        self.engine, self.candidates = engine, candidates
        asked = engine.requests([prompt], params)
        self.prompt, self.params = asked[0].prompt.ids, asked[0].params
        self.requests = Requests.bind(engine, asked)
        self.request = self.requests.open(0, engine)
        self.steps: list[Step] = []

    def told(self, output: Sequence[int], first: int, count: int) -> dict[str, Any]:
        """Everything as JSON's types."""
        if len(self.prompt) + len(output) >= self.engine.max_length:
            raise Refusal(
                f"{len(self.prompt)} + {len(output)} tokens leave no room in {self.engine.max_length}"
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
        }  # fmt: skip

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
