"""Models in lockstep: every member is where it would be alone."""

import pytest
import torch
from architectures import ARCHITECTURES
from helpers import recorded

from handloom import Engine, ModelError, join

EXPERT_PROMPTS, AMATEUR_PROMPTS = [[3, 5, 7], [11] * 20], [[7], [9, 2]]


@pytest.fixture(scope="module")
def pair():
    return Engine(ARCHITECTURES["llama"]()), Engine(ARCHITECTURES["qwen3"]())


def test_members_equal_their_engines_alone(pair):
    joint = join(pair, [EXPERT_PROMPTS, AMATEUR_PROMPTS])
    alone = [e.prefill(p) for e, p in zip(pair, [EXPERT_PROMPTS, AMATEUR_PROMPTS], strict=True)]
    for tokens in ([4, 9], [1, 2], [8, 8]):
        joint = joint.step(torch.tensor(tokens))
        alone = [e.step(s, tokens) for e, s in zip(pair, alone, strict=True)]
    for got, want in zip(joint.logits, alone, strict=True):
        torch.testing.assert_close(got, want.logits, rtol=0, atol=0)
    assert joint.new_tokens == [[4, 1, 8], [9, 2, 8]]
    assert joint.lengths.tolist() == [6, 23]


def test_members_of_one_engine_share_a_pass(pair):
    """Three of one engine with another in between, one step each: where they would be alone, in two passes."""
    engines = (pair[0], pair[1], pair[0], pair[0])
    prompts = [EXPERT_PROMPTS, AMATEUR_PROMPTS, AMATEUR_PROMPTS, [[1], [2, 3, 4]]]
    joint = join(engines, prompts)
    with recorded(pair[0].model) as passes:
        joint = joint.step([4, 9])
    assert passes.shapes == [(6, 1)]
    for engine, state, own in zip(engines, joint.states, prompts, strict=True):
        want = engine.step(engine.prefill(own), [4, 9])
        assert state.tokens == want.tokens
        torch.testing.assert_close(state.logits, want.logits, rtol=0, atol=2e-5)


def test_select_and_keep_reach_all_members(pair):
    joint = join(pair, [EXPERT_PROMPTS, AMATEUR_PROMPTS])
    forked = joint.select([1, 1, 0]).extend([[1, 2, 3], [4, 5], [6]]).keep([2, 1, 1])
    for engine, state, prompts in zip(pair, forked.states, [EXPERT_PROMPTS, AMATEUR_PROMPTS], strict=True):
        for row, (source, added) in enumerate([(1, [1, 2]), (1, [4]), (0, [6])]):
            want = engine.prefill([prompts[source] + added]).logits[0]
            torch.testing.assert_close(state.logits[row], want, rtol=0, atol=2e-5)
    del joint, forked
    for engine in pair:
        engine.pool.check()


def test_contrastive_decoding_on_public_primitives(pair):
    """log p_expert - log p_amateur over plausible tokens (arXiv 2210.15097), against logits recomputed in full."""
    joint, alpha, chosen = join(pair, [[EXPERT_PROMPTS[0]], [EXPERT_PROMPTS[0]]]), 0.1, []
    for _ in range(6):
        expert, amateur = (logits.log_softmax(-1) for logits in joint.logits)
        plausible = expert >= expert.amax(-1, keepdim=True) + torch.log(torch.tensor(alpha))
        tokens = (expert - amateur).masked_fill(~plausible, -torch.inf).argmax(-1)
        chosen.append(tokens.item())
        joint = joint.step(tokens)
    ids = list(EXPERT_PROMPTS[0])
    for token in chosen:
        with torch.no_grad():
            logp = [e.model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1) for e in pair]
        score = torch.where(
            logp[0] >= logp[0].max() + torch.log(torch.tensor(alpha)), logp[0] - logp[1], -torch.inf
        )
        assert score.argmax().item() == token
        ids.append(token)


def test_one_model_under_two_prompts(pair):
    engine = pair[0]
    joint = join([engine, engine], [[[1, 2, 3]], [[3]]]).step([5])
    assert [s.tokens for s in joint.states] == [[[1, 2, 3, 5]], [[3, 5]]]


@pytest.mark.parametrize(
    ("names", "prompts", "message"),
    [
        (("llama",), [], "1 engines for 0"),
        (("llama", "qwen3"), [[[1]], [[1], [2]]], r"rows; theirs have \[1, 2\]"),
    ],
)
def test_members_that_do_not_fit_are_refused(pair, names, prompts, message):
    engines = [pair[{"llama": 0, "qwen3": 1}[name]] for name in names]
    with pytest.raises(ModelError, match=message):
        join(engines, prompts)
