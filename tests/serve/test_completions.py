"""Completions through OpenAI's own client: the engine's tokens, in OpenAI's shapes."""

import asyncio
import itertools

import httpx
import openai
import pytest
from helpers import until

from handloom import SamplingParams

SEEDED = {"temperature": 1.2, "seed": 3, "max_tokens": 12}


def given(server, prompt, **settings):
    """What the engine itself gives, asked in OpenAI's names."""
    params = SamplingParams.from_dict(settings, dialect="openai")
    return server.engine.generate([prompt], params)


def test_texts_lists_and_ids_are_prompts(server, client):
    prompts = ["the quick", "brown fox jumps", "lazy"]
    wanted = [given(server, prompt, **SEEDED)[0].text for prompt in prompts]
    many = client.completions.create(model="tiny", prompt=prompts, **SEEDED)
    assert [choice.text for choice in many.choices] == wanted
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    ids = [server.engine.encode(prompt) for prompt in prompts]
    assert [c.text for c in client.completions.create(model="tiny", prompt=ids, **SEEDED).choices] == wanted
    one = client.completions.create(model="tiny", prompt=ids[1], **SEEDED)
    assert one.choices[0].text == wanted[1]
    assert one.usage.prompt_tokens == len(ids[1])
    assert one.usage.total_tokens == len(ids[1]) + one.usage.completion_tokens


def test_samples_and_the_best_of_them(server, client):
    wanted = given(server, "the", n=5, **SEEDED)
    found = client.completions.create(model="tiny", prompt="the", n=5, **SEEDED)
    assert [choice.text for choice in found.choices] == [result.text for result in wanted]
    best = sorted(wanted, key=lambda r: -r.cumulative_logprob / r.n_new)[:2]
    chosen = client.completions.create(model="tiny", prompt="the", n=2, best_of=5, **SEEDED)
    assert [choice.text for choice in chosen.choices] == [result.text for result in best]
    assert chosen.usage.completion_tokens == sum(result.n_new for result in wanted)


def test_echo_scores_the_prompt_as_evaluation_harnesses_ask(server, client):
    ids = server.engine.encode("the quick brown fox")
    asked = {"prompt": [ids], "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    found = client.completions.create(model="tiny", **asked).choices[0]
    direct = server.engine.generate([ids], max_new_tokens=1, prompt_logprobs=1)[0]
    told = found.logprobs.token_logprobs
    assert told[0] is None
    assert told[1:-1] == pytest.approx(direct.prompt_logprobs[1:], abs=1e-6)
    assert told[-1] == pytest.approx(direct.raw_logprobs[0], abs=1e-6)
    state = server.engine.prefill([ids[:1]])
    likely = server.engine.extend(state, [ids[1:]]).all_logits[0].log_softmax(-1).max(-1).values.tolist()
    first = state.logits.log_softmax(-1).max().item()
    assert [max(top.values()) for top in found.logprobs.top_logprobs[1:]] == pytest.approx(
        [first, *likely], abs=1e-4
    )
    assert found.text.startswith("the quick brown fox")
    ends = found.logprobs.text_offset
    assert [found.text[a:b] for a, b in itertools.pairwise(ends)] == found.logprobs.tokens[:-1]
    only = client.completions.create(model="tiny", **asked | {"max_tokens": 0}).choices[0]
    assert only.text == "the quick brown fox"
    assert only.logprobs.token_logprobs == told[:-1]


def test_a_conversation_goes_through_the_template(server, client):
    messages = [{"role": "user", "content": "the quick"}]
    asked = {"seed": 1, "max_completion_tokens": 8, "temperature": 1.0}
    ids = server.engine.chat_prompt(messages)
    wanted = given(server, ids, seed=1, max_tokens=8, temperature=1.0, logprobs=True, top_logprobs=2)[0]
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "quick"}]}
    ]
    found = client.chat.completions.create(
        model="tiny", messages=parts, logprobs=True, top_logprobs=2, **asked
    )
    choice = found.choices[0]
    assert choice.message.content == wanted.text
    assert choice.message.role == "assistant"
    assert [entry.logprob for entry in choice.logprobs.content] == pytest.approx(
        wanted.raw_logprobs, abs=1e-5
    )
    assert [[t.logprob for t in e.top_logprobs] for e in choice.logprobs.content] == [
        pytest.approx(list(top.values()), abs=1e-5) for top in wanted.top_logprobs
    ]
    assert found.usage.prompt_tokens == len(ids)


def test_a_stream_joins_to_the_answer(server, client):
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "dog"}],
        "n": 2,
        "logprobs": True,
        **SEEDED,
    }
    whole = client.chat.completions.create(**asked)
    texts, tokens, ends, usage = ["", ""], [[], []], {}, None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            tokens[choice.index] += [e.logprob for e in choice.logprobs.content] if choice.logprobs else []
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert tokens == [pytest.approx([e.logprob for e in c.logprobs.content], abs=1e-5) for c in whole.choices]
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage == whole.usage
    pieces = client.completions.create(model="tiny", prompt="dog", stream=True, echo=True, **SEEDED)
    whole = client.completions.create(model="tiny", prompt="dog", echo=True, **SEEDED).choices[0].text
    assert "".join(p.choices[0].text for p in pieces) == whole


def test_fields_beyond_openais(server, client):
    def ask(**extra):
        return client.completions.create(
            model="tiny", prompt="the quick", **SEEDED, extra_body=extra
        ).choices[0]

    for names in ({"top_k": 5}, {"min_p": 0.2, "repeat_penalty": 1.3}, {"typ_p": 0.5, "profile": "llamacpp"}):
        assert ask(**names).text == given(server, "the quick", **SEEDED, **names)[0].text
    ordered = ask(
        top_p=0.5, processors=["top_p", "temperature"], return_raw_logprobs=True, return_token_ids=True
    )
    wanted = given(server, "the quick", **SEEDED, top_p=0.5, order=["top_p", "temperature"])[0]
    assert ordered.token_ids == wanted.token_ids
    assert ordered.processed_logprobs == pytest.approx(wanted.logprobs, abs=1e-5)
    assert ordered.raw_logprobs == pytest.approx(wanted.raw_logprobs, abs=1e-5)
    preset = {"temperature": 1.0, "dynatemp_low": 0.5, "dynatemp_high": 1.5, "dynamic_temperature": True,
              "eta_cutoff": 3, "do_sample": True, "temperature_last": False, "seed": 3}  # fmt: skip
    found = client.completions.create(
        model="tiny", prompt="the", max_tokens=9, extra_body=preset | {"dialect": "textgen"}
    )
    params = SamplingParams.from_dict(preset | {"max_tokens": 9}, dialect="textgen")
    assert found.choices[0].text == server.engine.generate("the", params).text


def test_output_follows_a_grammar_and_a_strategy(server, client):
    from handloom.strategies import beam_search

    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["STOP", "the"]}}}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
    assert client.chat.completions.create(**chat, response_format=form).choices[0].message.content in (
        '"STOP"',
        '"the"',
    )
    chosen = client.completions.create(model="tiny", prompt="x", extra_body={"choice": ["lazy", "dog"]})
    assert chosen.choices[0].text in ("lazy", "dog")
    asked = {"model": "tiny", "prompt": "the", "max_tokens": 5, "temperature": 0}
    found = client.completions.create(
        **asked, extra_body={"strategy": {"name": "beam_search", "num_beams": 3}}
    )
    wanted = beam_search(server.engine, ["the"], num_beams=3, max_new_tokens=5)[0]
    assert found.choices[0].text == wanted.text


def test_a_trace_comes_with_the_sample(server, client):
    asked = {"model": "tiny", "prompt": "the", **SEEDED, "extra_body": {"trace": True, "top_k": 4}}
    choice = client.completions.create(**asked).choices[0]
    assert choice.text == given(server, "the", **SEEDED, top_k=4)[0].text
    steps = choice.trace["steps"]
    assert len(steps) == 12
    assert [stage["name"] for stage in steps[0]["stages"]] == ["model", "temperature", "top_k"]
    assert steps[0]["stages"][2]["kept"] == 4


def test_tokens_and_models(server, client):
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == server.engine.max_length
    told = httpx.post(server.url + "/tokenize", json={"prompt": "the quick"}).json()
    assert told["tokens"] == server.engine.encode("the quick")
    assert httpx.post(server.url + "/detokenize", json={"tokens": told["tokens"]}).json() == {
        "prompt": "the quick"
    }
    messages = [{"role": "user", "content": "x"}]
    told = httpx.post(server.url + "/tokenize", json={"messages": messages}).json()
    assert told["tokens"] == server.engine.chat_prompt(messages)
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}

    def answered():
        """Completions so far; nothing is said of them before the first."""
        name = 'handloom_requests_total{path="/v1/completions",status="200"}'
        lines = httpx.get(server.url + "/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    before = answered()
    client.completions.create(model="tiny", prompt="a", max_tokens=2)
    assert answered() == before + 1


def test_callers_who_leave_give_their_blocks_back_and_the_others_get_what_they_asked_for(server):
    engine, url = server.engine, server.url + "/v1"
    count, before = 200, engine.pool.capacity
    prompts = [[5 + i % 50] * (3 + i % 7) for i in range(count)]
    asked = [
        {"temperature": 1.0, "seed": i, "max_tokens": 300 if i % 3 == 2 else 3 + i % 5} for i in range(count)
    ]

    async def everything():
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=120) as client:

            async def one(i):
                made = client.completions.create(
                    model="tiny", prompt=prompts[i], **asked[i], stream=i % 2 == 0
                )
                if i % 3 != 2:
                    result = await made
                    if i % 2 == 0:
                        return "".join([chunk.choices[0].text async for chunk in result])
                    return result.choices[0].text
                if i % 2 == 0:
                    stream = await made
                    await anext(aiter(stream))
                    await stream.close()
                    return None
                task = asyncio.ensure_future(made)
                await asyncio.sleep(0.05 * (i % 4))
                task.cancel()
                return None

            return await asyncio.gather(*map(one, range(count)))

    texts = asyncio.run(everything())
    until(lambda: server.worker.pending == 0)
    stayed = [i for i in range(count) if i % 3 != 2]
    params = [SamplingParams.from_dict(asked[i], dialect="openai") for i in stayed]
    assert [texts[i] for i in stayed] == [
        r.text for r in engine.generate([prompts[i] for i in stayed], params)
    ]
    assert server.worker._tickets == {}
    assert engine.pool.in_use == 0
    assert engine.pool.capacity == before


def test_the_harness_scores_and_generates_what_the_engine_does(server, tmp_path):
    pytest.importorskip("tenacity", reason="the harness asks servers through it")
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    models, instance = (
        pytest.importorskip("lm_eval.models.api_models"),
        pytest.importorskip("lm_eval.api.instance"),
    )

    def asked(kind, *arguments):
        return instance.Instance(request_type=kind, doc={}, arguments=arguments, idx=0)

    engine = server.engine
    engine.tokenizer.save_pretrained(tmp_path)
    model = completions.LocalCompletionsAPI(
        base_url=server.url + "/v1/completions", model="tiny", tokenizer=str(tmp_path), batch_size=2,
        max_length=256, num_concurrent=1,
    )  # fmt: skip
    pairs = [("the quick", " brown fox"), ("the", " lazy dog"), ("Stop here", ", then STOP")]
    found = model.loglikelihood([asked("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (context, rest), (logprob, greedy) in zip(pairs, found, strict=True):
        ids, begun = engine.encode(context + rest), len(engine.encode(context))
        wanted = engine.score(engine.prefill([ids[:begun]]), [ids[begun:]]).sum().item()
        assert logprob == pytest.approx(wanted, abs=1e-3)
        assert greedy == (
            engine.generate(ids[:begun], max_new_tokens=len(ids) - begun).token_ids == ids[begun:]
        )
    until = {"until": ["o"], "max_gen_toks": 12}
    texts = model.generate_until([asked("generate_until", "the quick", until)], disable_tqdm=True)
    wanted = engine.generate("the quick", SamplingParams(stop=["o"], max_new_tokens=12)).text
    assert texts == [wanted]
    chat = completions.LocalChatCompletion(
        base_url=server.url + "/v1/chat/completions", model="tiny", num_concurrent=1
    )
    messages = models.JsonChatStr('[{"role": "user", "content": "the quick"}]')
    texts = chat.generate_until([asked("generate_until", messages, until)], disable_tqdm=True)
    ids = engine.chat_prompt([{"role": "user", "content": "the quick"}])
    assert texts == [engine.generate(ids, SamplingParams(stop=["o"], max_new_tokens=12)).text]
