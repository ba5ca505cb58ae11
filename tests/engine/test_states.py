"""Random programs over States against recomputation from nothing, with the pool's books checked after each line."""

import gc

import pytest
import torch
from architectures import ARCHITECTURES, prompts_of
from helpers import full_logits, recorded, tiny_llama
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from handloom import Engine, HandloomError, State

TOKENS = st.integers(0, 96)
# fp32 rounding moves the logits by up to 1e-4; a wrong cell, mask or position moves them by 0.05 at least.
TOLERANCE = 1e-3
MOST_ROWS = 5
LONGEST = 60


def has_room(machine):
    """Whether there is a State that can be continued."""
    return any(max(map(len, rows)) < LONGEST for _, rows, _ in machine.kept)


class Programs(RuleBasedStateMachine):
    """Every State made is kept with the tokens it should hold, and any of them may be continued at any time."""

    model = None
    options: dict = {}
    known: dict = {}

    @initialize()
    def load(self):
        self.engine = Engine(self.model, **self.options)
        self.kept = []  # and not in a Bundle: hypothesis holds on to what a rule returns

    def checked(self, state, rows, prompts):
        """Compare a State with the rows it should hold, recomputed without a cache."""
        assert state.tokens == rows
        assert state.lengths.tolist() == [len(row) for row in rows]
        assert state.prompt_lengths.tolist() == prompts
        for row, logits in zip(rows, state.logits, strict=True):
            assert torch.allclose(logits, self.expected(row)[-1], atol=TOLERANCE, rtol=0)
        self.kept.append((state, rows, prompts))

    def pick(self, data, longest=LONGEST):
        """Any State made so far, most of them old, if its rows are not too long to go on."""
        fit = [i for i, (_, rows, _) in enumerate(self.kept) if max(map(len, rows)) < longest]
        return self.kept[data.draw(st.sampled_from(fit))]

    def expected(self, row):
        """The same rows come again in forks, in what is selected, and in other programs."""
        if tuple(row) not in self.known:
            self.known[tuple(row)] = full_logits(self.model, row)
        return self.known[tuple(row)]

    @rule(prompts=st.lists(st.lists(TOKENS, min_size=1, max_size=20), min_size=1, max_size=3))
    def prefill(self, prompts):
        self.checked(self.engine.prefill(prompts), prompts, [len(prompt) for prompt in prompts])

    @precondition(has_room)
    @rule(data=st.data())
    def step(self, data):
        state, rows, prompts = self.pick(data)
        tokens = data.draw(st.lists(TOKENS, min_size=len(rows), max_size=len(rows)))
        longer = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
        self.checked(self.engine.step(state, torch.tensor(tokens)), longer, prompts)

    @precondition(has_room)
    @rule(data=st.data())
    def extend(self, data):
        state, rows, prompts = self.pick(data)
        new = [data.draw(st.lists(TOKENS, min_size=1, max_size=6)) for _ in rows]
        longer = [row + more for row, more in zip(rows, new, strict=True)]
        wide = self.engine.extend(state, new)
        for row, more, logits in zip(longer, new, wide.all_logits, strict=True):
            truth = self.expected(row)[len(row) - len(more) :]
            assert torch.allclose(logits[: len(more)], truth, atol=TOLERANCE, rtol=0)
        self.checked(wide, longer, prompts)

    @precondition(has_room)
    @rule(data=st.data())
    def keep(self, data):
        """Extend, keep a part, and go on from that part."""
        state, rows, prompts = self.pick(data)
        new = [data.draw(st.lists(TOKENS, min_size=1, max_size=6)) for _ in rows]
        counts = [data.draw(st.integers(0, len(more))) for more in new]
        shorter = [row + more[:count] for row, more, count in zip(rows, new, counts, strict=True)]
        self.checked(self.engine.extend(state, new).keep(counts), shorter, prompts)

    @precondition(has_room)
    @rule(data=st.data())
    def select(self, data):
        state, rows, prompts = self.pick(data)
        index = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=MOST_ROWS))
        picked = [rows[i] for i in index], [prompts[i] for i in index]
        self.checked(state.select(index), *picked)

    @precondition(has_room)
    @rule(data=st.data())
    def concat(self, data):
        """Rows of two States made at any time, one of them often emptied first, go on together."""
        one, other = self.pick(data), self.pick(data)
        if data.draw(st.booleans()):
            one = one[0].select([]), [], []
        rows, prompts = one[1] + other[1], one[2] + other[2]
        if len(rows) <= MOST_ROWS:
            self.checked(State.concat([one[0], other[0]]), rows, prompts)

    @precondition(has_room)
    @rule(data=st.data())
    def score(self, data):
        """Scoring commits nothing."""
        state, rows, _ = self.pick(data)
        new = [data.draw(st.lists(TOKENS, min_size=1, max_size=4)) for _ in rows]
        scored = self.engine.score(state, new)
        for row, more, logprobs in zip(rows, new, scored, strict=True):
            truth = self.expected(row + more)[len(row) - 1 : -1].log_softmax(-1)
            truth = truth.gather(1, torch.tensor(more)[:, None])[:, 0]
            assert torch.allclose(logprobs[: len(more)], truth, atol=TOLERANCE, rtol=0)
            assert not logprobs[len(more) :].any()
        assert state.tokens == rows

    @rule(prompts=st.lists(st.lists(TOKENS, min_size=1, max_size=20), min_size=1, max_size=3))
    def generate(self, prompts):
        """The loop shares the pool with the States."""
        answers = self.engine.generate(prompts, max_new_tokens=3)
        for prompt, answer in zip(prompts, answers, strict=True):
            truth = full_logits(self.model, prompt)[-1]
            assert truth[answer.token_ids[0]] >= truth.max() - TOLERANCE

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def forget(self, data):
        """Drop a State; its blocks go back unless another State needs them."""
        self.kept.pop(data.draw(st.integers(0, len(self.kept) - 1)))

    @invariant()
    def the_books_are_right(self):
        if hasattr(self, "engine"):
            self.engine.pool.check()

    def teardown(self):
        """Old States still hold what they held; then all of them go, and every block comes back."""
        if not hasattr(self, "engine"):
            return
        while self.kept:
            state, rows, prompts = self.kept.pop()
            assert state.tokens == rows
            assert state.prompt_lengths.tolist() == prompts
            for row, logits in zip(rows, self.engine.step(state, [1] * len(rows)).logits, strict=True):
                assert torch.allclose(logits, self.expected([*row, 1])[-1], atol=TOLERANCE, rtol=0)
            del state
        gc.collect()
        self.engine.pool.check()
        assert self.engine.pool.in_use == 0


def programs(name, model, examples, steps, **options):
    """A test case that runs random programs on one model."""
    machine = type(name, (Programs,), {"model": model, "options": options, "known": {}})
    case = machine.TestCase
    case.settings = settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=True
    )
    return case


TestDense = programs("Dense", tiny_llama(), 10, 12, block_size=4)
TestOneTokenBlocks = programs("OneTokenBlocks", tiny_llama(), 8, 10, block_size=1, prefill_chunk=3)
TestNoPrefixCache = programs("NoPrefixCache", tiny_llama(), 6, 10, block_size=4, prefix_cache=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["mistral_sw", "gemma2", "llama_dynamic_ntk", "deepseek_v3", "bloom", "mamba2", "lfm2", "gpt_neo"],
)
def test_random_programs_on_other_architectures(name):
    case = programs(f"Programs_{name}", ARCHITECTURES[name](), 3, 8, block_size=4)
    case("runTest").runTest()


def test_an_empty_state_goes_through_everything():
    engine = Engine(tiny_llama())
    state = engine.prefill([[1, 2, 3], [4]], hidden=True)
    empty = state.select([])
    assert (len(empty), empty.logits.shape) == (0, (0, 101))
    for more in (engine.step(empty, []), engine.extend(empty, []).keep([]), empty.select([])):
        assert (len(more), more.tokens, more.logits.shape) == (0, [], (0, 101))
    assert engine.score(empty, []).shape == (0, 0)
    back = State.concat([empty, state, empty])
    assert back.tokens == state.tokens
    assert torch.equal(back.hidden(), state.hidden())


def test_concat_pads_hidden_states_and_forgets_the_extension():
    engine = Engine(tiny_llama())
    one, other = engine.prefill([[1, 2, 3]], hidden=True), engine.prefill([[4]], hidden=True)
    both = State.concat([one, engine.extend(other, [[5, 6]], hidden=True)])
    assert both.counts == (3, 2)
    assert torch.equal(both.hidden()[0], one.hidden()[0])
    assert not both.hidden()[1, 2].any()
    with pytest.raises(HandloomError, match="made by extend"):
        both.keep([1, 1])
    with pytest.raises(HandloomError, match="at least one State"):
        State.concat([])


@torch.no_grad()
def test_last_hidden_is_each_rows_last_token():
    engine = Engine(tiny_llama(num_hidden_layers=3))
    prompts, longer = prompts_of([9, 4, 1]), [[7, 8], [9], [10, 11, 12]]
    state = engine.prefill(prompts, hidden=True)
    extended = engine.extend(state, longer, hidden=True)
    kept = extended.keep([1, 1, 2])
    fed = [[*prompt, *new] for prompt, new in zip(prompts, longer, strict=True)]
    cut = [row[: len(row) - n] for row, n in zip(fed, [1, 0, 1], strict=True)]
    for now, rows in ((state, prompts), (extended, fed), (kept, cut)):
        for layer in range(-4, 4):
            for got, ids in zip(now.last_hidden(layer), rows, strict=True):
                theirs = engine.model(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
                torch.testing.assert_close(got, theirs.hidden_states[layer][0, -1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(engine.model.lm_head(state.last_hidden()), state.logits, atol=1e-4, rtol=1e-4)
    assert not state.hidden()[1, -1].any()  # what was easily taken for the last token
    for layer in (4, -5, "last"):
        with pytest.raises(HandloomError, match="is none of the 4 hidden states: -4 to 3"):
            state.hidden(layer)
    with pytest.raises(HandloomError, match="row 1 keeps nothing"):
        extended.keep([1, 0, 1]).last_hidden()


def test_prompts_of_a_state_share_a_pass():
    engine, prompts = Engine(tiny_llama()), [[1, 2, 3], [4] * 9, [5, 6]]
    with recorded(engine.model) as passes:
        state = engine.prefill(prompts)
    assert len(passes.shapes) == 1
    for prompt, logits in zip(prompts, state.logits, strict=True):
        torch.testing.assert_close(logits, full_logits(engine.model, prompt)[-1], rtol=0, atol=TOLERANCE)
