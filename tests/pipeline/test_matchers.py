"""Backends of grammars: llguidance and xgrammar give the masks worked out by hand, and clear errors."""

import importlib.util
import json
import pickle
import re
import sys

import pytest
import torch
from helpers import text_engine, tiny_llama
from languages import ASKED, BACKENDS, Nested, allowed, bound, step
from tiny_tokenizers import byte_fallback, byte_level, metaspace

from handloom import CapabilityError, Engine, ParameterError, SamplingParams
from handloom.pipeline.pipeline import Pipeline
from handloom.pipeline.processors import Grammar


@pytest.fixture(scope="module")
def engine():
    return text_engine(slots=3)


# -- backends


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokenizer", [byte_level, byte_fallback])
def test_masks_of_a_backend_by_hand(backend, tokenizer):
    tokenizer = tokenizer()
    letters = dict(zip("abc", tokenizer.convert_tokens_to_ids(list("abc")), strict=True))
    grammar = Grammar.regex("ab+c", tokenizer=tokenizer, backend=backend)
    pipeline = Pipeline([grammar], name="grammar")
    size, eos = len(tokenizer), tokenizer.eos_token_id
    rows = pipeline.bind([None], [[0]], vocab_size=size, eos_token_ids=[eos])
    a, b, c = letters.values()
    same = {i for i in range(size) if tokenizer.decode([i]) in "abc"} | {a, b, c}  # <0x61> says a, too
    seen = [allowed(rows, size)[0]]
    for token in (a, b, b, c):
        rows = rows.accept(torch.tensor([token]), step(rows))
        seen.append(allowed(rows, size)[0])
    assert all(found <= same | {eos} for found in seen)
    assert [{a, b, c, eos} & found for found in seen] == [{a}, {b}, {b, c}, {b, c}, {eos}]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_forks_and_rewinds(backend):
    tokenizer = byte_level()
    x, y = tokenizer.convert_tokens_to_ids(list("xy"))
    grammar = Grammar.lark('start: "x" start "y" | "x" "y"', tokenizer=tokenizer, backend=backend)
    rows = Pipeline([grammar], name="grammar").bind([None], [[0]], vocab_size=360, eos_token_ids=[1])
    kept = []
    for token in [x] * 20 + [y] * 20:
        kept.append(rows)
        allowed(rows, 360)
        rows = rows.accept(torch.tensor([token]), step(rows))
    assert allowed(rows, 360) == [{1}]
    expected = [{x}] + [{x, y}] * 20 + [{y}] * 19
    for at in [5, 39, 0, 20, 38, 1]:
        assert allowed(kept[at], 360) == [expected[at]]
        assert allowed(kept[at].select([0, 0, 0]), 360) == [expected[at]] * 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_kinds_of_grammars(engine, backend):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 3, "maximum": 17}, "s": {"enum": ["x", "yy"]}},
        "required": ["n", "s"],
        "additionalProperties": False,
    }
    grammars = {
        "schema": Grammar.json_schema(schema, whitespace=False, backend=backend),
        "text": Grammar.json_schema(json.dumps(schema), whitespace=False, backend=backend),
        "lark": Grammar.lark('start: "a" ("b" | "c")~3', backend=backend),
        "ebnf": Grammar.ebnf('root ::= "a" [0-9] "b"', backend=backend),
        "choice": Grammar.choice(['say "hi"', "a\\b", "two\nlines"], backend=backend),
    }
    if backend == "xgrammar":
        grammars["lark"] = Grammar.lark('start: "a" ("b" | "c") ("b" | "c") ("b" | "c")', backend=backend)
    for seed in range(4):
        said = {
            name: engine.generate("x", temperature=1.0, seed=seed, max_new_tokens=60, processors=[grammar])
            for name, grammar in grammars.items()
        }
        assert {result.finish_reason for result in said.values()} == {"eos"}
        for name in ("schema", "text"):
            value = json.loads(said[name].text)
            assert list(value) == ["n", "s"]
            assert 3 <= value["n"] <= 17
            assert value["s"] in ("x", "yy")
            assert " " not in said[name].text
        assert re.fullmatch("a[bc]{3}", said["lark"].text)
        assert re.fullmatch("a[0-9]b", said["ebnf"].text)
        assert said["choice"].text in ('say "hi"', "a\\b", "two\nlines")


@pytest.mark.parametrize("backend", BACKENDS)
def test_schemas_may_be_given_in_several_ways(engine, backend):
    class Model:
        """As pydantic's."""

        @staticmethod
        def model_json_schema():
            return {"enum": [7]}

    settings = {"max_new_tokens": 40, "temperature": 1.0, "seed": 3, "logit_bias": {1: 8.0}}
    said = [
        engine.generate(
            "x", processors=[Grammar.json_schema(schema, backend=backend, whitespace=False)], **settings
        )
        for schema in ({"enum": [7]}, '{"enum": [7]}', Model, True)
    ]
    assert [result.text for result in said[:3]] == ["7", "7", "7"]
    assert said[3].finish_reason == "eos"
    json.loads(said[3].text)


def test_matchers_of_the_backends_are_taken_as_they_are(engine):
    import llguidance.hf

    tokenizer = llguidance.hf.from_tokenizer(engine.tokenizer)
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_regex("ab+c"))
    for grammar in (Grammar(matcher), Grammar(lambda tokenizer: matcher.deep_copy())):
        results = engine.generate(ASKED, max_new_tokens=4, processors=[grammar])
        assert all("abbbc".startswith(result.text[:1]) for result in results)
        assert all(re.fullmatch("ab+c?", result.text) for result in results)
    wrong = llguidance.LLMatcher(tokenizer, "start: nowhere", log_level=0)
    with pytest.raises(ParameterError, match='unknown name: "nowhere"'):
        Grammar(wrong)


@pytest.mark.skipif(importlib.util.find_spec("xgrammar") is None, reason="xgrammar is optional")
def test_an_xgrammar_matcher_is_taken_as_it_is(engine):
    import xgrammar

    info = xgrammar.TokenizerInfo.from_huggingface(engine.tokenizer, vocab_size=engine.vocab_size)
    matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(info).compile_regex("ab+c"))
    assert re.fullmatch("ab+c?", engine.generate("x", max_new_tokens=4, processors=[Grammar(matcher)]).text)
    wide = bound(Grammar(matcher), vocab=500)
    assert not wide.apply(torch.zeros(1, 500), context := step(wide)).isfinite().any()
    assert "needs" not in context.cache["failures"][0]
    assert "vocab_size=<the model's>" in context.cache["failures"][0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", [330, 360, 500])
def test_a_vocabulary_of_another_size(backend, vocab):
    tokenizer = byte_level()
    grammar = Grammar.regex("[^a]+", tokenizer=tokenizer, backend=backend)
    rows = Pipeline([grammar], name="grammar").bind([None], [[0]], vocab_size=vocab, eos_token_ids=[1])
    whole = Pipeline([grammar], name="grammar").bind([None], [[0]], vocab_size=360, eos_token_ids=[1])
    found, known = allowed(rows, vocab)[0], allowed(whole, 360)[0]
    assert found == {token for token in known if token < vocab}
    assert max(known) > 330
    assert not found & {0, 1, 2}  # special tokens are no text


# -- errors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("regex", "a(", "unclosed group|not closed"),
        ("lark", "start: nowhere", "unknown name"),
        ("ebnf", "root ::= nowhere", "nowhere"),
        ("json_schema", {"type": "arrayy"}, "arrayy"),
    ],
)
def test_an_invalid_grammar_is_named_before_anything_runs(engine, backend, kind, text, reason):
    grammar = getattr(Grammar, kind)(text, backend=backend)
    with pytest.raises(ParameterError, match=rf"(?s)request 1: invalid {kind}: .*({reason})"):
        engine.generate(ASKED[:2], [SamplingParams(), SamplingParams(processors=[grammar])])


def test_schemas_that_cannot_be_kept_are_refused(engine):
    with pytest.raises(ParameterError, match=r'Unimplemented keys.*"uniqueItems"'):
        engine.generate("x", processors=[Grammar.json_schema({"type": "array", "uniqueItems": True})])
    with pytest.raises(ParameterError, match="invalid json_schema"):
        engine.generate("x", processors=[Grammar.json_schema("{not json")])


def test_a_missing_backend_is_named(engine, monkeypatch):
    for backend, hint in [
        ("llguidance", r'pip install "handloom\[grammar\]"'),
        ("xgrammar", "pip install xgrammar"),
    ]:
        monkeypatch.setitem(sys.modules, backend, None)
        with pytest.raises(CapabilityError, match=f"needs the package '{backend}': {hint}"):
            engine.generate("x", processors=[Grammar.regex("a", backend=backend)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CapabilityError, match=r"handloom\[grammar\]"):
        engine.generate("x", processors=[Grammar.regex("a")])


def test_a_missing_or_unreadable_tokenizer_is_named():
    bare = Engine(tiny_llama())
    with pytest.raises(ParameterError, match=r"Grammar.regex\(..., tokenizer=...\)"):
        bare.generate([[5]], processors=[Grammar.regex("a")])
    with pytest.raises(ParameterError, match="tokenizer="):
        bound(Grammar.regex("a"))
    with pytest.raises(CapabilityError, match="llguidance cannot read a"):
        bound(Grammar.regex("a", tokenizer=metaspace(), backend="llguidance"))


@pytest.mark.skipif(importlib.util.find_spec("xgrammar") is None, reason="xgrammar is optional")
def test_a_tokenizer_that_one_backend_cannot_read_goes_to_the_next():
    tokenizer = metaspace()
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    grammar = Grammar.regex("ab", tokenizer=tokenizer)
    rows = Pipeline([grammar], name="g").bind([None], [[0]], vocab_size=len(tokenizer), eos_token_ids=[2])
    rows = rows.accept(torch.tensor([a]), step(rows))
    assert allowed(rows, len(tokenizer)) == [{b}]
    with pytest.raises(ParameterError, match="invalid regex"):  # and a grammar that one rejects does not
        bound(Grammar.regex("a(", tokenizer=byte_level()))


def test_what_is_no_grammar_is_refused():
    with pytest.raises(ParameterError, match=r"3 is no grammar: .*fill, accept, may_end, rollback, fork"):
        Grammar(3)
    with pytest.raises(ParameterError, match="gave 3, which is no matcher"):
        bound(Grammar(lambda tokenizer: 3))
    with pytest.raises(ParameterError, match="backend='outlines' is none of auto, llguidance, xgrammar"):
        Grammar.regex("a", backend="outlines")
    for wrong in ([], "", [""], [3]):
        with pytest.raises(ParameterError, match="choice takes one or more texts"):
            Grammar.choice(wrong)


def test_results_can_be_pickled(engine):
    result = engine.generate("x", max_new_tokens=5, processors=[Grammar.choice(["fox"])])
    data = pickle.dumps(result)
    assert len(data) < 3000  # the tokenizer is not in it
    again = pickle.loads(data)
    assert again.text == "fox"
    assert engine.generate("x", again.params).text == "fox"


def test_it_prints_itself():
    assert repr(Grammar.regex("a+")) == "Grammar.regex('a+')"
    assert repr(Grammar(Nested())) == "Grammar(Nested)"
    table = Pipeline.default().explain(SamplingParams(temperature=1.0, processors=[Grammar.regex("a+")]))
    assert re.search(r"grammar +mask edit +fused sampler +grammar=Grammar\.regex\('a\+'\)", table)


# -- a real model

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}  # fmt: skip
LIST = {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 2, "maxItems": 4}
EITHER = {"anyOf": [{"type": "boolean"}, {"type": "object", "properties": {"x": {"type": "number"}},
                                          "required": ["x"], "additionalProperties": False}]}  # fmt: skip


def is_person(value):
    return list(value) == ["name", "age"] and len(value["name"]) <= 20 and 0 <= value["age"] <= 120


def is_list(value):
    return 2 <= len(value) <= 4 and set(value) <= {"red", "green", "blue"}


def is_either(value):
    return isinstance(value, bool) or (list(value) == ["x"] and isinstance(value["x"], int | float))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_smollm2_says_json_of_a_schema(smollm2_engine, backend):
    tasks = [
        ("Describe a person as JSON with name and age.", PERSON, is_person),
        ("Give me a list of colours as JSON.", LIST, is_list),
        ('Answer true, false or {"x": number}.', EITHER, is_either),
    ]
    prompts, params = [], []
    for temperature in (0.0, 1.0):
        for text, schema, _ in tasks:
            grammar = Grammar.json_schema(schema, whitespace=False, backend=backend)
            prompts.append([{"role": "user", "content": text}])
            params.append(
                SamplingParams(temperature=temperature, seed=3, max_new_tokens=80, processors=[grammar])
            )
    together = smollm2_engine.generate(prompts, params)
    for result, (_, _, valid) in zip(together, tasks * 2, strict=True):
        assert result.finish_reason == "eos", result
        assert valid(json.loads(result.text)), result.text
    alone = smollm2_engine.generate(prompts[3], params[3])
    assert alone.token_ids == together[3].token_ids
