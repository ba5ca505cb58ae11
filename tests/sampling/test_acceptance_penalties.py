"""Penalties, masks and reported numbers against counts made by hand (Python's Counter, float64 sums).

Penalties exist twice: as processors of a pipeline, over a history, and as `SparseEdits` of the sampling
kernels, over listed ids. Both are held to the same oracle.
"""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from sampling_rows import edits, generator, key

from handloom import Pipeline, SamplingParams
from handloom.kernels.sampling import rules
from handloom.kernels.sampling.reference import apply_edits
from handloom.kernels.sampling.sample import sample, sample_reference
from handloom.pipeline.pipeline import Context

VOCAB = 40
PATHS = {
    "reference": lambda x, **call: sample_reference(rules.Call(x, **call)),
    "cpu": lambda x, **call: sample(x, kernels="torch", **call),
}
either = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


def texts(count, seed=0):
    """Prompts and outputs of different lengths: repeats, cells without a token (-1), ids beyond the vocabulary."""
    g = generator(seed)
    found = []
    for row in range(count):
        prompt = torch.randint(0, 9, (1 + row % 7,), generator=g).tolist()
        output = torch.randint(4, 13, (row % 6,), generator=g).tolist()
        if row % 3 == 1:
            prompt[0] = -1
        if row % 4 == 2:
            prompt[-1] = VOCAB + 3
        found.append((prompt, output))
    return found


def context(pairs):
    histories = [prompt + output for prompt, output in pairs]
    width = max(map(len, histories))
    zeros = torch.zeros(len(pairs), dtype=torch.int64)
    return Context(
        tokens=torch.tensor([h + [-1] * (width - len(h)) for h in histories]),
        lengths=torch.tensor([len(h) for h in histories]),
        prompt_lengths=torch.tensor([len(prompt) for prompt, _ in pairs]),
        seeds=zeros,
        streams=zeros,
    )


def scoped(prompt, output, scope, window):
    """The tokens that count: a scope of the text, its last `window` cells if there is a window."""
    text = prompt + output
    start = len(prompt) if scope == "output" else 0
    end = len(prompt) if scope == "prompt" else len(text)
    start = max(start, len(text) - window) if window else start
    return Counter(token for token in text[start:end] if 0 <= token < VOCAB)


def penalised(x, prompt, output, params):
    """Logits [V] float64 after repetition, presence and frequency penalty."""
    x, scope = x.double().clone(), params.penalty_scope
    counts = scoped(prompt, output, "all" if scope == "auto" else scope, params.penalty_window)
    for token in counts:
        r = params.repetition_penalty
        x[token] = x[token] * r if x[token] < 0 else x[token] / r
    counts = scoped(prompt, output, "output" if scope == "auto" else scope, params.penalty_window)
    for token, count in counts.items():
        x[token] -= params.presence_penalty + params.frequency_penalty * count
    return x


STRENGTHS = [(1.5, 0.0, 0.0), (0.8, 0.0, 0.0), (1.0, 0.7, 0.0), (1.0, 0.0, -0.4), (1.3, -0.5, 0.6)]


@pytest.mark.parametrize("scope", ["auto", "prompt", "output", "all"])
def test_processors_equal_the_counts_in_every_scope_and_window(scope):
    """Every strength and window of the scope, one a row, in one batch."""
    combinations = list(itertools.product(STRENGTHS, (0, 1, 3, 100)))
    pairs = texts(len(combinations))
    requests = [
        SamplingParams(
            temperature=1,
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
            penalty_scope=scope,
            penalty_window=window,
        )
        for (repetition, presence, frequency), window in combinations
    ]
    x = torch.randn(len(pairs), VOCAB, generator=generator(1)) * 3
    x[::3, 5] = -math.inf
    x[1::3, 6] = -0.0
    rows = Pipeline.default().bind(requests, [prompt for prompt, _ in pairs], vocab_size=VOCAB)
    result = rows.apply(x, context(pairs))
    for row, (prompt, output) in enumerate(pairs):
        expected = penalised(x[row], prompt, output, requests[row])
        assert not result[row].isnan().any()
        torch.testing.assert_close(result[row].double(), expected, rtol=1e-6, atol=1e-6)
        touched = sorted({token for token in prompt + output if 0 <= token < VOCAB})
        others = torch.ones(VOCAB, dtype=torch.bool)
        others[touched] = False
        assert torch.equal(result[row][others].view(torch.int32), x[row][others].view(torch.int32))


def test_sparse_edits_equal_the_counts():
    """`count_tokens` and the kernels' penalties, windows of both kinds different, pads and foreign ids in it."""
    pairs = texts(24, seed=5)
    step = context(pairs)
    starts, ends = (torch.zeros_like(step.lengths), step.prompt_lengths), (step.lengths, step.lengths)
    ids, seen, counts = rules.count_tokens(step.tokens, starts, ends)
    g = generator(6)
    repetition, presence, frequency = (
        torch.tensor(values)[torch.randint(3, (24,), generator=g)]
        for values in ((1.0, 1.4, 0.8), (0.0, 0.6, -0.3), (0.0, 0.5, -0.7))
    )
    listed = ids.clamp(max=VOCAB)  # the bitmap covers the vocabulary; a foreign id has no bit to set
    touched = rules.touched_bits(torch.where(listed < VOCAB, listed, -1), VOCAB)
    given = rules.SparseEdits(
        ids, torch.zeros(ids.shape), seen, counts, repetition, presence, frequency, touched
    )
    x = torch.randn(24, VOCAB, generator=g) * 3
    x[4, :3] = -math.inf
    result = apply_edits(x, edits=given)
    for row, (prompt, output) in enumerate(pairs):
        text = prompt + output
        listed = {
            t: (s, c)
            for t, s, c in zip(*(v[row].tolist() for v in (ids, seen, counts)), strict=True)
            if t >= 0
        }
        everything, produced = Counter(text), Counter(output)
        everything.pop(-1, None)
        assert listed == {token: (n, produced[token]) for token, n in everything.items()}
        params = SamplingParams(
            repetition_penalty=repetition[row].item(),
            presence_penalty=presence[row].item(),
            frequency_penalty=frequency[row].item(),
        )
        expected = penalised(x[row], prompt, output, params)
        torch.testing.assert_close(result[row].double(), expected, rtol=1e-6, atol=1e-6)


def test_off_penalties_change_no_bit():
    pairs = texts(6)
    x = torch.randn(6, VOCAB, generator=generator(2))
    x[0, 3], x[1, 4] = -0.0, -math.inf
    off = [SamplingParams(temperature=1, repetition_penalty=1.0)] * 6
    rows = Pipeline.default().bind(off, [prompt for prompt, _ in pairs], vocab_size=VOCAB)
    assert rows.apply(x, context(pairs)) is x
    given = edits(6, VOCAB)
    one = torch.ones(6)
    given = given._replace(
        bias=torch.zeros(given.ids.shape), repetition=one, presence=one * 0, frequency=one * 0
    )
    assert torch.equal(apply_edits(x, edits=given), x)


def test_step_by_step_equals_starting_anew():
    """Penalties, DRY and n-grams along a growing text are those of a request whose text was always this long."""
    params = SamplingParams(
        temperature=1,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.2,
        penalty_window=6,
        dry_multiplier=0.7,
        dry_allowed_length=1,
        no_repeat_ngram_size=4,
    )
    g = generator(7)
    prompts = [[3, 5, 3, 5], [1], [2, -1, 2]]
    outputs = torch.randint(2, 6, (3, 12), generator=g)
    rows = Pipeline.default().bind([params] * 3, prompts, vocab_size=VOCAB)
    changed = 0
    for length in range(12):
        pairs = [(prompt, outputs[i, :length].tolist()) for i, prompt in enumerate(prompts)]
        x, step = torch.randn(3, VOCAB, generator=g), context(pairs)
        walked = rows.apply(x, step)
        anew = Pipeline.default().bind([params] * 3, prompts, vocab_size=VOCAB).apply(x, context(pairs))
        assert torch.equal(walked, anew)
        changed += int((walked != x).sum())
        rows = rows.accept(outputs[:, length], step)
    assert changed > 100


def test_excluded_and_infinite_tokens_pass_through_penalties():
    """No inf - inf: -inf stays, +inf stays the largest, and a NaN stays in its row."""
    x = torch.zeros(3, VOCAB)
    x[0, 3], x[1, 3], x[2, 4] = -math.inf, math.inf, math.nan
    request = SamplingParams(
        temperature=1, repetition_penalty=2.0, presence_penalty=3.0, frequency_penalty=-1.0
    )
    pairs = [([3], [3, 4])] * 3
    rows = Pipeline.default().bind([request] * 3, [[3]] * 3, vocab_size=VOCAB)
    result = rows.apply(x, context(pairs))
    assert result[0, 3] == -math.inf
    assert result[1].argmax() == 3
    assert not result[:2].isnan().any()
    assert result[:2, 4].tolist() == [-2.0, -2.0]


# Masks


@either
@pytest.mark.parametrize("vocab", [31, 32, 33, 64, 95])
def test_tail_bits_of_the_last_word_mean_nothing(path, vocab):
    g = generator(vocab)
    allowed = torch.rand(5, vocab, generator=g) < 0.6
    allowed[:, 0] = True
    x = torch.randn(5, vocab, generator=g)
    packed = rules.pack_mask(allowed)
    tail = -(1 << (vocab % 32)) if vocab % 32 else 0
    call = {"logprobs": True, **key(5)}
    clean, dirty, none = (
        path(x, bitmask=mask, **call)
        for mask in (packed, with_tail(packed, tail), with_tail(packed, ~tail, keep=True))
    )
    hidden = path(torch.where(allowed, x, -math.inf), **call)
    for drawn in (clean, dirty, none):
        assert torch.equal(drawn.tokens, hidden.tokens)
        assert torch.equal(drawn.kept, allowed.sum(dim=1))


def with_tail(packed, bits, keep=False):
    """The last word with bits set, or (keep) with all others cleared."""
    packed = packed.clone()
    if keep:
        packed[:, -1] &= bits
    else:
        packed[:, -1] |= bits
    return packed


# Reported numbers


@either
def test_reported_numbers_are_those_of_the_distributions(path):
    """Log-probabilities raw and processed, entropy, rank and kept count of the drawn token, to 1e-5."""
    rows, vocab = 48, 200
    g = generator(9)
    x = torch.randn(rows, vocab, generator=g) * torch.tensor([1.0, 4.0, 0.2]).repeat(16)[:, None]
    x[::5] = x[::5].round()
    temperature = torch.tensor([0.0, 0.7, 1.0, 2.0]).repeat(12)
    k = torch.tensor([0, 5, 20]).repeat(16)
    given = edits(rows, vocab)
    drawn = path(x, temperature=temperature, rules=(rules.top_k(k),), edits=given, logprobs=True, **key(rows))
    edited = apply_edits(x, edits=given).double()
    scaled = edited / torch.where(temperature > 0, temperature, 1.0).double()[:, None]
    for row in range(rows):
        token, own = int(drawn.tokens[row]), scaled[row]
        kept = own > -math.inf
        if temperature[row] > 0 and k[row] > 0:
            kept &= own.float() >= own.float().sort(descending=True).values[k[row] - 1]
        law = own.masked_fill(~kept, -math.inf).log_softmax(0)
        finite = law[law > -math.inf]
        expected = {
            "raw_logprob": x[row].double().log_softmax(0)[token].item(),
            "logprob": law[token].item(),
            "entropy": -(finite.exp() * finite).sum().item(),
        }
        for name, value in expected.items():
            assert getattr(drawn, name)[row].item() == pytest.approx(value, abs=1e-5, rel=1e-5), (row, name)
        assert drawn.kept[row] == kept.sum()
        assert drawn.rank[row] == 1 + (own.float() > own.float()[token]).sum()


@either
def test_rank_of_a_tie_is_that_of_its_group(path):
    """Tokens of one logit share the rank 1 + number above: of 3 3 1 1 1 0 they are 1 1 3 3 3 6."""
    x = torch.tensor([[3.0, 3.0, 1.0, 1.0, 1.0, 0.0]]).expand(400, -1)
    drawn = path(x, seeds=torch.full((400,), 2), positions=torch.arange(400), logprobs=True)
    assert set(zip(drawn.tokens.tolist(), drawn.rank.tolist(), strict=True)) == {
        *((0, 1), (1, 1)),
        *((2, 3), (3, 3), (4, 3)),
        (5, 6),
    }


@either
@pytest.mark.parametrize("n_top", [1, 2, 7, 50])
def test_the_most_probable_tokens_come_in_a_stable_order(path, n_top):
    """Of equal logits the lowest id comes first; raw log-probabilities, whatever the edits."""
    g = generator(n_top)
    x = (torch.randn(12, 50, generator=g) * 2).round()
    x[3, 10:] = -math.inf
    given = edits(12, 50)
    drawn = path(x, n_top=n_top, edits=given, **key(12))
    order = np.argsort(-x.double().numpy(), axis=1, kind="stable")[:, :n_top]
    assert (drawn.top_ids.numpy() == order).all()
    expected = x.double().log_softmax(dim=1).gather(1, torch.from_numpy(order))
    torch.testing.assert_close(drawn.top_logprobs.double(), expected, rtol=1e-5, atol=1e-5)
