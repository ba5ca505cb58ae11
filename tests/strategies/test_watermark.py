"""Watermarks: transformers' lists and tournaments, laws over keys, and p-values that are uniform without a mark."""

import copy
import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny_llama
from transformers import SynthIDTextWatermarkingConfig, WatermarkDetector, WatermarkingConfig
from transformers.generation import (
    BayesianDetectorConfig,
    BayesianDetectorModel,
    SynthIDTextWatermarkDetector,
    SynthIDTextWatermarkLogitsProcessor,
)

from handloom import Context, Engine, ParameterError, SamplingParams, laws
from handloom.strategies import (
    GreenList,
    Tournament,
    Unigram,
    contrastive_decoding,
    detect_exponential,
    exponential_watermark,
)
from handloom.strategies.watermark.detection import binomial_tail, hypergeometric_tail

V = 101
PROMPTS = [[5, 9, 17], [40, 2], [3, 3, 8, 21, 60, 2, 11]]
WARM = {"temperature": 1.2, "seed": 5, "max_new_tokens": 60}


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_llama())


@pytest.fixture(scope="module")
def plain(engine):
    """Unmarked texts."""
    asked = [SamplingParams(temperature=1.2, seed=i, max_new_tokens=60) for i in range(60)]
    return engine.generate([[i] for i in range(60)], asked)


# -- against transformers


SCHEMES = [
    {"seeding_scheme": "lefthash"},
    {"seeding_scheme": "lefthash", "greenlist_ratio": 0.5, "bias": 4.0, "hashing_key": 12345},
    {"seeding_scheme": "selfhash", "context_width": 1},
    {"seeding_scheme": "selfhash", "context_width": 3, "bias": 3.0},
]


@pytest.mark.parametrize("options", SCHEMES, ids=str)
def test_green_lists_are_those_of_transformers(engine, options):
    config = WatermarkingConfig(**options)
    mark = GreenList(V, **options)
    results = engine.generate(PROMPTS, max_new_tokens=12, processors=[mark])
    for prompt, result in zip(PROMPTS, results, strict=True):
        if len(prompt) < options.get("context_width", 1):
            continue
        theirs = engine.model.generate(
            torch.tensor([prompt]),
            watermarking_config=config,
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=0,
        )
        assert result.token_ids == theirs[0, len(prompt) :].tolist()
    without = copy.deepcopy(engine.model.config)
    without.bos_token_id = -1  # this detector compares it, so None will not do
    detector = WatermarkDetector(without, "cpu", config, ignore_repeated_ngrams=True)
    for result in results:
        found, theirs = mark.detect(result), detector(torch.tensor([result.token_ids]), return_dict=True)
        assert (found.count, found.score) == (theirs.num_tokens_scored[0], theirs.num_green_tokens[0])


def test_tournaments_are_those_of_transformers():
    keys = [654, 400, 836, 123, 340, 443, 597, 160, 57, 29]
    config = SynthIDTextWatermarkingConfig(keys=keys, ngram_len=4)
    theirs = SynthIDTextWatermarkLogitsProcessor(
        ngram_len=4, keys=keys, sampling_table_size=config.sampling_table_size, sampling_table_seed=0,
        context_history_size=1024, device="cpu",
    )  # fmt: skip
    engine = Engine(tiny_llama())
    mark, seen, inside = Tournament(keys, ngram_len=4), [], []

    def watch(logits, context):
        seen.append(logits.clone())
        return logits

    def keep(logits, context):
        inside.append(logits.clone())
        return logits

    (result,) = engine.generate([[5, 9]], processors=[watch, mark, keep], **(WARM | {"max_new_tokens": 12}))
    text = [5, 9]
    for before, after, token in zip(seen, inside, result.token_ids, strict=True):
        wanted = theirs(torch.tensor([text]), before.clone())
        torch.testing.assert_close(after.softmax(-1), wanted.softmax(-1), rtol=1e-4, atol=1e-6)
        text.append(token)


def test_the_detector_of_transformers_finds_the_tournament(engine, plain):
    """Its Bayesian posterior, with equal chances before and a likelihood set by hand: P(g = 1 | marked) = 0.625."""
    keys = list(range(100, 130))
    marked = engine.generate(PROMPTS, processors=[Tournament(keys, ngram_len=3)], **WARM)
    module = BayesianDetectorModel(BayesianDetectorConfig(watermarking_depth=len(keys)))
    with torch.no_grad():
        for name, value in (("beta", 0.0), ("delta", 0.0)):
            getattr(module.likelihood_model_watermarked, name).fill_(value)
        module.prior.fill_(0.5)
    bits = SynthIDTextWatermarkLogitsProcessor(
        ngram_len=3, keys=keys, sampling_table_size=2**16, sampling_table_seed=0, context_history_size=1024,
        device="cpu",
    )  # fmt: skip
    detector = SynthIDTextWatermarkDetector(module, bits, SimpleNamespace(eos_token_id=-1))
    with torch.no_grad():
        posterior = [float(detector(torch.tensor([text.token_ids]))[0]) for text in (*marked, *plain[:5])]
    assert min(posterior[:3]) > 0.999
    assert max(posterior[3:]) < 0.001


# -- laws


def test_the_tournament_keeps_the_law_over_keys():
    """Seven tokens, 2,000 keys of four layers: the mean of the marked law is the law, within five standard errors."""
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0, 1.1, -0.4, 0.7]])
    context = Context(
        tokens=torch.tensor([[1, 2, 3, 4]]), lengths=torch.tensor([4]), prompt_lengths=torch.tensor([0])
    )
    source = torch.Generator().manual_seed(1)
    keys = torch.randint(2**40, (2000, 4), generator=source).tolist()
    found = torch.stack([Tournament(each, ngram_len=3).apply(logits, context)[0].exp() for each in keys])
    error = (found.mean(0) - logits[0].softmax(-1)).abs() / (found.std(0) / math.sqrt(2000))
    assert float(error.max()) < 5
    assert float(found.std(0).max()) > 0.05


def test_exponential_marks_keep_the_law_over_keys():
    """A first token as it comes, then one that a key draws: 300 keys, chi-square, false alarms one in 10^6."""
    tiny = Engine(tiny_llama(vocab_size=5))
    params = SamplingParams(temperature=1.1, max_new_tokens=2)
    law, counts = laws.sequence_law(tiny, [1, 2], params), Counter()
    for key in range(300):
        (result,) = exponential_watermark(tiny, [[1, 2]], params.replace(seed=key // 6), key=key, width=1)
        counts[tuple(result.token_ids)] += 1
    first = Counter()
    for (a, _), n in counts.items():
        first[a] += n
    conditional = {
        y: first[y[0]] / 300 * p / sum(q for z, q in law.items() if z[0] == y[0]) for y, p in law.items()
    }
    conditional = {y: p for y, p in conditional.items() if p > 0}
    assert laws.chi_square(counts, conditional, 300) > 1e-6


def test_one_key_goes_on_in_the_same_way(engine):
    """Behind the first `width` tokens the key decides, whatever the seed."""
    asked = {"temperature": 1.0, "max_new_tokens": 12, "width": 2, "forced_tokens": {0: 7, 1: 8}}
    one, two = (exponential_watermark(engine, [[5, 9]], seed=seed, **asked)[0].token_ids for seed in (1, 2))
    assert one == two != exponential_watermark(engine, [[5, 9]], seed=1, key=1, **asked)[0].token_ids


# -- detection


MARKS = {
    "green list": (GreenList(V, greenlist_ratio=0.5, bias=3.0), None),
    "self-hash": (GreenList(V, bias=4.0, seeding_scheme="selfhash", context_width=2), None),
    "unigram": (Unigram(V, bias=3.0), None),
    "tournament": (Tournament(range(100, 130), ngram_len=3), None),
}


@pytest.mark.parametrize("name", [*MARKS, "exponential"])
def test_marked_texts_are_found_and_others_are_not(engine, plain, name):
    if name == "exponential":
        marked = exponential_watermark(engine, PROMPTS, width=2, **WARM)
        detect = lambda text: detect_exponential(text, width=2)  # noqa: E731
    else:
        mark, _ = MARKS[name]
        marked, detect = engine.generate(PROMPTS, processors=[mark], **WARM), mark.detect
    assert max(detect(text).p_value for text in marked) < 1e-4
    assert min(detect(text).p_value for text in plain) > 1e-5
    assert abs(sum(detect(text).z for text in plain)) / math.sqrt(len(plain)) < 5


@pytest.mark.parametrize("name", ["green list", "unigram", "tournament", "exponential"])
def test_p_values_without_a_mark(plain, name):
    """60 texts under 10 other keys: shares below 1 %, 10 % and 50 % at most what they say, within five deviations."""
    make = {
        "green list": lambda key: GreenList(V, greenlist_ratio=0.5, hashing_key=key).detect,
        "unigram": lambda key: Unigram(V, key=key).detect,
        "tournament": lambda key: Tournament(range(key, key + 8), ngram_len=3).detect,
        "exponential": lambda key: lambda text: detect_exponential(text, key=key, width=2),
    }[name]
    found = [
        detect(text).p_value for detect in (make(1000 + 7919 * key) for key in range(10)) for text in plain
    ]
    for level in (0.01, 0.1, 0.5):
        share, slack = (
            sum(p <= level for p in found) / len(found),
            5 * math.sqrt(level * (1 - level) / len(found)),
        )
        assert share <= level + slack
        assert share >= level / 2 - slack  # discrete p-values fall short of it, but not by much


def test_tails_by_hand():
    assert binomial_tail(2, 3, 0.5) == pytest.approx(0.5)
    assert binomial_tail(0, 3, 0.5) == 1
    assert binomial_tail(4, 3, 0.5) == 0
    assert hypergeometric_tail(2, 2, 2, 4) == pytest.approx(1 / 6)
    assert hypergeometric_tail(0, 2, 2, 4) == pytest.approx(1)
    assert Unigram(V).detect([]).p_value == 1
    assert detect_exponential([1]).p_value == 1


def test_marks_go_with_any_strategy(engine):
    mark = GreenList(V, greenlist_ratio=0.5, bias=6.0)
    (result,) = contrastive_decoding(
        engine,
        PROMPTS[:1],
        amateur=Engine(tiny_llama(num_hidden_layers=1)),
        processors=[mark],
        max_new_tokens=40,
    )
    assert mark.detect(result).p_value < 1e-3


def test_batch_equals_solo(engine):
    params = [SamplingParams(max_new_tokens=n, temperature=1.0, seed=n) for n in (5, 9, 7)]
    laws.batch_equals_solo(exponential_watermark, engine, PROMPTS, params, width=1)
    for mark, _ in MARKS.values():
        laws.batch_equals_solo(Engine.generate, engine, PROMPTS, params, processors=[mark])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: GreenList(V, seeding_scheme="x"), "'lefthash' or 'selfhash'"),
        (lambda e: Unigram(V, ratio=1), "between 0 and 1"),
        (lambda e: Tournament([]), "takes keys"),
        (lambda e: exponential_watermark(e, PROMPTS), "temperature > 0"),
        (lambda e: exponential_watermark(e, PROMPTS, width=0), "width >= 1"),
    ],
)
def test_out_of_range_is_an_error(engine, call, message):
    with pytest.raises(ParameterError, match=message):
        call(engine)
