"""Every rule against rows computed by hand, most of them the vectors of transformers' own tests."""

import math

import pytest
import torch

from handloom.errors import ParameterError
from handloom.pipeline.pipeline import Context
from handloom.pipeline.processors import (
    DRY,
    EDT,
    XTC,
    AdaptiveP,
    AllowedTokens,
    BadWords,
    BannedTokens,
    BiasHook,
    Bitmask,
    DynamicTemperature,
    Epsilon,
    Eta,
    ExponentialDecay,
    ForcedTokens,
    FrequencyPenalty,
    LogitBias,
    MinNewTokens,
    MinP,
    Mirostat,
    NoRepeatNGram,
    PLess,
    PrefixFunction,
    PresencePenalty,
    RepetitionPenalty,
    SequenceBias,
    Smoothing,
    SuppressFirst,
    TailFree,
    Temperature,
    TopA,
    TopH,
    TopK,
    TopNSigma,
    TopP,
    Typical,
    Watermark,
    watermark_score,
)
from handloom.pipeline.processors.masks import pack_bitmask, unpack_bitmask

INF = math.inf


def logs(rows):
    return torch.tensor(rows, dtype=torch.float64).log().float()


def kept(rule, rows):
    """Indices that a rule keeps in each row of probabilities."""
    result = rule(logs(rows))
    return [row.isfinite().nonzero().flatten().tolist() for row in result]


def context(histories, prompt=0, vocab=None, eos=()):
    width = max(1, *map(len, histories))
    return Context(
        tokens=torch.tensor([h + [-1] * (width - len(h)) for h in histories]),
        lengths=torch.tensor([len(h) for h in histories]),
        prompt_lengths=torch.full((len(histories),), prompt),
        seeds=torch.zeros(len(histories), dtype=torch.int64),
        streams=torch.zeros(len(histories), dtype=torch.int64),
        eos_token_ids=frozenset(eos),
    )


def banned(rule, histories, vocab, **options):
    result = rule(torch.zeros(len(histories), vocab), context(histories, **options))
    return [set((row == -INF).nonzero().flatten().tolist()) for row in result]


KEPT = [
    (TopP(0.8), [[0.3, 0.1, 0.1, 0.5], [0.15, 0.3, 0.3, 0.25]], [[0, 3], [1, 2, 3]]),
    (TopP(0.5), [[0.25] * 4], [[0, 1, 2, 3]]),  # ties at the boundary are all kept
    (TopP(1e-6), [[0.2, 0.5, 0.3]], [[1]]),
    (TopK(3), [[0.1, 0.2, 0.05, 0.4, 0.25]], [[1, 3, 4]]),
    (TopK(2), [[0.3, 0.3, 0.3, 0.1]], [[0, 1, 2]]),  # the third ties with the second
    (TopK(9), [[0.3, 0.7]], [[0, 1]]),
    (TopK([1, 2]), [[0.2, 0.3, 0.5], [0.2, 0.3, 0.5]], [[2], [1, 2]]),
    (TopH(0.3, "code"), [[0.97, 0.01, 0.01, 0.01]], [[0]]),
    (TopH(0.7, "code"), [[0.4, 0.3, 0.2, 0.1]], [[0, 1]]),
    (TopH(1.0, "code"), [[0.25] * 4], [[0, 1, 2, 3]]),
    (TopH(0.4, "code"), [[0.75, 0.25, 1e-30, 1e-30]], [[0]]),
    # paper: H(p) = 1.280; renormalised prefixes 0, .683 (4:3), 1.061 (4:3:2), 1.280
    (TopH(0.5, "paper"), [[0.4, 0.3, 0.2, 0.1]], [[0]]),
    (TopH(0.6, "paper"), [[0.4, 0.3, 0.2, 0.1]], [[0, 1]]),
    (TopH(0.9, "paper"), [[0.4, 0.3, 0.2, 0.1]], [[0, 1, 2]]),
    (
        MinP(0.05),
        [[0.9, 0.0274, 0.047, 0.0274], [0.15, 0.3, 0.3, 0.25], [0.97, 0.01, 0.01, 0.01]],
        [[0, 2], [0, 1, 2, 3], [0]],
    ),
    (Typical(0.5), [[0.97, 0.01, 0.01, 0.01], [0.4, 0.2, 0.2, 0.2]], [[0], [1, 2, 3]]),
    (Epsilon(0.1), [[0.87, 0.099, 0.001, 0.03], [0.4, 0.299, 0.101, 0.2]], [[0], [0, 1, 2, 3]]),
    (Epsilon(0.9), [[0.6, 0.4]], [[0]]),  # nothing reaches it: the best is kept
    (Eta(0.0625), [[1e-30, 0.1, 0.8, 0.1], [0.01, 0.04, 0.9, 0.05]], [[1, 2, 3], [2]]),
    (TopA(0.5), [[0.6, 0.2, 0.17, 0.03]], [[0, 1]]),  # threshold .5 * .36 = .18
    # p sorted .4 .3 .2 .1: first differences equal, second 0; with .5 .3 .1 .1: d = -.2 -.2 0, d2 = 0 .2
    (TailFree(0.5), [[0.5, 0.3, 0.1, 0.1]], [[0, 1]]),
    # d = -.4 -.1 -.05 0, d2 = .3 .05 .05 of .4: cumulated .75 .875 1
    (TailFree(0.8), [[0.6, 0.2, 0.1, 0.05, 0.05]], [[0, 1]]),
    (TailFree(0.9), [[0.6, 0.2, 0.1, 0.05, 0.05]], [[0, 1, 2]]),
    (PLess(True), [[0.5, 0.3, 0.2]], [[0]]),  # sum p^2 = .38
    (PLess("norm"), [[0.5, 0.3, 0.2]], [[0, 1, 2]]),  # (3 * .38 - 1) / 2 = .07
    (PLess("norm"), [[0.8, 0.15, 0.05]], [[0]]),  # (3 * .665 - 1) / 2 = .4975
]


@pytest.mark.parametrize(("rule", "rows", "expected"), KEPT)
def test_kept_sets(rule, rows, expected):
    assert kept(rule, rows) == expected


def test_top_n_sigma():
    # deviation of (0, 1, 2, 3, 4) is sqrt(2): n = 1 keeps logits >= 2.586, n = 2 keeps >= 1.17
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])
    assert TopNSigma(1.0)(x).isfinite().tolist() == [[False, False, False, True, True]]
    assert TopNSigma(2.0)(x).isfinite().tolist() == [[False, False, True, True, True]]
    masked = torch.tensor([[0.0, -INF, 2.0, 4.0]])  # mean 2, deviation sqrt(8/3) = 1.63
    assert TopNSigma(1.3)(masked).isfinite().tolist() == [[False, False, True, True]]


def test_temperature_divides():
    x = torch.tensor([[1.0, -2.0, -INF]])
    assert Temperature(0.5)(x).tolist() == [[2.0, -4.0, -INF]]
    assert Temperature(1.0)(x) is x


def test_dynamic_temperature():
    p = [0.7, 0.2, 0.1]
    h = -sum(q * math.log(q) for q in p) / math.log(3)
    result = DynamicTemperature(0.5, 2.0)(logs([p]))
    expected = logs([p]) / (0.5 + 1.0 * h**2)
    torch.testing.assert_close(result, expected)
    flat = DynamicTemperature(0.5)(logs([[0.25] * 4]))  # full entropy: the high end, 1.5
    torch.testing.assert_close(flat, logs([[0.25] * 4]) / 1.5)


def test_edt():
    p = [0.5, 0.5]  # H = ln 2
    result = EDT(edt_theta=0.1, edt_base=0.8, temperature=0.9)(logs([p]))
    torch.testing.assert_close(result, logs([p]) / (0.9 * 0.8 ** (0.1 / math.log(2))))


def test_smoothing():
    x = torch.tensor([[3.0, 1.0, 2.0, -INF]])
    assert Smoothing(0.5)(x).tolist() == [[3.0, 1.0, 2.5, -INF]]  # 3 - .5 d^2
    # curve 2: k = .5, s = .5: 3 - .25 d^2 + .25 d^3
    assert Smoothing(0.5, 2.0)(x).tolist() == [[3.0, 0.0, 2.5, -INF]]


def test_xtc_drops_all_top_choices_but_the_least():
    row = [[0.4, 0.3, 0.15, 0.1, 0.05]]
    ctx = context([[0]])
    assert XTC(1.0, 0.12)(logs(row), ctx).isfinite().tolist() == [[False, False, True, True, True]]
    assert XTC(1.0, 0.35)(logs(row), ctx).isfinite().all()  # only one reaches the threshold
    guard = XTC(1.0, 0.12, xtc_guard=(1,))(logs(row), ctx)
    assert guard.isfinite().all()
    assert not XTC(1.0, 0.12, xtc_guard=(2,))(logs(row), ctx).isfinite().all()


def test_xtc_coin_has_its_probability_and_is_reproducible():
    rows = 4000
    ctx = Context(
        lengths=torch.arange(rows), seeds=torch.full((rows,), 5), streams=torch.zeros(rows, dtype=torch.int64)
    )
    x = logs([[0.6, 0.4]]).expand(rows, 2)
    hit = ~XTC(0.3, 0.2)(x, ctx)[:, 0].isfinite()
    assert torch.equal(hit, ~XTC(0.3, 0.2)(x, ctx)[:, 0].isfinite())
    # binomial(4000, .3) has deviation 29; 5 deviations: false alarm below 1e-6
    assert abs(int(hit.sum()) - 1200) < 145


def test_mirostat_2_steers_surprise():
    x = logs([[0.5, 0.25, 0.125, 0.125]])
    rule = Mirostat(2, 1.0, 0.5)  # mu starts at 2 bits: keeps p >= 1/4
    ctx = context([[0]])
    assert rule(x, ctx).isfinite().tolist() == [[True, True, False, False]]
    view = ctx.view(rule, None, None)
    view.values = vars_of(rule, x)
    memory = rule.start(view)
    view.memory = memory
    rule.apply(x, view)
    moved = rule.accept(memory, torch.tensor([1]), view)
    # the token's kept probability is 1/3: surprise log2(3), mu = 2 - .5 (log2(3) - 1)
    assert moved["mu"].item() == pytest.approx(2 - 0.5 * (math.log2(3) - 1), abs=1e-6)
    assert memory["mu"].item() == 2.0


def vars_of(rule, x):
    from handloom.pipeline.forms import values_of

    site = Context(device=x.device, vocab_size=x.shape[1])
    return values_of(rule, [rule.settings(None, i) for i in range(len(x))], [True] * len(x), site)


def test_mirostat_1_chooses_k_from_zipf():
    # p ~ 1/rank: every log-ratio is exactly the rank's, so the exponent is 1 and epsilon 0 is the limit
    # case; take 2
    vocab = 50
    x = (-2 * torch.arange(1, vocab + 1, dtype=torch.float64).log()).float()[None]
    mu = 3.0
    k = int(((1.0 * 2**mu) / (1 - vocab**-1.0)) ** 0.5)
    result = Mirostat(1, mu / 2)(x, context([[0]]))
    assert result.isfinite().sum().item() == k == 2


def test_adaptive_p_prefers_probabilities_near_its_aim():
    p = [0.6, 0.3, 0.1]
    result = AdaptiveP(0.3)(logs([p]))  # no past: the aim is the target itself
    expected = [5 - 10 * (abs(q - 0.3) / 0.3) ** 2 / (1 + abs(q - 0.3) / 0.3) for q in p]
    assert result[0].tolist() == pytest.approx(expected, abs=1e-4)


SCORES = torch.full((2, 6), 0.1)
SCORES[0, 0], SCORES[1, 5] = -0.1, 0.4


def test_repetition_penalty_oracle():
    result = RepetitionPenalty(2.0)(SCORES, context([[0, 1], [5, 0]]))
    assert result[0, :2].tolist() == pytest.approx([-0.2, 0.05])
    assert [result[1, 0].item(), result[1, 5].item()] == pytest.approx([0.05, 0.2])
    assert (result[0, 2:] == SCORES[0, 2:]).all()


def test_encoder_repetition_penalty_is_its_inverse_on_the_prompt():
    result = RepetitionPenalty(0.5, "prompt")(SCORES, context([[0, 1], [5, 0]], prompt=2))
    assert result[0, :2].tolist() == pytest.approx([-0.05, 0.2])
    assert [result[1, 0].item(), result[1, 5].item()] == pytest.approx([0.2, 0.8])


@pytest.mark.parametrize(
    ("scope", "window", "seen"),
    [
        ("auto", 0, {3: 2, 4: 1}),
        ("output", 0, {3: 2, 4: 1}),
        ("prompt", 0, {1: 2, 2: 1}),
        ("all", 0, {1: 2, 2: 1, 3: 2, 4: 1}),
        ("all", 4, {2: 1, 3: 2, 4: 1}),
        ("output", 2, {3: 1, 4: 1}),
        ("prompt", 5, {1: 1, 2: 1}),
    ],
)
def test_presence_and_frequency_by_hand(scope, window, seen):
    ctx = context([[1, 1, 2, 3, 3, 4]], prompt=3)
    if scope == "all" and window == 4:
        ctx = context([[1, 1, 2, 3, 4, 3]], prompt=3)
    if scope == "output" and window == 2:
        ctx = context([[1, 1, 2, 3, 3, 4]], prompt=3)
    x = torch.zeros(1, 8)
    presence = PresencePenalty(1.5, scope, window)(x, ctx)
    frequency = FrequencyPenalty(0.5, scope, window)(x, ctx)
    assert presence[0].tolist() == [-1.5 if i in seen else 0.0 for i in range(8)]
    assert frequency[0].tolist() == [-0.5 * seen.get(i, 0) for i in range(8)]


def test_penalties_skip_embeddings_and_foreign_ids():
    ctx = context([[-1, -1, 2, 99]], prompt=2)
    assert PresencePenalty(1.0, "all")(torch.zeros(1, 4), ctx).tolist() == [[0.0, 0.0, -1.0, 0.0]]


def test_negative_penalties_raise():
    ctx = context([[1]], prompt=0)
    assert FrequencyPenalty(-2.0)(torch.zeros(1, 3), ctx).tolist() == [[0.0, 2.0, 0.0]]


def test_no_repeat_ngram_oracle():
    rows = [[1, 1, 2, 1], [0, 1, 0, 1]]
    assert banned(NoRepeatNGram(2), rows, 3) == [{1, 2}, {0}]
    assert banned(NoRepeatNGram(3), rows, 3) == [set(), {0}]
    assert banned(NoRepeatNGram(3), [[1, 2, 5, 7, 8, 5, 1, 2]], 9) == [{5}]
    assert banned(NoRepeatNGram(3), [[1, 1]], 3) == [set()]
    assert banned(NoRepeatNGram(1), [[1, 4]], 6) == [{1, 4}]
    assert banned(NoRepeatNGram([1, 2]), [[1, 2], [1, 2, 1]], 4) == [{1, 2}, {2}]


DRY_TEXT = [1, 2, 3, 4, 9, 1, 2, 3]  # ... repeats 1 2 3, which 4 would extend: length 3


def test_dry_by_hand():
    loss = DRY(0.8, 1.75, 2)(torch.zeros(1, 10), context([DRY_TEXT]))[0]
    assert loss[4].item() == pytest.approx(-0.8 * 1.75)
    assert (loss[[0, 1, 2, 3, 5, 6, 7, 8, 9]] == 0).all()
    assert (DRY(0.8, 1.75, 4)(torch.zeros(1, 10), context([DRY_TEXT])) == 0).all()


def test_dry_takes_the_longest_match_and_honours_breakers_and_window():
    text = [2, 3, 5, 1, 2, 3, 4, 2, 3]  # 3 -> 5 with length 2 (2 3), 3 -> 4 with length 2
    loss = DRY(1.0, 2.0, 1)(torch.zeros(1, 10), context([text]))[0]
    assert loss.tolist() == [0, 0, 0, 0, -2.0, -2.0, 0, 0, 0, 0]
    assert DRY(1.0, 2.0, 1, dry_breakers=(2,))(torch.zeros(1, 10), context([text]))[0, 4].item() == -1.0
    assert (DRY(1.0, 2.0, 1, dry_breakers=(3,))(torch.zeros(1, 10), context([text])) == 0).all()
    assert DRY(1.0, 2.0, 1, dry_breakers=(4,))(torch.zeros(1, 10), context([text]))[0, 4].item() == 0.0
    windowed = DRY(1.0, 2.0, 1, dry_window=4)(torch.zeros(1, 10), context([text]))[0]
    assert windowed.tolist() == [0, 0, 0, 0, -1.0, 0, 0, 0, 0, 0]  # within 3 4 2 3 only "3" repeats


def test_dry_explains_unresolved_breakers():
    with pytest.raises(ParameterError, match="resolve"):
        DRY(1.0, dry_breakers=("\n",))(torch.zeros(1, 4), context([[1]]))


WORDS = [[1], [4], [1, 0], [0, 1, 2], [1, 3, 1, 3]]
TEXTS = [[0, 1, 3, 1], [0, 1, 0, 1]]


def test_bad_words_oracle():
    assert banned(BadWords(WORDS, spare_eos=True), TEXTS, 5, eos=[4]) == [{0, 1, 3}, {0, 1, 2}]
    assert banned(BadWords([[4]]), TEXTS, 5, eos=[4]) == [{4}, {4}]


def test_sequence_bias_oracle():
    bias = {(1,): 100.0, (4,): 100.0, (1, 0): -100.0, (0, 1, 2): -100.0, (1, 3, 1, 3): -100.0}
    result = SequenceBias(bias)(torch.zeros(2, 5), context(TEXTS))
    assert result.tolist() == [[-100, 100, 0, -100, 100], [-100, 100, -100, 0, 100]]


def test_prefix_function():
    rule = PrefixFunction(lambda sample, ids: {0: [0, 1], 1: [2, 3]}[int(ids[0])])
    result = rule(torch.zeros(2, 4), context([[0], [1]]))
    assert result.isfinite().tolist() == [[True, True, False, False], [False, False, True, True]]
    nothing = PrefixFunction(lambda sample, ids: [])(torch.zeros(1, 4), context([[0]]))
    assert (nothing == -INF).all()


def test_forced_tokens():
    rule = ForcedTokens({0: 2, 3: 1})
    assert rule(torch.ones(1, 4), context([[5, 5]], prompt=2)).tolist() == [[-INF, -INF, 0.0, -INF]]
    assert rule(torch.ones(1, 4), context([[5, 5, 5]], prompt=2)).tolist() == [[1.0] * 4]
    assert rule(torch.ones(1, 4), context([[5] * 5], prompt=2)).tolist() == [[-INF, 0.0, -INF, -INF]]


def test_exponential_decay_oracle():
    rule = ExponentialDecay((5, 1.1))
    x = torch.tensor([[2.0, 1.0], [-2.0, 1.0], [-INF, 1.0]])
    same = rule(x, context([[3] * 4] * 3, prompt=2, eos=[0]))
    assert same.tolist() == x.tolist()
    later = rule(x, context([[3] * 20] * 3, prompt=2, eos=[0]))  # 13 tokens beyond
    gain = 2 * (1.1**13 - 1)
    assert later[:2, 0].tolist() == pytest.approx([2 + gain, -2 + gain], rel=1e-5)
    assert later[2, 0] == -INF
    assert (later[:, 1] == 1).all()


def test_min_new_tokens_oracle():
    rule = MinNewTokens(3, stop_token_ids=(1,))
    masked = [banned(rule, [[2] * n], 4, prompt=5, eos=[0])[0] for n in (5, 6, 7, 8)]
    assert masked == [{0, 1}, {0, 1}, {0, 1}, set()]


def test_single_token_constraints():
    x = torch.zeros(1, 4)
    assert LogitBias({1: 2.5, 3: -INF})(x).tolist() == [[0.0, 2.5, 0.0, -INF]]
    assert BannedTokens((0, 2))(x).tolist() == [[-INF, 0.0, -INF, 0.0]]
    assert AllowedTokens((0, 2))(x).tolist() == [[0.0, -INF, 0.0, -INF]]
    assert SuppressFirst((1,))(x, context([[9]], prompt=1)).tolist() == [[0.0, -INF, 0.0, 0.0]]
    assert SuppressFirst((1,))(x, context([[9, 9]], prompt=1)).tolist() == [[0.0] * 4]


@pytest.mark.parametrize("rule", [BannedTokens((4,)), LogitBias({-1: 1.0}), AllowedTokens((0, 9))])
def test_ids_outside_the_vocabulary_are_named(rule):
    with pytest.raises(ParameterError, match="valid ids are 0 to 3"):
        rule(torch.zeros(1, 4))


def test_bitmask_layout_and_tail():
    allowed = torch.zeros(2, 70, dtype=torch.bool)
    allowed[0, [0, 31, 32, 69]] = True
    allowed[1, 5] = True
    mask = pack_bitmask(allowed)
    assert mask.dtype == torch.int32
    assert mask.tolist() == [[1 - 2**31, 1, 1 << 5], [32, 0, 0]]
    assert torch.equal(unpack_bitmask(mask, 70), allowed)
    assert torch.equal(unpack_bitmask(mask | torch.tensor([0, 0, -64], dtype=torch.int32), 70), allowed)
    result = Bitmask(lambda ctx: mask)(torch.zeros(2, 70))
    assert torch.equal(result.isfinite(), allowed)
    with pytest.raises(ParameterError, match="int32"):
        Bitmask(lambda ctx: mask.long())(torch.zeros(2, 70))


def test_bias_hook_and_watermark():
    assert (
        BiasHook(lambda ctx, vocab: torch.arange(vocab)[None])(torch.zeros(2, 3)).tolist() == [[0, 1, 2]] * 2
    )
    vocab = 200
    rule, text = Watermark(2.0), [1]
    for _ in range(60):
        x = torch.zeros(1, vocab)
        result = rule(x, context([text]))
        assert set(result.unique().tolist()) == {0.0, 2.0}
        green = (result[0] > 0).nonzero().flatten()
        text.append(int(green[len(text) % len(green)]))
    assert watermark_score(text, vocab) == pytest.approx(
        math.sqrt(60 * 3)
    )  # all green: (n - n/4) / sqrt(3n/16)
    plain = torch.randint(0, vocab, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    assert abs(watermark_score(plain, vocab)) < 4.5  # false alarm below 1e-5


def test_explicit_values_name_what_is_wrong():
    with pytest.raises(ParameterError, match="takes 1 values"):
        TopK(1, 2)
    with pytest.raises(ParameterError, match="no parameter 'p'"):
        TopP(p=0.5)
