"""What several test files need: small engines, a record of forward passes, the check that nothing leaked."""

import functools
import gc
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from architectures import LLAMA_LIKE, NO_SPECIAL_TOKENS, UNTIED, randomise, seeded
from tiny_tokenizers import byte_level
from transformers import LlamaConfig, LlamaForCausalLM

from handloom import Engine

POISON = 100  # a token that the check at load never uses, see `poisoned`


def tiny_llama(dtype: torch.dtype = torch.float32, **fields) -> LlamaForCausalLM:
    """A random dense model, 101 tokens, no special ones; `fields` replace configuration values."""
    config = LlamaConfig(**(LLAMA_LIKE | NO_SPECIAL_TOKENS | UNTIED | fields))
    with seeded(0):
        model = LlamaForCausalLM(config)
    randomise(model)
    return model.eval().to(dtype)


def poisoned(model):
    """The model with NaN as the embedding of token POISON: a row that meets it has NaN logits from there on."""
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = float("nan")
    return model


def text_engine(**options) -> Engine:
    """An engine with a byte-level tokenizer, whose `</s>` ends the text."""
    tokenizer = byte_level()
    ends = [tokenizer.eos_token_id]
    return Engine(tiny_llama(vocab_size=len(tokenizer)), tokenizer, eos_token_ids=ends, **options)


def spell(text: str) -> list[int]:
    """One token per letter in the tokenizer of `text_engine`."""
    return byte_level().convert_tokens_to_ids(list(text.replace(" ", "Ġ")))


def forced(text_or_ids) -> dict[int, int]:
    """`forced_tokens` that make a request say exactly this, one token per letter."""
    ids = spell(text_or_ids) if isinstance(text_or_ids, str) else text_or_ids
    return dict(enumerate(ids))


def assert_nothing_leaked(engine) -> None:
    """Every block is back, and the pool's books are right."""
    if engine.pool.in_use:  # an exception's traceback holds on to frames until they are collected
        gc.collect()
    engine.pool.check()
    assert engine.pool.in_use == 0


def nothing_left(logits, context):
    """A processor that excludes every token."""
    return torch.full_like(logits, -torch.inf)


@dataclass
class Passes:
    """Forward passes of a model: `shapes` holds (rows, tokens per row) of each."""

    shapes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens fed in all, idle slots included."""
        return sum(rows * width for rows, width in self.shapes)

    @property
    def prompts(self) -> list[int]:
        """Lengths of the passes of more than one token per row."""
        return [width for _, width in self.shapes if width > 1]

    @property
    def steps(self) -> list[int]:
        """Rows of the passes of one token per row."""
        return [rows for rows, width in self.shapes if width == 1]


@contextmanager
def recorded(model):
    """Record the forward passes of a transformers model and of its twins; a hook would have engines drop prefixes."""
    passes, kind = Passes(), type(model)
    original = kind.forward

    @functools.wraps(original)
    def noted(module, *args, **kwargs):
        if module._parameters is model._parameters:
            given = kwargs.get("input_ids", args[0] if args else None)
            given = kwargs["inputs_embeds"] if given is None else given
            passes.shapes.append((given.shape[0], given.shape[1]))
        return original(module, *args, **kwargs)

    kind.forward = noted
    try:
        yield passes
    finally:
        kind.forward = original


@torch.no_grad()
def full_logits(model, ids) -> torch.Tensor:
    """Logits `[T, V]` float32 of one sequence, by one forward pass without a cache."""
    return model(torch.tensor([list(ids)]), use_cache=False).logits[0].float()


def outcome(generation) -> tuple:
    """What a request gave, without times: equal for equal requests."""
    return (
        generation.token_ids,
        generation.text,
        generation.finish_reason,
        generation.stop_reason,
        generation.logprobs,
        generation.raw_logprobs,
    )


def until(condition, seconds: float = 120.0) -> None:
    """Wait for a condition that another thread or process brings about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.005)
