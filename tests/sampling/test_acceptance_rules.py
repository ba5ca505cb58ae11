"""Every other truncation rule against its definition in float64, on all kinds of rows.

As in `test_acceptance_sets.py` the oracle keeps two sets, which differ in what float32 cannot place: a threshold is
moved by BAND of its distance from the maximum and by four float32 steps of that, a mass, an entropy or a
probability by BAND. A result lies between the two; `exact` says in how many rows, at least, they must agree.
"""

import math

import numpy as np
import pytest
import torch
from sampling_rows import generator, key
from test_acceptance_sets import KINDS, row_of

from handloom import SamplingParams
from handloom.kernels.sampling import rules
from handloom.kernels.sampling.draw import draw
from handloom.kernels.sampling.reference import truncate
from handloom.kernels.sampling.sample import sample, sample_reference
from handloom.pipeline.pipeline import Context, Pipeline
from handloom.pipeline.processors import (
    XTC,
    Epsilon,
    Eta,
    MinP,
    PLess,
    TailFree,
    TopA,
    TopH,
    TopK,
    TopNSigma,
    TopP,
    Typical,
)

BAND = 1e-5
VOCAB = 211
FINITE = [kind for kind in KINDS if "+inf" not in kind]  # +inf is made finite before the rules that are fused


class Law:
    """One row in float64: sorted distinct facts that the definitions below speak of."""

    def __init__(self, x):
        self.x = x.astype(np.float64)
        self.alive = self.x > -np.inf
        self.top = self.x.max()
        weights = np.where(self.alive, np.exp(self.x - self.top), 0.0)
        self.p = weights / weights.sum()
        self.log_mass = self.top + math.log(weights.sum())
        self.log_p = np.where(self.alive, self.x - self.log_mass, -np.inf)
        self.entropy = -(self.p * np.where(self.alive, self.log_p, 0.0)).sum()
        self.order = np.argsort(-self.x, kind="stable")
        self.step = 4 * float(np.spacing(np.float32(abs(self.top))))

    def above(self, level, slack):
        """Tokens at or above a logit, and always the largest."""
        if not np.isfinite(level):
            return self.alive & (self.x >= level)
        level = level - slack * (BAND * (1 + abs(self.top - level)) + self.step)
        return self.alive & (self.x >= min(level, self.top))

    def prefix(self, count):
        """The `count` largest and all ties of the last of them."""
        return self.alive & (self.x >= self.x[self.order[max(count, 1) - 1]])


def epsilon(law, cutoff, slack):
    return law.above(law.log_mass + math.log(cutoff), slack)


def eta(law, cutoff, slack):
    level = math.log(cutoff)
    return law.above(law.log_mass + min(level, 0.5 * level - law.entropy), slack)


def min_p(law, share, slack):
    return law.above(law.top + math.log(share), slack)


def top_a(law, a, slack):
    return law.above(math.log(a) + 2 * law.top - law.log_mass, slack)


def p_less(law, mode, slack):
    least = (law.p**2).sum()
    if mode == "norm":
        least = (len(law.x) * least - 1) / (len(law.x) - 1) + slack * -1e-7
    return law.above(law.log_mass + math.log(max(least, 1e-37)), slack)


def top_n_sigma(law, n, slack):
    return law.above(law.top - n * law.x[law.alive].std(), slack)


def top_k(law, k, slack):
    return law.prefix(min(k, len(law.x)))


def top_p(law, p, slack):
    above = np.cumsum(law.p[law.order]) - law.p[law.order]
    return law.prefix(int((above < p + slack * BAND).sum()))


def typical(law, p, slack):
    distance = np.where(law.alive, np.abs(-law.log_p - law.entropy), np.inf)
    order = np.argsort(distance, kind="stable")
    above = np.cumsum(law.p[order]) - law.p[order]
    last = distance[order[max(int((above < p + slack * BAND).sum()), 1) - 1]]
    band = BAND * (1 + last) + law.step
    near = np.abs(distance - last) <= band  # which of these comes first, float32 may see otherwise
    if len(np.unique(law.x[near])) == 1:
        band = 0.0
    return law.alive & (distance <= last + slack * band)


def tail_free(law, z, slack):
    curvature = np.abs(np.diff(np.diff(law.p[law.order])))
    share = np.cumsum(curvature) / max(curvature.sum(), 1e-30)
    return law.prefix(1 + int((share <= z + slack * 10 * BAND).sum()))


def top_h_paper(law, alpha, slack):
    p = law.p[law.order]
    mass = np.cumsum(p)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, -p * np.log(p), 0.0)
    inside = np.cumsum(terms) / mass + np.log(mass) <= alpha * law.entropy + slack * BAND
    return law.prefix(int(np.cumprod(inside).sum()))


def top_h_code(law, alpha, slack):
    p = law.p[law.order[:100]] / law.p[law.order[:100]].sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, -p * np.log(p), 0.0)
    inside = np.cumsum(terms) <= alpha * terms.sum() + slack * BAND
    return law.prefix(int(np.cumprod(inside).sum()))


def xtc(law, threshold, slack):
    """What is dropped is a prefix: with a lower threshold (slack 1) the least of it lies lower, more is dropped."""
    reach = law.p >= threshold * (1 + slack * BAND)
    return law.alive & (law.x <= law.x[reach].min() + max(slack, 0) * law.step) if reach.any() else law.alive


RULES = {
    "epsilon": (epsilon, Epsilon, (1e-4, 0.003, 0.02, 0.5)),
    "eta": (eta, Eta, (1e-4, 0.01, 0.3)),
    "min-p": (min_p, MinP, (1e-3, 0.1, 0.7)),
    "top-a": (top_a, TopA, (0.01, 0.2, 1.0)),
    "p-less": (p_less, PLess, (True, "norm")),
    "top-n-sigma": (top_n_sigma, TopNSigma, (0.1, 1.0, 2.5)),
    "top-k": (top_k, TopK, (1, 2, 50, VOCAB)),
    "top-p": (top_p, TopP, (1e-6, 0.1, 0.9, 0.999)),
    "typical": (typical, Typical, (0.05, 0.5, 0.95)),
    "tail-free": (tail_free, TailFree, (0.1, 0.7, 0.97)),
    "top-h, paper": (top_h_paper, lambda alpha: TopH(alpha, "paper"), (0.1, 0.5, 0.9)),
    "top-h, code": (top_h_code, lambda alpha: TopH(alpha, "code"), (0.1, 0.5, 0.9)),
    "xtc": (xtc, lambda threshold: XTC(1.0, threshold), (0.004, 0.05, 0.3)),
}


def step_of(rows):
    lengths = torch.full((rows,), 3)
    parts = key(rows)
    return Context(
        tokens=torch.zeros(rows, 3, dtype=torch.int64),
        lengths=lengths,
        prompt_lengths=lengths,
        seeds=parts["seeds"],
        streams=parts["streams"],
    )


@pytest.mark.parametrize("name", RULES)
def test_every_rule_keeps_what_its_definition_keeps(name):
    """All kinds of rows, three of each, all parameters; a rule must be exact on 60 % of them."""
    define, make, parameters = RULES[name]
    x = torch.stack([row_of(kind, VOCAB, seed) for kind in FINITE for seed in range(3)])
    exact = 0
    laws = [Law(row) for row in x.numpy()]
    for parameter in parameters:
        kept = (make(parameter)(x, step_of(len(x))) > -torch.inf).numpy()
        for row, law in enumerate(laws):
            least, most = define(law, parameter, -1.0), define(law, parameter, 1.0)
            label = FINITE[row // 3], parameter
            assert not (least & ~kept[row]).any(), (*label, (least & ~kept[row]).nonzero()[0][:5])
            assert not (kept[row] & ~most).any(), (*label, (kept[row] & ~most).nonzero()[0][:5])
            exact += (least == most).all()
    assert exact > 0.6 * len(laws) * len(parameters)


ON = torch.ones(1)
KERNELS = {  # the same rules as the sampling kernels take them, one parameter a row
    "epsilon": rules.epsilon,
    "eta": rules.eta,
    "min-p": rules.min_p,
    "top-a": rules.top_a,
    "top-n-sigma": rules.top_n_sigma,
    "top-k": rules.top_k,
    "top-p": rules.top_p,
    "typical": rules.typical,
    "top-h, paper": rules.top_h,
    "top-h, code": lambda alpha: rules.top_h(alpha, ON.expand(len(alpha))),
    "xtc": lambda threshold: rules.xtc(threshold, ON.expand(len(threshold))),
}


@pytest.mark.parametrize("name", KERNELS)
def test_every_rule_of_the_kernels_keeps_what_its_definition_keeps(name):
    """Reference by its set, CPU path by the size of its set and its token, for the same rows and parameters."""
    define, _, parameters = RULES[name]
    x = torch.stack([row_of(kind, VOCAB, seed) for kind in FINITE for seed in range(2)])
    laws, parts = [Law(row) for row in x.numpy()], key(len(x))
    for parameter in parameters:
        chain = (KERNELS[name](torch.full((len(x),), float(parameter))),)
        kept = (truncate(x, chain, tuple(parts.values())) > -torch.inf).numpy()
        drawn = sample(x, rules=chain, logprobs=True, kernels="torch", **parts)
        for row, law in enumerate(laws):
            least, most = define(law, parameter, -1.0), define(law, parameter, 1.0)
            label = FINITE[row // 2], parameter
            assert not (least & ~kept[row]).any(), label
            assert not (kept[row] & ~most).any(), label
            assert least.sum() <= drawn.kept[row] <= most.sum(), label
            assert most[drawn.tokens[row]], label
        assert torch.equal(sample_reference(rules.Call(x, rules=chain, **parts)).tokens, drawn.tokens)


CHAINS = [
    {"top_k": 30, "typical_p": 0.8},
    {"typical_p": 0.9, "top_k": 12, "top_p": 0.9},
    {"top_h": 0.6, "min_p": 0.02},
    {"top_h": 0.7, "top_h_rule": "code"},
    {"top_n_sigma": 1.0, "top_p": 0.9},
    {"xtc_probability": 0.5, "xtc_threshold": 0.05, "top_k": 40},
    {"epsilon_cutoff": 0.01, "eta_cutoff": 0.05, "top_a": 0.1},
    {"p_less": True, "top_k": 20},
    {"p_less": "norm", "tfs": 0.9},
    {"top_k": 30, "top_p": 0.95, "tfs": 0.9},
    {"mirostat": 2, "mirostat_tau": 3.0},
    {"smoothing_factor": 0.3, "min_p": 0.05},
]


@pytest.mark.parametrize("fields", CHAINS, ids=lambda fields: ",".join(fields))
@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_the_sampler_draws_from_what_the_rules_leave(fields, temperature):
    """Rules fused with the draw give the tokens that applying them one by one and drawing gives, row by row."""
    x = torch.stack([row_of(kind, VOCAB, seed) for kind in FINITE for seed in range(4)])
    params = SamplingParams(temperature=temperature, **fields)
    rows = Pipeline.default().bind([params] * len(x), [[0] * 3] * len(x), vocab_size=VOCAB)
    step = step_of(len(x))
    processed = rows.apply(x, step)
    expected = draw(processed, step.seeds, step.positions, step.streams)
    got = rows.sample(x, step).tokens
    assert (processed.gather(1, got[:, None]) > -torch.inf).all()
    assert torch.equal(got, expected)
    assert len(got.unique()) > 20


def test_rules_of_rows_differ_from_row_to_row():
    """Each row has a rule of its own and gets what it gets alone."""
    fields = [*CHAINS, {}, {"top_k": 1}]
    requests = [SamplingParams(temperature=1.0, **own) for own in fields]
    x = torch.randn(len(requests), VOCAB, generator=generator(8)) * 3
    together = Pipeline.default().bind(requests, [[0] * 3] * len(x), vocab_size=VOCAB)
    step = step_of(len(x))
    tokens = together.sample(x, step).tokens
    for row, request in enumerate(requests):
        alone = Pipeline.default().bind([request], [[0] * 3], vocab_size=VOCAB)
        own = Context(
            tokens=step.tokens[:1],
            lengths=step.lengths[:1],
            prompt_lengths=step.prompt_lengths[:1],
            seeds=step.seeds[row : row + 1],
            streams=step.streams[row : row + 1],
        )
        assert alone.sample(x[row : row + 1], own).tokens[0] == tokens[row], fields[row]


EDITS = [
    *({"smoothing_factor": 0.4, "smoothing_curve": curve} for curve in (1.0, 1.5, 3.0)),
    *({"temperature": t} for t in (1e-6, 0.01, 5.0)),
    *({"dynatemp_range": 0.9, "dynatemp_exponent": exponent} for exponent in (0.3, 2.0)),
    *({"edt_theta": theta} for theta in (0.1, 10.0)),
    *({"adaptive_target": target} for target in (0.05, 0.9)),
    {"repetition_penalty": 0.2, "presence_penalty": -5.0, "frequency_penalty": 5.0},
    {"dry_multiplier": 1e3, "dry_allowed_length": 0, "no_repeat_ngram_size": 3},
    {"logit_bias": {1: 1e4, 2: -1e4}, "min_new_tokens": 3},
]


@pytest.mark.parametrize("fields", EDITS, ids=lambda fields: ",".join(map(str, fields)))
def test_edits_of_finite_masks_and_extreme_rows_make_no_nan(fields):
    """Nor do they bring back an excluded token, and a token is drawn that was allowed before."""
    x = torch.stack([row_of(kind, VOCAB, seed) for kind in FINITE for seed in range(2)])
    params = SamplingParams(**({"temperature": 1.0} | fields))
    rows = Pipeline.default().bind(
        [params] * len(x), [[0, 1, 0]] * len(x), vocab_size=VOCAB, eos_token_ids={5}
    )
    step = step_of(len(x))
    processed = rows.apply(x, step)
    assert not processed.isnan().any()
    assert (processed[x == -torch.inf] == -torch.inf).all()
    drawn = rows.sample(x, step)
    assert (x.gather(1, drawn.tokens[:, None]) > -torch.inf).all()
    assert drawn.logprobs.isfinite().all()
