"""SmolLM2-135M-Instruct for real: chat, ragged batches, quantised, streamed, stop strings, UTF-8."""

import pytest
import torch
from helpers import assert_nothing_leaked, forced, recorded, tiny_llama

from handloom import Engine, SamplingParams

pytestmark = pytest.mark.slow

QUESTION = "What is the capital of France?"
ANSWER = [504, 3575, 282, 4649, 314, 7042, 30, 2]
PROMPTS = [
    "The capital of France is",
    "2, 3, 5, 7, 11, 13,",
    "Once upon a time, in a village by the sea, there lived a fisherman who",
    "def fibonacci(n):\n    ",
    "A",
    "Die Hauptstadt von Deutschland ist Berlin. Die Hauptstadt von Italien ist",
]
BUDGETS = [5, 3, 6, 4, 2, 3]


@pytest.fixture
def engine(smollm2_engine):
    yield smollm2_engine
    assert_nothing_leaked(smollm2_engine)


@torch.no_grad()
def theirs(model, ids, n):
    """Greedy tokens of `model.generate` for one prompt."""
    prompt = torch.tensor([ids])
    options = {"max_new_tokens": n, "do_sample": False, "repetition_penalty": None}
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return out[0, len(ids) :].tolist()


def test_chat_gives_the_golden_answer(engine):
    generation = engine.chat(QUESTION)
    assert generation.token_ids == ANSWER
    assert generation.text == "The capital of France is Paris."
    assert (generation.finish_reason, generation.stop_reason) == ("eos", 2)
    assert generation.n_new == 8
    messages = [{"role": "user", "content": QUESTION}]
    assert engine.generate(messages).token_ids == ANSWER
    prompt = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert "system" in prompt
    assert engine.decode(generation.prompt_token_ids, skip_special_tokens=False) == prompt


def test_chat_goes_on_after_its_own_answer(engine):
    messages = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "The capital of France is Paris."},
        {"role": "user", "content": "And of Italy?"},
    ]
    engine.chat(messages[:1])
    with recorded(engine.model) as passes:
        again = engine.chat(messages, max_new_tokens=12)
    assert passes.prompts == [len(again.prompt_token_ids) - 32]  # two blocks of what was said are known
    assert again.token_ids == theirs(engine.model, again.prompt_token_ids, 12)[: again.n_new]
    assert "Rome" in again.text


def test_a_ragged_batch_equals_each_alone_and_transformers(engine):
    params = [SamplingParams(max_new_tokens=n) for n in BUDGETS]
    few = Engine(engine.model, engine.tokenizer, slots=3)
    together = few.generate(PROMPTS, params)
    for prompt, own, generation in zip(PROMPTS, params, together, strict=True):
        ids = engine.encode(prompt)
        assert generation.token_ids == engine.generate(prompt, own).token_ids
        assert generation.token_ids == theirs(engine.model, ids, own.max_new_tokens)
        assert generation.text == engine.tokenizer.decode(generation.token_ids, skip_special_tokens=True)
    assert_nothing_leaked(few)


def test_log_probabilities_equal_a_full_forward(engine):
    generation = engine.generate(PROMPTS[2], max_new_tokens=12, prompt_logprobs=0, logprobs=2)
    ids = generation.prompt_token_ids + generation.token_ids
    with torch.no_grad():
        logp = engine.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    expected = logp[range(len(ids) - 1), ids[1:]].tolist()
    n = len(generation.prompt_token_ids)
    assert generation.prompt_logprobs[1:] == pytest.approx(expected[: n - 1], abs=1e-3)
    assert generation.logprobs == pytest.approx(expected[n - 1 :], abs=1e-3)
    assert [max(row, key=row.get) for row in generation.top_logprobs] == generation.token_ids


def test_sampling_is_the_same_alone_and_in_a_batch(engine):
    params = SamplingParams(temperature=0.8, top_k=40, top_p=0.95, seed=11, max_new_tokens=5)
    together = engine.generate(PROMPTS[:4], params)
    for prompt, generation in zip(PROMPTS, together, strict=False):
        assert engine.generate(prompt, params).token_ids == generation.token_ids


def test_eight_samples_come_from_one_prefill(engine):
    fresh = Engine(engine.model, engine.tokenizer, slots=8)
    prompt = fresh.encode(PROMPTS[2] * 6)
    with recorded(engine.model) as passes:
        results = fresh.generate(prompt, n=8, temperature=1.0, seed=3, max_new_tokens=4)
    assert passes.prompts == [len(prompt)]
    assert passes.steps == [8, 8, 8]
    assert len({tuple(g.token_ids) for g in results}) > 1


def test_streaming_equals_not_streaming(engine):
    params = [SamplingParams(max_new_tokens=n) for n in BUDGETS]
    expected = engine.generate(PROMPTS, params)
    texts, tokens, results = {}, {}, {}
    for event in engine.stream(PROMPTS, params):
        texts.setdefault(event.request, []).append(event.text)
        tokens.setdefault(event.request, []).append(event.token_id)
        if event.generation:
            results[event.request] = event.generation
    for index, generation in enumerate(expected):
        assert tokens[index] == generation.token_ids == results[index].token_ids
        assert "".join(texts[index]) == generation.text == results[index].text
        assert sum(map(bool, texts[index])) > len(texts[index]) // 2  # it comes in pieces


def test_a_stop_string_across_token_borders(engine):
    whole = engine.chat(QUESTION)
    pieces = whole.token_texts
    assert pieces[:3] == ["The", " capital", " of"]
    generation = engine.chat(QUESTION, stop="tal of Fr")
    assert generation.text == "The capi"
    assert generation.token_ids == ANSWER[:4]
    assert (generation.finish_reason, generation.stop_reason) == ("stop", "tal of Fr")
    assert engine.chat(QUESTION, stop="tal of Fr", include_stop=True).text == "The capital of Fr"
    shown = [e.text for e in engine.stream([{"role": "user", "content": QUESTION}], stop="tal of Fr")]
    assert shown == ["The", " capi", "", ""]
    # The prompt holds the word, the answer does not.
    assert engine.chat(QUESTION, stop="What").token_ids == ANSWER


@pytest.fixture(scope="module")
def speller(smollm2_engine):
    """SmolLM2's tokenizer before a tiny model, which says what it is forced to."""
    tokenizer = smollm2_engine.tokenizer
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    engine = Engine(tiny_llama(vocab_size=len(tokenizer), **sizes), tokenizer, eos_token_ids=[2])
    yield engine
    assert_nothing_leaked(engine)


SCRIPTS = ["I ❤️ 🦜👩‍👩‍👧 and 🇫🇷!", "你好，世界。今天", "naïve ŝtrato — “ﬁn”", "안녕 こん"]


@pytest.mark.parametrize("text", SCRIPTS, ids=["emoji", "Chinese", "accents", "Korean"])
def test_characters_split_across_tokens_arrive_whole(speller, text):
    ids = speller.tokenizer(text)["input_ids"]
    assert len(ids) > len(text.split())
    said = SamplingParams(forced_tokens=forced(ids), max_new_tokens=len(ids))
    events = list(speller.stream("Say:", said))
    assert [e.token_id for e in events] == ids
    assert "".join(e.text for e in events) == events[-1].generation.text == text
    assert not any("\ufffd" in e.text for e in events)
    held = [i for i, e in enumerate(events) if not e.text]
    assert held or all(
        speller.decode([i]) for i in ids
    )  # something was held back where a token is no character
    # Cut inside a character, what is left of it is shown as such and no more.
    if held:
        cut = speller.generate("Say:", said.replace(max_new_tokens=held[0] + 1))
        assert cut.text == speller.tokenizer.decode(ids[: held[0] + 1])
    stop = speller.generate("Say:", said.replace(stop=text[-1]))
    assert stop.text == text[: text.index(text[-1])]


def test_prompts_in_other_scripts(engine):
    prompts = ["你好，世界", "🦜 is a", "안녕하세요"]
    for prompt, generation in zip(prompts, engine.generate(prompts, max_new_tokens=6), strict=True):
        ids = engine.encode(prompt)
        assert generation.token_ids == theirs(engine.model, ids, 6)[: generation.n_new]
        whole = engine.decode(ids + generation.token_ids)
        assert whole == prompt + generation.text or "\ufffd" in whole


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantised_it_still_knows(smollm2, kind):
    engine = Engine.from_pretrained(str(smollm2), quantization=kind, device="cpu")
    assert engine.capabilities.path == "attention"
    generation = engine.chat(QUESTION, max_new_tokens=6)
    assert "Paris" in generation.text
    ids = generation.prompt_token_ids
    assert generation.token_ids[:3] == theirs(engine.model, ids, 3)
    assert [g.n_new for g in engine.generate(PROMPTS[:3], max_new_tokens=2)] == [2] * 3
    assert_nothing_leaked(engine)


def test_bfloat16_in_fixed_slots_gives_the_same_bits_whatever_shares_the_batch(smollm2):
    engine = Engine.from_pretrained(str(smollm2), dtype="bfloat16", device="cpu", slots=3, fixed_slots=True)
    params = SamplingParams(max_new_tokens=4, temperature=0.7, seed=1)
    together = engine.generate(PROMPTS[:5], params)
    for index in (0, 3, 4):
        alone = engine.generate(PROMPTS[index], params)
        assert alone.token_ids == together[index].token_ids
        assert alone.logprobs == together[index].logprobs
        assert alone.raw_logprobs == together[index].raw_logprobs


def test_defaults_of_the_model_are_used_when_asked(engine):
    config = engine.model.generation_config
    params = engine.generate("A", max_new_tokens=1, defaults="model", seed=0).params
    assert params.temperature == (config.temperature if config.do_sample else 0.0)
    assert engine.generate("A", max_new_tokens=1).params.temperature == 0.0


def test_a_state_and_a_generation_agree(engine):
    state, found = engine.prefill(PROMPTS[:3]), []
    for _ in range(5):
        found.append(state.logits.argmax(-1))
        state = engine.step(state, found[-1])
    expected = engine.generate(PROMPTS[:3], max_new_tokens=5)
    assert torch.stack(found, 1).tolist() == [g.token_ids for g in expected]
    del state


def test_a_padded_batch_equals_its_texts(engine):
    batch = engine.tokenizer(PROMPTS, padding=True, padding_side="left", return_tensors="pt")
    expected = engine.generate(PROMPTS, max_new_tokens=5)
    assert [g.token_ids for g in engine.generate(batch, max_new_tokens=5)] == [g.token_ids for g in expected]


def test_the_model_is_left_as_it_was(engine):
    ids = engine.encode(PROMPTS[0])
    before = theirs(engine.model, ids, 4)
    engine.generate(PROMPTS, max_new_tokens=2)
    assert theirs(engine.model, ids, 4) == before
