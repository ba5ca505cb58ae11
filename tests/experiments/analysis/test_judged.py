"""What other models say of records, against plain passes and by hand."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from helpers import full_logits, text_engine
from tiny_tokenizers import CHAT

from handloom import ParameterError, cli
from handloom.experiments import samples
from handloom.experiments.analysis.judged import features, with_embeddings, with_judge, with_steps
from handloom.experiments.analysis.metrics import METRICS, mauve, watermark
from handloom.experiments.plan import Plan
from handloom.experiments.records import read_results
from handloom.experiments.run import run
from handloom.strategies import Unigram, beam_search, exponential_watermark


@pytest.fixture(scope="module")
def engine():
    """The judge."""
    return text_engine()


def record(text, prompt="the cat", sample=0):
    return {
        "text": text,
        "prompt": prompt,
        "prompt_hash": prompt,
        "sample": sample,
        "token_ids": [1],
        "finish_reason": "stop",
    }


def test_a_judge_reads_every_text_behind_its_prompt(engine):
    records = [record(" sat down"), record(" x", "a dog"), record(""), record(" ran", sample=1)]
    made = with_judge(records, engine)
    for before, after in zip(records, made, strict=True):
        context, ids = (
            engine.tokenizer.encode(before[k], add_special_tokens=False) for k in ("prompt", "text")
        )
        logp = full_logits(engine.model, context + ids).log_softmax(-1)
        expected = [float(logp[len(context) + i - 1, token]) for i, token in enumerate(ids)]
        assert after.get("judge_logprobs", []) == pytest.approx(expected, abs=1e-4)
    value = METRICS["judge_perplexity"].of([made[0]])
    assert value == [pytest.approx(math.exp(-np.mean(made[0]["judge_logprobs"])))]
    assert METRICS["judge_logprob"].of([made[2]]) == []


def test_entropy_rank_and_kept_set_of_every_token_by_hand(engine):
    shared = {"top_k": 20, "temperature": 0.9, "max_new_tokens": 5, "ignore_eos": True}
    drawn = engine.generate(["the cat", "a dog"], **shared, min_p=0.1, seed=3)
    searched = beam_search(engine, ["x"], num_beams=2, max_new_tokens=4)
    records = [
        record(g.text, prompt)
        | {"token_ids": list(g.token_ids), "seed": 3, "strategy": name, "params": params}
        for g, prompt, name, params in (
            (drawn[0], "the cat", None, shared | {"min_p": 0.1}),
            (drawn[1], "a dog", None, shared),
            (searched[0], "x", "beam_search", {"num_beams": 2, "max_new_tokens": 9}),
        )
    ]
    made = with_steps([*records, records[0] | {"token_ids": [], "finish_reason": "error"}], engine)
    assert "rank" not in made[3]
    for before, after in zip(records, made, strict=False):
        context = engine.encode(before["prompt"])
        logits = full_logits(engine.model, context + before["token_ids"])[len(context) - 1 : -1]
        logp = logits.log_softmax(-1)
        assert after["entropy"] == pytest.approx((-(logp.exp() * logp).sum(-1)).tolist(), abs=1e-4)
        chosen = logits.gather(1, torch.tensor(before["token_ids"])[:, None])
        assert after["rank"] == ((logits > chosen).sum(-1) + 1).tolist()
    best = full_logits(engine.model, engine.encode("the cat"))[-1].div(0.9).softmax(-1).topk(20).values
    assert made[0]["kept"][0] == int((best >= 0.1 * best[0]).sum()) < 20
    assert made[1]["kept"] == [20] * 5
    assert made[2]["kept"] == [engine.vocab_size] * 4
    assert METRICS["kept"].of([made[1]]) == [20.0]


def test_features_are_hidden_states(engine):
    text = "the quick fox"
    with torch.no_grad():
        ids = torch.tensor([engine.encode(text)])
        hidden = engine.model(ids, output_hidden_states=True).hidden_states[-1][0]
    mean, last = (features(engine, [text], pooling=pooling) for pooling in ("mean", "last"))
    assert mean[0] == pytest.approx(hidden.mean(0).numpy(), abs=1e-4)
    assert last[0] == pytest.approx(hidden[-1].numpy(), abs=1e-4)
    made = with_embeddings([record("a dog"), record("a dog"), record("")], engine)
    assert METRICS["embedding_diversity"].of(made) == [pytest.approx(0, abs=1e-6)]
    assert "embedding" not in made[2]
    with pytest.raises(ParameterError, match="pooling='max': expected mean or last"):
        features(engine, [text], pooling="max")
    with pytest.raises(ParameterError, match="text 1 is empty"):
        features(engine, [text, ""])


def test_mauve_tells_near_from_far():
    rng = np.random.default_rng(0)
    reference, near = rng.normal(size=(2, 60, 4))
    options = {"num_buckets": 6, "device_id": -1}
    assert mauve(near, reference, **options) > 0.8 > 0.2 > mauve(near + 8, reference, **options)


def test_p_values_of_watermarks_are_metrics(engine):
    params = {"temperature": 1.5, "max_new_tokens": 60, "ignore_eos": True, "seed": 1}
    marked = exponential_watermark(engine, ["the cat"], params, key=7)[0]
    plain = engine.generate("the cat", params)
    records = [record("") | {"token_ids": list(g.token_ids), "params": {"key": 7}} for g in (marked, plain)]
    first, second = METRICS["watermark_p"].of(records)
    assert first < 1e-6 < 0.01 < second
    unigram = Unigram(engine.vocab_size, key=3)
    assert watermark(unigram.detect).of(records) == [unigram.detect(r["token_ids"]).p_value for r in records]


def test_a_command_writes_what_models_say(engine, tmp_path, monkeypatch, capsys):
    """A judge's log-probabilities and every token's entropy and rank, by plain passes of transformers alone."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["handloom", "score", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, capsys.readouterr()

    asked = []
    monkeypatch.setattr(samples, "load_engine", lambda **given: asked.append(given) or engine)
    monkeypatch.setattr(engine.tokenizer, "chat_template", CHAT)
    plan = {
        "model": "own",
        "prompts": ["the cat", "a dog"],
        "params": {"temperature": 1.0, "top_k": 9, "max_new_tokens": 4, "ignore_eos": True},
        "chat": True,
    }
    run(Plan.of(plan), tmp_path / "a.jsonl", load=samples.load_engine)
    header, records = read_results([tmp_path / "a.jsonl"])
    for options, model in (((), "own"), (("--chat", "-m", "judge"), "judge"), (("--steps",), "own")):
        code, told = command(tmp_path / "a.jsonl", "-o", tmp_path / "b.jsonl", *options)
        assert (code, "2 samples in" in told.out, asked[-1]) == (0, True, {"name_or_path": model})
        again, made = read_results([tmp_path / "b.jsonl"])
        assert again == header
        for before, after in zip(records, made, strict=True):
            assert {name: after[name] for name in before} == before
            chat = [{"role": "user", "content": before["prompt"]}]
            text = (
                before["prompt"]
                if not options
                else engine.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            )
            context = engine.tokenizer.encode(text, add_special_tokens=False)
            ids = (
                before["token_ids"]
                if "--steps" in options
                else engine.tokenizer.encode(before["text"], add_special_tokens=False)
            )
            logp = full_logits(engine.model, context + ids).log_softmax(-1)[len(context) - 1 : -1]
            if "--steps" in options:
                assert after["entropy"] == pytest.approx((-(logp.exp() * logp).sum(-1)).tolist(), abs=1e-3)
                assert after["rank"] == [
                    int((row > row[i]).sum()) + 1 for row, i in zip(logp, ids, strict=True)
                ]
                assert after["kept"] == [9] * 4
            else:
                expected = [float(row[i]) for row, i in zip(logp, ids, strict=True)]
                assert after["judge_logprobs"] == pytest.approx(expected, abs=1e-4)
    several = {"header": header | {"models": {"one": {}, "two": {}}}}
    (tmp_path / "c.jsonl").write_text(json.dumps(several) + "\n")
    for path, said in (("none.jsonl", "there is no"), ("c.jsonl", "--model: the run has one, two; name one")):
        code, told = command(tmp_path / path, "-o", tmp_path / "d.jsonl")
        assert code
        assert said in told.err
        assert not (tmp_path / "d.jsonl").exists()
