"""The contestants: one class per way to decode the same model, all with the same three methods."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from handloom import Engine, SamplingParams

TINY = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=0,
)


@dataclass(frozen=True)
class Request:
    """One prompt (token ids) and how many tokens to answer."""

    prompt: list[int]
    new_tokens: int


@dataclass(frozen=True)
class Sampling:
    """Temperature, top-k and top-p of every row."""

    temperature: float
    top_k: int
    top_p: float


def load(name: str, dtype: torch.dtype, config: LlamaConfig = TINY) -> PreTrainedModel:
    """A model in evaluation mode.

    Args:
        name: `tiny` for random weights, the same at every call; `demo` for SmolLM2; a folder; a hub name.
        config: the shape of `tiny`.
    """
    if name == "tiny":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            model.lm_head.weight[config.eos_token_id] = 0  # never the best token, so no answer ends early
        return model.eval()
    if name == "demo":
        from handloom import demo

        name = demo.locate()
    return AutoModelForCausalLM.from_pretrained(
        Path(name) if Path(name).is_dir() else name, dtype=dtype
    ).eval()


class Side(Protocol):
    """A way to decode."""

    name: str
    model: PreTrainedModel

    def answer(self, requests: list[Request], sampling: Sampling | None = None) -> int:
        """Answer all requests, greedy without `sampling`; the number of tokens that were asked for."""

    def first_tokens(self, prompt: list[int], samples: int, sampling: Sampling) -> float:
        """Seconds until the first token of each of `samples` samples of one prompt is there."""


class Handloom:
    """This engine.

    Args:
        slots: rows decoded together; more requests wait and take over slots in flight.
        stop_at_eos: test every token for the end of the text, as in use; False for answers of exact length.
    """

    name = "handloom"

    def __init__(self, model: PreTrainedModel, slots: int, stop_at_eos: bool = False):
        self.model, self.stop_at_eos = model, stop_at_eos
        self.engine = Engine(model, slots=slots)

    def _params(self, new_tokens: int, sampling: Sampling | None, **more) -> SamplingParams:
        chosen = {} if sampling is None else vars(sampling) | {"seed": 0}
        return SamplingParams(max_new_tokens=new_tokens, ignore_eos=not self.stop_at_eos, **chosen, **more)

    def answer(self, requests: list[Request], sampling: Sampling | None = None) -> int:
        """See `Side`."""
        params = [self._params(r.new_tokens, sampling) for r in requests]
        answers = self.engine.generate([r.prompt for r in requests], params)
        return _checked(requests, [len(a.token_ids) for a in answers])

    def first_tokens(self, prompt: list[int], samples: int, sampling: Sampling) -> float:
        """See `Side`; the prompt is prefilled once."""
        start, waiting = time.perf_counter(), set(range(samples))
        # Two tokens, so that the first one is an event of its own and not the end of an answer.
        for event in self.engine.stream([prompt], self._params(2, sampling, n=samples)):
            waiting.discard(event.sample)
            if not waiting:
                break
        return time.perf_counter() - start


class HuggingFace:
    """`model.generate` with its default cache, in batches padded on the left.

    Args:
        batch: rows in a batch; a batch runs until its longest answer is complete.
        stop_at_eos: see `Handloom`.
    """

    name = "generate"

    def __init__(self, model: PreTrainedModel, batch: int, stop_at_eos: bool = False):
        self.model, self.batch, self.stop_at_eos = model, batch, stop_at_eos

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], new_tokens: int, sampling: Sampling | None, **more):
        width = max(len(p) for p in prompts)
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        eos = self.model.config.eos_token_id if self.stop_at_eos else None
        chosen = {"do_sample": False} if sampling is None else {"do_sample": True, **vars(sampling)}
        self.model.generation_config.eos_token_id = eos
        return self.model.generate(
            ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=new_tokens,
            eos_token_id=eos,
            pad_token_id=0,
            **chosen,
            **more,
        )

    def answer(self, requests: list[Request], sampling: Sampling | None = None) -> int:
        """See `Side`."""
        made = []
        for i in range(0, len(requests), self.batch):
            group = requests[i : i + self.batch]
            longest = max(r.new_tokens for r in group)
            out = self._generate([r.prompt for r in group], longest, sampling)
            fresh = out.shape[1] - max(len(r.prompt) for r in group)
            made += [min(r.new_tokens, fresh) for r in group]
        return _checked(requests, made)

    def first_tokens(self, prompt: list[int], samples: int, sampling: Sampling) -> float:
        """See `Side`; the prompt is repeated for every sample."""
        start = time.perf_counter()
        self._generate([prompt], 1, sampling, num_return_sequences=samples)
        return time.perf_counter() - start


def _checked(requests: list[Request], made: list[int]) -> int:
    for index, (request, count) in enumerate(zip(requests, made, strict=True)):
        if count != request.new_tokens:
            raise RuntimeError(f"request {index}: {count} tokens instead of {request.new_tokens}")
    return sum(made)
