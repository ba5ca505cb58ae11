"""Processors that raise, write to their input or return what is no logits: named, and only their rows end."""

import re

import pytest
import torch
from architectures import prompts_of
from helpers import assert_nothing_leaked, tiny_llama

from handloom import Engine, ParameterError, Pipeline, SamplingParams
from handloom.processors import Edit, Keep, Processor
from handloom.strategies import contrastive_search, speculative

PROMPTS = prompts_of([5, 9, 3, 12])


def raises(logits, context):
    if int(context.output_lengths.max()) >= 2:
        raise ValueError("not today")
    return logits


def integers(logits, context):
    return torch.zeros_like(logits, dtype=torch.long)


def writes(logits, context):
    logits[:, 3] = -torch.inf
    return logits


def writes_elsewhere(logits, context):
    logits.mul_(2.0)
    return logits.clone()


def nan(logits, context):
    return torch.full_like(logits, float("nan"))


def infinite(logits, context):
    return logits.masked_fill(torch.arange(logits.shape[1]) == 3, float("inf"))


def nothing(logits, context):
    return None


class Levels(Keep):
    """Raises inside the sampler."""

    defaults = {"n": 0.0}

    def level(self, statistics, n):
        return statistics.variance - n


class NoNumbers(Keep):
    """Its level is no number."""

    defaults = {"n": 0.0}

    def level(self, statistics, n):
        return statistics.maximum * float("nan")


class Masses(Keep):
    """Raises before the sampler, while the step is planned."""

    defaults = {"n": 0.0}

    def mass(self, context):
        raise ZeroDivisionError("no mass")


class NoMasses(Keep):
    """A mass that is no number, found out by the sampler."""

    defaults = {"n": 0.0}

    def mass(self, context):
        return context.values.n * torch.nan


class NoMassesByKey(NoMasses):
    """The same in torch."""

    def key(self, logits, context):
        return -logits


class Lists(Edit):
    """Raises among the edits that share a copy of the logits."""

    defaults = {"n": 0.0}

    def listed(self, context):
        raise TypeError("no list")


class Forgets(Processor):
    """Raises when it accepts its second token."""

    def apply(self, logits, context):
        return logits

    def start(self, context):
        return {"count": torch.zeros(len(context.params), 1)}

    def accept(self, memory, tokens, context):
        if memory["count"].max() >= 1:
            raise KeyError("count")
        return {"count": memory["count"] + 1}


class StartsBadly(Forgets):
    def start(self, context):
        raise OSError("no file")


FAULTS = {
    raises: "processor 'raises' raised ValueError: not today",
    integers: r"processor 'integers' must return floating logits like the torch\.float32 .* got torch\.int64",
    writes: "processor 'writes' wrote to the logits that it was given; .* logits.clone",
    writes_elsewhere: "processor 'writes_elsewhere' wrote to the logits",
    nan: "processor 'nan' returned NaN",
    infinite: r"processor 'infinite' returned \+inf",
    nothing: r"processor 'nothing' must return logits of shape \[\d, 101\], got None",
    Levels(
        1.0
    ): "processor 'Levels' raised AttributeError: there is no statistic 'variance'; a rule may read maximum",
    NoNumbers(1.0): "processor 'NoNumbers' gave NaN as its level",
    NoMasses(1.0): "processor 'NoMasses' gave NaN as its mass",
    NoMassesByKey(1.0): "processor 'NoMassesByKey' gave NaN as its mass",
    Masses(1.0): "processor 'Masses' raised ZeroDivisionError: no mass",
    Lists(1.0): "processor 'Lists' raised TypeError: no list",
    Forgets(): "processor 'Forgets' raised KeyError: 'count'",
    StartsBadly(): "processor 'StartsBadly' raised OSError: no file",
}
CASES = [
    pytest.param(fault, message, sampled, id=f"{getattr(fault, '__name__', type(fault).__name__)}-{mode}")
    for fault, message in FAULTS.items()
    for mode, sampled in (("greedy", 0.0), ("sampled", 1.0))
    if sampled or not isinstance(fault, Keep)  # a greedy row is not truncated
]


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.mark.parametrize("graph", [False, True], ids=["loop", "program"])
@pytest.mark.parametrize(("fault", "message", "sampled"), CASES)
def test_its_rows_end_in_error_and_the_others_are_as_they_were(model, fault, message, sampled, graph):
    plain = SamplingParams(max_new_tokens=6, temperature=sampled, seed=5)
    engine = Engine(model, slots=2, graph=graph)
    wanted = [g.token_ids for g in engine.generate(PROMPTS, plain)]
    params = [plain, plain.replace(processors=[fault]), plain, plain.replace(processors=[fault])]
    results = engine.generate(PROMPTS, params)
    for row, result in enumerate(results):
        if row % 2:
            assert result.finish_reason == "error"
            assert re.match(rf"request {row}: {message}", result.error), result.error
            assert result.token_ids == wanted[row][: result.n_new]
        else:
            assert (result.token_ids, result.error) == (wanted[row], None)
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("fault", [integers, writes, writes_elsewhere, nothing])
def test_by_hand_it_raises_at_once(model, fault):
    """In a notebook there is no row to end."""
    pipeline = Pipeline([fault])
    with pytest.raises(ParameterError, match=FAULTS[fault]):
        pipeline(torch.zeros(1, 101))


def test_half_precision_is_taken(model):
    def halved(logits, context):
        return (logits / 2).to(torch.bfloat16)

    result = Engine(model).generate(PROMPTS[0], max_new_tokens=3, processors=[halved])
    assert result.finish_reason == "length"


def test_the_models_own_nan_stays_the_models(model):
    def passes(logits, context):
        return logits + 0

    broken = tiny_llama()
    with torch.no_grad():
        broken.get_input_embeddings().weight[7] = float("nan")
    result = Engine(broken).generate([1, 7, 3], max_new_tokens=3, processors=[passes])
    assert "the model's logits hold NaN" in result.error


def test_strategies_tell_the_same(model):
    engine = Engine(model)
    for results in (
        contrastive_search(engine, PROMPTS[:2], max_new_tokens=4, processors=[raises]),
        speculative(engine, PROMPTS[:2], max_new_tokens=4, processors=[raises]),
    ):
        assert [r.finish_reason for r in results] == ["error"] * 2
        assert all(r.error.endswith("processor 'raises' raised ValueError: not today") for r in results)
