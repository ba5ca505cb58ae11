"""What a row's result may not depend on: its place, the batch, its neighbours, memory, and the process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sampling_rows import edits, generator, key

from handloom import Pipeline, SamplingParams
from handloom.kernels.sampling import rules
from handloom.kernels.sampling.draw import draw, draw_reference
from handloom.kernels.sampling.sample import sample, sample_reference
from handloom.pipeline.pipeline import Context

VOCAB = 300
BATCH = 64
PATHS = {
    "reference": lambda x, **call: sample_reference(rules.Call(x, **call)),
    "cpu": lambda x, **call: sample(x, kernels="torch", **call),
}
either = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def batch_of(rows=BATCH, vocab=VOCAB):
    """Rows of several kinds and everything that a call takes, one value a row."""
    g = generator(rows)
    x = torch.randn(rows, vocab, generator=g) * torch.tensor([0.5, 2.0, 5.0, 3e3]).repeat(rows // 4)[:, None]
    x[1::8] = (x[1::8] * 2).round()
    x[2::8, ::3] = -torch.inf

    def pick(*values):
        return torch.tensor(values)[torch.randint(len(values), (rows,), generator=g)]

    chain = (rules.top_k(pick(0, 1, 20, 50)), rules.top_p(pick(0.5, 0.9, 1.0)), rules.min_p(pick(0.0, 0.1)))
    return x, {
        **key(rows),
        "temperature": pick(0.0, 0.7, 1.0, 2.0),
        "rules": chain,
        "edits": edits(rows, vocab),
        "bitmask": rules.pack_mask(torch.rand(rows, vocab, generator=g) < 0.9),
    }


def rows_of(value, index):
    """The same rows of everything in a call."""
    if isinstance(value, torch.Tensor):
        return value[index]
    if isinstance(value, dict):
        return {name: rows_of(part, index) for name, part in value.items()}
    if isinstance(value, rules.Rule):
        return value._replace(parameter=value.parameter[index])
    if hasattr(value, "_fields"):
        return type(value)(*(part[index] for part in value))
    return tuple(rows_of(part, index) for part in value)


def bits(drawn):
    """Tokens, kept counts, ranks and the bits of the float fields, NaN included."""
    fields = [part for part in drawn if part is not None]
    return [part.view(torch.int32) if part.dtype == torch.float32 else part for part in fields]


def assert_same(drawn, expected, index=slice(None)):
    for part, other in zip(bits(drawn), bits(expected), strict=True):
        assert torch.equal(part, other[index])


@either
def test_every_batch_size_gives_a_row_the_same_bits(path):
    x, call = batch_of()
    together = path(x, logprobs=True, n_top=3, **call)
    for size in (1, 2, 7, 8, 63):
        for start in range(0, BATCH, size):
            index = slice(start, min(start + size, BATCH))
            assert_same(path(x[index], logprobs=True, n_top=3, **rows_of(call, index)), together, index)


@either
def test_permuted_and_repeated_rows_give_the_same_bits(path):
    x, call = batch_of()
    together = path(x, logprobs=True, **call)
    for order in (
        torch.randperm(BATCH, generator=generator(1)),
        torch.arange(BATCH).flip(0),
        torch.full((9,), 5),
    ):
        assert_same(path(x[order], logprobs=True, **rows_of(call, order)), together, order)


@either
@pytest.mark.parametrize("filler", [torch.nan, -torch.inf, torch.inf, 0.0, 3e38])
def test_padding_rows_give_the_same_bits(path, filler):
    """Rows of nothing, of NaN or of anything else around the real ones."""
    x, call = batch_of()
    together = path(x, logprobs=True, **call)
    place = torch.arange(BATCH) * 2 + 1
    index = torch.zeros(2 * BATCH + 1, dtype=torch.int64)  # the others have row 0's parameters
    index[place] = torch.arange(BATCH)
    padded = torch.full((2 * BATCH + 1, VOCAB), filler)
    padded[place] = x
    drawn = path(padded, logprobs=True, **rows_of(call, index))
    for part, other in zip(bits(drawn), bits(together), strict=True):
        assert torch.equal(part[place], other)


@either
def test_what_the_memory_held_before_does_not_matter(path):
    """Cold and warm: the same call twice, and after calls of other shapes."""
    x, call = batch_of()
    first = path(x, logprobs=True, **call)
    path(torch.randn(3, 17, generator=generator(2)), **key(3))
    assert_same(path(x, logprobs=True, **call), first)


def test_a_larger_vocabulary_of_excluded_tokens_changes_no_token():
    """Noise belongs to a token id: padding the vocabulary, as models do, draws the same."""
    x, call = batch_of()
    call = {name: call[name] for name in ("seeds", "positions", "streams", "temperature", "rules")}
    expected = sample(x, kernels="torch", **call).tokens
    for more in (1, 3, 20, 5000):
        wide = torch.cat([x, torch.full((BATCH, more), -torch.inf)], dim=1)
        assert torch.equal(sample(wide, kernels="torch", **call).tokens, expected)


def test_an_excluded_token_changes_no_other_draw():
    """Removing a token that was not drawn leaves the draw as it is: its noise was nobody else's."""
    x = torch.randn(200, 50, generator=generator(3))
    before = draw(x, **key(200))
    loser = (before + 7) % 50
    after = draw(x.scatter(1, loser[:, None], -torch.inf), **key(200))
    assert torch.equal(before, after)


def test_positions_count_not_the_number_of_calls():
    """Drawing positions in any order, or one of them alone, gives what drawing them in a row gives."""
    x = torch.randn(1, 80, generator=generator(4)).expand(100, -1)
    seeds, positions = torch.full((100,), 9), torch.arange(100)
    expected = draw(x, seeds, positions)
    order = torch.randperm(100, generator=generator(5))
    assert torch.equal(draw(x, seeds, positions[order]), expected[order])
    assert draw(x[:1], seeds[:1], positions[60:61]) == expected[60]
    assert torch.equal(draw_reference(x, seeds, positions), expected)
    assert len(expected.unique()) > 20


HERE = Path(__file__).resolve().parent
PROGRAM = """
import json, sys
sys.path[:0] = sys.argv[1:]
import torch
from test_acceptance_invariance import PATHS, batch_of, pipeline_tokens
x, call = batch_of()
found = {name: path(x, logprobs=True, **call) for name, path in PATHS.items()}
answer = {name: [drawn.tokens.tolist(), drawn.logprob.view(torch.int32).tolist()] for name, drawn in found.items()}
print(json.dumps(answer | {"pipeline": pipeline_tokens()}))
"""


def pipeline_tokens(profile="default"):
    """Tokens of a batch of requests through `Pipeline`, as the loop draws them."""
    g = generator(12)
    requests = [
        SamplingParams(temperature=t, top_k=k, top_p=p, repetition_penalty=1.2, profile=profile)
        for t in (0.0, 0.8, 1.5)
        for k in (0, 7)
        for p in (1.0, 0.8)
    ]
    x = torch.randn(len(requests), 90, generator=g) * 2
    history = torch.randint(0, 90, (len(requests), 12), generator=g)
    rows = Pipeline.default().bind(requests, history[:, :8].tolist(), vocab_size=90)
    lengths = torch.full((len(requests),), 12)
    parts = key(len(requests))
    step = Context(
        tokens=history,
        lengths=lengths,
        prompt_lengths=lengths - 4,
        seeds=parts["seeds"],
        streams=parts["streams"],
    )
    return rows.sample(x, step).tokens.tolist()


def test_two_processes_draw_the_same():
    """Seeds, not the state of a process: another interpreter with another hash seed gives the same bits."""
    environment = os.environ | {"PYTHONHASHSEED": "123", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(HERE), str(HERE.parent / "support" / "sampling")]
    child = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    there = json.loads(child.stdout)
    x, call = batch_of()
    for name, path in PATHS.items():
        drawn = path(x, logprobs=True, **call)
        assert there[name] == [drawn.tokens.tolist(), drawn.logprob.view(torch.int32).tolist()], name
    assert there["pipeline"] == pipeline_tokens()


def test_profiles_draw_with_the_same_noise():
    """Common random numbers: where a profile leaves the same distribution, it draws the same tokens."""
    assert pipeline_tokens("hf") == pipeline_tokens()
    assert pipeline_tokens("vllm") == pipeline_tokens()
    assert pipeline_tokens("textgen") == pipeline_tokens()
