"""Several processes or devices: tensor parallelism over gloo, and accelerate's device maps, against one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from architectures import prompts_of
from helpers import tiny_llama

from handloom import Engine
from handloom.errors import ModelError, ParameterError
from handloom.loop.intake import checked, one_params

PROMPTS = prompts_of([3, 9, 1])  # two slots: the third row replaces another
RANKS = Path(__file__).resolve().parents[1] / "support" / "programs" / "ranks.py"


@pytest.mark.slow
def test_two_processes_draw_the_tokens_of_one(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    arguments = [str(RANKS), str(tmp_path), json.dumps(PROMPTS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{i}.json").read_text()) for i in range(2)]

    alone = Engine(model, slots=2, max_length=64)
    expected = {
        "greedy": [g.token_ids for g in alone.generate(PROMPTS, max_new_tokens=8)],
        "seeded": [g.token_ids for g in alone.generate(PROMPTS, max_new_tokens=8, temperature=1.0, seed=7)],
    }
    for rank in ranks:
        assert {name: rank[name] for name in expected} == expected
        assert rank["heads"] == alone.pool.stores[0].keys.shape[-2] // 2  # split, not copied
    # Ranks start from different generators; 24 tokens of 101 agree by chance with probability below 1e-20.
    assert ranks[0]["unseeded"] == ranks[1]["unseeded"]


def test_a_lone_process_is_told_to_use_torchrun(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ModelError, match="torchrun"):
        Engine.from_pretrained(tmp_path, tp_plan="auto")


@pytest.mark.parametrize(
    "other",
    [{"device": "cpu"}, {"device_map": "auto"}, {"quantization": "int8-cpu"}],
    ids=lambda o: next(iter(o)),
)
def test_a_tensor_plan_excludes_other_placements(tmp_path, other):
    with pytest.raises(ModelError, match=f"{next(iter(other))}=.*exclude"):
        Engine.from_pretrained(tmp_path, tp_plan="auto", **other)


def test_time_limits_are_refused_where_ranks_could_stop_apart():
    engine = Engine(tiny_llama(), slots=2, max_length=64)
    engine.generate([PROMPTS[0]], max_new_tokens=1, max_time=60)
    split = SimpleNamespace(_tp_size=2)
    engine.model = split
    with pytest.raises(ParameterError, match=r"max_time=60.*clock"):
        checked(engine, one_params(engine, None, False, {"max_time": 60}), 3, {})


def test_a_model_spread_by_accelerate_answers_as_one_in_one_piece(tmp_path):
    pytest.importorskip("accelerate")
    from accelerate import dispatch_model

    model = tiny_llama()
    wanted = [g.token_ids for g in Engine(model, slots=2, max_length=64).generate(PROMPTS, max_new_tokens=8)]
    model.save_pretrained(tmp_path)
    loaded = Engine.from_pretrained(
        tmp_path, device_map="auto", dtype="float32", slots=2, max_length=64,
        model_kwargs={"max_memory": {"cpu": "1GiB"}},
    )  # fmt: skip
    hooked = dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert hasattr(hooked, "_hf_hook")
    for engine in (loaded, Engine(hooked, slots=2, max_length=64)):
        assert [g.token_ids for g in engine.generate(PROMPTS, max_new_tokens=8)] == wanted
    assert not any(p.device != torch.device("cpu") for p in hooked.parameters())
