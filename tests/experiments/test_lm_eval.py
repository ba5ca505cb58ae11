"""The model of lm-evaluation-harness: the numbers of `hf`, with shared contexts and repeated prompts computed once."""

import json
import logging
import runpy
import sys
from functools import partial

import pytest
from helpers import recorded, text_engine
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_tokenizers import CHAT, byte_level

from handloom import ParameterError
from handloom.experiments.lm_eval.model import HandloomLM
from handloom.strategies import beam_search

CHOICE = """
task: choices
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{options}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: texts
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{q}}"
metric_list: [{metric: word_perplexity}]
"""
UNTIL = """
task: answers
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{gold}}"
generation_kwargs: {until: ["o", "\\n\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
"""
QUESTIONS = ["the quick brown fox", "a lazy dog jumps over", "stop here, then", "the"]


def request(kind, *arguments, **more):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, **more)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer, and tasks over local files."""
    place = tmp_path_factory.mktemp("lm_eval")
    engine = text_engine()
    engine.model.save_pretrained(place / "model")
    byte_level().save_pretrained(place / "model")
    rows = [
        {"q": q, "options": [" the fox", " dog", " a", " jumps over the lazy dog"], "answer": i, "gold": "x"}
        for i, q in enumerate(QUESTIONS)
    ]
    (place / "docs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in (("choices", CHOICE), ("texts", ROLLING), ("answers", UNTIL)):
        files = json.dumps({"test": str(place / "docs.jsonl")})
        head = f"dataset_path: json\ndataset_kwargs: {{data_files: {files}}}\ntest_split: test\n"
        (place / f"{name}.yaml").write_text(head + task)
    return place


@pytest.fixture(scope="module")
def theirs(folder):
    """The harness's own model on the folder."""
    return HFLM(str(folder / "model"), device="cpu", batch_size=2, dtype="float32")


@pytest.fixture(scope="module")
def ours(folder):
    """Ours on the folder; the device is what the harness says on a machine without one."""
    return HandloomLM(str(folder / "model"), device="cuda:0", batch_size=4, dtype="float32", device_map=None)


def test_tasks_from_local_files_have_the_numbers_of_hf(folder, theirs, ours, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    tasks = TaskManager(include_path=str(folder), include_defaults=False)

    def evaluated(model):
        found = simple_evaluate(
            model=model, tasks=["choices", "texts", "answers"], task_manager=tasks, bootstrap_iters=0
        )
        metrics = [
            value
            for task in found["results"].values()
            for value in task.values()
            if not isinstance(value, str)
        ]
        answers = [sample["resps"] for sample in found["samples"]["answers"]]
        scores = [
            number
            for sample in found["samples"]["choices"]
            for response in sample["resps"]
            for number in response[0]
        ]
        return metrics, answers, scores

    mine, other = evaluated(ours), evaluated(theirs)
    assert mine[0] == pytest.approx(other[0], rel=1e-4)
    assert mine[1] == other[1]
    assert any(text for answer in mine[1] for (text,) in answer)
    assert mine[2] == pytest.approx(other[2], abs=1e-4)


def test_awkward_requests_have_the_numbers_of_hf(theirs, ours):
    pairs = [("", "the fox"), ("the ", " dog"), ("a", "b" * 70), ("x" * 400, " dog"), ("</s>", "fox")]
    asked = [request("loglikelihood", *pair) for pair in pairs]
    for mine, other in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert mine == pytest.approx(other, abs=1e-4)
    texts = [request("loglikelihood_rolling", text) for text in ("a dog", "the quick fox " * 60)]
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-5)
    kwargs = [{"until": ["e"], "max_gen_toks": 9}, {"until": [], "max_new_tokens": 6}]
    asked = [request("generate_until", text, each) for each in kwargs for text in (*QUESTIONS, "y" * 400)]
    assert ours.generate_until(asked) == theirs.generate_until(asked)


def test_a_context_is_computed_once_for_all_its_continuations(ours):
    context = "the quick brown fox jumps over the lazy dog. " * 3
    length = len(ours.tok_encode(context.rstrip()))
    choices = [" a", " the dog", " the fox jumps", " x", " y"]
    with recorded(ours.engine.model) as passes:
        scores = ours.loglikelihood([request("loglikelihood", context, choice) for choice in choices])
    fed = sum(len(ours._encode_pair(context, choice)[1]) - 1 for choice in choices)
    assert passes.tokens <= length + len(choices) * max(fed, 1)
    assert passes.tokens < 2 * length
    alone = [ours.loglikelihood([request("loglikelihood", context, choice)])[0] for choice in choices]
    for one, other in zip(scores, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_repeats_are_samples_of_one_prompt(ours):
    context = "stop here, then jump over the lazy dog. " * 3
    length = len(ours.tok_encode(context))
    asked = [request("generate_until", context, {"temperature": 1.5, "seed": 3, "max_gen_toks": 4})] * 5
    with recorded(ours.engine.model) as passes:
        answers = ours.generate_until(asked)
    assert length <= passes.tokens <= length + 5 * 4
    assert len(set(answers)) > 1
    assert ours.generate_until(asked) == answers


def test_strategies_and_samplers_by_keyword(ours):
    def answer(**kwargs):
        return ours.generate_until([request("generate_until", "the quick", {"max_gen_toks": 6} | kwargs)])[0]

    ids = ours.tok_encode("the quick")
    beam = beam_search(ours.engine, [ids], num_beams=3, max_new_tokens=6)[0]
    assert answer(strategy="beam_search", num_beams=3) == ours.engine.decode(beam.token_ids)
    drawn = ours.engine.generate([ids], temperature=1.3, min_p=0.05, seed="per-request:7", max_new_tokens=6)[
        0
    ]
    assert answer(temperature=1.3, min_p=0.05, seed=7) == ours.engine.decode(drawn.token_ids)
    assert answer(temperature=1.3, do_sample=False) == answer()
    with pytest.raises(ParameterError, match="did you mean 'temperature'"):
        answer(temprature=1.3)
    with pytest.raises(ParameterError, match="did you mean 'beam_search'"):
        answer(strategy="beem_search")
    with pytest.raises(ParameterError, match="no room for a context"):
        answer(max_gen_toks=10**6)


def test_what_a_model_cannot_be_made_of_is_said(ours, folder):
    with pytest.raises(ParameterError, match=r"--model_args quantisation: expected one of .*quantization"):
        HandloomLM(str(folder / "model"), quantisation="nf4")
    with pytest.raises(ParameterError, match="no more options"):
        HandloomLM(ours.engine, slots=3)
    assert HandloomLM(ours.engine, max_length=50).max_length == 50


def test_chats_go_through_the_template(ours, theirs, monkeypatch):
    monkeypatch.setattr(ours.tokenizer, "chat_template", CHAT)
    monkeypatch.setattr(theirs.tokenizer, "chat_template", CHAT)
    chat = [{"role": "user", "content": "a fox"}, {"role": "assistant", "content": "a dog"}]
    for ready in (True, False):
        assert ours.apply_chat_template(chat, ready) == theirs.apply_chat_template(chat, ready)
    assert ours.chat_template(True) == CHAT
    assert ours.tokenizer_name == theirs.tokenizer_name


@pytest.fixture
def own_logging(monkeypatch):
    """The harness's command sets up the root logger, which the tests behind this one share."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    monkeypatch.setattr(root, "level", root.level)


def test_the_harness_own_command_finds_the_model(folder, own_logging, monkeypatch, capsys):
    arguments = [
        "run",
        "--model",
        "handloom",
        "--model_args",
        f"pretrained={folder / 'model'}",
        "--tasks",
        "answers",
    ]
    arguments += [
        "--include_path",
        str(folder),
        "--gen_kwargs",
        "strategy=beam_search,num_beams=2",
        "--limit",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments])
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    runpy.run_module("handloom.experiments.lm_eval", run_name="__main__")
    assert "exact_match" in capsys.readouterr().out
