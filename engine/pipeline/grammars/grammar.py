"""Grammar: only texts of a language, such as JSON of a schema, a regular expression, or your own matcher's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ParameterError
from ..forms import Context, Edit
from .matchers import (
    METHODS,
    WORD_BITS,
    Matcher,
    Source,
    allow,
    as_matcher,
    exclude,
    forbid,
)

COMPLETE = "the grammar's text is complete, but the request excludes EOS (min_new_tokens, bans)"
FAR = 16  # tokens that a matcher is rolled back for a row before the row gets a matcher of its own


class Node:
    """A place in the tree of texts: the token that leads here, and where it was accepted."""

    __slots__ = ("depth", "parent", "token")

    def __init__(self, parent: Node | None = None, token: int = -1):
        self.parent, self.token = parent, token
        self.depth = 0 if parent is None else parent.depth + 1


class Cursor:
    """A matcher and the node where it stands; a fork copies its source when it is first used."""

    __slots__ = ("matcher", "node", "source")

    def __init__(self, matcher: Matcher | None, node: Node | None, source: Cursor | None = None):
        self.matcher, self.node, self.source = matcher, node, source

    def fork(self) -> Cursor:
        """A cursor of its own for another row."""
        return Cursor(None, None, self if self.source is None else self.source)

    def way(self, target: Node) -> tuple[int, list[Node]]:
        """How many tokens to take back, and which nodes to visit then, to get from here to `target`."""
        here = self.node if self.source is None else self.source.node
        back, ahead = 0, []
        while here is not target:
            if here.depth >= target.depth:
                here, back = here.parent, back + 1
            else:
                ahead.append(target)
                target = target.parent
        return back, ahead[::-1]

    def move(self, target: Node) -> int | None:
        """Bring the matcher to `target`; the token that it refuses on the way, or None."""
        if self.source is not None:
            self.matcher, self.node, self.source = self.source.matcher.fork(), self.source.node, None
        back, ahead = self.way(target)
        if back:
            self.matcher.rollback(back)
            for _ in range(back):
                self.node = self.node.parent
        for node in ahead:
            if not self.matcher.accept(node.token):
                return node.token
            self.node = node
        return None


class Places:
    """Where the rows of a batch stand in a grammar.

    Immutable in what it says: tokens are only noted, and a row's matcher follows when its next mask is asked
    for, so that on a GPU the host need not wait for a token before the forward pass is under way. Older and
    forked Places may share a matcher; whoever needs it moves it, back or forth.
    """

    def __init__(self, cursors: Sequence[Cursor], nodes: Sequence[Node], news: tuple | None = None):
        self.cursors, self._nodes, self._news = list(cursors), list(nodes), news

    @property
    def nodes(self) -> list[Node]:
        """The node of every row."""
        if self._news is not None:
            tokens, flags = self._news
            rows = zip(self._nodes, tokens.tolist(), flags, strict=True)
            self._nodes, self._news = [Node(node, token) if on else node for node, token, on in rows], None
        return self._nodes

    def accept(self, tokens: Tensor, flags: Sequence[bool]) -> Places:
        """These places after tokens [B] int64, in the rows that are on."""
        return Places(self.cursors, self.nodes, (tokens, list(flags)))

    def select(self, index: Sequence[int]) -> Places:
        """The places of chosen rows; a repeated row gets a matcher of its own."""
        seen: set[int] = set()
        cursors = []
        for i in index:
            cursors.append(self.cursors[i].fork() if i in seen else self.cursors[i])
            seen.add(i)
        return Places(cursors, [self.nodes[i] for i in index])

    def put(self, row: int, other: Places) -> Places:
        """These places with one row's replaced."""
        cursors, nodes = list(self.cursors), list(self.nodes)
        cursors[row], nodes[row] = other.cursors[0], other.nodes[0]
        return Places(cursors, nodes)

    def matcher(self, row: int) -> tuple[Matcher, int | None]:
        """The row's matcher, moved to its place, and the token that it refused on the way."""
        node = self.nodes[row]
        if self.cursors[row].way(node)[0] > FAR:  # shared with a row that went elsewhere
            self.cursors[row] = self.cursors[row].fork()
        refused = self.cursors[row].move(node)
        return self.cursors[row].matcher, refused


def upload(mask: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, without waiting for it."""
    return mask.pin_memory().to(device, non_blocking=True)


class Grammar(Edit):
    """Allow only tokens that keep the output within a language; end-of-sequence only where it may end.

    Make one with `json_schema`, `regex`, `lark`, `ebnf` or `choice`, or from a matcher of your own: an object
    with the methods of `handloom.processors.Matcher` at the start of a text, an `llguidance.LLMatcher`, an
    `xgrammar.GrammarMatcher`, or a function tokenizer -> one of these, which is called once. Rows fork it.

    tokenizer: which tokens there are; None: that of the Engine the request is given to. Tokens of a larger
    vocabulary than the grammar's are banned.

    The output alone is constrained, from its first token. Where a text may end, EOS and `stop_token_ids` are
    allowed; a complete one allows nothing else, which finishes the row. With `ignore_eos` a text goes on while
    it can, and EOS fills up a complete one. A row for which no token is left ends with an error that says why.
    """

    name = "grammar"
    kind = "opaque"  # asks the host at every step
    identity_when_off = True
    defaults = {"grammar": None, "stop_token_ids": (), "ignore_eos": False, "eos_token_ids": None}
    before_temperature = True

    def __init__(self, matcher: Matcher | Callable[[Any], Any], *, tokenizer: Any = None):
        super().__init__()
        if as_matcher(matcher) is None and not callable(matcher):
            raise ParameterError(
                f"{matcher!r} is no grammar: give an object with the methods {', '.join(METHODS)}, an LLMatcher, "
                "a GrammarMatcher, or a function tokenizer -> one of these"
            )
        self.source, self.tokenizer = matcher, tokenizer
        self.explicit = {"grammar": self}  # what `Pipeline.explain` prints
        self._start: Cursor | None = None
        self._resolved: list[tuple[Any, Grammar]] = []

    @classmethod
    def json_schema(
        cls, schema: Any, *, whitespace: bool = True, tokenizer: Any = None, backend: str = "auto"
    ) -> Grammar:
        """JSON that a schema admits.

        schema: a dict, its JSON as a string, True for any JSON, or a pydantic model. whitespace: allow blanks
        and newlines between JSON's tokens; small models may go on with those for ever. backend: "llguidance",
        "xgrammar" or "auto", the first of them that is installed and reads the tokenizer. Keywords that the
        backend does not know are an error with llguidance; xgrammar ignores some.
        """
        if hasattr(schema, "model_json_schema"):
            schema = schema.model_json_schema()
        text = schema if isinstance(schema, str) else json.dumps({} if schema is True else schema)
        return cls(Source("json_schema", text, backend, whitespace), tokenizer=tokenizer)

    @classmethod
    def regex(cls, pattern: str, *, tokenizer: Any = None, backend: str = "auto") -> Grammar:
        """Texts that match a regular expression as a whole."""
        return cls(Source("regex", pattern, backend), tokenizer=tokenizer)

    @classmethod
    def lark(cls, text: str, *, tokenizer: Any = None, backend: str = "auto") -> Grammar:
        """A context-free grammar in Lark's syntax, with the rule `start`."""
        return cls(Source("lark", text, backend), tokenizer=tokenizer)

    @classmethod
    def ebnf(cls, text: str, *, tokenizer: Any = None, backend: str = "auto") -> Grammar:
        """A context-free grammar in the syntax of llama.cpp's GBNF, with the rule `root`."""
        return cls(Source("ebnf", text, backend), tokenizer=tokenizer)

    @classmethod
    def choice(cls, texts: Iterable[str], *, tokenizer: Any = None, backend: str = "auto") -> Grammar:
        """One of several texts."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts or not all(isinstance(text, str) and text for text in texts):
            raise ParameterError(f"choice takes one or more texts that are not empty, got {texts!r}")
        return cls(Source("choice", json.dumps(texts), backend), tokenizer=tokenizer)

    def for_tokenizer(self, tokenizer: Any) -> Grammar:
        """This grammar compiled, for `tokenizer` unless it has one of its own; the same object every time.

        Raises ParameterError for a grammar that the backend rejects, CapabilityError where none is installed.
        """
        if self.tokenizer is not None or self._start is not None or as_matcher(self.source) is not None:
            self.compiled()
            return self
        found = next((grammar for known, grammar in self._resolved if known is tokenizer), None)
        if found is None:
            found = Grammar(self.source)
            found._start = found._compile(tokenizer)
            self._resolved.append((tokenizer, found))
        return found

    def compiled(self) -> Cursor:
        """The start of every text; never moved, only forked."""
        if self._start is None:
            self._start = self._compile(self.tokenizer)
        return self._start

    def _compile(self, tokenizer: Any) -> Cursor:
        matcher = as_matcher(self.source)
        if matcher is None:
            matcher = as_matcher(made := self.source(tokenizer))
        if matcher is None:
            raise ParameterError(f"{self!r}: {self.source!r} gave {made!r}, which is no matcher")
        return Cursor(matcher, Node())

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: what was compiled is made again."""
        return {**vars(self), "_start": None, "_resolved": []}

    def on(self, settings: dict[str, Any]) -> bool:
        return True

    def pack(self, rows: list[dict[str, Any]], context: Context) -> dict[str, Any]:
        """`eos`: end ids; `ends`: those that may follow where a text may end; `fill`: that follow a complete one."""
        eos, ends, fill = [frozenset(context.ends(row)) for row in rows], [], []
        for row, own in zip(rows, eos, strict=True):
            stops = frozenset(row["stop_token_ids"])
            ends.append(stops if row["ignore_eos"] else stops | own)
            fill.append(ends[-1] or own)
        return {"eos": eos, "ends": ends, "fill": fill}

    def start(self, context: Context) -> Places:
        start, rows = self.compiled(), len(context.values.flags)
        nodes = [start.node] * rows
        if context.lengths is not None and context.tokens is not None:
            spans = zip(context.prompt_lengths.tolist(), context.lengths.tolist(), strict=True)
            for row, (first, last) in enumerate(spans):  # a batch that is under way
                for token in context.history[row, first:last].tolist() if last > first else ():
                    nodes[row] = Node(nodes[row], token)
        return Places([start.fork() for _ in nodes], nodes)

    def accept(self, memory: Places, tokens: Tensor, context: Context) -> Places:
        return memory.accept(tokens, context.values.flags)

    def mask(self, context: Context) -> Tensor:
        """Which tokens may come next, packed [B, ceil(V / 32)] int32; all ones in rows that are off."""
        mask, device = self._masks(context), context.device
        return mask if device is None or device.type == "cpu" else upload(mask, device)

    def exclude(self, buffer: Tensor, context: Context) -> None:
        if buffer.device.type != "cpu":
            super().exclude(buffer, context)
            return
        mask = self._masks(context)
        for row, on in enumerate(context.values.flags):
            if on:
                exclude(buffer[row, :-1], mask[row])

    def _masks(self, context: Context) -> Tensor:
        """The mask on the CPU; each matcher is moved to its row's place."""
        flags = context.values.flags
        mask = torch.full((len(flags), -(-context.vocab_size // WORD_BITS)), -1, dtype=torch.int32)
        for row, on in enumerate(flags):
            if on:
                try:
                    problem = self._fill(mask[row], row, context)
                except Exception as error:  # noqa: BLE001 - one request's matcher must not take the others with it
                    mask[row] = 0
                    problem = f"the grammar's matcher raised {type(error).__name__}: {error}"
                context.fail(row, problem)  # told only if no token can be drawn
        return mask

    def _fill(self, mask: Tensor, row: int, context: Context) -> str:
        """Set the row's bits; what to tell if no token can be drawn."""
        values, node = context.values, context.memory.nodes[row]
        mask.zero_()
        if node.token in values.fill[row]:  # the text has ended, and the request goes on regardless
            allow(mask, values.fill[row])
            return COMPLETE
        matcher, refused = context.memory.matcher(row)
        if refused is not None:
            return f"the grammar does not accept token {refused}, which was chosen in spite of it"
        matcher.fill(mask)
        forbid(mask, values.eos[row])
        if spare := context.vocab_size % WORD_BITS:
            mask[-1] &= (1 << spare) - 1
        goes_on, may_end = bool(mask.any()), matcher.may_end()
        if may_end:
            allow(mask, values.ends[row] if goes_on else values.fill[row])
        if goes_on:
            return "no token is left: the request's other processors exclude all that the grammar allows here"
        if not may_end:
            return f"the grammar is at a dead end after {node.depth} tokens: no token of the vocabulary may follow"
        if not values.fill[row]:
            return "the grammar's text is complete, but there is no EOS token: give stop_token_ids"
        return COMPLETE

    def __repr__(self) -> str:
        if isinstance(self.source, Source):
            return f"Grammar.{self.source.kind}({self.source.text!r})"
        return f"Grammar({getattr(self.source, '__name__', type(self.source).__name__)})"
