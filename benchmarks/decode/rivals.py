"""More ways to decode the same model, and all of them by name."""

import importlib.util
import time
from collections.abc import Callable, Collection
from dataclasses import fields

import torch
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, PreTrainedModel

from benchmarks.decode.sides import (
    Clock,
    Handloom,
    HuggingFace,
    Request,
    Sampling,
    Side,
    Timeline,
    counted,
    loaded,
    twin,
)

PAGE = 256  # tokens in a page of the continuous batching cache: transformers' own default
PATIENCE = 600.0  # seconds without any finished request before continuous batching counts as stuck


class BareLoop:
    """The floor: forward and argmax or draw, by hand, over transformers' default cache; lengths must agree."""

    name = "loop"
    counts_operations = True

    def __init__(self, model: PreTrainedModel, clock: Clock = time.perf_counter):
        self.model, self.clock = model, clock

    @torch.no_grad()
    def timeline(self, requests: list[Request], sampling: Sampling | None = None) -> Timeline:
        """See `Side`."""
        steps, prompts = requests[0].new_tokens, [r.prompt for r in requests]
        if any(r.new_tokens != steps or len(r.prompt) != len(prompts[0]) for r in requests):
            raise ValueError("the bare loop decodes requests of one length alone")
        cache, moments, start = DynamicCache(config=self.model.config), [], self.clock()
        ids = torch.tensor(prompts, device=self.model.device)
        for _ in range(steps):
            out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = pick(out.logits[:, -1], sampling)[:, None]
            ids.tolist()  # whoever asked wants to see them
            moments.append(self.clock() - start)
        return Timeline([list(moments) for _ in requests], self.clock() - start)

    def answer(self, requests: list[Request], sampling: Sampling | None = None) -> int:
        """See `Side`."""
        return counted(requests, [len(m) for m in self.timeline(requests, sampling).tokens])

    def close(self) -> None:
        """See `Side`."""


def pick(logits: torch.Tensor, sampling: Sampling | None) -> torch.Tensor:
    """The next token of each row of `logits [B, V]`, with the least that a hand-written loop can do."""
    if sampling is None:
        return logits.argmax(-1)
    if sampling.repetition_penalty != 1 or sampling.min_p:
        raise ValueError("the bare loop knows temperature, top-k and top-p alone")
    logits, ids = (logits.float() / sampling.temperature).sort(descending=True)
    if sampling.top_k:
        logits, ids = logits[:, : sampling.top_k], ids[:, : sampling.top_k]
    probabilities = logits.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    drawn = probabilities.masked_fill(before > sampling.top_p, 0).multinomial(1)
    return ids.gather(-1, drawn)[:, 0]


class ContinuousBatching:
    """transformers' continuous batching: the manager behind `model.generate_batch`.

    The manager is used directly, since `generate_batch` gives all requests of a call the same answer length. It is
    set up once and kept. Left to itself it takes most of the free memory, and takes half a minute on a CPU to do so;
    here it gets what the requests need.

    Args:
        slots: most requests decoded together.
        longest: most tokens of a prompt with its answer.
    """

    name = "generate_batch"
    counts_operations = False  # it works in a thread of its own

    def __init__(self, model: PreTrainedModel, slots: int, longest: int):
        self.model = model
        flash = any(importlib.util.find_spec(name) for name in ("flash_attn", "flash_attn_interface"))
        known = {f.name for f in fields(ContinuousBatchingConfig)}
        wanted = {
            "page_size" if "page_size" in known else "block_size": PAGE,  # the latter in transformers 5.17
            # It admits nobody while 15 % or less are free.
            "num_blocks": -(-5 * slots * -(-longest // PAGE) // 4) + 1,
            "max_batch_tokens": max(slots, min(2048, slots * longest)),
            "max_requests_per_batch": slots,
            "drop_unsupported_processors": False,
            "auto_switch_to_flash": flash,  # it would fetch a kernel from the hub otherwise
        }
        self.config = ContinuousBatchingConfig(**{k: v for k, v in wanted.items() if k in known})
        self._sampling: object = self  # no manager yet

    def _ready(self, sampling: Sampling | None) -> None:
        """Leave no manager that was made for another way to draw."""
        if self._sampling != sampling:
            self.model.destroy_cached_continuous_batching_manager()
        self._sampling = sampling

    @torch.no_grad()
    def timeline(self, requests: list[Request], sampling: Sampling | None = None) -> Timeline:
        """See `Side`; its moments are of `time.perf_counter`."""
        self._ready(sampling)
        chosen = {"do_sample": False}
        if sampling is not None:
            chosen = {"do_sample": True, "top_k": 0, **sampling.chosen()}
        settings = GenerationConfig(eos_token_id=-1, pad_token_id=0, **chosen)
        with self.model.continuous_batching_context_manager(
            generation_config=settings,
            continuous_batching_config=self.config,
            persistent_manager=True,
            block=True,
            timeout=60,
        ) as manager:
            start = time.perf_counter()
            names = [
                manager.add_request(r.prompt, max_new_tokens=r.new_tokens, record_timestamps=True)
                for r in requests
            ]
            done = self._collect(manager, len(names))
            total = time.perf_counter() - start
        return Timeline([[t - start for t in done[name]] for name in names], total).checked(requests)

    def _collect(self, manager, wanted: int) -> dict[str, list[float]]:
        done, heard = {}, time.perf_counter()
        while len(done) < wanted:
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running() or time.perf_counter() - heard > PATIENCE:
                    raise RuntimeError(f"generate_batch stopped with {len(done)} of {wanted} requests done")
                continue
            heard = time.perf_counter()
            if result.error is not None:
                raise RuntimeError(f"generate_batch: {result.error}")
            if result.is_finished():
                done[result.request_id] = result.timestamps
        return done

    def answer(self, requests: list[Request], sampling: Sampling | None = None) -> int:
        """See `Side`."""
        return counted(requests, [len(m) for m in self.timeline(requests, sampling).tokens])

    def close(self) -> None:
        """See `Side`."""
        self.model.destroy_cached_continuous_batching_manager()


# Name -> how to make it of a model of its own, the rows decoded together, and the longest prompt with its answer.
SIDES: dict[str, Callable[[PreTrainedModel, int, int], Side]] = {
    "handloom": lambda model, slots, longest: Handloom(loaded(model), slots),
    "handloom compile": lambda model, slots, longest: Handloom(loaded(model), slots, compile=True),
    "generate": lambda model, slots, longest: HuggingFace(twin(model), slots),
    "generate static+compile": lambda model, slots, longest: HuggingFace(twin(model), slots, static=longest),
    "generate_batch": lambda model, slots, longest: ContinuousBatching(twin(model), slots, longest),
    "loop": lambda model, slots, longest: BareLoop(twin(model)),
}
COMPILED = ("handloom compile", "generate static+compile")
UNIFORM = ("loop",)  # whose requests must agree in length
BRIEF = ("generate", "loop")  # whose cache lives no longer than a run


def caches(names: Collection[str]) -> int:
    """How many caches are alive at once, at most, when these sides take turns."""
    return len(set(names) - set(BRIEF)) + bool(set(names) & set(BRIEF))


def side(name: str, model: PreTrainedModel, slots: int, longest: int) -> Side:
    """A side by its name, with the weights of `model`."""
    return SIDES[name](model, slots, longest)


def copies(names: Collection[str], device: torch.device) -> int:
    """How many of these sides hold weights of their own beside the common ones."""
    return sum(name.startswith("handloom") for name in names) if device.type == "cpu" else 0
