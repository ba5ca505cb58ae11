"""Who decides which implementation runs, and that a choice is never silently ignored."""

import logging

import pytest
import torch

from handloom.kernels import dispatch

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
