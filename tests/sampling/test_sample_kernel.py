"""Sampling on the CPU: the reference against an oracle and transformers, the fast path against the reference."""

import math

import numpy as np
import pytest
import torch
from sampling_rows import differences, edits, generator, key, oracle, rows
from transformers.generation import logits_process as hf

from handloom.kernels.sampling import rules
from handloom.kernels.sampling.reference import apply_edits, scale, truncate
from handloom.kernels.sampling.sample import sample, sample_reference

NAMES = [name for name, _ in rows(2, 8)]
FINITE = [name for name in NAMES if name not in ("infinite", "broken")]
SETTINGS = [
    (k, p, m) for k in (0, 1, 7, 50, 10**9) for p in (0.0, 0.5, 0.9, 0.999, 1.0) for m in (0.0, 0.05, 1.0)
]


def values(batch, value):
    return torch.full((batch,), float(value))


def short(batch, k, p, m):
    return rules.top_k(values(batch, k)), rules.top_p(values(batch, p)), rules.min_p(values(batch, m))


@pytest.mark.parametrize("name", FINITE)
def test_reference_keeps_what_the_oracle_keeps(name):
    x = dict(rows(2, 400))[name]
    for temperature in (1.0, 0.7):
        scaled = scale(x, values(2, temperature))
        for k, p, m in SETTINGS:
            left = truncate(scaled, short(2, k, p, m)) > -torch.inf
            for row, kept in zip(x.numpy(), left.numpy(), strict=True):
                expected, margin = oracle(row, temperature=temperature, top_k=k, top_p=p, min_p=m)
                if margin > 1e-6:  # closer to p than float32 resolves
                    assert (kept == expected).all(), (temperature, k, p, m)


@pytest.mark.parametrize(
    ("rule", "probabilities", "expected"),
    [
        (lambda: rules.top_k(values(1, 2)), [0.25, 0.25, 0.25, 0.25], [1, 1, 1, 1]),
        (lambda: rules.top_p(values(1, 0.8)), [0.3, 0.1, 0.1, 0.5], [1, 0, 0, 1]),
        (lambda: rules.top_p(values(1, 0.8)), [0.15, 0.3, 0.3, 0.25], [0, 1, 1, 1]),
        (lambda: rules.min_p(values(1, 0.05)), [0.9, 0.0274, 0.047, 0.0256], [1, 0, 1, 0]),
        (lambda: rules.epsilon(values(1, 0.1)), [0.87, 0.099, 0.001, 0.03], [1, 0, 0, 0]),
        (lambda: rules.eta(values(1, 0.0625)), [0.01, 0.04, 0.9, 0.05], [0, 0, 1, 0]),
        (lambda: rules.top_a(values(1, 0.5)), [0.6, 0.2, 0.17, 0.03], [1, 1, 0, 0]),  # limit .5 * .36 = .18
        (lambda: rules.p_less(values(1, 1.0)), [0.5, 0.34, 0.16], [1, 0, 0]),  # sum of squares .3912
        (lambda: rules.top_n_sigma(values(1, 1.0)), [1 / math.e**2, 1, 1 / math.e], [0, 1, 0]),  # sigma .816
        (lambda: rules.top_k(values(1, 2), ties="lowest"), [0.2, 0.4, 0.2, 0.2], [1, 1, 0, 0]),
        (lambda: rules.top_k(values(1, 3), ties="lowest"), [0.1, 0.2, 0.2, 0.2, 0.3], [0, 1, 1, 0, 1]),
        (lambda: rules.typical(values(1, 0.5)), [0.97, 0.01, 0.01, 0.01], [1, 0, 0, 0]),
        (
            lambda: rules.typical(values(1, 0.5)),
            [0.4, 0.2, 0.2, 0.2],
            [0, 1, 1, 1],
        ),  # H 1.33: .28 against .42
        (lambda: rules.typical(values(1, 0.7)), [0.4, 0.2, 0.2, 0.2], [1, 1, 1, 1]),
        (lambda: rules.xtc(values(1, 0.1), values(1, 1)), [0.3, 0.15, 0.05, 0.5], [0, 1, 1, 0]),
        (lambda: rules.xtc(values(1, 0.1), values(1, 1)), [0.5, 0.2, 0.2, 0.1], [0, 0, 0, 1]),
        (lambda: rules.xtc(values(1, 0.2), values(1, 1)), [0.4, 0.25, 0.25, 0.1], [0, 1, 1, 1]),
        (lambda: rules.xtc(values(1, 0.6), values(1, 1)), [0.5, 0.3, 0.2], [1, 1, 1]),
        (lambda: rules.xtc(values(1, 0.1), values(1, 0)), [0.5, 0.3, 0.2], [1, 1, 1]),
        (lambda: rules.top_h(values(1, 0.5)), [0.5, 0.25, 0.15, 0.1], [1, 0, 0, 0]),  # H 1.208, 0, .637
        (lambda: rules.top_h(values(1, 0.6)), [0.5, 0.25, 0.125, 0.125], [1, 1, 0, 0]),  # 1.213, .637, .956
        (lambda: rules.top_h(values(1, 0.8)), [0.5, 0.25, 0.125, 0.125], [1, 1, 1, 1]),  # a tie comes along
        (lambda: rules.tail_free(values(1, 0.4)), [0.1, 0.3, 0.1, 0.5], [0, 1, 0, 1]),  # 0, .2, .1, .1 of .4
        (lambda: rules.tail_free(values(1, 0.5)), [0.6, 0.2, 0.1, 0.05, 0.05], [1, 0, 0, 0, 0]),  # .3 of .5
        (lambda: rules.top_h(values(1, 0.5), values(1, 1)), [0.25, 0.5, 0.125, 0.125], [0, 1, 0, 0]),
        (lambda: rules.top_h(values(1, 0.6), values(1, 1)), [0.25, 0.5, 0.125, 0.125], [1, 1, 0, 0]),
    ],
)
def test_hand_computed_tables(rule, probabilities, expected):
    x = torch.tensor([probabilities]).log()
    for vocab in (x.shape[1], 300):  # tokens at -inf change nothing
        wide = torch.full((1, vocab), -torch.inf)
        wide[:, : x.shape[1]] = x
        coin = tuple(key(1).values())
        left = truncate(wide, (rule(),), coin)
        assert (left > -torch.inf).long().tolist() == [expected + [0] * (vocab - x.shape[1])]
        drawn = sample(wide, **key(1), rules=(rule(),), logprobs=True, kernels="torch")
        assert int(drawn.kept) == sum(expected)
        assert expected[int(drawn.tokens)] == 1


@pytest.mark.parametrize("name", FINITE)
def test_exact_counts_keep_the_lowest_ids_of_the_ties(name):
    x = dict(rows(2, 400))[name]
    for k in (1, 2, 50, 399):
        left = truncate(x, (rules.top_k(values(2, k), ties="lowest"),)) > -torch.inf
        for row, kept in zip(x.numpy().astype(np.float64), left.numpy(), strict=True):
            order = np.lexsort((np.arange(400), -row))
            expected = sorted(i for i in order[:k] if row[i] > -np.inf)
            assert kept.nonzero()[0].tolist() == expected, k
        drawn = sample(x, **key(2), rules=(rules.top_k(values(2, k), ties="lowest"),), logprobs=True)
        assert drawn.kept.tolist() == left.sum(dim=1).tolist()
        assert left[torch.arange(2), drawn.tokens].all()


def test_rules_after_a_cut_see_exactly_what_is_left():
    """Of five equal tokens the exact count leaves two; half their mass is one token with its tie."""
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, -1.0]])
    chain = (rules.top_k(values(1, 2), ties="lowest"), rules.top_p(values(1, 0.5)))
    assert (truncate(x, chain) > -torch.inf).tolist() == [[True, True, False, False, False, False]]
    drawn = sample(x, **key(1), rules=chain, logprobs=True)
    assert drawn.kept.tolist() == [2]
    assert math.isclose(float(drawn.logprob), -math.log(2), rel_tol=1e-6)


def test_highest_logits_are_ranked_by_logit_and_then_by_id():
    """Logits too close to have log-probabilities of their own beside a large one; the larger logit comes first."""
    x = torch.zeros(2, 40)
    x[0, 9], x[0, 5], x[0, 7], x[0, 3] = 1e4, 1e-5, 2e-5, 1e-5
    x[1, 30] = torch.nan
    drawn = sample(x, **key(2), n_top=5)
    assert drawn.top_ids.tolist() == [[9, 7, 3, 5, 0], [0, 1, 2, 3, 4]]
    assert drawn.top_logprobs[0].tolist() == [0.0, -1e4, -1e4, -1e4, -1e4]
    assert drawn.top_logprobs[1].isnan().all()


def test_unknown_ties_are_named():
    with pytest.raises(ValueError, match="ties='first': expected one of 'keep', 'lowest'"):
        rules.top_k(values(1, 2), ties="first")
    with pytest.raises(ValueError, match="tosses a coin"):
        truncate(torch.zeros(1, 5), (rules.xtc(values(1, 0.1), values(1, 1)),))


def test_the_coin_falls_as_often_as_it_should():
    """20,000 coins at chance .3: 6,000 expected; 5,700 ... 6,300 is missed with probability 4e-6."""
    count = 20_000
    x = torch.tensor([[2.0, 1.0, 0.0]]).expand(count, -1)
    chosen = (rules.xtc(values(count, 0.2), values(count, 0.3)),)
    drawn = sample(
        x, seeds=torch.full((count,), 9), positions=torch.arange(count), rules=chosen, logprobs=True
    )
    assert 5700 < int((drawn.kept == 2).sum()) < 6300  # .665 and .245 reach the threshold: one is dropped
    assert int((drawn.kept == 3).sum()) + int((drawn.kept == 2).sum()) == count
    assert drawn.rank[(drawn.kept == 2)].min() == 2  # the rank is among all tokens, dropped ones too


@pytest.mark.parametrize("name", [name for name in FINITE if name != "signed zeros"])
def test_transformers_keeps_a_subset_and_the_surplus_sits_at_the_threshold(name):
    x = dict(rows(3, 500, seed=3))[name]
    for k, p, m in ((50, 0.95, 0.05), (50, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.1), (7, 0.5, 0.0)):
        warped = x
        warpers = [hf.TopKLogitsWarper(k)] if k else []
        warpers += [hf.TopPLogitsWarper(p)] if p < 1 else []
        warpers += [hf.MinPLogitsWarper(m)] if m else []
        for warper in warpers:
            warped = warper(None, warped)
        theirs, ours = warped > -torch.inf, truncate(x, short(3, k, p, m)) > -torch.inf
        theirs &= x > -torch.inf  # its min-p keeps the top by index even where it is -inf
        for row in range(3):
            lowest = x[row][ours[row]].min()
            near = (x[row] - lowest).abs() <= 2e-6 * max(1.0, abs(float(lowest)))
            assert not (theirs[row] & ~ours[row] & ~near).any(), (k, p, m)
            assert not (ours[row] & ~theirs[row] & ~near).any(), (k, p, m)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("vocab", [3, 31, 1000])
def test_fast_path_is_the_reference(name, vocab):
    g = generator(vocab)
    x = dict(rows(4, vocab))[name]
    for case in range(12):

        def pick(*choices):
            return torch.tensor(choices)[torch.randint(len(choices), (4,), generator=g)].float()

        settings = {
            **key(4, case),
            "temperature": pick(1.0, 0.7, 0.0, 5.0, 1e-3, 1e-6, math.inf),
            "logprobs": True,
            "n_top": 2,
        }
        chosen = (
            rules.top_k(pick(0, 1, 50, vocab // 2, vocab + 1)),
            rules.top_p(pick(0.0, 0.1, 0.9, 0.999, 1.0)),
            rules.min_p(pick(0.0, 0.05, 1.0)),
        )
        if case % 3 == 1:
            more = (rules.eta(pick(0, 1e-3)), rules.top_a(pick(0, 0.2)), rules.p_less(pick(0, 1)))
            chosen = (*more, chosen[0], rules.top_n_sigma(pick(0, 1.5)), rules.epsilon(pick(0, 1e-3)))
        if case in (2, 3, 5, 6, 8):
            exact = rules.top_k(pick(0, 1, 50, vocab // 2), ties="lowest")
            typical, xtc = rules.typical(pick(0.1, 0.5, 0.9, 1)), rules.xtc(pick(0.02, 0.1), pick(0, 0.5, 1))
            top_h = rules.top_h(pick(0, 0.3, 0.8, 1), pick(0, 1))
            orders = {2: (exact, xtc), 3: (xtc, exact), 5: (typical, top_h), 6: (top_h, xtc), 8: (typical,)}
            chosen = (*orders[case], *chosen[1:])
        if case % 2:
            settings["edits"] = edits(4, vocab, case)
        if case % 4 == 3:
            settings["bitmask"] = rules.pack_mask(torch.rand(4, vocab, generator=g) < 0.8)
        expected = sample_reference(rules.Call(x, rules=chosen, **settings))
        assert not differences(expected, sample(x, rules=chosen, kernels="torch", **settings)), case


@pytest.mark.slow
@pytest.mark.parametrize(("vocab", "turn"), [(32001, 0), (128256, 1), (151936, 3)])
def test_fast_path_is_the_reference_at_full_size(vocab, turn):
    """Each kind of row under one setting of five at each size, another one at the next."""
    chosen = [(50, 0.95, 0.05), (0, 0.9, 0.0), (0, 1.0, 0.05), (0, 1.0, 0.0), (1000, 0.999, 0.0)]
    for number, (name, x) in enumerate(rows(2, vocab)):
        setting = chosen[(number + turn) % 5]
        settings = {**key(2), "temperature": torch.tensor([0.8, 1.0]), "rules": short(2, *setting)}
        expected = sample_reference(rules.Call(x, logprobs=True, **settings))
        assert not differences(expected, sample(x, logprobs=True, **settings)), (name, setting)


def test_rows_do_not_disturb_each_other():
    """Solo, permuted, padded with broken rows and read through strides: the same tokens, bit for bit."""
    x = torch.cat(
        [part for name, part in rows(2, 600) if name in ("normal", "zipf", "bfloat16", "two levels")]
    )
    batch = len(x)
    settings = {
        **key(batch),
        "temperature": torch.tensor([0.0, 1.0, 0.7, 2.0] * 2),
        "top_k": torch.tensor([0, 20, 50, 7] * 2),
        "top_p": torch.tensor([0.9, 1.0, 0.5, 0.99] * 2),
    }
    together = sample(x, logprobs=True, **settings)

    def rows_of(index, table):
        chosen = {name: value[index] for name, value in settings.items()}
        return sample(table, logprobs=True, **chosen)

    for row in range(batch):
        alone = rows_of(slice(row, row + 1), x[row : row + 1])
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(together[:6], alone[:6], strict=True))
    order = torch.randperm(batch, generator=generator(1))
    assert torch.equal(rows_of(order, x[order]).tokens, together.tokens[order])
    poisoned = x[order].clone()
    poisoned[::2] = torch.nan
    assert torch.equal(rows_of(order, poisoned).tokens[1::2], together.tokens[order][1::2])
    wide = torch.full((batch, 700), torch.nan)
    wide[:, 50:650] = x
    assert torch.equal(sample(wide[:, 50:650], **settings).tokens, together.tokens)
    assert torch.equal(sample(x.t().contiguous().t(), **settings).tokens, together.tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_exactly(dtype):
    x = (torch.randn(3, 500, generator=generator(0)) * 3).to(dtype)
    settings = {**key(3), "top_k": torch.tensor([5, 0, 50]), "logprobs": True}
    assert not differences(sample(x.float(), **settings), sample(x, **settings))


def test_input_is_not_written_and_bad_rows_are_reported():
    x = dict(rows(3, 100))["broken"]
    before = x.clone()
    drawn = sample(x, **key(3), top_k=values(3, 5), edits=edits(3, 100), logprobs=True)
    assert torch.equal(x.nan_to_num(7.0), before.nan_to_num(7.0))
    assert drawn.tokens[[0, 2]].tolist() == [-1, -1]
    assert drawn.tokens[1] >= 0
    assert drawn.logprob.isnan().tolist() == [True, False, True]
    assert drawn.kept.tolist()[::2] == [0, 0]


def test_a_ban_does_not_hide_a_nan():
    x = torch.zeros(1, 40)
    x[0, 3] = torch.nan
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[0, 3] = False
    assert sample(x, **key(1), bitmask=rules.pack_mask(mask)).tokens.tolist() == [-1]


def test_infinite_logits_share_the_whole_probability():
    x = torch.zeros(1, 50)
    x[0, [7, 30]] = torch.inf
    counts = {7: 0, 30: 0}
    for seed in range(200):
        drawn = sample(x, seeds=torch.tensor([seed]), positions=torch.tensor([0]), logprobs=True)
        counts[int(drawn.tokens)] += 1
        assert math.isclose(float(drawn.logprob), -math.log(2), rel_tol=1e-5)
    assert 50 < counts[7] < 150  # binomial(200, 1/2) leaves this with probability 1e-12


def test_edits_by_hand():
    """History 3 5 3 | 5 5, repetition over all of it, counts over the last two; a pad, a bias and a ban."""
    history = torch.tensor([[3, 5, 3, -1, 5, 5]])
    start, end = torch.tensor([0]), torch.tensor([6])
    ids, seen, counts = rules.count_tokens(history, (start, start + 4), (end, end), capacity=4)
    assert (ids.tolist(), seen.tolist(), counts.tolist()) == (
        [[3, 5, -1, -1]],
        [[2, 3, 0, 0]],
        [[0, 2, 0, 0]],
    )
    ids[0, 2:] = torch.tensor([0, 1])
    bias = torch.tensor([[0.0, 0.0, 1.5, -torch.inf]])
    one = torch.tensor([1.0])
    sparse = rules.SparseEdits(
        ids, bias, seen, counts, 2 * one, one / 2, one / 4, rules.touched_bits(ids, 40)
    )
    x = torch.zeros(1, 40)
    x[0, 3], x[0, 5] = -1.0, 4.0
    edited = apply_edits(x, edits=sparse)[0]
    assert edited[:6].tolist() == [1.5, -torch.inf, 0.0, -2.0, 0.0, 4.0 / 2 - 0.5 - 2 * 0.25]
    assert not edited[6:].any()
    off = sparse._replace(bias=bias * 0, repetition=one, presence=one * 0, frequency=one * 0)
    off = off._replace(bias=torch.zeros(1, 4))
    assert torch.equal(apply_edits(x, edits=off), x)


def test_bitmask_bits_and_tail():
    allowed = torch.rand(2, 70, generator=generator(0)) < 0.5
    packed = rules.pack_mask(allowed)
    assert packed.shape == (2, 3)
    assert torch.equal(rules.unpack_mask(packed, 70), allowed)
    packed[:, -1] |= -(2**6)  # bits beyond the vocabulary mean nothing
    assert torch.equal(rules.unpack_mask(packed, 70), allowed)
    x = torch.randn(2, 70, generator=generator(1))
    assert torch.equal(apply_edits(x, bitmask=packed), torch.where(allowed, x, -torch.inf))


def test_temperature_extremes():
    x = torch.tensor([[42.0, 41.99, -20.0]] * 4)
    temperature = torch.tensor([0.001, 0.0, math.inf, 1.0])
    drawn = sample(x, **key(4), temperature=temperature, logprobs=True)
    assert drawn.tokens[:2].tolist() == [0, 0]
    assert math.isclose(float(drawn.logprob[0]), -math.log1p(math.exp(-9.9945)), abs_tol=1e-6)
    assert math.isclose(float(drawn.logprob[2]), -math.log(3), rel_tol=1e-6)
    assert drawn.kept.tolist() == [3, 3, 3, 3]


def pooled_chi_square(counts, expected, least=20.0):
    """Chi-square statistic and degrees of freedom with rare outcomes pooled until each cell expects `least`."""
    order = np.argsort(expected)
    cells, count, mass = [], 0.0, 0.0
    for index in order:
        count, mass = count + counts[index], mass + expected[index]
        if mass >= least:
            cells.append((count, mass))
            count = mass = 0.0
    cells[-1] = (cells[-1][0] + count, cells[-1][1] + mass)
    return sum((c - m) ** 2 / m for c, m in cells), len(cells) - 1


@pytest.mark.parametrize(
    ("settings", "temperature"),
    [((0, 1.0, 0.0), 1.0), ((20, 1.0, 0.0), 0.7), ((0, 0.8, 0.0), 1.0), ((40, 0.9, 0.1), 1.5)],
)
def test_draws_follow_the_law(settings, temperature):
    """Chi-square of 40,000 draws against the exact law; limit at 6.5 sigma of its normal form: false alarm 1e-9."""
    x = torch.randn(1, 120, generator=generator(4)) * 2
    law = torch.softmax(truncate(scale(x, values(1, temperature)), short(1, *settings)).double(), dim=1)[
        0
    ].numpy()
    draws, batch = 40_000, 4000
    counts = np.zeros(120)
    for start in range(0, draws, batch):
        positions = torch.arange(start, start + batch)
        k, p, m = settings
        drawn = sample(
            x.expand(batch, -1),
            seeds=torch.full((batch,), 77),
            positions=positions,
            temperature=values(batch, temperature),
            top_k=values(batch, k),
            top_p=values(batch, p),
            min_p=values(batch, m),
        )
        counts += np.bincount(drawn.tokens.numpy(), minlength=120)
    assert not counts[law == 0].any()
    statistic, freedom = pooled_chi_square(counts[law > 0], law[law > 0] * draws)
    normal = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert normal < 6.5


def test_wrong_shapes_are_named():
    x = torch.zeros(2, 10)
    with pytest.raises(ValueError, match="expected \\[rows, vocabulary\\]"):
        sample(x[0], **key(2))
    with pytest.raises(ValueError, match="temperature of shape \\(3,\\)"):
        sample(x, **key(2), temperature=torch.ones(3))
    with pytest.raises(ValueError, match="n_top=11"):
        sample(x, **key(2), n_top=11)
    assert sample(x[:0], **key(0)).tokens.shape == (0,)
