"""Requests: prompts of every form, and what a result says."""

import pytest
import torch
from architectures import prompts_of
from helpers import (
    forced,
    full_logits,
    outcome,
    text_engine,
    tiny_llama,
)
from tiny_tokenizers import byte_level
from transformers import GenerationConfig

from handloom import Engine, SamplingParams
from handloom.errors import ParameterError, PromptError

PROMPTS = prompts_of([5, 17, 1, 9])


# Prompts


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizers_padded_output_equals_its_texts(texts, side):
    prompts = ["the quick", "a", "brown fox jumps over"]
    batch = byte_level()(prompts, padding=True, padding_side=side, return_tensors="pt")
    assert (batch["attention_mask"] == 0).any()
    expected = texts.generate(prompts, max_new_tokens=8)
    assert [outcome(g) for g in texts.generate(batch, max_new_tokens=8)] == [outcome(g) for g in expected]
    assert texts.prefill(batch).tokens == [g.prompt_token_ids for g in expected]


def test_a_padded_tensor_without_its_mask_explains_itself(texts):
    ids = byte_level()(["the quick", "a"], padding=True, return_tensors="pt")["input_ids"]
    for act in (texts.generate, texts.prefill, texts.stream):
        with pytest.raises(
            PromptError, match=r"without an attention_mask.*pad id 2.*input_ids and attention_mask"
        ):
            act(ids)


def test_one_prompt_gives_one_result_and_a_list_gives_a_list(engine, texts):
    assert engine.generate([5, 6], max_new_tokens=1).n_new == 1
    assert len(engine.generate([[5, 6]], max_new_tokens=1)) == 1
    assert len(texts.generate(["ab"], max_new_tokens=1)) == 1
    assert texts.generate("ab", max_new_tokens=1).prompt_token_ids == texts.encode("ab")
    results = engine.generate([[5, 6], [7]], max_new_tokens=1, n=2)
    assert [(g.request, g.sample) for g in results] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len(engine.generate([5, 6], max_new_tokens=1, n=2)) == 2


def test_chat_without_a_template_says_how_to_set_one(texts):
    with pytest.raises(PromptError, match=r"no chat template.*tokenizer\.chat_template"):
        texts.chat("hello")
    with pytest.raises(PromptError, match="no chat template"):
        texts.generate([{"role": "user", "content": "hello"}])


def test_chat_and_message_lists_go_through_the_template():
    engine = text_engine()
    engine.tokenizer = type(engine.tokenizer)(tokenizer_object=engine.tokenizer.backend_tokenizer)
    engine.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}|{% endfor %}>"
    )
    expected = engine.encode("user: fox|>")
    messages = [{"role": "user", "content": "fox"}]
    assert engine.chat_prompt("fox") == engine.chat_prompt(messages) == expected
    settings = {"max_new_tokens": 4}
    answers = [
        engine.chat("fox", **settings),
        engine.chat(messages, **settings),
        engine.generate(messages, **settings),
        engine.generate([messages], **settings)[0],
        engine.generate(expected, **settings),
    ]
    assert all(outcome(a) == outcome(answers[0]) for a in answers)


def test_encode_and_decode_are_the_tokenizers(texts):
    ids = texts.encode("naïve 😀")
    assert ids == byte_level()("naïve 😀")["input_ids"]
    assert texts.decode(ids) == "naïve 😀"
    assert texts.decode(torch.tensor(ids)) == "naïve 😀"
    assert texts.decode([*ids, 1]) == "naïve 😀"
    assert texts.decode([*ids, 1], skip_special_tokens=False) == "naïve 😀</s>"


def test_without_a_tokenizer_ids_work_and_text_says_what_is_missing(engine):
    generation = engine.generate([5, 6], max_new_tokens=3)
    assert generation.text == ""
    assert generation.n_new == 3
    with pytest.raises(PromptError, match="no tokenizer"):
        engine.generate("text")
    with pytest.raises(PromptError, match="no tokenizer"):
        engine.decode([5])
    with pytest.raises(ParameterError, match=r"request 0: stop=.*needs a tokenizer"):
        engine.generate([5, 6], stop="x")
    with pytest.raises(ParameterError, match="needs a tokenizer"):
        engine.generate([5, 6], bad_words=["x"])


# Results


def test_logprobs_equal_a_full_forward(engine):
    settings = {"max_new_tokens": 10, "logprobs": 3, "prompt_logprobs": 0}
    for generation in engine.generate(PROMPTS, temperature=0.7, top_k=5, seed=1, **settings):
        prompt, ids = generation.prompt_token_ids, generation.token_ids
        logits = full_logits(engine.model, prompt + ids)
        raw = logits.log_softmax(-1)
        given = [None, *raw[range(len(prompt) - 1), prompt[1:]].tolist()]
        assert generation.prompt_logprobs[0] is None
        assert generation.prompt_logprobs[1:] == pytest.approx(given[1:], abs=1e-4)
        answer = range(len(prompt) - 1, len(prompt) + len(ids) - 1)
        assert generation.raw_logprobs == pytest.approx(raw[answer, ids].tolist(), abs=1e-4)
        best = logits[answer].topk(5)
        processed = (best.values / 0.7).log_softmax(-1)
        for i, (token, row) in enumerate(zip(ids, best.indices.tolist(), strict=True)):
            assert generation.logprobs[i] == pytest.approx(processed[i, row.index(token)].item(), abs=1e-4)
        top = raw[answer].topk(3)
        for have, tokens, values in zip(
            generation.top_logprobs, top.indices.tolist(), top.values.tolist(), strict=True
        ):
            assert list(have) == tokens
            assert list(have.values()) == pytest.approx(values, abs=1e-4)


def test_logprobs_are_absent_unless_asked_for_and_counts_are_per_request(engine):
    asked = [None, 0, 2, 500]
    params = [SamplingParams(max_new_tokens=2, logprobs=count) for count in asked]
    results = engine.generate([[5, 6]] * 4, params)
    assert results[0].top_logprobs is None
    assert [[len(row) for row in g.top_logprobs] for g in results[1:]] == [[0, 0], [2, 2], [101, 101]]
    assert [g.prompt_logprobs for g in results] == [None] * 4


def test_prompt_logprobs_in_chunks_and_of_a_single_token():
    model, [prompt] = tiny_llama(), prompts_of([29])
    expected = full_logits(model, prompt)[:-1].log_softmax(-1)[range(28), prompt[1:]].tolist()
    engine = Engine(model, prefill_chunk=8)
    engine.generate(prompt, max_new_tokens=1)  # leaves the prompt's blocks as a known prefix
    for n in (1, 2):
        results = engine.generate([prompt], max_new_tokens=1, prompt_logprobs=0, n=n)
        for generation in results:
            assert generation.prompt_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    assert engine.generate([7], max_new_tokens=1, prompt_logprobs=0).prompt_logprobs == [None]


def test_alternatives_to_each_token_of_a_prompt():
    model = tiny_llama()
    engine, prompt = Engine(model, slots=2, prefill_chunk=7), list(range(3, 28))
    found = engine.generate(prompt, max_new_tokens=1, prompt_logprobs=4)
    best = full_logits(model, prompt).log_softmax(-1).topk(4)
    assert found.prompt_top_logprobs[0] is None
    assert [list(top) for top in found.prompt_top_logprobs[1:]] == best.indices[:-1].tolist()
    values = [value for top in found.prompt_top_logprobs[1:] for value in top.values()]
    assert values == pytest.approx(best.values[:-1].flatten().tolist(), abs=1e-4)
    plain = engine.generate(prompt, max_new_tokens=1, prompt_logprobs=0)
    assert plain.prompt_top_logprobs[1:] == [{}] * 24


def test_the_default_is_greedy_and_256_tokens_and_says_so(engine):
    one_layer = Engine(tiny_llama(num_hidden_layers=1, max_position_embeddings=512))
    generation = one_layer.generate([5])
    assert (generation.n_new, generation.finish_reason) == (256, "length")
    assert generation.stop_reason == "max_new_tokens"
    logits = full_logits(one_layer.model, [5, *generation.token_ids])
    assert logits[:-1].argmax(-1).tolist() == generation.token_ids
    generation = engine.generate(PROMPTS[1])  # 17 tokens of 256
    assert (generation.n_new, generation.finish_reason) == (239, "length")
    assert generation.stop_reason == "max_length"


def test_sampling_has_no_hidden_filter(engine):
    """A flat distribution over 101 tokens, 600 draws: fewer than 90 different ones with p < 1e-6.

    A filter such as top_k=50 leaves 50.
    """
    results = engine.generate([5], temperature=1e6, seed=0, n=3, max_new_tokens=200)
    assert len({token for g in results for token in g.token_ids}) >= 90


def test_model_defaults_are_read_when_asked_and_only_then(texts):
    config = GenerationConfig(
        do_sample=True, temperature=0.5, top_k=7, max_new_tokens=5, eos_token_id=[1, 40]
    )
    model = texts.model
    before, model.generation_config = model.generation_config, config
    try:
        assert texts.generate("the", max_new_tokens=3, seed=1).params.temperature == 0
        params = texts.generate("the", defaults="model").params
        assert (params.temperature, params.top_k, params.max_new_tokens) == (0.5, 7, 5)
        params = texts.generate("the", defaults="model", temperature=0, max_tokens=2).params
        assert (params.temperature, params.max_new_tokens) == (0, 2)
        params = next(texts.stream("the", defaults="model")).generation
        assert params is None
    finally:
        model.generation_config = before
    with pytest.raises(ParameterError, match=r'defaults=.*"none" or "model"'):
        texts.generate("the", defaults="hub")


def test_a_generation_config_or_a_dict_can_stand_for_params(texts):
    config = GenerationConfig(do_sample=False, max_new_tokens=3)
    expected = texts.generate("the", max_new_tokens=3).token_ids
    assert texts.generate("the", config).token_ids == expected
    assert texts.generate("the", {"max_tokens": 3}).token_ids == expected
    assert texts.generate(["the"], [config])[0].token_ids == expected
    with pytest.raises(ParameterError, match="not SamplingParams"):
        texts.generate("the", 3)


def test_eos_ids_are_those_of_the_generation_config_or_those_that_are_given(caplog):
    tokenizer = byte_level()
    model = tiny_llama(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = [40, 41]
    model.config.eos_token_id = 42
    with caplog.at_level("INFO", "handloom"):
        engine = Engine(model, tokenizer)
    assert engine.eos_token_ids == {40, 41}  # as in transformers: what the tokenizer ends with is not asked
    assert "the tokenizer's end token 1 ends no text" in caplog.text
    wider = Engine(model, tokenizer, eos_token_ids=[40, tokenizer.eos_token_id])
    for each, ends in ((engine, {40, 41}), (wider, {40, 1})):
        for token in (1, 40, 41, 42):
            generation = each.generate("the", forced_tokens=forced([50, token, 51]), max_new_tokens=3)
            reason = (
                ([50, token], "eos", token)
                if token in ends
                else ([50, token, 51], "length", "max_new_tokens")
            )
            assert (generation.token_ids, generation.finish_reason, generation.stop_reason) == reason
    own = engine.generate("the", forced_tokens=forced([50, 40, 51]), max_new_tokens=3, eos_token_ids=[51])
    assert (own.token_ids, own.finish_reason) == ([50, 40, 51], "eos")
    # the model's defaults are the engine's, not a narrower set
    again = wider.generate("the", forced_tokens=forced([50, 1]), max_new_tokens=3, defaults="model")
    assert again.finish_reason == "eos"


def test_a_model_without_eos_runs_to_its_length(engine):
    assert engine.eos_token_ids == frozenset()
    generation = engine.generate([5], max_new_tokens=4, min_new_tokens=2)
    assert (generation.n_new, generation.finish_reason) == (4, "length")


def test_timings_add_up(engine):
    for generation in engine.generate(PROMPTS, max_new_tokens=4):
        t = generation.timings
        assert t.queued >= 0
        assert t.prefill > 0
        assert t.queued + t.prefill <= t.first_token <= t.total
        assert t.first_token + t.decode == pytest.approx(t.total, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "shown"), [({}, False), ({"progress": False}, False), ({"progress": True}, True)]
)
def test_the_progress_bar_is_off_where_there_is_no_terminal(engine, capsys, options, shown):
    engine.generate(PROMPTS, max_new_tokens=2, **options)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("4/4" in captured.err) == shown
