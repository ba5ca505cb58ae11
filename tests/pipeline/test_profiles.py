"""Profiles against transformers itself, and against hand-computed cases for the other engines.

What the other engines made of the same logits is in `test_profile_vectors.py`.
"""

import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessor

from handloom.errors import ParameterError
from handloom.kernels.sampling.rules import LIGHTEST
from handloom.params.sampling_params import SamplingParams
from handloom.pipeline.pipeline import Context, Pipeline
from handloom.pipeline.profiles import PROFILES, profile

VOCAB = 40
EOS = 2


def context(histories, prompt, seeds=0):
    width = max(map(len, histories))
    return Context(
        tokens=torch.tensor([h + [-1] * (width - len(h)) for h in histories]),
        lengths=torch.tensor([len(h) for h in histories]),
        prompt_lengths=torch.full((len(histories),), prompt),
        seeds=torch.full((len(histories),), seeds),
        streams=torch.zeros(len(histories), dtype=torch.int64),
    )


def processed(params, x, history, prompt):
    """What the pipeline of one request makes of logits x [B, V]."""
    rows = Pipeline.default().bind(
        [params] * len(x), [history[:prompt]] * len(x), vocab_size=x.shape[1], eos_token_ids={EOS}
    )
    return rows.apply(x, context([history] * len(x), prompt))


def kept(params, probabilities, history=(1,), prompt=1):
    x = torch.tensor([probabilities], dtype=torch.float64).log().float()
    return processed(params, x, list(history), prompt)[0].isfinite().nonzero().flatten().tolist()


@pytest.fixture(scope="module")
def model():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, bos_token_id=1, eos_token_id=EOS, **sizes)).eval()


def oracle(model, config, x, history, prompt, own=None):
    """The processors that transformers' own generate builds, applied to x."""
    config, _ = model._prepare_generation_config(config)
    ids = torch.tensor([history] * len(x))
    model._prepare_special_tokens(config, True, device="cpu")
    chain = model._get_logits_processor(
        config,
        input_ids_seq_length=prompt,
        encoder_input_ids=ids[:, :prompt],
        logits_processor=own,
        device="cpu",
    )
    return chain(ids, x.clone())


CONFIGS = [
    {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9},
    {"do_sample": True, "temperature": 1.5, "top_k": 0, "min_p": 0.1, "typical_p": 0.8},
    {"do_sample": True, "top_k": 20, "epsilon_cutoff": 0.02, "eta_cutoff": 0.05},
    {"do_sample": True, "top_k": 30, "top_h": 0.6, "temperature": 0.9},
    {"do_sample": True, "top_k": 0, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "top_p": 0.7},
    {
        "do_sample": True,
        "top_k": 0,
        "bad_words_ids": [[4], [EOS], [3, 7]],
        "sequence_bias": [[[5], 2.0], [[3, 9], -4.0]],
    },
    {
        "do_sample": True,
        "top_k": 0,
        "min_new_tokens": 3,
        "suppress_tokens": [6, 8],
        "begin_suppress_tokens": [9],
    },
    {"do_sample": True, "top_k": 0, "exponential_decay_length_penalty": (1, 1.4), "repetition_penalty": 0.8},
    {"repetition_penalty": 1.2, "suppress_tokens": [6], "temperature": 0.5, "top_k": 3},
]
HISTORIES = [([3, 7, 3, 9, 3], 5), ([3, 7, 3, 9, 3, 5, 7, 3], 5)]


@pytest.mark.parametrize("settings", CONFIGS)
@pytest.mark.parametrize(("history", "prompt"), HISTORIES)
def test_hf_equals_the_processors_of_generate(model, settings, history, prompt):
    config = GenerationConfig(eos_token_id=EOS, pad_token_id=0, max_new_tokens=9, **settings)
    params = SamplingParams.from_generation_config(config, eos_token_ids={EOS})
    assert params.profile == "hf"
    # an unset top_k is 50 in generate, which is more than this vocabulary
    x = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(8)) * 2
    torch.testing.assert_close(
        processed(params, x, history, prompt), oracle(model, config, x, history, prompt)
    )


ROWS = st.lists(
    st.sampled_from([-math.inf, -1e9, -5.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 3.0, 40.0]),
    min_size=VOCAB,
    max_size=VOCAB,
).filter(lambda row: any(math.isfinite(v) for v in row))


SINGLE = [
    {"do_sample": True, "top_k": 0, "top_h": 0.5},
    *({"do_sample": True, "top_k": k} for k in (1, 7)),
    *({"do_sample": True, "top_k": 0, "top_p": p} for p in (0.3, 0.9)),
    *({"do_sample": True, "top_k": 0, name: 0.1} for name in ("min_p", "epsilon_cutoff", "eta_cutoff")),
    {"do_sample": True, "top_k": 0, "typical_p": 0.6},
]


@pytest.mark.parametrize("settings", CONFIGS[:5] + SINGLE)
@given(row=ROWS)
@settings(max_examples=25)
def test_on_adversarial_rows_transformers_keeps_a_subset_cut_at_the_threshold(settings, row):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, bos_token_id=1, eos_token_id=EOS, **sizes))
    config = GenerationConfig(eos_token_id=EOS, pad_token_id=0, max_new_tokens=9, **settings)
    x = torch.tensor([row])
    history, prompt = HISTORIES[1]
    params = SamplingParams.from_generation_config(config, eos_token_ids={EOS})
    ours, theirs = processed(params, x, history, prompt)[0], oracle(model, config, x, history, prompt)[0]
    both = ours.isfinite() & theirs.isfinite()
    torch.testing.assert_close(ours[both], theirs[both])
    if "top_h" in settings:  # ours leaves out what has less than 2**-35 of the highest token's weight
        theirs = theirs.masked_fill(theirs < theirs.max() - LIGHTEST, -torch.inf)
    assert (theirs.isfinite() <= ours.isfinite()).all()
    surplus = ours[ours.isfinite() & ~theirs.isfinite()]
    if len(surplus):
        # typical ranks by distance from the entropy: its threshold is one such distance, with a logit on
        # each side
        assert len(surplus.unique()) <= (2 if "typical_p" in settings else 1)


def test_hf_puts_own_processors_before_the_temperature(model):
    class AddOne(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, 0] += 1
            return scores

    config = GenerationConfig(do_sample=True, temperature=0.5, top_k=0, eos_token_id=EOS, max_new_tokens=5)
    params = SamplingParams.from_generation_config(config, eos_token_ids={EOS}, processors=[AddOne()])
    x = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(8))
    expected = oracle(model, config, x, *HISTORIES[0], own=[AddOne()])
    torch.testing.assert_close(processed(params, x, *HISTORIES[0]), expected)


def test_the_version_that_hf_was_tested_against_is_the_installed_one():
    assert profile("hf").tested_against == f"transformers {transformers.__version__}"


P = [0.5, 0.2, 0.15, 0.1, 0.05]


def test_vllm_takes_min_p_before_the_nucleus():
    # min_p .25 leaves .5 .2 .15 (threshold .125); of these .85, .5 + .2 is .82: top_p .8 stops there
    params = SamplingParams(temperature=1, min_p=0.25, top_p=0.8, profile="vllm")
    assert kept(params, P) == [0, 1]
    assert kept(params.replace(profile="hf"), P) == [
        0,
        1,
        2,
    ]  # .5 + .2 < .8 of the whole, then min_p drops nothing


def test_vllm_presence_counts_the_output_and_repetition_everything():
    params = SamplingParams(temperature=1, presence_penalty=1.0, profile="vllm")
    x = torch.zeros(1, 5)
    assert processed(params, x, [3, 4, 1], 2)[0].tolist() == [0, -1, 0, 0, 0]
    params = SamplingParams(temperature=1, repetition_penalty=2.0, presence_penalty=1.0, profile="vllm")
    assert processed(params, x + 1, [3, 4, 1], 2)[0].tolist() == [1, -0.5, 1, 0.5, 0.5]


def test_vllm_biases_before_penalties():
    params = SamplingParams(temperature=1, repetition_penalty=2.0, logit_bias={1: 3.0}, profile="vllm")
    assert processed(params, torch.ones(1, 5), [1], 1)[0, 1].item() == 2.0


def test_vllm_has_no_temperature_between_0_and_a_hundredth():
    x = torch.tensor([[1.0, 0.5]])
    for temperature, divisor in ((1e-6, 0.01), (0.01, 0.01), (0.02, 0.02), (0.0, 1.0)):
        result = processed(SamplingParams(temperature=temperature, profile="vllm"), x, [1], 1)
        torch.testing.assert_close(result, x / divisor)


def test_llamacpp_has_the_temperature_last():
    params = SamplingParams(temperature=0.5, top_p=0.8, profile="llamacpp")
    assert kept(params, P) == [0, 1, 2]  # at temperature 1: .5 + .2 + .15
    assert kept(params.replace(profile="hf"), P) == [0, 1]  # squared: .769 + .123 of the whole
    x = torch.tensor([P]).log()
    assert processed(params, x, [1], 1)[0, 0].item() == pytest.approx(2 * math.log(0.5))


def test_llamacpp_typical_comes_before_top_p_and_penalties_count_the_prompt():
    params = SamplingParams(temperature=1, presence_penalty=1.0, frequency_penalty=0.5, profile="llamacpp")
    assert processed(params, torch.zeros(1, 5), [3, 3, 1], 2)[0].tolist() == [0, -1.5, 0, -2, 0]
    windowed = params.replace(penalty_window=2)
    assert processed(windowed, torch.zeros(1, 5), [3, 3, 1], 2)[0].tolist() == [0, -1.5, 0, -1.5, 0]


def test_llamacpp_runs_the_chain_for_greedy_rows():
    # typical .3 on (.55, .15 x 3): H = 1.18, distances .59 and .71 -> the best; on flat-ish rows the best
    # is dropped
    row = torch.tensor([[0.4, 0.2, 0.2, 0.2]]).log()
    params = SamplingParams(temperature=0, typical_p=0.5, profile="llamacpp")
    chain = Pipeline.default().bind([params], [[1]], vocab_size=4)
    assert chain.sample(row, context([[1]], 1)).tokens.tolist() == [1]
    chain = Pipeline.default().bind([params.replace(profile="default")], [[1]], vocab_size=4)
    assert chain.sample(row, context([[1]], 1)).tokens.tolist() == [0]


def test_llamacpp_mirostat_leaves_the_other_rules_out():
    params = SamplingParams(temperature=1, mirostat=2, profile="llamacpp")
    names = [processor.name for processor in Pipeline.default().for_params(params)]
    assert names[-2:] == ["temperature", "mirostat"]
    with pytest.raises(ParameterError, match="top_k=5 has no effect"):
        processed(params.replace(top_k=5), torch.zeros(1, 5), [1], 1)


def test_llamacpp_counts_the_length_of_its_list_for_the_dynamic_temperature():
    # (.5, .25, .25) and one banned: H / ln n is 1.0397 / ln 4 = .75 while the ban stays in the list, .9464 of
    # the three that top-p leaves; the temperature is .5 + 1 * that
    row = torch.tensor([[0.5, 0.25, 0.25, 1.0]]).log()
    params = SamplingParams(temperature=1, dynatemp_range=0.5, banned_tokens=[3], profile="llamacpp")
    ratio = math.log(2)
    for top_p, temperature in ((1.0, 0.5 + 0.75), (0.999, 0.5 + 1.0397207708 / math.log(3))):
        x = processed(params.replace(top_p=top_p), row, [1], 1)[0]
        assert (x[0] - x[1]).item() == pytest.approx(ratio / temperature, rel=1e-5)


def test_vllm_looks_for_bad_words_in_the_output_alone():
    params = SamplingParams(temperature=1, bad_words=[[3, 1], [4]], profile="vllm")
    assert kept(params, P, history=(1, 3), prompt=2) == [0, 1, 2, 3]  # 3 belongs to the prompt
    assert kept(params, P, history=(1, 3), prompt=1) == [0, 2, 3]
    assert kept(params.replace(profile="hf"), P, history=(1, 3), prompt=2) == [0, 2, 3]


def test_textgen_truncates_at_temperature_and_min_p_last():
    params = SamplingParams(temperature=0.5, top_p=0.8, profile="textgen")
    assert kept(params, P) == [0, 1]
    assert kept(SamplingParams(temperature=1, top_p=0.7, min_p=0.45, profile="textgen"), P) == [0]


def test_textgen_top_n_sigma_counts_excluded_tokens_as_zero():
    # logits 4 3 2 and one excluded as 0: deviation of (4, 3, 2, 0) unbiased is 1.708; n = 1 keeps >= 2.29
    x = torch.tensor([[4.0, 3.0, 2.0, -math.inf]])
    params = SamplingParams(temperature=1, top_n_sigma=1.0, profile="textgen")
    assert processed(params, x, [1], 1)[0].isfinite().tolist() == [True, True, False, False]
    # ours: deviation of (4, 3, 2) is .816
    ours = processed(params.replace(profile="default"), x, [1], 1)[0]
    assert ours.isfinite().tolist() == [True, False, False, False]


def test_textgen_guards_the_end_token_from_xtc():
    params = SamplingParams(temperature=1, xtc_probability=1.0, xtc_threshold=0.1, profile="textgen")
    assert kept(params, [0.3, 0.25, 0.4, 0.05]) == [0, 1, 2, 3]  # id 2 ends the text and would be dropped
    assert kept(params, [0.4, 0.3, 0.05, 0.25]) == [2, 3]


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("hf", {"presence_penalty": 1.0}),
        ("vllm", {"typical_p": 0.5}),
        ("llamacpp", {"tfs": 0.5}),
        ("textgen", {"top_h": 0.5}),
        ("hf", {"dynatemp_range": 0.5}),
        ("vllm", {"edt_theta": 0.5}),
        ("llamacpp", {"dynatemp_range": 0.5, "mirostat": 2}),
    ],
)
def test_rules_that_an_engine_lacks_are_errors(name, field):
    with pytest.raises(ParameterError, match=rf"has no effect.*{name}"):
        processed(SamplingParams(temperature=1, profile=name, **field), torch.zeros(1, 5), [1], 1)


def test_rows_of_different_profiles_share_a_batch():
    x = torch.tensor([P]).log()
    requests = [
        SamplingParams(temperature=0.5, top_p=0.8, profile=name)
        for name in ("llamacpp", "hf", "textgen", "default", "vllm")
    ]
    rows = Pipeline.default().bind(requests, [[1]] * 5, vocab_size=5, eos_token_ids={EOS})
    together = rows.apply(x.expand(5, -1).clone(), context([[1]] * 5, 1))
    for i, request in enumerate(requests):
        assert torch.equal(together[i], processed(request, x, [1], 1)[0])


def test_every_profile_explains_itself_and_an_unknown_one_is_an_error():
    for name in PROFILES:
        text = Pipeline.default().explain(SamplingParams(temperature=0.7, top_k=5, profile=name))
        assert repr(name) in text
        assert "tested against" in text
    with pytest.raises(ParameterError, match="choose one of default, hf"):
        profile("vlm")
