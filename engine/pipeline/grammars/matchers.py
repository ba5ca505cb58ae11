"""Matchers: what follows a grammar token by token, and which backends compile one."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ...errors import CapabilityError, ParameterError

WORD_BITS = 32
KINDS = ("json_schema", "regex", "lark", "ebnf", "choice")
BACKENDS = ("auto", "llguidance", "xgrammar")


class Matcher(Protocol):
    """Where one text stands in a grammar. Write a class with these methods to bring a language of your own.

    End-of-sequence tokens are not its business: `Grammar` allows them exactly where `may_end` is true.
    """

    def fill(self, mask: Tensor) -> None:
        """Set the bits of the tokens that may come next in `mask` [ceil(V / 32)] int32, which comes as zeros:
        bit i % 32 of word i // 32 is token i (see `allow`).
        """

    def accept(self, token: int) -> bool:
        """Go on by one token; False, and nothing changes, if it may not come next."""

    def may_end(self) -> bool:
        """Whether the text so far is a whole sentence of the language."""

    def rollback(self, count: int) -> None:
        """Take the last `count` >= 1 accepted tokens back."""

    def fork(self) -> Matcher:
        """An independent matcher at the same place."""


METHODS = tuple(name for name in vars(Matcher) if not name.startswith("_"))


def allow(mask: Tensor, tokens: Iterable[int]) -> None:
    """Set the bits of `tokens` in a row of a packed mask, [ceil(V / 32)] int32; those beyond it are ignored."""
    words = mask.numpy().view(np.uint32)
    for token in tokens:
        if 0 <= token < WORD_BITS * len(words):
            words[token // WORD_BITS] |= np.uint32(1 << token % WORD_BITS)


def forbid(mask: Tensor, tokens: Iterable[int]) -> None:
    """Clear the bits of `tokens` in a row of a packed mask; those beyond it are ignored."""
    words = mask.numpy().view(np.uint32)
    for token in tokens:
        if 0 <= token < WORD_BITS * len(words):
            words[token // WORD_BITS] &= ~np.uint32(1 << token % WORD_BITS)


# The largest logit that a byte of a mask lets each of its eight tokens have.
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
CEILINGS = np.where(_BITS, np.float32(np.inf), np.float32(-np.inf))


def exclude(logits: Tensor, mask: Tensor) -> None:
    """Set to -inf what a row of a packed mask excludes from `logits` [V] float32, in place on the CPU.

    By a table and a minimum, as a branch for every token is many times slower.
    """
    limits = CEILINGS.take(mask.numpy().view(np.uint8), axis=0, mode="clip")
    torch.minimum(logits, torch.from_numpy(limits).view(-1)[: len(logits)], out=logits)


def as_matcher(given: Any) -> Matcher | None:
    """A `Matcher` from one, from an `llguidance.LLMatcher` or an `xgrammar.GrammarMatcher`; None: it is none.

    Raises ParameterError for an llguidance matcher in its error state.
    """
    if all(callable(getattr(given, name, None)) for name in METHODS):
        return given
    if hasattr(given, "compute_bitmask") and hasattr(given, "try_consume_tokens"):
        if given.is_error():
            raise ParameterError(f"invalid grammar: {given.get_error().strip()}")
        return LLGuidanceMatcher(given)
    if hasattr(given, "fill_next_token_bitmask") and hasattr(given, "accept_token"):
        return XGrammarMatcher(given)
    return None


class LLGuidanceMatcher:
    """An `llguidance.LLMatcher` as a `Matcher`."""

    def __init__(self, matcher: Any):
        self.matcher = matcher

    def fill(self, mask: Tensor) -> None:
        allowed = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.int32)
        if self.matcher.is_error():
            raise ParameterError(f"llguidance gave up: {self.matcher.get_error().splitlines()[0]}")
        count = min(len(mask), len(allowed))
        mask.numpy()[:count] = allowed[:count]

    def accept(self, token: int) -> bool:
        return (
            self.matcher.try_consume_tokens([token]) == 1
        )  # consume_token would never recover from a refusal

    def may_end(self) -> bool:
        return self.matcher.is_accepting()

    def rollback(self, count: int) -> None:
        if not self.matcher.rollback(count):
            raise ParameterError(f"llguidance cannot take {count} tokens back")

    def fork(self) -> LLGuidanceMatcher:
        return LLGuidanceMatcher(self.matcher.deep_copy())


class XGrammarMatcher:
    """An `xgrammar.GrammarMatcher` as a `Matcher`.

    vocab_size: of the `TokenizerInfo` it was compiled for; None: the model's. banned: tokens that are not text,
    whose spelling xgrammar would take for it.
    """

    def __init__(self, matcher: Any, vocab_size: int | None = None, banned: Iterable[int] = ()):
        self.matcher, self.vocab_size, self.banned = matcher, vocab_size, tuple(banned)

    def fill(self, mask: Tensor) -> None:
        words = len(mask) if self.vocab_size is None else -(-self.vocab_size // WORD_BITS)
        allowed = torch.zeros(1, words, dtype=torch.int32)
        try:
            self.matcher.fill_next_token_bitmask(allowed, 0)
        except RuntimeError as error:
            raise ParameterError(
                f"xgrammar gave no mask of {words} words, one bit for each token: compile the grammar with "
                f"TokenizerInfo.from_huggingface(tokenizer, vocab_size=<the model's>) ({last_line(error)})"
            ) from error
        if self.vocab_size is not None:  # the last word's spare bits are set
            forbid(allowed[0], range(self.vocab_size, words * WORD_BITS))
        forbid(allowed[0], self.banned)
        count = min(len(mask), words)
        mask[:count] = allowed[0, :count]

    def accept(self, token: int) -> bool:
        return self.matcher.accept_token(token)

    def may_end(self) -> bool:
        return self.matcher.is_completed()

    def rollback(self, count: int) -> None:
        self.matcher.rollback(count)

    def fork(self) -> XGrammarMatcher:
        return XGrammarMatcher(self.matcher.fork(), self.vocab_size, self.banned)


@dataclass(frozen=True)
class Source:
    """The text of a grammar; called with a tokenizer it gives a `Matcher` at the start.

    kind: one of "json_schema", "regex", "lark", "ebnf", "choice"; text: a schema as JSON, a list of choices as
    JSON, else in the kind's own syntax. whitespace: for schemas, whether blanks are free between JSON tokens.
    """

    kind: str
    text: str
    backend: str = "auto"
    whitespace: bool = True

    def __post_init__(self):
        if self.backend not in BACKENDS:
            raise ParameterError(f"backend={self.backend!r} is none of {', '.join(BACKENDS)}")

    def __call__(self, tokenizer: Any) -> Matcher:
        if tokenizer is None:
            raise ParameterError(f"a grammar needs the tokenizer: Grammar.{self.kind}(..., tokenizer=...)")
        problem = None
        for backend in installed() if self.backend == "auto" else [self.backend]:
            try:
                return (with_llguidance if backend == "llguidance" else with_xgrammar)(self, tokenizer)
            except CapabilityError as error:  # one may read a tokenizer that another does not
                problem = problem or error
        raise problem


def installed() -> list[str]:
    """The backends that can be imported, the best first; where there is none, the one to install."""
    from importlib.util import find_spec

    return [name for name in BACKENDS[1:] if find_spec(name)] or ["llguidance"]


def missing(error: ImportError) -> CapabilityError:
    """What to say when a backend cannot be imported."""
    hint = 'pip install "handloom[grammar]"' if error.name == "llguidance" else f"pip install {error.name}"
    return CapabilityError(f"a grammar needs the package {error.name!r}: {hint}")


def last_line(error: Exception) -> str:
    """The part of a backend's message that is for people."""
    return str(error).strip().splitlines()[-1]


# -- llguidance


@functools.lru_cache(maxsize=4)
def llguidance_tokenizer(tokenizer: Any, size: int) -> Any:
    """An `LLTokenizer` of `size` tokens; making one takes up to a second."""
    from llguidance.hf import from_tokenizer

    try:
        eos = tokenizer.eos_token_id
        return from_tokenizer(tokenizer, eos_token=0 if eos is None else eos)
    except ValueError as error:
        raise CapabilityError(
            f"llguidance cannot read a {type(tokenizer).__name__} ({error}); it takes byte-level and "
            "byte-fallback tokenizers of the tokenizers library"
        ) from error


def with_llguidance(source: Source, tokenizer: Any) -> Matcher:
    """Compile a grammar with llguidance."""
    try:
        from llguidance import LLMatcher
        from llguidance.gbnf_to_lark import gbnf_to_lark
    except ImportError as error:
        raise missing(error) from error
    text = source.text
    try:
        if source.kind == "json_schema":
            text = LLMatcher.grammar_from_json_schema(
                text, overrides={"whitespace_flexible": source.whitespace}
            )
        elif source.kind == "regex":
            text = LLMatcher.grammar_from_regex(text)
        elif source.kind == "choice":
            text = "start: " + " | ".join(map(json.dumps, json.loads(text)))
        elif source.kind == "ebnf":
            text = gbnf_to_lark(text)
    except Exception as error:  # the converter raises nothing more definite
        raise ParameterError(f"invalid {source.kind}: {error}") from error
    matcher = LLMatcher(llguidance_tokenizer(tokenizer, len(tokenizer)), text, log_level=0)
    if matcher.is_error():
        raise ParameterError(f"invalid {source.kind}: {matcher.get_error().strip()}")
    return LLGuidanceMatcher(matcher)


# -- xgrammar


@functools.lru_cache(maxsize=4)
def xgrammar_compiler(tokenizer: Any, size: int) -> Any:
    """A `GrammarCompiler` for a tokenizer of `size` tokens."""
    import xgrammar

    try:
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=size)
    except (ValueError, RuntimeError) as error:
        raise CapabilityError(
            f"xgrammar cannot read a {type(tokenizer).__name__} ({last_line(error)})"
        ) from error
    return xgrammar.GrammarCompiler(info)


def with_xgrammar(source: Source, tokenizer: Any) -> Matcher:
    """Compile a grammar with xgrammar."""
    try:
        import xgrammar
    except ImportError as error:
        raise missing(error) from error
    size, text = len(tokenizer), source.text
    compiler = xgrammar_compiler(tokenizer, size)
    try:
        if source.kind == "json_schema":
            compact = {} if source.whitespace else {"any_whitespace": False, "separators": (",", ":")}
            compiled = compiler.compile_json_schema(text, **compact)
        elif source.kind == "regex":
            compiled = compiler.compile_regex(text)
        elif source.kind == "lark":
            compiled = compiler.compile_lark(text)
        elif source.kind == "choice":
            compiled = compiler.compile_grammar("root ::= " + " | ".join(map(json.dumps, json.loads(text))))
        else:
            compiled = compiler.compile_grammar(text)
    except (ValueError, RuntimeError) as error:
        raise ParameterError(f"invalid {source.kind}: {str(error).strip()}") from error
    return XGrammarMatcher(xgrammar.GrammarMatcher(compiled), size, tokenizer.all_special_ids)
