"""Ways to decode the same model: this engine and `model.generate`. Others are in `rivals.py`."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Protocol

import torch
from transformers import CompileConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from handloom import Engine, SamplingParams
from handloom.kernels.linear.blocked import block_linears

Clock = Callable[[], float]


@dataclass(frozen=True)
class Request:
    """One prompt (token ids) and how many tokens to answer."""

    prompt: list[int]
    new_tokens: int


@dataclass(frozen=True)
class Sampling:
    """How every row draws; what is left at its default is off."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def chosen(self) -> dict[str, float]:
        """What is on, under the names that this engine and transformers share."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}


@dataclass
class Timeline:
    """When the tokens of one run reached the host, in seconds after its start.

    Args:
        tokens: one list of moments for each request. total: when the run was over.
    """

    tokens: list[list[float]]
    total: float = 0.0

    @classmethod
    def of(cls, requests: list[Request]) -> "Timeline":
        """An empty one."""
        return cls([[] for _ in requests])

    def checked(self, requests: list[Request]) -> "Timeline":
        """Itself, if every request got as many tokens as it asked for."""
        counted(requests, [len(moments) for moments in self.tokens])
        return self


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Another model of the same weights: modules and configuration are copied, tensors are not.

    So every side may patch, compile or configure its own model, and the weights are in memory once.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})


def loaded(model: PreTrainedModel) -> PreTrainedModel:
    """A twin as `Engine.from_pretrained` leaves a model: on a CPU linear layers have blocked weights of their own."""
    own = twin(model)
    if model.device.type == "cpu":
        block_linears(own)
    return own


def synchronize(device: torch.device) -> None:
    """Wait for what the device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Side(Protocol):
    """A way to decode."""

    name: str
    model: PreTrainedModel
    counts_operations: bool  # whether tensor operations can be counted where it makes them

    def answer(self, requests: list[Request], sampling: Sampling | None = None) -> int:
        """Answer all requests, greedy without `sampling`; the number of tokens that were asked for."""

    def timeline(self, requests: list[Request], sampling: Sampling | None = None) -> Timeline:
        """Answer all requests and say when each token was there."""

    def close(self) -> None:
        """Give back what lives longer than the object."""


class Handloom:
    """This engine.

    Args:
        slots: rows decoded together; more requests wait and take over slots in flight.
        stop_at_eos: test every token for the end of the text, as in use; False for answers of exact length.
        compile: compile the decode step.
        clock: seconds.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        slots: int,
        stop_at_eos: bool = False,
        compile: bool = False,
        clock: Clock = time.perf_counter,
    ):
        self.name = "handloom compile" if compile else "handloom"
        self.model, self.stop_at_eos, self.clock = model, stop_at_eos, clock
        self.counts_operations = not compile
        self.engine = Engine(model, slots=slots, compile=compile)

    def _params(self, new_tokens: int, sampling: Sampling | None, **more) -> SamplingParams:
        chosen = {} if sampling is None else sampling.chosen() | {"seed": 0}
        return SamplingParams(max_new_tokens=new_tokens, ignore_eos=not self.stop_at_eos, **chosen, **more)

    def answer(self, requests: list[Request], sampling: Sampling | None = None) -> int:
        """See `Side`."""
        params = [self._params(r.new_tokens, sampling) for r in requests]
        answers = self.engine.generate([r.prompt for r in requests], params, progress=False)
        if any(a.finish_reason == "cancelled" for a in answers):
            raise KeyboardInterrupt  # the engine hands back what it has; a benchmark has no use for it
        return counted(requests, [len(a.token_ids) for a in answers])

    def timeline(self, requests: list[Request], sampling: Sampling | None = None) -> Timeline:
        """See `Side`."""
        found, clock = Timeline.of(requests), self.clock
        params = [self._params(r.new_tokens, sampling) for r in requests]
        start = clock()
        for event in self.engine.stream([r.prompt for r in requests], params):
            if event.finish == "error":
                raise RuntimeError(event.generation.error)
            found.tokens[event.request].append(clock() - start)
        found.total = clock() - start
        return found.checked(requests)

    def first_tokens(self, prompt: list[int], samples: int, sampling: Sampling) -> float:
        """Seconds until the first token of each of `samples` samples of one prompt; it is prefilled once."""
        start, waiting = self.clock(), set(range(samples))
        # Two tokens, so that the first one is an event of its own and not the end of an answer.
        for event in self.engine.stream([prompt], self._params(2, sampling, n=samples)):
            waiting.discard(event.sample)
            if not waiting:
                break
        return self.clock() - start

    def close(self) -> None:
        """See `Side`."""
        del self.engine


@dataclass
class Stamps(BaseStreamer):
    """Hears of every step of `generate`, the prompt first; the tokens are on the host by then."""

    clock: Clock
    moments: list[float] = field(default_factory=list)

    def put(self, value) -> None:
        """A step's tokens."""
        self.moments.append(self.clock())

    def end(self) -> None:
        """Nothing follows."""


class HuggingFace:
    """`model.generate`, in batches padded on the left.

    Args:
        batch: rows in a batch; a batch runs until its longest answer is complete.
        stop_at_eos: see `Handloom`.
        static: tokens that a static cache holds, with the compiled step that goes with it; 0 for the default:
            a dynamic cache and no compilation.
        clock: seconds.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: int,
        stop_at_eos: bool = False,
        static: int = 0,
        clock: Clock = time.perf_counter,
    ):
        self.name = "generate static+compile" if static else "generate"
        self.model, self.batch, self.stop_at_eos, self.clock = model, batch, stop_at_eos, clock
        self.counts_operations = not static
        self.options = {}
        if static:
            self.options = {"cache_implementation": "static", "max_cache_len": static}
            if model.device.type == "cpu":  # elsewhere transformers compiles by itself
                self.options["compile_config"] = CompileConfig(mode="default")
                self.options["compile_config"]._compile_all_devices = True

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], new_tokens: int, sampling: Sampling | None, **more):
        width = max(len(p) for p in prompts)
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        eos = self.model.config.eos_token_id if self.stop_at_eos else None
        chosen = {"do_sample": False}
        if sampling is not None:  # its own default of k is 50
            chosen = {"do_sample": True, "top_k": 0, **sampling.chosen()}
        self.model.generation_config.eos_token_id = eos
        return self.model.generate(
            ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=new_tokens,
            eos_token_id=eos,
            pad_token_id=0,
            **self.options,
            **chosen,
            **more,
        )

    def answer(self, requests: list[Request], sampling: Sampling | None = None) -> int:
        """See `Side`."""
        made = []
        for group in self._groups(requests):
            longest = max(r.new_tokens for r in group)
            out = self._generate([r.prompt for r in group], longest, sampling)
            fresh = out.shape[1] - max(len(r.prompt) for r in group)
            made += [min(r.new_tokens, fresh) for r in group]
        return counted(requests, made)

    def timeline(self, requests: list[Request], sampling: Sampling | None = None) -> Timeline:
        """See `Side`."""
        found, start = Timeline([]), self.clock()
        for group in self._groups(requests):
            stamps = Stamps(self.clock)
            longest = max(r.new_tokens for r in group)
            self._generate([r.prompt for r in group], longest, sampling, streamer=stamps)
            steps = [moment - start for moment in stamps.moments[1:]]
            found.tokens += [steps[: r.new_tokens] for r in group]
        synchronize(self.model.device)
        found.total = self.clock() - start
        return found.checked(requests)

    def _groups(self, requests: list[Request]) -> list[list[Request]]:
        return [requests[i : i + self.batch] for i in range(0, len(requests), self.batch)]

    def first_tokens(self, prompt: list[int], samples: int, sampling: Sampling) -> float:
        """Seconds until the first token of each of `samples` samples, for each of which the prompt is repeated."""
        start = self.clock()
        self._generate([prompt], 1, sampling, num_return_sequences=samples)
        return self.clock() - start

    def close(self) -> None:
        """See `Side`."""


def counted(requests: list[Request], made: list[int]) -> int:
    """The number of tokens, if every request got what it asked for."""
    for index, (request, count) in enumerate(zip(requests, made, strict=True)):
        if count != request.new_tokens:
            raise RuntimeError(f"request {index}: {count} tokens instead of {request.new_tokens}")
    return sum(made)
