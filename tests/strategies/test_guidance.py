"""Guidance: the exact law of every second distribution, by its paper's formula on cache-free logits."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import assert_nothing_leaked, recorded, text_engine, tiny_llama

from handloom import Engine, ParameterError, SamplingParams, laws
from handloom.laws import naive
from handloom.strategies import (
    classifier_free_guidance,
    context_aware,
    contrastive_decoding,
    dola,
    ensemble,
    experts,
    scored,
)
from handloom.strategies.guidance.scored import of_text

V, PROMPT, NEGATIVE = 11, [3, 5, 7, 1], [2, 9]
VECTORS = json.loads(Path(__file__).with_name("transformers_4_49.json").read_text())
PROMPTS = [[5, 9, 17], [40], [3, 3, 8, 21, 60, 2, 11]]


@pytest.fixture(scope="module")
def tiny():
    return Engine(tiny_llama(vocab_size=V, num_hidden_layers=3), slots=500)


@pytest.fixture(scope="module")
def others():
    return [Engine(tiny_llama(vocab_size=V, num_hidden_layers=n), slots=500) for n in (1, 2)]


@pytest.fixture(scope="module")
def wide():
    return Engine(tiny_llama(num_hidden_layers=3), slots=3)


def after(engine, ids, prompt=None):
    """Cache-free log-probabilities behind sequences, with another prompt in front if one is given."""
    ids = ids if prompt is None else [prompt + row[len(PROMPT) :] for row in ids]
    return naive.next_logits(engine.model, ids).log_softmax(-1)


def reward(texts):
    return [0.3 * (sum(ids) % 5) for ids in texts]


def jsd(p, q):
    m = (p + q) / 2
    return 0.5 * ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1))


def dola_by_definition(engine, ids, layers, alpha):
    model = engine.model
    out = model(torch.tensor(ids), use_cache=False, output_hidden_states=True)
    final = out.logits[:, -1].softmax(-1)
    early = torch.stack([model.lm_head(out.hidden_states[j][:, -1]).softmax(-1) for j in layers])
    chosen = torch.stack([jsd(final, q) for q in early]).argmax(0)
    q = early[chosen, torch.arange(len(ids))]
    return torch.where(final >= alpha * final.amax(-1, keepdim=True), (final / q).log(), -torch.inf)


def cut(scores, like, alpha):
    p = like.exp()
    return torch.where(p >= alpha * p.amax(-1, keepdim=True), scores, -torch.inf)


def topk(scores, k):
    return torch.where(scores >= scores.topk(k).values[:, -1:], scores, -torch.inf)


# strategy, its options, and its formula: (engine, others, ids) -> logits behind each
CASES = {
    "cfg": (
        classifier_free_guidance,
        lambda o: {"negative_prompts": [NEGATIVE], "guidance_scale": 2.5},
        lambda e, o, ids: after(e, ids, NEGATIVE) + 2.5 * (after(e, ids) - after(e, ids, NEGATIVE)),
    ),
    "cfg from the last token": (
        classifier_free_guidance,
        lambda o: {"guidance_scale": 1.5},
        lambda e, o, ids: 1.5 * after(e, ids) - 0.5 * after(e, ids, PROMPT[-1:]),
    ),
    "cad": (
        context_aware,
        lambda o: {"questions": [NEGATIVE], "alpha": 0.5},
        lambda e, o, ids: 1.5 * after(e, ids) - 0.5 * after(e, ids, NEGATIVE),
    ),
    "contrastive": (
        contrastive_decoding,
        lambda o: {"amateur": o[0], "alpha": 0.2, "beta": 0.7},
        lambda e, o, ids: cut(1.7 * after(e, ids) - 0.7 * after(o[0], ids), after(e, ids), 0.2),
    ),
    "contrastive, original": (
        contrastive_decoding,
        lambda o: {"amateur": o[0], "alpha": 0.1, "amateur_temperature": 0.5, "original": True},
        lambda e, o, ids: cut(
            after(e, ids) - (after(o[0], ids) / 0.5).log_softmax(-1), after(e, ids), 0.1
        ),
    ),
    "dexperts": (
        experts,
        lambda o: {"expert": o[0], "anti_expert": o[1], "alpha": 1.3},
        lambda e, o, ids: after(e, ids) + 1.3 * (after(o[0], ids) - after(o[1], ids)),
    ),
    "anti-expert alone": (
        experts,
        lambda o: {"anti_expert": o[1], "alpha": 0.4},
        lambda e, o, ids: after(e, ids) - 0.4 * after(o[1], ids),
    ),
    "product": (
        ensemble,
        lambda o: {"others": [o[0], (o[1], [NEGATIVE])]},
        lambda e, o, ids: (after(e, ids) + after(o[0], ids) + after(o[1], ids, NEGATIVE)) / 3,
    ),
    "mixture": (
        ensemble,
        lambda o: {"others": [o[0]], "weights": [3.0, 1.0], "kind": "mixture"},
        lambda e, o, ids: (0.75 * after(e, ids).exp() + 0.25 * after(o[0], ids).exp()).log(),
    ),
    "dola": (
        dola,
        lambda o: {"layers": [0, 1, 2], "alpha": 0.1},
        lambda e, o, ids: dola_by_definition(e, ids, [0, 1, 2], 0.1),
    ),
    "fudge": (
        scored,
        lambda o: {"scorer": reward, "k": 6, "weight": 1.5},
        lambda e, o, ids: topk(after(e, ids), 6)
        + 1.5 * torch.tensor([reward([[*row, v] for v in range(V)]) for row in ids]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_exact_law(tiny, others, name):
    """Two tokens of eleven, with a temperature and a bias behind the guidance; false alarms one in 10^6."""
    strategy, options, formula = CASES[name]
    given = options(others)

    def run(engine, prompts, params):
        own = {k: v * len(prompts) if k in ("negative_prompts", "questions") else v for k, v in given.items()}
        if "others" in own:
            own["others"] = [
                (o[0], o[1] * len(prompts)) if isinstance(o, tuple) else o for o in own["others"]
            ]
        return strategy(engine, prompts, params, **own)

    with torch.no_grad():
        laws.exact_distribution(
            run, tiny, PROMPT, SamplingParams(temperature=1.3, logit_bias={4: 1.0}, max_new_tokens=2),
            draws=1000, batch=1000, next_logits=lambda ids: formula(tiny, others, ids),
        )  # fmt: skip
    for engine in (tiny, *others):
        assert_nothing_leaked(engine)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (classifier_free_guidance, lambda e, o: {"guidance_scale": 1.0}),
        (context_aware, lambda e, o: {"questions": PROMPTS[::-1], "alpha": 0.0}),
        (contrastive_decoding, lambda e, o: {"amateur": o, "alpha": 1.0}),
        (contrastive_decoding, lambda e, o: {"amateur": o, "alpha": 0.0, "beta": 0.0}),
        (experts, lambda e, o: {"expert": o, "alpha": 0.0}),
        (experts, lambda e, o: {"expert": o, "anti_expert": o, "alpha": 2.0}),
        (ensemble, lambda e, o: {"others": [e, e]}),
        (ensemble, lambda e, o: {"others": [o], "weights": [1, 0], "kind": "mixture"}),
        (ensemble, lambda e, o: {"others": [o], "weights": [1, 0]}),
        (dola, lambda e, o: {"alpha": 1.0}),
        (scored, lambda e, o: {"scorer": reward, "weight": 0.0}),
        (scored, lambda e, o: {"scorer": reward, "k": 1}),
    ],
)
def test_settings_that_change_nothing(wide, strategy, options):
    """Where the second distribution has no say, greedy tokens are those of `generate`."""
    other = Engine(tiny_llama(num_hidden_layers=1))
    plain = wide.generate(PROMPTS, max_new_tokens=6)
    guided = strategy(wide, PROMPTS, max_new_tokens=6, **options(wide, other))
    assert [r.token_ids for r in guided] == [r.token_ids for r in plain]


def test_guidance_of_zero_decodes_the_negative_prompts(wide):
    guided = classifier_free_guidance(
        wide, PROMPTS, negative_prompts=PROMPTS[::-1], guidance_scale=0.0, max_new_tokens=6
    )
    assert [r.token_ids for r in guided] == [
        r.token_ids for r in wide.generate(PROMPTS[::-1], max_new_tokens=6)
    ]


@pytest.mark.parametrize(
    "name", ["cfg from the last token", "contrastive", "dexperts", "mixture", "dola", "fudge"]
)
def test_batch_equals_solo_and_sampling_pipelines_compose(wide, name):
    strategy, options, _ = CASES[name]
    beside = [Engine(tiny_llama(num_hidden_layers=n)) for n in (1, 2)]
    params = [
        SamplingParams(max_new_tokens=5, temperature=1.0, top_p=0.9, seed=1, n=2),
        SamplingParams(max_new_tokens=7, repetition_penalty=1.5),
        SamplingParams(max_new_tokens=4, temperature=0.8, min_p=0.05, seed=3, stop_token_ids=[2, 5, 8]),
    ]
    laws.batch_equals_solo(strategy, wide, PROMPTS, params, **options(beside))


def test_every_prompt_has_its_own_question(wide):
    """Context-aware decoding of three prompts with three questions: each as it is alone."""
    questions, warm = [[9], [40, 2], [11]], {"temperature": 1.0, "seed": 4, "max_new_tokens": 5}
    together = context_aware(wide, PROMPTS, questions=questions, **warm)
    for prompt, question, result in zip(PROMPTS, questions, together, strict=True):
        (alone,) = context_aware(
            wide, [prompt], SamplingParams(**{**warm, "seed": result.seed}), questions=[question]
        )
        assert result.token_ids == alone.token_ids


@pytest.mark.parametrize("scale", [0.5, 2.0, 5.0])
def test_classifier_free_guidance_is_that_of_transformers(wide, scale):
    ours = classifier_free_guidance(wide, PROMPTS, guidance_scale=scale, max_new_tokens=8)
    negated = classifier_free_guidance(
        wide, PROMPTS, negative_prompts=[[1, 2]], guidance_scale=scale, max_new_tokens=8
    )
    options = {"max_new_tokens": 8, "do_sample": False, "guidance_scale": scale, "pad_token_id": 0}
    for prompt, one, other in zip(PROMPTS, ours, negated, strict=True):
        ids = torch.tensor([prompt])
        theirs = wide.model.generate(ids, **options)[0, len(prompt) :].tolist()
        assert one.token_ids == theirs
        theirs = wide.model.generate(ids, negative_prompt_ids=torch.tensor([[1, 2]]), **options)
        assert other.token_ids == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("case", VECTORS["dola"], ids=lambda case: str(case["dola_layers"]))
def test_dola_is_that_of_transformers(case):
    engine = Engine(tiny_llama(num_hidden_layers=6, tie_word_embeddings=case["tied"]))
    results = dola(
        engine, [prompt for prompt, _ in case["runs"]], layers=case["dola_layers"], rule="code",
        repetition_penalty=case["repetition_penalty"], max_new_tokens=8,
    )  # fmt: skip
    assert [r.token_ids for r in results] == [tokens for _, tokens in case["runs"]]


def test_a_step_by_hand():
    """Three tokens: p_e = (.5, .4, .1), p_a = (.8, .1, .1); 2210.15097 takes token 1, 0.05 below 0.1 * max is cut."""
    expert, amateur = torch.tensor([0.5, 0.46, 0.04]).log(), torch.tensor([0.8, 0.19, 0.01]).log()
    engines = [Engine(tiny_llama(vocab_size=3)) for _ in range(2)]
    for engine, law in zip(engines, (expert, amateur), strict=True):
        now = engine.prefill([[0]]).logits[0]
        with torch.no_grad():  # the same logits behind every prompt of one token
            hidden = engine.prefill([[0]], hidden=True).hidden()[0, -1]
            engine.model.lm_head.weight += torch.outer(law - now, hidden / hidden.square().sum())
    (result,) = contrastive_decoding(
        engines[0], [[0]], amateur=engines[1], alpha=0.1, original=True, max_new_tokens=1
    )
    assert result.token_ids == [1]
    # log(.46/.19) against log(.5/.8); token 2, for which log(.04/.01) is larger than both, is below .1 * .5
    margin = math.log(0.46 / 0.19) - math.log(0.46 / 0.19 + 0.5 / 0.8)
    assert result.logprobs[0] == pytest.approx(margin, abs=1e-4)
    assert result.raw_logprobs[0] == pytest.approx(math.log(0.46), abs=1e-4)


def test_passes_a_token(wide):
    """Both prompts of the model in one pass a token, none of them wider than the rows that run."""
    with recorded(wide.model) as passes:
        classifier_free_guidance(wide, [[1, 2, 3]], negative_prompts=[[4, 5]], max_new_tokens=5)
    assert passes.shapes == [(1, 3), (1, 2)] + [(2, 1)] * 4


def test_a_scorer_of_text():
    engine = text_engine()
    wish = of_text(engine, lambda text: 50.0 * text.count("e"))
    (result,) = scored(engine, "The tr", scorer=wish, k=400, max_new_tokens=3)
    assert result.text.count("e") >= 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: contrastive_decoding(e, PROMPTS, amateur=e, alpha=2), r"alpha in \[0, 1\]"),
        (lambda e: ensemble(e, PROMPTS, others=[e], weights=[1]), "2 models takes as many weights"),
        (lambda e: ensemble(e, PROMPTS, others=[e], weights=[1, -1], kind="mixture"), "at least 0"),
        (lambda e: ensemble(e, PROMPTS, others=[e], kind="sum"), "kind='sum'"),
        (lambda e: dola(e, PROMPTS, layers=[9]), r"not \"low\", \"high\" or numbers in 0..2"),
        (lambda e: dola(e, PROMPTS, rule="x"), "rule 'paper' or 'code'"),
        (lambda e: scored(e, PROMPTS, scorer=reward, k=0), "k >= 1"),
        (lambda e: scored(e, PROMPTS, scorer=lambda texts: [1.0]), "numbers for 303 texts"),
    ],
)
def test_out_of_range_is_an_error(wide, call, message):
    with pytest.raises(ParameterError, match=message):
        call(wide)
