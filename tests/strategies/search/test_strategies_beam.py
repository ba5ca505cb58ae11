"""Beam search against `model.generate(num_beams=...)`, and the law of sampled beams."""

import math
from collections import Counter
from itertools import permutations, product

import pytest
import torch
from helpers import assert_nothing_leaked, tiny_llama
from transformers import GenerationConfig

from handloom import Engine, ParameterError, Processor, SamplingParams, laws
from handloom.laws import naive
from handloom.strategies import beam_search

PROMPTS = [[5, 9, 17], [40], [3, 3, 8, 21, 60, 2, 11, 3, 3], [7, 70]]
EOS = [4, 9]


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_llama())


@pytest.fixture(scope="module")
def ending():
    engine = Engine(tiny_llama(vocab_size=13, eos_token_id=EOS))
    assert engine.eos_token_ids == set(EOS)
    return engine


def theirs(model, prompt, **kwargs):
    """New tokens of each sequence that transformers returns, without the padding behind its end."""
    eos = kwargs.get("eos_token_id", model.generation_config.eos_token_id) or []
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        **kwargs,
    )
    sequences = []
    for row in output.sequences[:, len(prompt) :].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
        sequences.append(row[:end])
    return sequences, output.sequences_scores.tolist()


def agree(engine, prompts, ours, theirs_too, length_penalty=1.0):
    """Tokens and scores of all prompts equal transformers', prompt by prompt."""
    per_prompt = len(ours) // len(prompts)
    for i, prompt in enumerate(prompts):
        mine = ours[i * per_prompt : (i + 1) * per_prompt]
        tokens, scores = theirs_too(prompt)
        assert [result.token_ids for result in mine] == tokens
        assert [(result.request, result.sample) for result in mine] == [(i, k) for k in range(per_prompt)]
        for result, score in zip(mine, scores, strict=True):
            score = pytest.approx(score, abs=1e-4, rel=1e-6)  # theirs is a float32, and may be large
            assert sum(result.logprobs) / result.n_new**length_penalty == score
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("num_beams", [1, 2, 5])
def test_equals_generate_without_ends(engine, num_beams):
    ours = beam_search(
        engine, PROMPTS, num_beams=num_beams, num_return_sequences=num_beams, max_new_tokens=10
    )
    if num_beams == 1:  # transformers then decodes greedily, without scores
        assert [r.token_ids for r in ours] == [
            r.token_ids for r in engine.generate(PROMPTS, max_new_tokens=10)
        ]
        return
    options = {"num_beams": num_beams, "num_return_sequences": num_beams, "max_new_tokens": 10}
    agree(engine, PROMPTS, ours, lambda prompt: theirs(engine.model, prompt, do_sample=False, **options))
    assert {result.finish_reason for result in ours} == {"length"}


@pytest.mark.parametrize(
    ("early_stopping", "length_penalty"),
    list(product([False, True, "never"], [-1.0, 0.0, 1.0, 2.5])),
)
def test_equals_generate_with_ends(ending, early_stopping, length_penalty):
    prompts = [[1, 2, 3], [5], [7, 7, 8, 1, 0], [12, 3]]
    options = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": length_penalty}
    options |= {"early_stopping": early_stopping, "max_new_tokens": 12}
    ours = beam_search(ending, prompts, **options)
    agree(
        ending,
        prompts,
        ours,
        lambda prompt: theirs(ending.model, prompt, do_sample=False, **options),
        length_penalty,
    )
    assert "eos" in {result.finish_reason for result in ours}


def test_processors_act_on_log_probabilities_as_in_transformers(ending):
    prompts = [[1, 2, 3, 1, 2], [5, 6], [7, 7, 8, 1, 0]]
    ours = beam_search(
        ending, prompts, num_beams=4, max_new_tokens=10, repetition_penalty=1.7, no_repeat_ngram_size=2,
        min_new_tokens=4,
    )  # fmt: skip
    options = {"num_beams": 4, "max_new_tokens": 10, "min_new_tokens": 4, "do_sample": False}
    options |= {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    agree(ending, prompts, ours, lambda prompt: theirs(ending.model, prompt, **options))
    plain = beam_search(ending, prompts, num_beams=4, max_new_tokens=10)
    assert [r.token_ids for r in ours] != [r.token_ids for r in plain]


def test_stop_token_ids_end_like_eos_and_ignore_eos_does_not_end(ending):
    prompts = [[1, 2, 3], [7, 7, 8, 1, 0]]
    ours = beam_search(ending, prompts, num_beams=3, max_new_tokens=8, ignore_eos=True, stop_token_ids=[2])
    options = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "eos_token_id": [2]}
    agree(ending, prompts, ours, lambda prompt: theirs(ending.model, prompt, **options))


def test_each_prompt_may_have_its_own_parameters(ending):
    prompts = [[1, 2, 3], [5], [7, 7, 8, 1, 0]]
    params = [
        SamplingParams(max_new_tokens=3),
        SamplingParams(max_new_tokens=9, repetition_penalty=1.5),
        SamplingParams(max_length=11, ignore_eos=True),
    ]
    together = beam_search(ending, prompts, params, num_beams=3)
    for prompt, each, result in zip(prompts, params, together, strict=True):
        assert beam_search(ending, [prompt], each, num_beams=3)[0].token_ids == result.token_ids
    assert len(prompts[2]) + together[2].n_new <= 11


def test_batch_equals_solo_when_sampling(ending):
    params = SamplingParams(temperature=1.3, top_k=5, seed=3, max_new_tokens=8)
    laws.batch_equals_solo(beam_search, ending, [[1, 2, 3], [5], [12, 3]], params, num_beams=3)


def better_of_two(p):
    """The law of the likelier of two tokens drawn without replacement from p."""
    law = [0.0] * len(p)
    for first, second in permutations(range(len(p)), 2):
        law[first if p[first] > p[second] else second] += p[first] * p[second] / (1 - p[first])
    assert math.isclose(sum(law), 1.0, rel_tol=1e-5)
    return law


def test_sampled_candidates_are_drawn_without_replacement():
    """A beam of 1 draws two candidates and goes on with the likelier, as in transformers; at the end the one
    drawn first counts. A beam of 2 returns the likelier of both. False alarms: 2e-6.
    """
    engine, prompt, draws = Engine(tiny_llama(vocab_size=5)), [1, 2], 500

    def p(ids):
        return naive.next_logits(engine.model, [ids])[0].div(2.0).softmax(-1).tolist()

    one = {}
    for first, weight in enumerate(better_of_two(p(prompt))):
        one |= {(first, second): weight * q for second, q in enumerate(p([*prompt, first]))}
    two = {(token,): weight for token, weight in enumerate(better_of_two(p(prompt)))}
    for num_beams, law in ((1, one), (2, two)):
        depth = len(next(iter(law)))
        asked = [SamplingParams(temperature=2.0, max_new_tokens=depth, seed=s) for s in range(draws)]
        results = beam_search(engine, [prompt] * draws, asked, num_beams=num_beams)
        counts = Counter(tuple(result.token_ids) for result in results)
        assert laws.chi_square(counts, law, draws) > 1e-6


class Parity(Processor):
    """Favours token 2 after an even sum of output tokens and token 3 after an odd one; the sum is its memory."""

    def start(self, context):
        return {"sum": torch.zeros_like(context.lengths)}

    def apply(self, logits, context):
        context.note(context.memory["sum"])
        return favoured(logits, context.memory["sum"])

    def accept(self, memory, tokens, context):
        assert torch.equal(context.noted(), memory["sum"])
        return {"sum": memory["sum"] + tokens}


def favoured(logits, sums):
    bias = torch.zeros_like(logits)
    return logits + bias.scatter_(1, 2 + sums[:, None] % 2, 6.0)


def from_history(logits, context):
    sums = [
        int(row[start:end].sum())
        for row, start, end in zip(context.history, context.prompt_lengths, context.lengths, strict=True)
    ]
    return favoured(logits, torch.tensor(sums))


def test_memory_of_processors_follows_the_beams(ending):
    prompts = [[1, 2, 3], [5], [12, 3]]
    with_memory = SamplingParams(processors=[Parity()], max_new_tokens=9)
    without = SamplingParams(processors=[from_history], max_new_tokens=9)
    options = {"num_beams": 4, "num_return_sequences": 2}
    one = beam_search(ending, prompts, with_memory, **options)
    other = beam_search(ending, prompts, without, **options)
    assert [r.token_ids for r in one] == [r.token_ids for r in other]
    assert {2, 3} <= {token for result in one for token in result.token_ids}


def test_no_possible_sequence_is_an_error_of_that_prompt_alone(ending):
    ban_all = SamplingParams(max_new_tokens=4, allowed_tokens=[3], bad_words=[[3]])
    bad, good = beam_search(ending, [[1, 2], [5]], [ban_all, SamplingParams(max_new_tokens=4)], num_beams=2)
    assert bad.finish_reason == "error"
    assert good.finish_reason in ("eos", "length")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3"),
        ({"num_beams": 0}, "num_return_sequences=1 is not from 1 to num_beams=0"),
        ({"early_stopping": "always"}, "early_stopping='always'"),
        ({"n": 2}, "n=2"),
        ({"max_time": 1.0}, "max_time=1.0"),
        ({"logprobs": 3}, "logprobs"),
    ],
)
def test_what_it_cannot_do_is_an_error(engine, options, message):
    with pytest.raises(ParameterError, match=message):
        beam_search(engine, [[1, 2]], **options)


CONFIGS = [
    {"num_beams": 3, "length_penalty": -1.5, "num_return_sequences": 3},
    {"num_beams": 3, "early_stopping": True, "num_return_sequences": 2},
    {"num_beams": 2, "early_stopping": "never", "length_penalty": 2.5},
    {"num_beams": 3, "renormalize_logits": True, "repetition_penalty": 2.5, "num_return_sequences": 3},
]


@pytest.mark.parametrize("settings", CONFIGS)
def test_a_generation_config_tells_what_the_arguments_do_not(ending, settings):
    prompts = [[1, 2, 3, 1, 2], [5], [7, 7, 8, 1, 0], [12, 3]]
    config = GenerationConfig(max_new_tokens=12, pad_token_id=0, **settings)
    ours = beam_search(ending, prompts, config)
    agree(
        ending,
        prompts,
        ours,
        lambda prompt: theirs(ending.model, prompt, do_sample=False, max_new_tokens=12, **settings),
        settings.get("length_penalty", 1.0),
    )
    assert len(ours) == len(prompts) * settings.get("num_return_sequences", 1)
    as_dict = beam_search(ending, prompts, {"max_new_tokens": 12, "profile": "hf", **settings})
    assert [r.token_ids for r in as_dict] == [r.token_ids for r in ours]


def test_renormalised_scores_differ(ending):
    options = {"num_beams": 3, "max_new_tokens": 8, "repetition_penalty": 2.5}
    plain, again = (
        beam_search(ending, [[1, 2, 1, 2]], renormalize_logits=on, **options) for on in (False, True)
    )
    assert plain[0].logprobs != again[0].logprobs
    assert all(logprob <= 0 for logprob in again[0].logprobs)


def test_an_argument_wins_over_the_config_and_configs_must_agree(ending):
    config = GenerationConfig(max_new_tokens=6, num_beams=3, num_return_sequences=3, length_penalty=-2.0)
    ours = beam_search(ending, [[1, 2, 3]], config, num_beams=2, num_return_sequences=1, length_penalty=1.0)
    plain = beam_search(ending, [[1, 2, 3]], num_beams=2, max_new_tokens=6)
    assert [r.token_ids for r in ours] == [r.token_ids for r in plain]
    assert config.num_beams == 3  # what was passed stays as it was
    other = GenerationConfig(max_new_tokens=6, num_beams=2)
    with pytest.raises(ParameterError, match=r"num_beams differs between the prompts: \[3, 2\]"):
        beam_search(ending, [[1], [2]], [config, other])


def test_the_models_own_config_is_taken_when_asked(ending):
    before = ending.model.generation_config
    ending.model.generation_config = GenerationConfig(num_beams=3, num_return_sequences=2, eos_token_id=EOS)
    try:
        ours = beam_search(ending, [[1, 2, 3]], defaults="model", max_new_tokens=6)
    finally:
        ending.model.generation_config = before
    plain = beam_search(ending, [[1, 2, 3]], num_beams=3, num_return_sequences=2, max_new_tokens=6)
    assert [r.token_ids for r in ours] == [r.token_ids for r in plain]


TRUNCATIONS = [{"top_k": 1}, {"top_p": 0.05}, {"min_p": 0.95}, {"typical_p": 0.05}, {"epsilon_cutoff": 0.9}]


@pytest.mark.parametrize("rule", TRUNCATIONS, ids=lambda rule: next(iter(rule)))
def test_truncated_beams_that_sample_keep_tokens_enough_to_go_on(ending, rule):
    """transformers leaves 1 + the number of EOS ids to every beam. Two samples of 400; false alarm 1e-6 a rule."""
    prompt, draws = [1, 2, 3], 400
    config = GenerationConfig(
        do_sample=True, num_beams=3, max_new_tokens=3, temperature=2.0, pad_token_id=0, **{"top_k": 0} | rule
    )
    torch.manual_seed(5)
    output = ending.model.generate(torch.tensor([prompt] * draws), generation_config=config)
    found = Counter(ended(row) for row in output[:, len(prompt) :].tolist())
    asked = [SamplingParams.from_generation_config(config_of_one(config), seed=s) for s in range(draws)]
    ours = Counter(ended(r.token_ids) for r in beam_search(ending, [prompt] * draws, asked, num_beams=3))
    assert len(found) > 1
    assert same_law(found, ours) > 1e-6


def config_of_one(config):
    return {name: value for name, value in config.to_diff_dict().items() if name != "num_beams"}


def ended(tokens):
    """Tokens up to the end, as a key."""
    end = next((i + 1 for i, token in enumerate(tokens) if token in EOS), len(tokens))
    return tuple(tokens[:end])


def same_law(one, other):
    """p-value of the chi-square test that two counts of equal size come from one law; rare keys are pooled."""
    common = [key for key in one.keys() | other.keys() if one[key] + other[key] >= 10]
    pairs = [(one[key], other[key]) for key in common]
    rest = sum(one.values()) - sum(a for a, _ in pairs), sum(other.values()) - sum(b for _, b in pairs)
    pairs += [rest] if sum(rest) else []
    statistic = sum((a - b) ** 2 / (a + b) for a, b in pairs)
    freedom = torch.tensor((len(pairs) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2, dtype=torch.float64)))


def test_prompts_with_ends_of_their_own_sample_as_they_do_alone(ending):
    prompts = [[1, 2, 3], [5], [12, 3]]
    params = [
        SamplingParams(temperature=1.3, seed=3, max_new_tokens=8, eos_token_ids=ends)
        for ends in ([], [2, 3, 5, 7, 11], [4])
    ]
    together = beam_search(ending, prompts, params, num_beams=3)
    for prompt, own, result in zip(prompts, params, together, strict=True):
        assert beam_search(ending, [prompt], own, num_beams=3)[0].token_ids == result.token_ids
