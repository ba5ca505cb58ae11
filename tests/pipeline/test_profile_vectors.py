"""Profiles against what the engines themselves made of the same logits, recorded in `profile_vectors.json`.

The file's `about` says which version of each engine was run, and how. Probabilities are compared to 1e-4 of
themselves: the recordings have six digits, and the engines compute in float32, each in its own order.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from handloom.kernels.sampling.draw import draw
from handloom.params.sampling_params import SamplingParams
from handloom.pipeline.pipeline import Context, Pipeline
from handloom.pipeline.profiles import profile

VECTORS = json.loads(Path(__file__).with_name("profile_vectors.json").read_text())
CASES = VECTORS["cases"]
EOS = 2
ENGINES = ("vllm", "llamacpp", "textgen")


def named(cases):
    return [pytest.param(case, id=f"{case['profile']}-{number}") for number, case in cases]


SINGLE = named((i, case) for i, case in enumerate(CASES) if "steps" not in case)
WALKS = named((i, case) for i, case in enumerate(CASES) if "steps" in case)


def logits_of(case):
    return torch.tensor([[-math.inf if value is None else value for value in VECTORS["rows"][case["row"]]]])


def context(text, prompt):
    return Context(
        tokens=torch.tensor([text]),
        lengths=torch.tensor([len(text)]),
        prompt_lengths=torch.tensor([prompt]),
        seeds=torch.tensor([5]),
        streams=torch.tensor([0]),
    )


def rows_of(case, vocab):
    fields = dict(case["params"])
    if "logit_bias" in fields:  # JSON has no integer keys
        fields["logit_bias"] = {int(token): bias for token, bias in fields["logit_bias"].items()}
    params = SamplingParams(profile=case["profile"], **fields)
    return Pipeline.default().bind([params], [case["prompt"]], vocab_size=vocab, eos_token_ids={EOS})


def differences(expected, processed):
    """Where the kept set or a probability of `processed` [V] differs from a recording.

    Tokens that tie with the last kept one may be ours alone: then the recorded engine cut the tie, and the
    probabilities are compared among the tokens that it kept.
    """
    theirs = expected.get("ids", range(len(processed)))
    kept = torch.zeros(len(processed), dtype=torch.bool)
    kept[list(theirs)] = True
    ours = processed > -math.inf
    found = [f"token {i} is missing" for i in (kept & ~ours).nonzero().flatten().tolist()]
    surplus = processed[ours & ~kept]
    if len(surplus) and (surplus != processed[kept].min()).any():
        found.append(f"tokens {(ours & ~kept).nonzero().flatten().tolist()} are too many")
    probabilities = processed[kept].double().softmax(0)
    for token, p, own in zip(theirs, expected["p"], probabilities.tolist(), strict=True):
        if not math.isclose(p, own, rel_tol=1e-4, abs_tol=1e-9):
            found.append(f"token {token}: {own} instead of {p}")
    return found


@pytest.mark.parametrize("case", SINGLE)
def test_the_chain_leaves_what_the_engine_left(case):
    x = logits_of(case)
    rows, text = rows_of(case, x.shape[1]), case["prompt"] + case["output"]
    step = context(text, len(case["prompt"]))
    if "p" in case:
        processed = rows.apply(x, step)
        assert not differences(case, processed[0])
    if "token" in case:
        assert rows.sample(x, step).tokens.tolist() == [case["token"]]
    else:  # the fused sampler works on the same distribution
        expected = draw(processed, step.seeds, step.positions, step.streams)
        assert torch.equal(rows.sample(x, step).tokens, expected)


def state_of(rows, field):
    """The number that a stateful rule remembers under a name."""
    [found] = [m.memory[field] for m in rows.members if m.memory is not None and field in m.memory]
    return found.item()


@pytest.mark.parametrize("case", WALKS)
def test_stateful_rules_go_the_way_of_the_engine(case):
    x = logits_of(case)
    rows, text = rows_of(case, x.shape[1]), list(case["prompt"])
    for step in case["steps"]:
        now = context(text, len(case["prompt"]))
        processed = rows.apply(x, now)[0]
        if "p" in step:
            assert not differences(step, processed)
        assert processed[step["token"]] > -math.inf
        rows = rows.accept(torch.tensor([step["token"]]), now)
        text.append(step["token"])
        for field in {"mu", "sum", "weight"} & step.keys():
            assert state_of(rows, field) == pytest.approx(step[field], rel=1e-4)


@pytest.mark.parametrize("name", ENGINES)
def test_the_version_that_a_profile_names_is_the_recorded_one(name):
    assert profile(name).tested_against == VECTORS["about"][name]["version"]


def test_every_rule_of_an_engine_occurs_in_its_cases():
    """What a profile offers is recorded, but for what is ours alone or is not a matter of logits and text."""
    own = {
        "sequence_bias",
        "banned_tokens",
        "prefix_fn",
        "suppress_first",
        "forced_tokens",
        "exponential_decay",
    }
    shared = {"logit_bias", "allowed_tokens", "bad_words", "min_new_tokens"}  # of vLLM's; elsewhere masks
    for name in ENGINES:
        fields = {field for case in CASES if case["profile"] == name for field in case["params"]}
        offered = {rule.fields[0] for rule in profile(name)}
        assert offered - fields <= own | (shared if name != "vllm" else set()), name


NICKNAMES = {
    "penalties": ("repetition_penalty", "frequency_penalty", "presence_penalty"),
    "typ_p": ("typical",),
    "typical_p": ("typical",),
    "epsilon_cutoff": ("epsilon",),
    "eta_cutoff": ("eta",),
    "temperature": ("temperature",),
    "dynamic_temperature": ("dynatemp",),
    "quadratic_sampling": ("smoothing",),
    "encoder_repetition_penalty": (),
}


@pytest.mark.parametrize("name", ["llamacpp", "textgen"])
def test_the_order_is_the_engine_s_default(name):
    """Recorded orders in our names; llama.cpp's temperature is dynamic, too, and adaptive-p always its last."""
    expected = [
        rule for nickname in VECTORS["about"][name]["order"] for rule in NICKNAMES.get(nickname, (nickname,))
    ]
    if name == "llamacpp":
        expected += ["dynatemp", "adaptive_p"]
    assert [rule.name for rule in profile(name) if rule.name in expected] == expected
