"""Rules that go wrong inside the sampler: parameters or thresholds of NaN, device functions that do not compile."""

import dataclasses
import logging

import pytest
import torch
import triton
import triton.language as tl

from handloom.kernels import dispatch
from handloom.kernels.sampling import rules
from handloom.kernels.sampling.draw import NONE_KEPT
from handloom.kernels.sampling.reference import sample_reference
from handloom.kernels.sampling.rules import Rule
from handloom.kernels.sampling.sample import sample

ROWS = torch.randn(3, 700, generator=torch.Generator().manual_seed(8)) * 3
KEY = {"seeds": torch.arange(3) + 5, "positions": torch.arange(3)}
ONES = torch.ones(3)


def no_number(statistics, parameter):
    return torch.where(parameter == 2, torch.nan, statistics.maximum - 3)


@triton.jit
def no_number_on_device(maximum, log_mass, entropy, collision, count, mean, deviation, parameter):
    return tl.where(parameter == 2, float("nan"), maximum - 3)


@triton.jit
def unknown_name(maximum, log_mass, entropy, collision, count, mean, deviation, parameter):
    return maximum - nothing_of_this_name  # noqa: F821


NAN = torch.tensor([0.9, torch.nan, 0.9])
SENSELESS = {
    "mass": (rules.top_p(NAN),),
    "count": (rules.top_k(NAN),),
    "exact count": (rules.top_k(NAN, ties="lowest"),),
    "value": (rules.min_p(NAN),),
    "typical": (rules.typical(NAN),),
    "tail-free": (rules.top_k(ONES * 40), rules.tail_free(NAN)),
    "xtc": (rules.xtc(ONES / 9, NAN * 0),),
    "top-h, later": (rules.top_k(ONES * 40), rules.top_h(ONES / 2, NAN)),
}


@pytest.mark.parametrize("asked", SENSELESS.values(), ids=SENSELESS)
def test_a_parameter_that_is_no_number_keeps_nothing_of_its_row(asked):
    call = rules.Call(ROWS, **KEY, rules=asked, logprobs=True)
    reference = sample_reference(call)
    assert reference.tokens[1] == NONE_KEPT
    assert (reference.tokens[[0, 2]] >= 0).all()
    greedy = sample_reference(dataclasses.replace(call, temperature=ONES * 0)).tokens
    assert greedy.equal(ROWS.argmax(1))
    for kernels in ("torch", "triton"):
        drawn = sample(ROWS, **KEY, rules=asked, logprobs=True, kernels=kernels)
        assert drawn.tokens.equal(reference.tokens)
        assert drawn.kept.equal(reference.kept)
        assert drawn.logprob.isnan().tolist() == [False, True, False]
        at_zero = sample(ROWS, **KEY, rules=asked, temperature=ONES * 0, kernels=kernels)
        assert at_zero.tokens.equal(greedy)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("before", [(), (rules.top_k(ONES * 40),)], ids=["first", "after top-k"])
def test_a_threshold_that_is_no_number_keeps_nothing_of_its_row(kernels, before):
    parameter = torch.tensor([1.0, 2.0, 1.0])
    rule = Rule("value", parameter, no_number, no_number_on_device)
    drawn = sample(ROWS, **KEY, rules=(*before, rule), logprobs=True, kernels=kernels)
    plain = sample(ROWS, **KEY, rules=(*before, rule._replace(parameter=ONES)), kernels="torch").tokens
    assert drawn.tokens.tolist() == [plain[0], NONE_KEPT, plain[2]]
    assert drawn.kept[1] == drawn.rank[1] == 0
    for values in (drawn.logprob, drawn.raw_logprob, drawn.entropy):
        assert values.isnan().tolist() == [False, True, False]


def test_a_device_function_that_does_not_compile_is_named(monkeypatch, caplog):
    rule = Rule("value", ONES, lambda statistics, parameter: statistics.maximum - 3, unknown_name)
    rule.threshold.__name__ = "my_rule"
    message = "the device function of rule 'my_rule' does not compile: NameError.*nothing_of_this_name"
    with pytest.raises(dispatch.KernelUnavailable, match=message):
        sample(ROWS, **KEY, rules=(rule,), kernels="triton")
    monkeypatch.setattr(dispatch, "_why_not", lambda device, named: None)  # as where Triton runs of itself
    with caplog.at_level(logging.INFO, "handloom.kernels"):
        tokens = sample(ROWS, **KEY, rules=(rule,)).tokens
    assert tokens.equal(sample(ROWS, **KEY, rules=(rule,), kernels="torch").tokens)
    assert "sample runs in torch: the device function of rule 'my_rule'" in caplog.text


def test_other_errors_are_not_blamed_on_a_device_function():
    with pytest.raises(ValueError, match="15 truncation steps"):
        sample(ROWS, **KEY, rules=(rules.top_k(ONES),) * 15, kernels="triton")
