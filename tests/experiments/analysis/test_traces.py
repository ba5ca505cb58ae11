"""Traces: the tokens of `generate`, and numbers recomputed from the model's logits."""

import json
import re
import weakref

import numpy as np
import pytest
import torch
from helpers import recorded, text_engine
from torch.utils._python_dispatch import TorchDispatchMode

from handloom import ParameterError
from handloom.experiments.analysis.trace import followed, trace

PARAMS = {
    "temperature": 1.5,
    "top_k": 20,
    "min_p": 0.2,
    "repetition_penalty": 1.3,
    "seed": 3,
    "max_new_tokens": 8,
}


@pytest.fixture(scope="module")
def engine():
    """One engine for all traces."""
    return text_engine(slots=2)


def test_tokens_are_those_of_generate_and_stages_those_of_the_pipeline(engine):
    found = engine.trace("the cat", PARAMS | {"ignore_eos": True}, candidates=5)
    expected = engine.generate("the cat", **PARAMS, ignore_eos=True)
    assert found.generation.token_ids == expected.token_ids
    assert [step.token for step in found.steps] == expected.token_ids
    names = [stage.name for stage in found.steps[0].stages]
    assert names == ["model", "repetition_penalty", "temperature", "top_k", "min_p"]
    state = engine.prefill(["the cat"])
    for step, token, raw, drawn in zip(
        found.steps, expected.token_ids, expected.raw_logprobs, expected.logprobs, strict=True
    ):
        p = state.logits[0].softmax(-1)
        first, last = step.stages[0], step.stages[-1]
        assert step.greedy == int(p.argmax())
        assert first.probabilities[:5] == pytest.approx(p.topk(5).values.tolist(), abs=1e-6)
        assert first.entropy == pytest.approx(float(-(p * p.log()).sum()), abs=1e-4)
        place = step.candidates.index(token)
        assert np.log(first.probabilities[place]) == pytest.approx(raw, abs=1e-4)
        assert np.log(last.probabilities[place]) == pytest.approx(drawn, abs=1e-4)
        tempered = step.stages[2]
        assert tempered.kept == engine.vocab_size
        assert step.stages[3].kept == 20 >= last.kept >= 1
        assert step.stages[3].removed > 0
        state = engine.step(state, torch.tensor([token]))


def test_who_excluded_the_greedy_token_is_named(engine):
    greedy = engine.generate("the cat", max_new_tokens=1).token_ids[0]
    found = trace(
        engine, "the cat", temperature=1.0, banned_tokens=[greedy], top_k=5, seed=1, max_new_tokens=2
    )
    assert found.steps[0].greedy == greedy
    assert found.steps[0].killed_by == "banned_tokens"
    assert found.steps[0].token != greedy
    assert "killed by banned_tokens" in str(found)


def test_arrays_and_pages_hold_every_step(engine, tmp_path):
    found = trace(engine, "the cat", PARAMS, ignore_eos=True, candidates=4)
    found.save(tmp_path / "a.npz")
    arrays = np.load(tmp_path / "a.npz")
    assert arrays["tokens"].tolist() == found.generation.token_ids
    assert arrays["probabilities"].shape == (8, 5, arrays["candidates"].shape[1])
    assert arrays["kept"][:, 0].tolist() == [engine.vocab_size] * 8
    assert arrays["stages"].tolist() == ["model", "repetition_penalty", "temperature", "top_k", "min_p"]
    parquet = pytest.importorskip("pyarrow.parquet")
    found.save(tmp_path / "a.parquet")
    rows = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert [(row["step"], row["stage"]) for row in rows[:6]] == [
        *((0, name) for name in arrays["stages"].tolist()),
        (1, "model"),
    ]
    assert [row["kept"] for row in rows] == arrays["kept"].flatten().tolist()
    assert rows[7]["probabilities"] == pytest.approx(
        arrays["probabilities"][1, 2, : len(rows[7]["candidates"])]
    )
    found.save(tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    data = json.loads(re.search(r'id="data">(.*)</script>', text).group(1))
    texts = [data["texts"][str(step["token"])] for step in data["steps"]]
    assert texts == [found.text(token) for token in found.generation.token_ids]
    assert "http" not in text.replace("http-equiv", "")
    assert not re.search(r"^(import|export) |page/", text, re.M)  # all parts are inside
    with pytest.raises(ParameterError, match=r"written as \.npz or \.html"):
        found.save(tmp_path / "a.txt")


def test_bad_traces_say_what_is_wrong(engine):
    with pytest.raises(ParameterError, match="one sample; these parameters ask for 2"):
        trace(engine, "a", temperature=1.0, n=2, max_new_tokens=1)
    with pytest.raises(ParameterError, match="candidates=0"):
        trace(engine, "a", candidates=0)


def test_a_trace_costs_nothing_where_there_is_none(engine):
    """Operations of `generate` are the same before, and after a trace; a trace has its forward passes."""

    class Counted(TorchDispatchMode):
        """How many operations run."""

        def __torch_dispatch__(self, function, types, given=(), named=None):
            counts.append(str(function))
            return function(*given, **(named or {}))

    def operations():
        counts.clear()
        with Counted(), recorded(engine.model) as passes:
            engine.generate("the cat", PARAMS, ignore_eos=True, progress=False)
        return list(counts), list(passes.shapes)

    counts = []
    operations()  # what only a first run does
    before = operations()
    with recorded(engine.model) as passes:
        trace(engine, "the cat", PARAMS, ignore_eos=True)
    assert operations() == before
    assert len(before[0]) > 100
    assert (
        len(passes.shapes) == len(before[1]) + 2
    )  # one behind the last token, one for the prompt's own numbers


def test_a_step_is_let_go_when_it_is_told(engine, monkeypatch):
    held, alive = [], []

    def watched(token, left, candidates):
        alive.append(sum(each() is not None for each in held))
        held.extend(weakref.ref(logits) for _, logits in left)
        return followed(token, left, candidates)

    monkeypatch.setattr("handloom.experiments.analysis.trace.followed", watched)
    assert len(trace(engine, "the cat", PARAMS, ignore_eos=True).steps) == 8
    assert max(alive) <= 5  # the last step's, of the forty that were seen
