"""Pipeline and Rows: order, fusion, per-row parameters, memory, what they cost and what they say."""

import itertools
import math

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch.utils._python_dispatch import TorchDispatchMode

from handloom import Engine
from handloom.errors import ParameterError
from handloom.kernels.sampling.draw import draw
from handloom.params.sampling_params import SamplingParams
from handloom.pipeline.members import merge, reasons
from handloom.pipeline.pipeline import Context, Edit, Keep, Pipeline, PipelineWarning
from handloom.pipeline.processors import (
    DEFAULT_ORDER,
    XTC,
    BannedTokens,
    LogitBias,
    MinP,
    Mirostat,
    RepetitionPenalty,
    Smoothing,
    TailFree,
    Temperature,
    TopK,
    TopNSigma,
    TopP,
)

VOCAB = 300


class Cap(Edit):
    """A user's pointwise edit, without a device function."""

    defaults = {"cap": math.inf}

    def point(self, logits, ids, value):
        return torch.where(logits > value, value, logits)


PROMPT = [4, 8, 15, 16, 23, 42]


def context(rows, seed=1):
    history = torch.tensor([PROMPT] * rows)
    return Context(
        tokens=history,
        lengths=torch.full((rows,), len(PROMPT)),
        prompt_lengths=torch.full((rows,), len(PROMPT)),
        seeds=torch.arange(seed, seed + rows),
        streams=torch.zeros(rows, dtype=torch.int64),
    )


def bind(requests, pipeline=None, vocab=VOCAB):
    pipeline = pipeline or Pipeline.default()
    return pipeline.bind(requests, [PROMPT] * len(requests), vocab_size=vocab, eos_token_ids={0})


def noise(rows, seed=0, vocab=VOCAB, scale=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


class Count(TorchDispatchMode):
    """Counts dispatched operations; views are free."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in {"view", "select", "slice", "unsqueeze", "squeeze", "expand", "detach", "alias"}:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("params", "budget"),
    [
        ({}, 6),
        ({"temperature": 0.7}, 15),
        ({"temperature": 0.7, "top_k": 50, "top_p": 0.9}, 15),
        ({"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.05, "top_n_sigma": 0}, 15),
        (
            {
                "temperature": 0.7,
                "top_k": 50,
                "repetition_penalty": 1.2,
                "presence_penalty": 0.1,
                "frequency_penalty": 0.1,
            },
            40,
        ),
        ({"temperature": 0.7, "logit_bias": {3: 1.0}, "banned_tokens": (1, 2)}, 12),
    ],
)
def test_operations_of_a_step(params, budget):
    rows, x, ctx = bind([SamplingParams(**params)] * 4), noise(4), context(4)
    rows.sample(x, ctx)
    with Count() as count:
        rows.sample(x, ctx)
    assert 0 < len(count.names) <= budget, count.names


def test_operations_do_not_depend_on_what_other_rules_exist():
    with Count() as long_chain:
        bind([SamplingParams()] * 2).sample(noise(2), context(2))
    with Count() as short_chain:
        bind([SamplingParams()] * 2, Pipeline([Temperature()], name="short")).sample(noise(2), context(2))
    assert long_chain.names == short_chain.names


FUSED = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "min_p": 0.1},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.0, "epsilon_cutoff": 0.01, "eta_cutoff": 0.02},
    {"temperature": 1.0, "top_a": 0.3},
    {"temperature": 1.0, "p_less": True},
    {"temperature": 1.1, "p_less": "norm", "top_k": 30},
    {"temperature": 0.8, "top_n_sigma": 1.0, "top_k": 20},
    {"temperature": 0.8, "top_k": 20, "typical_p": 0.9, "min_p": 0.01},
    {"temperature": 0.8, "repetition_penalty": 1.3, "top_p": 0.7, "banned_tokens": (3, 4)},
]


def unfused(rows, x, ctx):
    """The definition: every processor in torch, then the draw."""
    processed = rows.apply(x, ctx)
    tokens = draw(processed, ctx.seeds, ctx.positions, ctx.streams, rows.greedy_rows())
    logp = processed.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    return tokens, x.log_softmax(-1).gather(-1, tokens[:, None])[:, 0], logp


@pytest.mark.parametrize("params", FUSED)
@pytest.mark.parametrize("scale", [0.5, 3.0, 12.0])
def test_fused_tokens_are_those_of_the_reference(params, scale):
    x = noise(16, seed=7, scale=scale)
    x[3, ::2] = -math.inf
    x[5] = x[5].round()
    rows, ctx = bind([SamplingParams(**params)] * 16), context(16)
    drawn = rows.sample(x, ctx)
    tokens, raw, logp = unfused(rows, x, ctx)
    assert drawn.tokens.tolist() == tokens.tolist()
    torch.testing.assert_close(drawn.raw_logprobs, raw, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(drawn.logprobs, logp, rtol=1e-5, atol=2e-5)


def test_fused_batch_of_different_requests():
    requests = [SamplingParams(**params) for params in FUSED] + [SamplingParams()] * 3
    x, ctx = noise(len(requests), seed=3), context(len(requests))
    rows = bind(requests)
    drawn = rows.sample(x, ctx)
    tokens, _, logp = unfused(rows, x, ctx)
    assert drawn.tokens.tolist() == tokens.tolist()
    torch.testing.assert_close(drawn.logprobs, logp, rtol=1e-5, atol=2e-5)
    assert drawn.tokens[-3:].tolist() == x[-3:].argmax(-1).tolist()
    for i, request in enumerate(requests):
        alone = bind([request]).sample(x[i : i + 1], context(1, seed=1 + i))
        assert alone.tokens.item() == drawn.tokens[i].item()


def test_a_users_rule_of_eight_lines_is_fused():
    class WithinSigma(Keep):
        """Keep logits within n standard deviations of the maximum."""

        defaults = {"n_sigma": 0.0}

        def level(self, statistics, n):
            return statistics.maximum - n * statistics.deviation

    pipeline = Pipeline([Temperature(0.8), WithinSigma([1.0, 0.0, 2.0]), TopK(40)])
    rows = pipeline.bind([None] * 3, [[]] * 3, vocab_size=VOCAB)
    assert rows.plan().unfused == []
    assert "torch on CUDA (it has no device function)" in pipeline.explain()
    assert reasons(pipeline, [[]] * 3, "cuda") == [
        "runs before WithinSigma, which the sampler cannot follow",
        "it has no device function",
        "",
    ]
    x, ctx = noise(3), context(3)
    assert rows.sample(x, ctx).tokens.tolist() == unfused(rows, x, ctx)[0].tolist()
    kept = rows.apply(x, ctx) > -math.inf
    scaled = x / 0.8
    wanted = scaled >= scaled.amax(-1, keepdim=True) - torch.tensor([[1.0], [99.0], [2.0]]) * scaled.std(
        -1, correction=0, keepdim=True
    )
    assert (kept.sum(-1) == torch.minimum(wanted.sum(-1), torch.tensor(40))).all()
    assert (kept <= wanted).all()


def test_greedy_rows_take_the_edited_argmax_without_truncation_or_temperature():
    x = noise(2)
    best = x.argmax(-1)
    request = SamplingParams(banned_tokens=[int(best[0])], top_k=3)
    drawn = bind([request] * 2).sample(x, context(2))
    masked = x.clone()
    masked[:, best[0]] = -math.inf
    assert drawn.tokens.tolist() == masked.argmax(-1).tolist()
    expected = masked.log_softmax(-1).gather(-1, drawn.tokens[:, None])[:, 0]
    torch.testing.assert_close(drawn.logprobs, expected)


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 3, "typical_p": 0.9}]
)
def test_bad_rows_have_nan_and_disturb_nobody(params):
    requests = [SamplingParams(**params)] * 4
    x, ctx = noise(4), context(4)
    good = bind(requests).sample(x, ctx)
    bad = x.clone()
    bad[1, 7] = math.nan
    bad[2] = -math.inf
    drawn = bind(requests).sample(bad, ctx)
    assert drawn.logprobs.isnan().tolist() == [False, True, True, False]
    assert drawn.raw_logprobs.isnan().tolist() == [False, True, True, False]
    assert drawn.tokens[[0, 3]].tolist() == good.tokens[[0, 3]].tolist()
    assert ((drawn.tokens >= 0) & (drawn.tokens < VOCAB)).all()


def test_a_row_left_without_a_token_is_bad_after_processing_alone():
    rows = bind(
        [SamplingParams(temperature=1.0, prefix_fn=lambda sample, ids: []), SamplingParams(temperature=1.0)]
    )
    drawn = rows.sample(noise(2), context(2))
    assert drawn.logprobs.isnan().tolist() == [True, False]
    assert not drawn.raw_logprobs.isnan().any()


def test_order_is_the_users():
    x = torch.tensor([[0.5, 0.3, 0.2]]).log()
    early = Pipeline([MinP(0.5), Temperature(0.5)], name="a").bind([None], [[]], vocab_size=3)
    late = Pipeline([Temperature(0.5), MinP(0.5)], name="b").bind([None], [[]], vocab_size=3)
    assert early.apply(x, context(1)).isfinite().tolist() == [[True, True, False]]
    assert late.apply(x, context(1)).isfinite().tolist() == [[True, False, False]]


def test_filling_and_clearing_rows():
    rows = Pipeline.default().bind([], [], vocab_size=VOCAB, capacity=3)
    x, ctx = noise(3), context(3)
    assert rows.apply(x, ctx) is x
    rows.fill(1, SamplingParams(temperature=1.0, top_k=1), PROMPT, seed=4, stream=2)
    assert rows.apply(x, ctx).isfinite().sum(-1).tolist() == [VOCAB, 1, VOCAB]
    rows.fill(1, SamplingParams(temperature=1.0, top_k=2), PROMPT)
    assert rows.apply(x, ctx).isfinite().sum(-1).tolist() == [VOCAB, 2, VOCAB]
    rows.fill(0, SamplingParams(temperature=1.0, top_k=3), PROMPT)
    rows.clear(1)
    assert rows.apply(x, ctx).isfinite().sum(-1).tolist() == [3, VOCAB, VOCAB]
    assert rows.select([2, 0, 0]).apply(x, ctx).isfinite().sum(-1).tolist() == [VOCAB, 3, 3]
    assert len(rows.select([1])) == 1
    with pytest.raises(ParameterError, match="rows are 0 to 2"):
        rows.fill(3, SamplingParams())


def test_a_new_request_starts_with_fresh_memory_beside_running_ones():
    request = SamplingParams(temperature=1.0, mirostat=2, mirostat_tau=1.0)
    rows = bind([request, request])
    ctx, x = context(2), noise(2)
    rows.sample(x, ctx)
    rows = rows.accept(torch.tensor([5, 9]), ctx)
    moved = memory_of(rows)
    assert moved[0] != 2.0
    rows.fill(0, SamplingParams(temperature=1.0, mirostat=2, mirostat_tau=3.0), PROMPT)
    assert memory_of(rows) == [6.0, moved[1]]


def memory_of(rows):
    (member,) = [member for member in rows.members if isinstance(member.processor, Mirostat)]
    return member.memory["mu"].tolist()


def test_a_token_of_minus_one_accepts_nothing():
    rows = bind([SamplingParams(temperature=1.0, mirostat=2)] * 3)
    ctx = context(3)
    rows.sample(noise(3), ctx)
    after = memory_of(rows.accept(torch.tensor([1, -1, 2]), ctx))
    assert after[1] == 10.0
    assert 10.0 not in (after[0], after[2])


def test_accept_with_another_context_is_an_error():
    rows = bind([SamplingParams(temperature=1.0, mirostat=2)])
    rows.sample(noise(1), context(1))
    with pytest.raises(ParameterError, match="same object"):
        rows.accept(torch.tensor([1]), context(1))


def test_explicit_parameters_beat_the_requests():
    rows = Pipeline([Temperature(0.5), TopK([1, 2])]).bind(
        [SamplingParams(temperature=0.9, top_k=7)] * 2, [[]] * 2, vocab_size=VOCAB
    )
    result = rows.apply(noise(2), context(2))
    assert result.isfinite().sum(-1).tolist() == [1, 2]
    assert result[0].max() == noise(2)[0].max() / 0.5


def test_a_list_of_values_must_cover_all_rows():
    with pytest.raises(ParameterError, match="top_k has 2 values, there is a row 2"):
        Pipeline([TopK([1, 2])]).bind([None] * 3, [[]] * 3, vocab_size=VOCAB)


def test_an_explicit_temperature_decides_the_mode():
    assert Pipeline([Temperature(0.5)]).bind([SamplingParams()], [[]], vocab_size=9).greedy == [False]
    assert Pipeline([Temperature(0)]).bind([SamplingParams(temperature=1.0)], [[]], vocab_size=9).greedy == [
        True
    ]


def test_a_field_that_nobody_reads_is_an_error():
    with pytest.raises(ParameterError, match=r"top_p=0\.5 has no effect.*TopP\(\)"):
        Pipeline([Temperature()], name="x").bind(
            [SamplingParams(temperature=1, top_p=0.5)], [[]], vocab_size=9
        )


def test_requests_bring_processors_of_their_own():
    def add_one(logits, context):
        return logits + 1

    class Halve:
        name = "halve"

        def apply(self, logits, context):
            return logits / 2

    x = torch.ones(3, VOCAB)
    rows = bind(
        [
            SamplingParams(processors=[add_one]),
            SamplingParams(processors=[Halve(), add_one]),
            SamplingParams(),
        ]
    )
    assert rows.apply(x, context(3))[:, 0].tolist() == [2.0, 1.5, 1.0]
    rows.clear(1)
    assert rows.apply(x, context(3))[:, 0].tolist() == [2.0, 1.0, 1.0]


def test_merging_keeps_every_order():
    a, b, c, d = TopK(1), TopK(2), TopK(3), TopK(4)
    assert merge([[a, b], [a, c, b], [d, a]]) == [d, a, c, b]
    with pytest.raises(ParameterError, match="different places"):
        merge([[a, b], [b, a]])


def test_a_pipeline_may_be_called_on_logits_and_on_states():
    class State:
        logits = noise(2)
        tokens = [[1, 2, 2], [3]]
        lengths = torch.tensor([3, 1])
        prompt_lengths = torch.tensor([1, 1])

    pipe = Pipeline([RepetitionPenalty(2.0), Temperature(0.5)])
    result = pipe(State())
    for row, seen in enumerate(({1, 2}, {3})):
        for token in range(6):
            old = State.logits[row, token]
            new = (old * 2 if old < 0 else old / 2) if token in seen else old
            assert result[row, token].item() == pytest.approx(new.item() / 0.5, rel=1e-6)
    assert torch.equal(Pipeline([Temperature(0.5)])(State.logits), State.logits / 0.5)


def test_the_linter_names_orders_that_rarely_mean_what_was_intended():
    with pytest.warns(PipelineWarning, match="temperature runs after top_p"):
        Pipeline([TopP(0.9), Temperature(0.7)])
    with pytest.warns(PipelineWarning, match="banned_tokens runs after the truncation rule top_k"):
        Pipeline([TopK(5), BannedTokens((1,))])
    with pytest.warns(PipelineWarning, match="repetition_penalty runs after temperature"):
        Pipeline([Temperature(0.7), RepetitionPenalty(1.2)])
    with pytest.warns(PipelineWarning, match="after mirostat"):
        Pipeline([Mirostat(2), TopK(5)])
    assert Pipeline([RepetitionPenalty(1.2), Temperature(0.7), TopK(5), TopP(0.9)]).lint() == []
    assert Pipeline.default().lint() == []


def explained(pipeline, params=None):
    """The line of each member in explain()."""
    lines = [line for line in pipeline.explain(params).splitlines() if line[:3].strip().isdigit()]
    return {line.split()[1]: line for line in lines}


def test_explain_says_where_each_member_runs_and_why():
    lines = explained(Pipeline([RepetitionPenalty(1.2), Temperature(0.7), TopP(0.9)]))
    for name in ("repetition_penalty", "temperature", "top_p"):
        assert "fused sampler" in lines[name]
    assert "top_p=0.9" in lines["top_p"]
    assert "sparse edit" in lines["repetition_penalty"]
    lines = explained(
        Pipeline.default(), SamplingParams(temperature=0.7, top_k=5, xtc_probability=0.5, top_h=0.5)
    )
    assert set(lines) == {"temperature", "top_k", "xtc", "top_h"}
    assert all("fused sampler" in line for line in lines.values())
    sigma = SamplingParams(
        temperature=0.7, top_n_sigma=1.0, top_k=5, repetition_penalty=1.2
    )  # before the temperature
    assert all("fused sampler" in line for line in explained(Pipeline.default(), sigma).values())
    lines = explained(
        Pipeline.default(), sigma.replace(dynatemp_range=0.3)
    )  # whose entropy is of what is left
    assert "torch (runs before dynatemp, and the sampler truncates last)" in lines["top_n_sigma"]
    lines = explained(Pipeline([TopNSigma(1.0), BannedTokens([1]), Temperature(0.7)], name="late ban"))
    assert "torch (runs before banned_tokens, and the sampler truncates last)" in lines["top_n_sigma"]
    lines = explained(Pipeline([Temperature(0.7), TopK(5), XTC(0.5, 0.1, xtc_guard=(3,))]))
    assert "xtc_guard spares tokens" in lines["xtc"]
    assert "torch (runs before xtc, which the sampler cannot follow)" in lines["top_k"]
    short = SamplingParams(temperature=0.7, top_k=256, top_p=0.9, tfs=0.9)
    assert all("fused sampler" in line for line in explained(Pipeline.default(), short).values())
    for long in (short.replace(top_k=257), short.replace(top_k=0), short.replace(profile="textgen", top_k=0)):
        assert "torch (its threshold needs" in explained(Pipeline.default(), long)["tfs"]
    for late in ((TailFree(0.9), TopK(5)), (TopK(5), BannedTokens([1]), TailFree(0.9))):
        assert "torch (its threshold needs" in explained(quiet(*late))["tfs"]
    lines = explained(Pipeline.default(), SamplingParams(temperature=0.7, typical_p=0.9, profile="llamacpp"))
    assert "runs before temperature, and the sampler truncates last" in lines["typical"]
    lines = explained(Pipeline.default(), SamplingParams(typical_p=0.9, profile="llamacpp"))
    assert "it may drop the most probable token of a greedy row" in lines["typical"]


def quiet(*rules):
    return Pipeline(rules, name="quiet")  # without the linter's warnings


def test_explain_says_why_an_order_is_not_fused():
    lines = explained(quiet(Temperature(0.7), BannedTokens([1]), TopK(3)))
    assert "torch (runs before banned_tokens, and the sampler edits first)" in lines["temperature"]
    assert "fused sampler" in lines["banned_tokens"]
    assert "fused sampler" in lines["top_k"]
    lines = explained(quiet(LogitBias({3: 1.0}), TopK(3), BannedTokens([1]), Temperature(0.7)))
    assert "torch (runs before banned_tokens, and the sampler truncates last)" in lines["top_k"]
    assert "torch (runs before top_k, which the sampler cannot follow)" in lines["logit_bias"]
    lines = explained(quiet(Cap(2.0), RepetitionPenalty(1.2), Cap(1.0), BannedTokens([1])))
    assert "fused sampler; torch on CUDA (it has no device function)" in lines["Cap"]
    first = quiet(Cap(2.0), RepetitionPenalty(1.2)).explain().splitlines()[3]
    assert "torch (runs before repetition_penalty, and the sampler edits listed tokens first)" in first
    lines = explained(quiet(Mirostat(2), TopK(3)))
    assert "torch (runs before top_k, and remembers what it left itself)" in lines["mirostat"]
    assert "version 1 fits the most probable tokens" in explained(quiet(Mirostat(1)))["mirostat"]
    assert "fused sampler" in explained(quiet(Mirostat(2)))["mirostat"]
    assert "torch (opaque)" in explained(quiet(lambda logits, context: logits))["<lambda>"]
    assert "neither sparse, a mask, nor pointwise" in explained(quiet(Smoothing(0.2)))["smoothing"]


def test_a_temperature_with_an_edit_of_its_own_runs_in_torch():
    class Squared(Temperature):
        def edit(self, logits, context):
            return super().edit(super().edit(logits, context), context)

    pipeline = Pipeline([Squared(0.5), TopK(3)])
    assert "torch (it is neither sparse, a mask, nor pointwise)" in explained(pipeline)["Squared"]
    rows, x, ctx = pipeline.bind([None] * 4, [[]] * 4, vocab_size=VOCAB), noise(4), context(4)
    assert rows.sample(x, ctx).tokens.tolist() == unfused(rows, x, ctx)[0].tolist()
    assert torch.equal(rows.apply(x, ctx).amax(-1), x.amax(-1) / 0.25)


def test_tail_free_sampling_is_fused_where_each_of_its_rows_has_a_short_top_k():
    """The rows that it is on for count, and no others; the tokens are those of every rule by itself."""
    free = SamplingParams(temperature=1.2, tfs=0.8)
    short, long, plain = free.replace(top_k=20), free.replace(top_k=257), free.replace(tfs=1.0, top_k=280)
    for others, fused in (
        ((plain, plain.replace(top_k=0)), True),
        ((plain, free), False),
        ((plain, long), False),
    ):
        params = short, *others, short.replace(top_k=3)
        rows, x, ctx = bind(params), noise(4), context(4)
        names = {rows.members[i].processor.name for i in rows.plan().unfused}
        assert ("tfs" in names) is not fused
        assert rows.sample(x, ctx).tokens.tolist() == unfused(rows, x, ctx)[0].tolist()


def test_explain_of_a_whole_pipeline_judges_each_member_alone():
    text = Pipeline.default().explain()
    assert "told for each alone" in text
    torch_only = {name for name, line in explained(Pipeline.default()).items() if "torch (" in line}
    assert torch_only == {"smoothing", "tfs", "adaptive_p", "watermarking_config"}


def test_the_same_processor_twice_is_an_error():
    rule_of_one = TopK(1)
    with pytest.raises(ParameterError, match="twice"):
        Pipeline([rule_of_one, rule_of_one])


def test_a_pipeline_has_no_hidden_member():
    assert [type(processor) for processor in Pipeline.default()] == list(DEFAULT_ORDER)
    rows = bind([SamplingParams(temperature=1.0)])
    assert rows.active() == []


class MemoryMachine(RuleBasedStateMachine):
    """Random programs of steps from arbitrary older rows, forks and reorderings, against replay
    from the start.
    """

    params = SamplingParams(
        temperature=1.0, mirostat=2, mirostat_tau=1.0, mirostat_eta=0.4, repetition_penalty=1.4,
        frequency_penalty=0.3, dry_multiplier=0.5, dry_allowed_length=1, adaptive_target=0.2,
    )  # fmt: skip

    @initialize()
    def begin(self):
        self.pipeline = Pipeline([rule() for rule in DEFAULT_ORDER], name="machine")
        self.values = [(self.start(1), [[]])]  # (rows, tokens of every row)

    def start(self, count):
        return self.pipeline.bind([self.params] * count, [PROMPT] * count, vocab_size=16)

    def step(self, rows, tokens, chosen):
        width = len(PROMPT) + max(map(len, tokens))
        texts = [PROMPT + row for row in tokens]
        ctx = Context(
            tokens=torch.tensor([text + [-1] * (width - len(text)) for text in texts]) % 16,
            lengths=torch.tensor([len(text) for text in texts]),
            prompt_lengths=torch.full((len(texts),), len(PROMPT)),
            seeds=torch.ones(len(texts), dtype=torch.int64),
            streams=torch.zeros(len(texts), dtype=torch.int64),
        )
        x = torch.stack([noise(1, seed=sum(row) * 31 + len(row), vocab=16)[0] for row in tokens])
        processed = rows.apply(x, ctx)
        return processed, rows.accept(torch.tensor(chosen), ctx)

    @rule(data=st.data())
    def extend(self, data):
        rows, tokens = data.draw(st.sampled_from(self.values))
        chosen = data.draw(st.lists(st.integers(0, 15), min_size=len(tokens), max_size=len(tokens)))
        _, after = self.step(rows, tokens, chosen)
        self.values.append((after, [[*row, token] for row, token in zip(tokens, chosen, strict=True)]))

    @rule(data=st.data())
    def choose(self, data):
        rows, tokens = data.draw(st.sampled_from(self.values))
        index = data.draw(st.lists(st.integers(0, len(tokens) - 1), min_size=1, max_size=3))
        self.values.append((rows.select(index), [tokens[i] for i in index]))

    @precondition(lambda self: len(self.values) > 1)
    @invariant()
    def newest_equals_replay(self):
        rows, tokens = self.values[-1]
        processed, _ = self.step(rows, tokens, [0] * len(tokens))
        for i, row in enumerate(tokens):
            replayed = self.start(1)
            for place, token in enumerate(row):
                _, replayed = self.step(replayed, [row[:place]], [token])
            alone, _ = self.step(replayed, [row], [0])
            assert torch.equal(processed[i], alone[0])


MemoryMachine.TestCase.settings = settings(max_examples=15, stateful_step_count=12)
TestMemory = MemoryMachine.TestCase


def test_greedy_rows_of_llamacpp_run_typical_although_other_rows_fuse_it():
    """By hand: of (.4, .2, .2, .2), the tokens of .2 are nearer to the entropy, so typical drops the best one."""
    greedy = SamplingParams(typical_p=0.5, profile="llamacpp")
    row = torch.tensor([[0.4, 0.2, 0.2, 0.2]]).log().expand(2, -1)
    rows = bind([greedy, greedy.replace(temperature=1.0)], vocab=4)
    assert [rows.members[i].processor.name for i in rows.plan().unfused] == ["typical"]
    assert rows.sample(row, context(2)).tokens[0] == 1
    rows = bind([greedy.replace(temperature=1.0)] * 2, vocab=4)
    assert rows.plan().unfused == []
    assert (rows.sample(row, context(2)).tokens > 0).all()


def test_a_request_has_its_own_order_beside_others_in_one_batch(engine):
    settings = {"temperature": 3.0, "top_p": 0.6, "seed": 5, "max_new_tokens": 8, "logprobs": 1}
    before = {"order": ["temperature", "top_p"]}
    after = {"order": ["top_p", "temperature"]}
    hot, cut = engine.generate([[1, 2, 3]] * 2, [SamplingParams(**settings, **o) for o in (before, after)])
    for found, order in ((hot, before), (cut, after)):
        pipeline = Pipeline(
            [{"temperature": Temperature, "top_p": TopP}[name]() for name in order["order"]], name="mine"
        )
        other = Engine(engine.model, pipeline=pipeline)
        assert other.generate([1, 2, 3], **settings).logprobs == pytest.approx(found.logprobs, abs=1e-5)
    assert hot.logprobs != cut.logprobs


def test_an_order_that_cannot_be_honoured_is_an_error(engine):
    with pytest.raises(ParameterError, match=r"has no 'topp'; it has logit_bias, .*top_p"):
        engine.generate([1], order=["topp"])
    with pytest.raises(ParameterError, match=r"top_k=5 has no effect: .*'default, reordered'"):
        engine.generate([1], order=["top_p"], top_k=5)
    for order in itertools.permutations(("dry", "xtc", "top_a", "eta", "top_k")):
        engine.requests([1], order=order)
    assert len(engine.pipeline.profiles) == 64
