"""Grammars: masks worked out by hand, matchers that fork and rewind, backends, and whole texts."""

import random
import re

import pytest
import torch
from helpers import assert_nothing_leaked, outcome, spell, text_engine, tiny_llama
from languages import ASKED, END, A, B, Letters, Nested, V, Word, after, allowed, bound, read, step
from recorded_graph import install
from tiny_tokenizers import byte_fallback, byte_level

from handloom import Engine, SamplingParams, draw, laws
from handloom.pipeline.grammars.matchers import forbid
from handloom.pipeline.pipeline import Context, Pipeline
from handloom.pipeline.processors import Grammar, allow
from handloom.pipeline.processors.masks import unpack_bitmask
from handloom.strategies import beam_search, speculative

# -- masks


def test_bits_of_a_packed_mask():
    mask = torch.zeros(2, dtype=torch.int32)
    allow(mask, [0, A, B, 63, 64, -1])
    assert mask.tolist() == [1 - 2**31, 1 - 2**31]
    assert unpack_bitmask(mask[None], 64)[0].nonzero().flatten().tolist() == [0, 31, 32, 63]
    forbid(mask, [A, 63, 64])
    assert mask.tolist() == [1, 1]


def test_every_mask_of_a_small_language_by_hand():
    texts = [(), (A,), (A, A), (A, B), (A, A, B), (A, A, B, B)]
    rows = bound(Grammar(Nested()), 6)
    assert allowed(rows) == [{A}] * 6
    rows = read(rows, texts)
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


def test_tokens_that_the_model_lacks_do_not_keep_a_text_open():
    class Beyond(Nested):
        def next(self):
            return [A, 38] if not self.text else [38]

        def may_end(self):
            return True

        def fork(self):
            return Beyond(self.text)

    pipeline, params = Pipeline([Grammar(Beyond())], name="grammar"), SamplingParams(ignore_eos=True)
    rows = pipeline.bind([params], [[0]], vocab_size=38, eos_token_ids=[5])
    assert allowed(rows, 38) == [{A}]
    rows = rows.accept(torch.tensor([A]), step(rows))
    assert allowed(rows, 38) == [{5}]  # as nothing else may follow


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


def test_the_sampler_takes_the_mask_and_draws_what_the_reference_draws():
    grammar = Grammar(Nested())
    params = [
        SamplingParams(
            temperature=1.3, top_k=9, repetition_penalty=1.2, logit_bias={A: -1.0}, processors=[grammar]
        ),
        SamplingParams(temperature=0.8, top_p=0.9),
        SamplingParams(processors=[grammar]),
        SamplingParams(temperature=2.0, processors=[grammar], banned_tokens=[B]),
    ]
    rows = Pipeline().bind(params, [[3, A]] * 4, vocab_size=V, eos_token_ids=[END])
    assert rows.plan().unfused == []
    source, text = torch.Generator().manual_seed(1), [[3, A] for _ in params]
    for at in range(12):
        lengths = torch.full((4,), 2 + at)
        keys = {"seeds": torch.arange(4), "streams": torch.zeros(4, dtype=torch.int64)}
        context = Context(
            tokens=torch.tensor(text), lengths=lengths, prompt_lengths=torch.full((4,), 2), **keys
        )
        logits = torch.randn(4, V, generator=source) * 3
        processed = rows.apply(logits, context)
        want = draw(processed, keys["seeds"], lengths, keys["streams"], rows.greedy_rows())
        drawn = rows.sample(logits, context)
        assert torch.equal(drawn.tokens, want)
        for row in (0, 2, 3):
            finite = set(processed[row].isfinite().nonzero().flatten().tolist())
            left = after(tuple(text[row][2:])) if END not in text[row] else {END}
            assert finite == left - ({B} if row == 3 else set())
        rows = rows.accept(drawn.tokens, context)
        text = [[*row, int(token)] for row, token in zip(text, drawn.tokens, strict=True)]


# -- the loop


@pytest.fixture(scope="module")
def engine():
    return text_engine(slots=3)


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


@pytest.mark.parametrize("recorded", [False, True])
def test_the_device_program_gives_the_same_texts(monkeypatch, recorded):
    model, tokenizer = tiny_llama(vocab_size=len(byte_level())), byte_level()
    eager = Engine(model, tokenizer, slots=2, graph=False)
    recorders = install(monkeypatch) if recorded else []
    program = Engine(model, tokenizer, slots=2, graph=True)
    own = [[Grammar(Letters())], [Grammar.choice(["the fox", "a dog"])], [], [Grammar.regex("ab+c")]]
    params = [
        SamplingParams(temperature=1.0, seed=i, max_new_tokens=12, processors=p) for i, p in enumerate(own)
    ]
    for _ in range(2):
        want, got = eager.generate(ASKED, params), program.generate(ASKED, params)
        assert [outcome(one)[:4] for one in got] == [outcome(one)[:4] for one in want]
    assert want[1].text in ("the fox", "a dog")
    replays = sum(recorder.replays for recorder in recorders)
    assert replays > 10 or not recorded  # of the forward: the grammar runs before it
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
    model = tiny_llama(vocab_size=len(byte_level()), num_hidden_layers=1)
    draft = Engine(model, byte_level(), eos_token_ids=engine.eos_token_ids)
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


def test_sampling_under_a_grammar_has_the_law_that_enumeration_gives():
    engine, grammar = text_engine(slots=64), Grammar(Letters())
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
