"""Small languages for the tests of grammars: matchers in plain Python, and what they allow, by hand."""

import importlib.util

import pytest
import torch
from helpers import spell

from handloom.pipeline.pipeline import Context, Pipeline
from handloom.pipeline.processors import allow

BACKENDS = [
    "llguidance",
    pytest.param(
        "xgrammar",
        marks=pytest.mark.skipif(importlib.util.find_spec("xgrammar") is None, reason="xgrammar is optional"),
    ),
]
V, A, B, END = 40, 31, 32, 39  # A is the sign bit of the first word, B the first of the second
ASKED = ["the quick", "lazy dog. new lines", "x", "Stop here, then"]


class Nested:
    """The language a^n b^n, n >= 1, as a user would write it; counts what is asked of it."""

    def __init__(self, text=(), calls=None, a=A, b=B):
        self.text, self.a, self.b = list(text), a, b
        self.calls = calls if calls is not None else dict.fromkeys(("fill", "accept", "rollback", "fork"), 0)

    def next(self):
        ones, twos = self.text.count(self.a), self.text.count(self.b)
        if twos == 0:
            return [self.a, self.b] if ones else [self.a]
        return [self.b] if twos < ones else []

    def fill(self, mask):
        assert not mask.any()
        self.calls["fill"] += 1
        allow(mask, self.next())

    def accept(self, token):
        self.calls["accept"] += 1
        if token not in self.next():
            return False
        self.text.append(token)
        return True

    def may_end(self):
        return 0 < self.text.count(self.a) == self.text.count(self.b)

    def rollback(self, count):
        assert 1 <= count <= len(self.text)
        self.calls["rollback"] += 1
        del self.text[-count:]

    def fork(self):
        self.calls["fork"] += 1
        return Nested(self.text, self.calls, self.a, self.b)


def after(text):
    """What may follow a text of a^n b^n, by hand."""
    ones, twos = text.count(A), text.count(B)
    if twos == 0:
        return {A, B} if ones else {A}
    return {B} if twos < ones else {END}


def bound(grammar, rows=1, params=None, vocab=V):
    pipeline = Pipeline([grammar], name="grammar")
    return pipeline.bind([params] * rows, [[0]] * rows, vocab_size=vocab, eos_token_ids=[END])


def step(rows):
    """A Context for rows of any length: this processor reads none of it."""
    lengths = torch.ones(len(rows), dtype=torch.int64)
    return Context(tokens=torch.zeros(len(rows), 1), lengths=lengths, prompt_lengths=lengths)


def allowed(rows, vocab=V):
    """The tokens that each row may take next; the logits of the others are -inf, of these untouched."""
    logits = torch.arange(float(vocab)).expand(len(rows), -1).clone()
    result = rows.apply(logits, step(rows))
    kept = result.isfinite()
    assert torch.equal(result[kept], logits[kept])
    return [set(row.nonzero().flatten().tolist()) for row in kept]


def read(rows, texts):
    """Rows after they have accepted a text each; shorter texts wait."""
    for at in range(max(map(len, texts))):
        tokens = torch.tensor([text[at] if at < len(text) else -1 for text in texts])
        rows = rows.accept(tokens, step(rows))
    return rows


class Letters(Nested):
    """a^n b^n in the letters of `text_engine`."""

    def __init__(self, text=(), calls=None):
        super().__init__(text, calls, *spell("ab"))

    def fork(self):
        self.calls["fork"] += 1
        return Letters(self.text, self.calls)


class Word(Letters):
    """One text, letter by letter."""

    def __init__(self, word, text=()):
        super().__init__(text)
        self.word = word

    def next(self):
        return spell(self.word)[len(self.text) :][:1]

    def may_end(self):
        return len(self.text) == len(self.word)

    def fork(self):
        return Word(self.word, self.text)
