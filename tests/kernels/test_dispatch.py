"""Who decides which implementation runs, and that a choice is never silently ignored."""

import contextlib
import importlib
import logging
from pathlib import Path

import pytest
import torch

from handloom.kernels import dispatch
from handloom.kernels.sampling import rules

LAUNCHERS = (
    "append_triton",
    "attention.attention_triton",
    "attention.packed_triton",
    "layer.gated_triton",
    "layer.norm_triton",
    "layer.rope_triton",
    "linear.few_rows_triton",
    "linear.nf4_triton",
    "penalties_triton",
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def test_argument_beats_block_beats_variable(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    assert dispatch.requested() == "triton"
    with dispatch.use("torch"):
        assert dispatch.requested() == "torch"
        with dispatch.use("auto"):
            assert dispatch.requested() == "auto"
        assert dispatch.requested() == "torch"
        assert dispatch.requested("triton") == "triton"
    monkeypatch.delenv(dispatch.VARIABLE)
    assert dispatch.requested() == "auto"


def test_unknown_choices_are_named(monkeypatch):
    with pytest.raises(ValueError, match="kernels= 'cuda': choose one of 'auto', 'triton', 'torch'"):
        dispatch.requested("cuda")
    monkeypatch.setenv(dispatch.VARIABLE, "fast")
    with pytest.raises(ValueError, match="HANDLOOM_KERNELS 'fast'"):
        dispatch.select("x", CPU)


def test_auto_takes_triton_on_cuda_alone():
    assert dispatch.select("some kernel", CPU) == "torch"
    if dispatch.importlib.util.find_spec("triton"):
        assert dispatch.select("some kernel", CUDA) == "triton"
    assert dispatch.select("some kernel", CUDA, unsupported="a reason") == "torch"


def test_a_named_choice_is_followed_or_raises(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(dispatch.KernelUnavailable, match="tensors are on 'cpu'"):
        dispatch.select("some kernel", CPU, "triton")
    with pytest.raises(dispatch.KernelUnavailable, match="rule 'f' has no device function"):
        dispatch.select("some kernel", CUDA, "triton", unsupported="rule 'f' has no device function")
    assert dispatch.select("some kernel", CUDA, "torch") == "torch"


def test_auto_says_once_why_it_fell_back(caplog):
    with caplog.at_level(logging.INFO, logger="handloom.kernels"):
        for _ in range(3):
            dispatch.select("a kernel named for this test", CPU)
    assert len(caplog.records) == 1
    assert "tensors are on 'cpu'" in caplog.text


@pytest.mark.parametrize("name", LAUNCHERS)
def test_kernels_are_launched_on_the_device_of_their_tensors(name, monkeypatch):
    """A model on the second device, the first being current: only there is there anything to enter, so it is spied."""
    pytest.importorskip("triton")
    module = importlib.import_module(f"handloom.kernels.{name}")
    entered = []

    @contextlib.contextmanager
    def device_of(tensor):
        entered.append(tensor)
        yield
        entered.append("left")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    first = torch.zeros(1)
    with pytest.raises(TypeError):  # arguments are missing: the launcher itself was reached inside the block
        module.launch(first)
    assert entered == [first]
    assert module.launch.__wrapped__.__name__ == "launch"


@pytest.mark.parametrize("name", ["sample", "draw"])
def test_the_sampler_is_launched_on_the_device_of_its_logits(name, monkeypatch):
    pytest.importorskip("triton")
    from handloom.kernels.sampling import fused

    told, logits, one = [], torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64)

    @contextlib.contextmanager
    def device_of(tensor):
        told.append(tensor is logits)
        yield
        told.append("left")

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(
        fused, "sample_fused", lambda call, **_: (told.append("launched"), rules.Drawn(one))[1]
    )
    function = getattr(importlib.import_module(f"handloom.kernels.sampling.{name}"), name)
    function(logits, seeds=one, positions=one, kernels="triton")
    assert told == [True, "launched", "left"]


def test_every_file_with_a_launcher_is_in_the_list():
    folder = Path(dispatch.__file__).parent
    found = {p for p in folder.rglob("*_triton.py") if "\ndef launch(" in p.read_text(encoding="utf-8")}
    assert {".".join(p.relative_to(folder).with_suffix("").parts) for p in found} == set(LAUNCHERS)
