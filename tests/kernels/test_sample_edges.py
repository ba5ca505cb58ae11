"""Where the paths of `sample` used to differ or to complain: fractional counts, finite masks, unknown statistics."""

import warnings

import pytest
import torch
from sampling_rows import generator

from handloom import Context, Keep, Pipeline, SamplingParams
from handloom.kernels.sampling.reference import truncate
from handloom.kernels.sampling.rules import Rule, Statistics
from handloom.kernels.sampling.sample import sample

KINDS = ["count", "exact_count"]


def logits_of(batch, vocab):
    return torch.randn(batch, vocab, generator=generator(0))


def key(batch):
    return {name: torch.arange(batch) for name in ("seeds", "positions", "streams")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_fractional_count_is_rounded_up_on_every_path(kind, kernels):
    logits, counts = logits_of(4, 300), torch.tensor([2.5, 0.25, 3.0, 7.75])
    drawn = sample(
        logits, **key(len(logits)), rules=(Rule(kind, counts),), logprobs=True,
        kernels=kernels,
    )  # fmt: skip
    assert drawn.kept.tolist() == [3, 1, 3, 8]
    left = truncate(logits, (Rule(kind, counts),))
    assert left.isfinite().sum(1).tolist() == [3, 1, 3, 8]


def test_finite_masks_make_no_warning():
    logits = logits_of(2, 20_000) + 3
    logits[:, 100:] = torch.finfo(torch.float32).min
    asked = {"temperature": 1.0, "top_p": 0.9, "seed": 1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for more in ({}, {"top_k": 40}, {"min_p": 0.1, "top_p": 1.0}, {"typical_p": 0.9, "top_p": 1.0}):
            params = SamplingParams(**asked | more)
            pipeline = Pipeline.default().bind([params] * 2, [[0]] * 2, vocab_size=20_000)
            one = torch.ones(2, dtype=torch.int64)
            context = Context(
                lengths=one, prompt_lengths=one, seeds=one, streams=one * 0, params=[params] * 2
            )
            assert (pipeline.sample(logits, context).tokens < 100).all()


class Unknown(Keep):
    defaults = {"share": 0.0}

    def level(self, statistics, value):
        return statistics.variance


def test_an_unknown_statistic_is_told_which_there_are():
    logits, known = logits_of(1, 20), ", ".join(Statistics._fields)
    with pytest.raises(AttributeError, match=f"there is no statistic 'variance'; a rule may read {known}"):
        Unknown(0.5)(logits)
    rule = Rule("value", torch.tensor([0.5]), lambda statistics, value: statistics.variance)
    with pytest.raises(AttributeError, match=f"may read {known}"):
        sample(logits, **key(len(logits)), rules=(rule,), kernels="torch")
