"""Which tokens are kept: the torch reference and the CPU path against float64 stable sorts, row by row.

The oracle keeps two sets, `least` and `most`, which differ only in tokens that float32 cannot place: a token
whose cumulated probability is within EPS of p, or whose logit is within four float32 steps of the min-p limit.
A result must lie between the two; wherever they agree, and that is nearly everywhere, it must be equal. Every
rule keeps all tokens from some logit upwards, so two kept sets of one row are equal iff their sizes are: that
is how the CPU path, which returns the size alone, is held to the set.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from sampling_rows import generator, key

from handloom.kernels.sampling import rules
from handloom.kernels.sampling.reference import scale, truncate
from handloom.kernels.sampling.sample import sample, sample_reference

EPS = 1e-6  # share of the mass
FLOAT_MAX = np.finfo(np.float32).max
FINFO_MIN = {dtype: torch.finfo(dtype).min for dtype in (torch.float32, torch.bfloat16)}
KS = (0, -1, 1, 2, 50, "V-1", "V", "V+1", 2**31 - 1)
PS = (0.0, 1e-6, 0.1, 0.9, 0.999999, 1.0, 1.5)
MIN_PS = (0.0, 0.05, 1.0)
TEMPERATURES = (0.0, 1e-6, 0.001, 0.01, 1.0, 5.0, math.inf)
ORDERS = {"hf": ("k", "p", "min-p"), "vllm": ("min-p", "k", "p")}

KINDS = {
    "normal .5": lambda x: x * 0.5,
    "normal 1": lambda x: x,
    "normal 3": lambda x: x * 3,
    "normal 10": lambda x: x * 10,
    "zipf": lambda x: -1.2 * (x.argsort().argsort() + 1.0).log(),
    "outlier": lambda x: put(x, 1e4, len(x) // 2),
    "one-hot": lambda x: put(torch.zeros_like(x), 30.0, len(x) // 3),
    "equal": lambda x: torch.full_like(x, 0.7),
    "two levels": lambda x: (x > 0).float(),
    "bfloat16": lambda x: (x * 3).bfloat16().float(),
    "integers": lambda x: (x * 2).round(),
    "offset": lambda x: x + 3e4,
    "negative offset": lambda x: x - 3e4,
    "ascending": lambda x: (x * 2).sort().values,
    "descending": lambda x: (x * 2).sort(descending=True).values,
    "half -inf": lambda x: hidden(x, 0.5, -math.inf),
    "99 % -inf": lambda x: hidden(x, 0.99, -math.inf),
    "one left": lambda x: put(torch.full_like(x, -math.inf), -7.0, len(x) - 1),
    "half -1e4": lambda x: hidden(x, 0.5, -1e4),
    "half -1e9": lambda x: hidden(x, 0.5, -1e9),
    "half finfo.min": lambda x: hidden(x, 0.5, FINFO_MIN[torch.float32]),
    "half bfloat16 finfo.min": lambda x: hidden(x, 0.5, FINFO_MIN[torch.bfloat16]),
    "99 % finfo.min": lambda x: hidden(x, 0.99, FINFO_MIN[torch.float32]),
    "one +inf": lambda x: put(x, math.inf, 1 % len(x)),
    "many +inf": lambda x: hidden(x, 0.2, math.inf),
    "signed zeros": lambda x: torch.where(x > 0, 0.0, -0.0),
}


def put(x, value, place):
    x = x.clone()
    x[place] = value
    return x


def hidden(x, share, value):
    """x [V] with a share of its tokens, scattered, at `value`; one at least stays."""
    place = (torch.arange(len(x)) * 0.6180339887) % 1 < share
    place[0] = False
    return torch.where(place, value, x)


def row_of(kind, vocab, seed=0):
    return KINDS[kind](torch.randn(vocab, generator=generator(seed + vocab)))


def oracle(x, *, k, p, min_p, temperature, order):
    """(least, most): kept tokens of float32 rows [B, V], bool each; parameters are arrays [B]."""
    safe = np.where(temperature > 0, temperature, 1.0).astype(np.float32)[:, None]
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = np.clip(np.minimum(x, FLOAT_MAX) / safe, -FLOAT_MAX, FLOAT_MAX)
    scaled = np.where(x == -np.inf, -np.inf, scaled).astype(np.float64)
    result = []
    for slack in (-1.0, 1.0):
        kept = scaled > -np.inf
        for rule in order:
            if rule == "k":
                kept = kept & keep_count(scaled, kept, k)
            elif rule == "p":
                kept = kept & keep_mass(scaled, kept, p, p + slack * EPS)
            else:
                kept = kept & keep_ratio(scaled, min_p, slack)
        result.append(np.where((temperature > 0)[:, None], kept, scaled > -np.inf))
    return result


def keep_count(x, kept, k):
    """The k largest of the kept tokens and all ties of the last of them."""
    vocab = x.shape[1]
    ordered = np.sort(np.where(kept, x, -np.inf), axis=1, kind="stable")[:, ::-1]
    last = np.take_along_axis(ordered, np.clip(k, 1, vocab)[:, None] - 1, axis=1)
    return ((k <= 0) | (k >= vocab))[:, None] | (x >= last)


def keep_mass(x, kept, p, limit):
    """Tokens for which the share of all larger kept ones is below the limit, ties with the last one too."""
    x = np.where(kept, x, -np.inf)
    ordered = np.sort(x, axis=1, kind="stable")[:, ::-1]
    weights = np.exp(ordered - ordered[:, :1])
    share = weights / weights.sum(axis=1, keepdims=True)
    above = np.cumsum(share, axis=1) - share
    count = np.maximum((above < limit[:, None]).sum(axis=1), 1)
    last = np.take_along_axis(ordered, count[:, None] - 1, axis=1)
    return (p >= 1)[:, None] | (x >= last)


def keep_ratio(x, min_p, slack):
    """Tokens at least min_p times as probable as the likeliest; the limit moved by four steps of float32."""
    top = x.max(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        limit = top + np.log(np.minimum(min_p, 1.0))[:, None]
    size = np.maximum(np.abs(top), np.where(np.isfinite(limit), np.abs(limit), 0.0))
    band = 4 * np.spacing(np.minimum(size, FLOAT_MAX / 2).astype(np.float32)).astype(np.float64)
    limit = np.minimum(limit - slack * band, top)
    return (min_p <= 0)[:, None] | (x >= limit)


def chosen_rules(order, k, p, min_p):
    made = {
        "k": rules.top_k(torch.from_numpy(k)),
        "p": rules.top_p(torch.from_numpy(p).float()),
        "min-p": rules.min_p(torch.from_numpy(min_p).float()),
    }
    return tuple(made[rule] for rule in order)


def settings(vocab):
    """All combinations of the parameters, as arrays [B]."""
    ks = [eval_k(k, vocab) for k in KS]
    table = np.array(list(itertools.product(ks, PS, MIN_PS, TEMPERATURES)), dtype=np.float64)
    # what a rule is given is float32, and so is what the oracle takes
    p, min_p, temperature = (table[:, i].astype(np.float32).astype(np.float64) for i in (1, 2, 3))
    return {"k": table[:, 0].astype(np.int64), "p": p, "min_p": min_p, "temperature": temperature}


def eval_k(k, vocab):
    return k if isinstance(k, int) else vocab + {"V-1": -1, "V": 0, "V+1": 1}[k]


def check(x, given, order, *, least_exact):
    """Both paths against the oracle on rows x [B, V]; least_exact: share of rows where the set must be equal."""
    least, most = oracle(x.float().numpy(), order=order, **given)
    temperature = torch.from_numpy(given["temperature"]).float()
    chain = chosen_rules(order, given["k"], given["p"], given["min_p"])
    left = truncate(scale(x.float().clamp(max=float(FLOAT_MAX)), temperature), chain) > -torch.inf
    left = torch.where(temperature[:, None] > 0, left, x > -torch.inf).numpy()
    assert not (least & ~left).any(), describe(least & ~left, given)
    assert not (left & ~most).any(), describe(left & ~most, given)
    assert (least == most).all(axis=1).mean() >= least_exact
    parts = key(len(x), x.shape[1])
    drawn = sample(x, rules=chain, temperature=temperature, logprobs=True, kernels="torch", **parts)
    assert (drawn.kept.numpy() == left.sum(axis=1)).all(), describe(left, given)
    tokens = drawn.tokens.numpy()
    assert left[np.arange(len(x)), tokens].all()
    greedy = given["temperature"] == 0
    assert (tokens[greedy] == x.float().numpy()[greedy].argmax(axis=1)).all()
    reference = sample_reference(rules.Call(x, rules=chain, temperature=temperature, **parts))
    assert torch.equal(reference.tokens, drawn.tokens)


def describe(wrong, given):
    row = int(wrong.any(axis=1).argmax())
    return {name: values[row].item() for name, values in given.items()}, wrong[row].nonzero()[0][:10]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_kept_sets_of_all_parameters_together(kind, order):
    """9 x 7 x 3 x 7 settings, one a row of the batch."""
    vocab = 67
    given = settings(vocab)
    x = row_of(kind, vocab).expand(len(given["k"]), -1)
    check(x, given, ORDERS[order], least_exact=0.95)


def mixed(batch, vocab, seed):
    """Parameters that differ from row to row, greedy rows among them."""
    g = generator(seed)

    def pick(values):
        return np.array(values, dtype=np.float64)[torch.randint(len(values), (batch,), generator=g).numpy()]

    given = {
        "k": pick([eval_k(k, vocab) for k in KS]).astype(np.int64),
        "p": pick(PS),
        "min_p": pick(MIN_PS),
        "temperature": pick(TEMPERATURES),
    }
    return given | {n: given[n].astype(np.float32).astype(np.float64) for n in ("p", "min_p", "temperature")}


def laid_out(x, layout):
    """The same values in another memory layout."""
    batch, vocab = x.shape
    if layout == "padded":
        wide = torch.full((batch + 2, vocab + 37), torch.nan, dtype=x.dtype)
        wide[1:-1, 18 : 18 + vocab] = x
        return wide[1:-1, 18 : 18 + vocab]
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "every other row":
        return x.repeat_interleave(2, dim=0)[::2]
    return x


# A covering selection: every batch size, vocabulary, dtype and layout occurs, small ones against large ones.
SHAPES = [
    (0, 1000, torch.float32, "plain"),
    (1, 1, torch.float32, "plain"),
    (8, 1, torch.bfloat16, "padded"),
    (2, 2, torch.float16, "transposed"),
    (7, 31, torch.bfloat16, "every other row"),
    (1024, 31, torch.float32, "padded"),
    (256, 111, torch.float16, "padded"),
    (99, 1000, torch.bfloat16, "transposed"),
    (64, 1000, torch.float32, "every other row"),
    (63, 111, torch.float32, "transposed"),
]
LARGE_SHAPES = [
    (7, 32001, torch.bfloat16, "transposed"),
    (8, 50257, torch.float16, "every other row"),
    (1, 128256, torch.bfloat16, "plain"),
    (8, 151936, torch.float32, "transposed"),
    (2, 262144, torch.bfloat16, "padded"),
    (31, 32000, torch.bfloat16, "plain"),
]


@pytest.mark.parametrize(
    ("batch", "vocab", "dtype", "layout"),
    [*SHAPES, *(pytest.param(*shape, marks=pytest.mark.slow) for shape in LARGE_SHAPES)],
)
def test_kept_sets_of_all_shapes(batch, vocab, dtype, layout):
    """Kinds of rows and parameters change from row to row; half precision is read exactly."""
    kinds = list(KINDS)
    rows = [row_of(kinds[(i * 7 + vocab) % len(kinds)], vocab, seed=i) for i in range(batch)]
    x = torch.stack(rows) if rows else torch.empty(0, vocab)
    x = laid_out(x.to(dtype), layout)
    for seed, order in enumerate(ORDERS.values()):
        given = mixed(batch, vocab, seed)
        if batch:
            check(x, given, order, least_exact=0.7)
        else:
            chain = chosen_rules(order, given["k"], given["p"], given["min_p"])
            drawn = sample(x, rules=chain, temperature=torch.ones(0), logprobs=True, n_top=2, **key(0))
            assert (drawn.tokens.shape, drawn.kept.shape, drawn.top_ids.shape) == ((0,), (0,), (0, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_without_a_token_are_reported_in_every_dtype(dtype):
    x = torch.randn(6, 90, generator=generator(1)).to(dtype)
    x[0, 40] = torch.nan
    x[2] = torch.nan
    x[4] = -torch.inf
    given = mixed(6, 90, 3)
    given["temperature"][:] = [0.0, 1.0, 1.0, 0.0, 0.001, 5.0]
    chain = chosen_rules(ORDERS["hf"], given["k"], given["p"], given["min_p"])
    temperature = torch.from_numpy(given["temperature"]).float()
    for kernels in ("torch", None):
        call = {"rules": chain, "temperature": temperature, "logprobs": True, **key(6)}
        drawn = (
            sample_reference(rules.Call(x, **call)) if kernels is None else sample(x, kernels=kernels, **call)
        )
        assert (drawn.tokens < 0).tolist() == [True, False, True, False, True, False]
        for field in (drawn.logprob, drawn.raw_logprob, drawn.entropy):
            assert field.isnan().tolist() == [True, False, True, False, True, False]
        assert (drawn.kept[[0, 2, 4]] == 0).all()


def test_scaled_rows_far_apart_have_the_exact_law():
    """Temperature .001 on logits 42 and -20 (flashinfer #5088), and 1e-6: probabilities never exceed 1."""
    x = torch.tensor([[42.0, 41.999, -20.0, 42.0]]).expand(3, -1)
    temperature = torch.tensor([1e-3, 1e-6, 1.0])
    drawn = sample(x, temperature=temperature, top_p=torch.full((3,), 0.5), logprobs=True, **key(3))
    # .001: weights 1, e^-1 (41.999 is 41.9990005 in float32), 1: a pair of .423 each passes .5 with both
    assert drawn.kept.tolist()[:2] == [2, 2]
    assert (drawn.logprob[:2] - math.log(0.5)).abs().max() < 1e-6
    assert set(drawn.tokens.tolist()[:2]) <= {0, 3}


def test_top_p_is_of_what_top_k_left():
    """.4 .3 .2 .1: the two largest renormalised are .571 .429, so p = .55 keeps one; of the whole it keeps two."""
    x = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    both = chosen_rules(("k", "p"), *(np.array([v]) for v in (2, 0.55, 0.0)))
    alone = chosen_rules(("p",), *(np.array([v]) for v in (0, 0.55, 0.0)))
    assert (truncate(x, both) > -torch.inf).tolist() == [[True, False, False, False]]
    assert (truncate(x, alone) > -torch.inf).tolist() == [[True, True, False, False]]


@pytest.mark.slow
def test_kept_sets_of_a_real_model(smollm2_engine):
    """Logits of SmolLM2 after a few texts, V = 49152."""
    texts = ["The capital of France is", "2, 3, 5, 7,", "Once upon a time", "def fib(n):"]
    x = smollm2_engine.prefill(texts).logits
    for seed, order in enumerate(ORDERS.values()):
        for turn in range(4):
            check(x, mixed(len(texts), x.shape[1], 10 * seed + turn), order, least_exact=0.7)


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_k_are_kept_of_ties_the_lowest_ids(kind):
    """The other tie mode of top-k, alone and before top-p: what a stable sort by logit puts first."""
    vocab = 67
    ks = np.repeat([0, -1, 1, 2, 5, 50, vocab - 1, vocab, vocab + 1, 2**31 - 1], 2)
    p = np.tile([1.0, 0.6], len(ks) // 2).astype(np.float32)
    x = row_of(kind, vocab).expand(len(ks), -1)
    chain = (rules.top_k(torch.from_numpy(ks), ties="lowest"), rules.top_p(torch.from_numpy(p)))
    left = (truncate(x.clamp(max=float(FLOAT_MAX)), chain) > -torch.inf).numpy()
    row = np.minimum(x[0].double().numpy(), FLOAT_MAX)
    order = np.argsort(-row, kind="stable")
    for k, share, kept in zip(ks, p, left, strict=True):
        first = order[:k] if 0 < k < vocab else order
        first = first[row[first] > -np.inf]
        weights = np.exp(row[first] - row.max())
        above = (np.cumsum(weights) - weights) / weights.sum()
        sets = []
        for limit in (share - EPS, share + EPS):
            count = max(int((above < limit).sum()), 1) if share < 1 else len(first)
            sets.append({int(token) for token in first if row[token] >= row[first[count - 1]]})
        assert sets[0] <= set(kept.nonzero()[0].tolist()) <= sets[1], (k, share)
    parts = key(len(ks), 3)
    drawn = sample(x, rules=chain, logprobs=True, kernels="torch", **parts)
    assert (drawn.kept.numpy() == left.sum(axis=1)).all()
    assert left[np.arange(len(ks)), drawn.tokens.numpy()].all()
    assert torch.equal(sample_reference(rules.Call(x, rules=chain, **parts)).tokens, drawn.tokens)
