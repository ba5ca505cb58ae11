"""Edits in the fused sampler: the tokens of one rule after the other, in any order, and what explain() says of it."""

import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES
from edit_programs import EOS, Program, compare, request
from hypothesis import given, settings
from hypothesis import strategies as st

from handloom import Engine, SamplingParams
from handloom.kernels.sampling.reference import apply_edits
from handloom.pipeline import drawing
from handloom.pipeline.members import unfused_alone
from handloom.pipeline.pipeline import Context, Pipeline
from handloom.pipeline.processors import (
    DEFAULT_ORDER,
    BannedTokens,
    ExponentialDecay,
    LogitBias,
    Mirostat,
    RepetitionPenalty,
    SequenceBias,
    Temperature,
    TopK,
)

VOCAB = 150


def fused_everywhere(monkeypatch):
    """Let a CPU build the edits of the sampler too, as a device does."""
    monkeypatch.setattr(drawing, "implementation", lambda device: None)


def check(program, moves):
    """Run a program; returns the names of the fused members of all its steps."""
    names = []
    for drawn, tokens, logprobs, members in program.run(moves):
        difference = compare(drawn, tokens, logprobs)
        assert not difference, f"{members}: {difference}"
        names += [name for name in members.split() if not name.startswith("[")]
    return names


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(0, 2**32))
def test_programs_on_the_cpu(seed):
    check(Program(random.Random(seed), VOCAB), 6)


@pytest.mark.parametrize("seed", range(60))
def test_programs_with_the_sampler_making_the_edits(seed, monkeypatch):
    fused_everywhere(monkeypatch)
    check(Program(random.Random(seed), VOCAB), 6)


def test_the_programs_fuse_every_member_that_can_be(monkeypatch):
    """Otherwise the tests above would compare nothing."""
    fused_everywhere(monkeypatch)
    seen = Counter(name for seed in range(100, 140) for name in check(Program(random.Random(seed), VOCAB), 4))
    fusable = {rule.name for rule in DEFAULT_ORDER if not unfused_alone(rule())} | {
        "Cheer",
        "EvenOnly",
        "Cap",
    }
    assert (fusable | {"bitmask"}) - {"prefix_fn", "epsilon", "eta", "top_a"} == set(seen)
    assert min(seen.values()) >= 5


@pytest.mark.slow
def test_programs_in_the_kernels():
    """Twelve programs, in a process of its own, because a stray pointer in the interpreter ends the process."""
    pytest.importorskip("triton")
    program = Path(__file__).resolve().parents[1] / "support" / "sampling" / "interpreted_edits.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, program, "12"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "0 failures" in done.stdout


REQUESTS = [
    SamplingParams(temperature=1.0, repetition_penalty=1.4, presence_penalty=0.5, penalty_window=6, top_k=20),
    SamplingParams(
        temperature=0.9, logit_bias={5: 2.0, 9: -3.0}, banned_tokens=(3, 4), frequency_penalty=0.4
    ),
    SamplingParams(temperature=1.2, mirostat=2, mirostat_tau=2.0, no_repeat_ngram_size=2, min_new_tokens=4),
    SamplingParams(temperature=1.0, forced_tokens={1: 6, 3: 8}, allowed_tokens=tuple(range(40)), top_p=0.9),
    SamplingParams(dry_multiplier=0.9, dry_allowed_length=1, suppress_first=(1, 2), repetition_penalty=1.2),
    SamplingParams(
        temperature=1.0, sequence_bias={(7,): 2.0, (7, 8): 3.0}, bad_words=[(5, 6), (11,)], p_less="norm"
    ),
]


@pytest.mark.parametrize("everywhere", [False, True])
def test_the_device_program_equals_the_eager_step(everywhere, monkeypatch):
    if everywhere:
        fused_everywhere(monkeypatch)
    model = ARCHITECTURES["llama"]()
    prompts = [[3, 5, 7, 9, 11], [1] * 7, [4], [2, 3] * 5, [9, 8, 7, 9, 8], [5] * 3]
    params = [request.replace(seed=i, max_new_tokens=8 + i) for i, request in enumerate(REQUESTS)]
    eager, program = (
        Engine(model, graph=graph, slots=3, block_size=4).generate(prompts, params) for graph in (False, True)
    )
    for one, other in zip(eager, program, strict=True):
        assert one.token_ids == other.token_ids
        assert other.logprobs == pytest.approx(one.logprobs, abs=1e-5)
        assert other.raw_logprobs == pytest.approx(one.raw_logprobs, abs=1e-5)


def of_profile(profile, rng):
    """A random request of what a profile has."""
    alone = SamplingParams(profile=profile)
    chain = Pipeline.default().for_params(alone)
    read = {
        field for rule in chain for field in rule.fields if field not in getattr(rule, "gives_way_to", ())
    }
    given = request(rng, VOCAB, fusable=rng.random() < 0.9).to_dict()
    return alone.replace(**{name: value for name, value in given.items() if name in read})


@pytest.mark.parametrize("profile", ["hf", "vllm", "llamacpp", "textgen"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_profiles_keep_their_order(profile, everywhere, monkeypatch):
    """Random requests beside one that is greedy and one that samples and uses nothing else."""
    if everywhere:
        fused_everywhere(monkeypatch)
    plain = [SamplingParams(profile=profile), SamplingParams(profile=profile, temperature=1.0)]
    fused = []
    for seed in range(
        4, 16
    ):  # llama.cpp's temperature comes last, so few of its programs fuse more: the 15th does
        rng = random.Random(seed)
        requests = [*plain, *(of_profile(profile, rng) for _ in range(3))]
        program = Program(rng, VOCAB, rows=5, chain=Pipeline.default(), requests=requests)
        fused += check(program, 4)
    assert len(set(fused)) >= 4


@torch.no_grad()
def test_no_operation_of_the_edits_reads_a_value_back():
    """On the meta device there are no values: whatever asks for one raises."""
    rows = Pipeline.default().bind(
        REQUESTS, [[1, 2, 3]] * len(REQUESTS), vocab_size=VOCAB, eos_token_ids={EOS}
    )
    rows.site.device = torch.device("meta")
    rows._greedy_tensor = None
    for member in rows.members:
        member.values = None
        if member.memory is not None:
            member.memory = {name: tensor.to("meta") for name, tensor in member.memory.items()}
    plan = rows.plan()
    assert len(plan.edits) == 13
    assert not plan.unfused

    def empty(*shape):
        return torch.zeros(*shape, dtype=torch.int64, device="meta")

    context = Context(empty(6, 20), empty(6), empty(6), empty(6), empty(6))
    drawn = rows.sample(torch.zeros(6, VOCAB, device="meta"), context)
    rows.accept(drawn.tokens, context, every_row=True)
    assert drawn.tokens.device.type == "meta"


def test_bad_rows_have_nan_and_disturb_nobody(monkeypatch):
    """NaN in a listed token, in one that is banned, and elsewhere; nothing left."""
    x = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(3))
    bad = x.clone()
    bad[0, 9], bad[1, 3], bad[2, 77], bad[3] = math.nan, math.nan, math.nan, -math.inf
    for everywhere in (False, True):
        if everywhere:
            fused_everywhere(monkeypatch)
        rows = Pipeline.default().bind([REQUESTS[1]] * 5, [[1, 9]] * 5, vocab_size=VOCAB)
        texts = torch.tensor([[1, 9]] * 5)
        context = Context(
            texts, *(torch.full((5,), 2) for _ in range(2)), torch.arange(5), torch.zeros(5).long()
        )
        good, drawn = rows.sample(x, context), rows.sample(bad, context)
        assert drawn.raw_logprobs.isnan().tolist() == [True] * 4 + [False]
        assert drawn.logprobs[[0, 2, 3]].isnan().all()
        assert drawn.tokens[4] == good.tokens[4]
        assert ((drawn.tokens >= 0) & (drawn.tokens < VOCAB)).all()


def test_edits_of_rows_with_and_without_a_text():
    """By hand: a bias twice on one token, a ban of a token that a penalty changes, a forced token that is banned."""
    chain = Pipeline(
        [LogitBias({1: 1.0, 2: 4.0}), RepetitionPenalty(2.0), BannedTokens((3,)), SequenceBias({(1,): 0.5})],
        name="by hand",
    )
    rows = chain.bind([None] * 2, [[], []], vocab_size=5)
    x = torch.tensor([[1.0, 2.0, -3.0, 3.0, -1.0], [1.0, 2.0, -3.0, 3.0, -1.0]])
    texts = torch.tensor([[1, 3, 1, 4], [-1, -1, -1, -1]])
    lengths = torch.tensor([4, 0])
    edits = rows.edits(x, Context(texts, lengths, torch.zeros(2).long()))
    want = [[1.0, 2.0, 1.0, -math.inf, -2.0], [1.0, 3.5, 1.0, -math.inf, -1.0]]
    assert apply_edits(x, **edits.arguments()).tolist() == want
    assert edits.at(torch.tensor([3, 1])).tolist() == [-math.inf, 3.5]
    assert edits.at(torch.tensor([4, 3])).tolist() == [-2.0, -math.inf]
    listed = [sorted(i for i in row if i >= 0) for row in edits.sparse.ids.tolist()]
    assert listed == [[1, 2, 3, 4], [1, 2]]  # each once; the mask excludes 3 where no edit lists it


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("last", [Temperature(0.7), TopK(1)])
def test_mirostat_learns_from_any_token_as_its_own_apply_does(everywhere, last, monkeypatch):
    """The drawn token, one that was forced from outside, and one that is excluded, which teaches nothing."""
    if everywhere:
        fused_everywhere(monkeypatch)
    rules = [LogitBias({9: 2.0}), BannedTokens((3,)), RepetitionPenalty(1.5)]
    after = [last, Mirostat(2, 1.5, 0.4)] if isinstance(last, Temperature) else [Mirostat(2, 1.5, 0.4), last]
    rows = Pipeline([*rules, *after], name="mirostat").bind([None] * 4, [[1, 9]] * 4, vocab_size=VOCAB)
    x = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(3)) * 2

    def context():
        lengths = torch.full((4,), 2)
        return Context(torch.tensor([[1, 9]] * 4), lengths, lengths, torch.arange(4), torch.zeros(4).long())

    fused, plain = context(), context()
    drawn = rows.sample(x, fused)
    rows.one_by_one(x, plain)
    committed = torch.cat([drawn.tokens[:1], torch.tensor([9, 100, 3])])
    got, want = (
        r.members[-1 if isinstance(last, Temperature) else -2].memory["mu"]
        for r in (rows.accept(committed, fused), rows.accept(committed, plain))
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert want[3] == 3.0
    assert len(set(want.tolist())) == 4


def test_an_edit_that_lists_nothing_changes_nothing():
    """No end token to raise, and no text to penalise."""
    rows = Pipeline(
        [ExponentialDecay((0, 2.0)), RepetitionPenalty(2.0), BannedTokens((1,))], name="nothing"
    ).bind([None], [[]], vocab_size=3)
    x, one = torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(1).long()
    empty = Context(torch.zeros(1, 0).long(), 0 * one, 0 * one)
    edits = rows.edits(x, empty)
    assert edits.sparse is None
    assert apply_edits(x, **edits.arguments()).tolist() == [[1.0, -math.inf, 3.0]]
    edits = rows.edits(x, Context(torch.tensor([[2]]), one, 0 * one))
    assert apply_edits(x, **edits.arguments()).tolist() == [[1.0, -math.inf, 1.5]]
