"""Grammars: masks worked out by hand, matchers that fork and rewind, backends, and whole texts."""

import importlib.util
import json
import random
import re
import sys

import pytest
import torch
from helpers import assert_nothing_leaked, outcome, spell, text_engine, tiny_llama
from tiny_tokenizers import byte_fallback, byte_level, metaspace

from handloom import CapabilityError, Engine, ParameterError, SamplingParams, laws
from handloom.pipeline import Context, Pipeline
from handloom.processors import Grammar, allow
from handloom.processors.masks import unpack_bitmask
from handloom.processors.matchers import forbid
from handloom.strategies import beam_search, speculative

BACKENDS = [
    "llguidance",
    pytest.param(
        "xgrammar",
        marks=pytest.mark.skipif(importlib.util.find_spec("xgrammar") is None, reason="xgrammar is optional"),
    ),
]
V, A, B, END = 40, 31, 32, 39  # A is the sign bit of the first word, B the first of the second
TREE = [*[(), (A,), (A, A), (A, B), (A, A, B), (A, A, B, B)]]


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


# -- masks


def test_bits_of_a_packed_mask():
    mask = torch.zeros(2, dtype=torch.int32)
    allow(mask, [0, A, B, 63, 64, -1])
    assert mask.tolist() == [1 - 2**31, 1 - 2**31]
    assert unpack_bitmask(mask[None], 64)[0].nonzero().flatten().tolist() == [0, 31, 32, 63]
    forbid(mask, [A, 63, 64])
    assert mask.tolist() == [1, 1]


def test_every_mask_of_a_small_language_by_hand():
    rows = bound(Grammar(Nested()), len(TREE))
    assert allowed(rows) == [{A}] * 6
    rows = read(rows, TREE)
    assert allowed(rows) == [{A}, {A, B}, {A, B}, {END}, {B}, {END}]
    assert allowed(rows) == [{A}, {A, B}, {A, B}, {END}, {B}, {END}]  # asking changes nothing
    ended = rows.accept(torch.tensor([-1, -1, -1, END, -1, END]), step(rows))
    assert [allowed(ended)[i] for i in (3, 5)] == [{END}, {END}]


def test_rows_without_a_grammar_are_left_alone_and_cost_no_mask():
    grammar = Grammar(matcher := Nested())
    with_it, without = SamplingParams(processors=[grammar]), SamplingParams()
    rows = Pipeline().bind([without, with_it, without], [[0]] * 3, vocab_size=V, eos_token_ids=[END])
    assert allowed(rows) == [set(range(V)), {A}, set(range(V))]
    assert matcher.calls["fill"] == 1
    rows.clear(1)
    logits = torch.randn(3, V)
    assert rows.apply(logits, step(rows)) is logits


def test_an_end_token_is_allowed_only_where_the_text_may_end():
    class Greedy(Nested):
        def next(self):  # it does not know that END ends a text, and offers it as a word
            return [*super().next(), END]

        def fork(self):
            return Greedy(self.text)

    rows = read(bound(Grammar(Greedy()), 3), [(), (A,), (A, B)])
    assert allowed(rows) == [{A}, {A, B}, {END}]


@pytest.mark.parametrize(
    ("params", "ends"),
    [
        (SamplingParams(), {END}),
        (SamplingParams(stop_token_ids=[7]), {END, 7}),
        (SamplingParams(ignore_eos=True), {END}),  # nothing else could follow a complete text
        (SamplingParams(ignore_eos=True, stop_token_ids=[7, 8]), {7, 8}),
    ],
)
def test_which_tokens_end_a_text(params, ends):
    rows = read(bound(Grammar(Nested()), 3, params), [(A,), (A, B), (A, B, min(ends))])
    assert allowed(rows) == [{A, B}, ends, ends]


def test_ignore_eos_goes_on_while_a_text_can():
    class Open(Nested):  # a^n b^m
        def next(self):
            return [self.b] if self.b in self.text else [self.a, self.b]

        def may_end(self):
            return True

        def fork(self):
            return Open(self.text)

    assert allowed(bound(Grammar(Open()))) == [{A, B, END}]
    assert allowed(bound(Grammar(Open()), 1, SamplingParams(ignore_eos=True))) == [{A, B}]


def test_a_called_grammar_reads_what_has_been_generated():
    tokens = torch.tensor([[B, A, A, -1], [B, B, A, B], [A, -1, -1, -1]])
    context = Context(tokens=tokens, lengths=torch.tensor([3, 4, 1]), prompt_lengths=torch.tensor([1, 2, 1]),
                      eos_token_ids=frozenset([END]))  # fmt: skip
    kept = Grammar(Nested())(torch.zeros(3, V), context).isfinite()
    assert [set(row.nonzero().flatten().tolist()) for row in kept] == [{A, B}, {END}, {A}]


# -- forks and rewinds


def test_decoding_in_a_line_copies_one_matcher_a_row_and_takes_nothing_back():
    matcher = Nested()
    rows = bound(Grammar(matcher), 3)
    for token in [A] * 20:
        allowed(rows)
        rows = rows.accept(torch.tensor([token] * 3), step(rows))
    assert matcher.calls == {"fill": 60, "accept": 57, "rollback": 0, "fork": 3}


def test_forks_and_rewinds_equal_replay():
    rng, grammar = random.Random(0), Grammar(Nested())
    states = [(bound(grammar, 2), [(), ()])]
    for _ in range(400):
        rows, texts = states[-1] if rng.random() < 0.9 else rng.choice(states)
        if rng.random() < 0.2:
            index = [rng.randrange(len(texts)) for _ in range(rng.randint(1, 4))]
            rows, texts = rows.select(index), [texts[i] for i in index]
        else:
            new = [
                -1 if after(text) == {END} else B if rng.random() > 0.95 else min(after(text))
                for text in texts
            ]
            rows = rows.accept(torch.tensor(new), step(rows))
            texts = [(*text, token) if token >= 0 else text for text, token in zip(texts, new, strict=True)]
        states.append((rows, texts))
        for rows, texts in (states[-1], rng.choice(states)):
            assert allowed(rows) == [after(text) for text in texts]
    assert max(len(text) for _, texts in states for text in texts) > 25


def test_two_branches_in_turn_do_not_fight_for_one_matcher():
    matcher = Nested()
    start = bound(Grammar(matcher))
    allowed(start)
    one, other = start, start.accept(torch.tensor([A]), step(start))
    for _ in range(200):
        assert allowed(one)[0] == ({A, B} if one is not start else {A})
        assert allowed(other) == [{A, B}]
        one, other = (rows.accept(torch.tensor([A]), step(rows)) for rows in (one, other))
    assert matcher.calls["fork"] == 2
    assert matcher.calls["accept"] < 400 + 400  # and not 200 + 199 + ... for each


def test_laws_hold_for_a_grammar():
    class Even:
        """Texts of any tokens below 16; at even places only even ones are offered, but all are accepted."""

        def __init__(self, count=0):
            self.count = count

        def fill(self, mask):
            allow(mask, range(0, 16, 2 - self.count % 2))

        def accept(self, token):
            self.count += 1
            return True

        def may_end(self):
            return False

        def rollback(self, count):
            self.count -= count

        def fork(self):
            return Even(self.count)

    laws.check_processor(Grammar(Even()))


# -- the loop


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


@pytest.fixture(scope="module")
def engine():
    return text_engine(slots=3)


ASKED = ["the quick", "lazy dog. new lines", "x", "Stop here, then"]


def drawn(**fields):
    return [SamplingParams(temperature=1.5, seed=i, max_new_tokens=20, **fields) for i in range(len(ASKED))]


def test_whole_texts_are_of_the_language_and_end_by_themselves(engine):
    results = engine.generate(ASKED, drawn(processors=[Grammar(Letters())], n=3))
    complete = [result for result in results if result.finish_reason == "eos"]
    assert len(complete) > len(results) / 2
    for result in complete:
        half = len(result.text) // 2
        assert half > 0
        assert result.text == "a" * half + "b" * half
        assert result.token_ids == [*spell(result.text), *engine.eos_token_ids]
    for result in results:
        assert re.fullmatch("a+b*", result.text)
    assert len({result.text for result in complete}) > 1
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_equals_solo_with_grammars_of_several_kinds(engine, temperature):
    nested, number = Grammar(Letters()), Grammar.regex("[0-9]{3,}")
    params = [
        SamplingParams(temperature=temperature, seed=5, max_new_tokens=9, processors=own)
        for own in ([nested], [number], [], [nested])
    ]
    laws.batch_equals_solo(Engine.generate, engine, ASKED, params)
    laws.cached_equals_naive(engine, ASKED, params)


def test_the_device_program_gives_the_same_texts():
    model, tokenizer = tiny_llama(vocab_size=len(byte_level())), byte_level()
    eager, program = (Engine(model, tokenizer, slots=2, graph=graph) for graph in (False, True))
    own = [[Grammar(Letters())], [Grammar.choice(["the fox", "a dog"])], [], [Grammar.regex("ab+c")]]
    params = [
        SamplingParams(temperature=1.0, seed=i, max_new_tokens=8, processors=p) for i, p in enumerate(own)
    ]
    for _ in range(2):
        want, got = eager.generate(ASKED, params), program.generate(ASKED, params)
        assert [outcome(one)[:4] for one in got] == [outcome(one)[:4] for one in want]
    assert want[1].text in ("the fox", "a dog")
    assert_nothing_leaked(program)


def test_one_grammar_is_one_member_of_the_pipeline_and_is_compiled_once(engine):
    made = []

    def factory(tokenizer):
        made.append(tokenizer)
        return Letters()

    grammar = Grammar(factory)
    for _ in range(2):
        engine.generate(ASKED, max_new_tokens=3, processors=[grammar])
    assert made == [engine.tokenizer]
    other = text_engine()
    other.tokenizer = byte_fallback()
    other.generate([[5]], max_new_tokens=1, processors=[grammar])
    assert made == [engine.tokenizer, other.tokenizer]


def test_speculation_keeps_to_the_grammar(engine):
    draft = Engine(tiny_llama(vocab_size=len(byte_level()), num_hidden_layers=1), byte_level())
    plain = engine.generate(ASKED, drawn(processors=[Grammar(Letters())]))
    for source in (draft, lambda tokens, count: [spell("a")[0], spell("b")[0], 9][:count]):
        results = speculative(
            engine, ASKED, drawn(processors=[Grammar(Letters())]), draft=source, num_draft=3, rule="coupled"
        )
        assert [outcome(one)[:4] for one in results] == [outcome(one)[:4] for one in plain]
        assert sum(result.accepted for result in results) > 0
    matcher = Letters()
    results = speculative(
        engine, ASKED[:1], drawn(processors=[Grammar(matcher)])[:1], draft=draft, num_draft=3
    )
    assert re.fullmatch("a+b*", results[0].text)
    assert matcher.calls["fork"] == 1  # rejected drafts are taken back, not copied for
    assert matcher.calls["rollback"] > 0


def test_sampling_under_a_grammar_has_the_law_that_enumeration_gives(engine):
    grammar = Grammar(Letters(), tokenizer=engine.tokenizer)
    params = SamplingParams(temperature=3.0, max_new_tokens=5, processors=[grammar])
    law = laws.sequence_law(engine, "x", params)
    a, b, eos = *spell("ab"), *engine.eos_token_ids
    complete = [(a, b, eos), (a, a, b, b, eos)]
    cut = [(a,) * n + (b,) * (5 - n) for n in (3, 4, 5)]
    assert set(law) == {*complete, *cut}
    laws.exact_distribution(Engine.generate, engine, "x", params, draws=500)


def test_beams_keep_to_the_grammar(engine):
    results = beam_search(
        engine,
        ASKED[:2],
        num_beams=3,
        num_return_sequences=2,
        max_new_tokens=6,
        processors=[Grammar(Letters())],
    )
    assert {result.text for result in results} <= {"ab", "aabb", "aaab", "aaaa", "aaaaa", "aaaaaa"} | {
        "aaabbb",
        "aaaabb",
        "aaaaab",
    }


# -- ends


def test_a_dead_end_is_an_error_that_says_so(engine):
    class Stuck(Letters):
        def next(self):
            return super().next() if len(self.text) < 2 else []

        def may_end(self):
            return False

        def fork(self):
            return Stuck(self.text)

    stuck, fine = engine.generate(ASKED[:2], [SamplingParams(processors=[Grammar(Stuck())], max_new_tokens=9),
                                              SamplingParams(max_new_tokens=9)])  # fmt: skip
    assert stuck.finish_reason == "error"
    assert len(stuck.token_ids) == 2
    assert stuck.error == (
        "request 0: the grammar is at a dead end after 2 tokens: no token of the vocabulary may follow"
    )
    assert outcome(fine)[:4] == outcome(engine.generate(ASKED[1], max_new_tokens=9))[:4]
    assert_nothing_leaked(engine)


@pytest.mark.parametrize(
    ("fields", "tokens", "reason"),
    [
        ({"min_new_tokens": 9}, 7, "complete, but the request excludes EOS"),
        ({"banned_tokens": [1]}, 7, "complete, but the request excludes EOS"),
        ({"banned_tokens": spell("f")}, 4, "other processors exclude all that the grammar allows"),
        ({"ignore_eos": True, "banned_tokens": [1]}, 7, "complete, but the request excludes EOS"),
    ],
)
def test_what_contradicts_the_grammar_is_named(engine, fields, tokens, reason):
    own = [Grammar(Word("the fox"))]
    result = engine.generate("x", max_new_tokens=20, processors=own, **fields)
    assert result.finish_reason == "error"
    assert len(result.token_ids) == tokens
    assert re.search(reason, result.error)


def test_a_token_that_the_grammar_refuses_is_named(engine):
    (z,), late = spell("z"), []

    def once(logits, context):
        late.append(1)
        return (
            logits
            if len(late) > 1
            else torch.full_like(logits, -torch.inf).index_fill(1, torch.tensor([z]), 0.0)
        )

    result = engine.generate("x", max_new_tokens=20, processors=[Grammar(Word("fox")), once])
    assert result.token_ids == [z]
    assert (
        result.error == f"request 0: the grammar does not accept token {z}, which was chosen in spite of it"
    )


def test_a_matcher_that_raises_takes_no_other_row_with_it(engine):
    class Broken(Letters):
        def fill(self, mask):
            raise KeyError("lost")

        def fork(self):
            return Broken()

    broken, fine = engine.generate(ASKED[:2], [SamplingParams(processors=[Grammar(Broken())], max_new_tokens=4),
                                               SamplingParams(max_new_tokens=4)])  # fmt: skip
    assert broken.error == "request 0: the grammar's matcher raised KeyError: 'lost'"
    assert len(fine.token_ids) == 4


def test_nan_logits_are_not_blamed_on_the_grammar():
    model = tiny_llama(vocab_size=len(byte_level()))
    with torch.no_grad():
        model.get_input_embeddings().weight[100] = float("nan")
    engine = Engine(model, byte_level())
    result = engine.generate([[5, 100]], max_new_tokens=3, processors=[Grammar(Letters())])[0]
    assert "the model's logits hold NaN" in result.error


def test_ignore_eos_fills_a_complete_text_up_to_its_length(engine):
    result = engine.generate("x", ignore_eos=True, max_new_tokens=12, processors=[Grammar.choice(["fox"])])
    assert (result.text, result.finish_reason) == ("fox", "length")
    assert result.token_ids[-2:] == [1, 1]


def test_min_new_tokens_keeps_an_open_text_going(engine):
    grammar = Grammar.regex("(ab)+")
    short = engine.generate(
        "x", SamplingParams(max_new_tokens=30, logit_bias={1: 100.0}, processors=[grammar])
    )
    long = engine.generate(
        "x", SamplingParams(max_new_tokens=30, min_new_tokens=7, logit_bias={1: 100.0}, processors=[grammar])
    )
    assert (short.text, short.finish_reason) == ("ab", "eos")
    assert (long.text, long.finish_reason) == ("ab" * (len(long.text) // 2), "eos")
    assert 7 < len(long.token_ids) <= 9


def test_stop_strings_and_criteria_end_a_text_in_the_middle(engine):
    grammar = Grammar.regex("(abc)+")
    result = engine.generate("x", max_new_tokens=20, ignore_eos=True, stop=["ca"], processors=[grammar])
    assert (result.text, result.finish_reason, result.stop_reason) == ("ab", "stop", "ca")
    result = engine.generate(
        "x", max_new_tokens=20, ignore_eos=True, criteria=[lambda p: len(p.text) >= 5], processors=[grammar]
    )
    assert (result.finish_reason, result.text[:5]) == ("stop", "abcab")


def test_a_model_without_eos_says_what_is_missing_and_takes_stop_tokens(engine):
    bare = Engine(tiny_llama(vocab_size=360))
    assert not bare.eos_token_ids
    grammar = Grammar(Letters())
    asked = {"max_new_tokens": 20, "temperature": 1.0, "seed": 1, "logit_bias": {spell("b")[0]: 100.0}}
    result = bare.generate([[5]], processors=[grammar], **asked)[0]
    assert "complete, but there is no EOS token: give stop_token_ids" in result.error
    result = bare.generate([[5]], processors=[grammar], stop_token_ids=[77], **asked)[0]
    assert (result.token_ids, result.finish_reason) == ([*spell("ab"), 77], "stop")


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


def test_it_prints_itself():
    assert repr(Grammar.regex("a+")) == "Grammar.regex('a+')"
    assert repr(Grammar(Nested())) == "Grammar(Nested)"
    assert "grammar" in Pipeline.default().explain(SamplingParams(processors=[Grammar.regex("a+")]))


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
