"""lm-evaluation-harness against the server, by its own models for OpenAI's API."""

import pytest
from served import chat_engine, served

from handloom import SamplingParams

pytest.importorskip("tenacity", reason="the harness asks servers through it")
completions = pytest.importorskip("lm_eval.models.openai_completions")
models = pytest.importorskip("lm_eval.models.api_models")
instance = pytest.importorskip("lm_eval.api.instance")


def asked(kind, *arguments):
    return instance.Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_the_harness_scores_and_generates_what_the_engine_does(tmp_path):
    engine = chat_engine(slots=4)
    engine.tokenizer.save_pretrained(tmp_path)
    with served(engine) as server:
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
