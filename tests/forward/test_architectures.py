"""The engine against `model.generate`: replacement in flight, forks, rewinds, extends; all architectures."""

import pytest
import torch
from architectures import ARCHITECTURES, MAX_LENGTH, greedy_reference, logits_reference, prompts_of
from helpers import assert_nothing_leaked

from handloom import Engine, SamplingParams

PROMPT_LENGTHS = [5, 17, 1, 40, 9, 23]
# With three slots every row but the first three replaces another; four rows grow into another block of 16.
NEW_TOKENS = [4, 16, 5, 12, 9, 10]

# fp32 rounding moves the logits by up to 1e-4; a wrong cell, mask or position moves them by 0.05 at least.
TOLERANCE = 1e-3

# How each architecture is run, where it is not our attention function over the block pool.
PATHS = {
    # their own attention over gathered cells: not exchangeable, or latent keys and values, or no attention
    **dict.fromkeys(("bloom", "codegen", "falcon_alibi", "falcon_rope", "gptj", "mpt", "xglm"), "mask"),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "minicpm3"), "mask"),
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2"), "mask"),
    # positions taken from the length of the cache, so one forward per row
    **dict.fromkeys(("gpt_neo", "llama4_text"), "rows"),
    # a layer type that only transformers' own cache knows; recurrent state kept inside the modules
    **dict.fromkeys(("glm_moe_dsa", "recurrent_gemma"), "solo"),
}


@pytest.fixture(params=ARCHITECTURES)
def name(request):
    return request.param


def test_ragged_batch_with_replacement_equals_generate(name):
    model = ARCHITECTURES[name]()
    prompts = prompts_of(PROMPT_LENGTHS)
    expected = greedy_reference(model, prompts, NEW_TOKENS)
    engine = Engine(model, slots=3, max_length=MAX_LENGTH)

    answers = engine.generate(prompts, [SamplingParams(max_new_tokens=n) for n in NEW_TOKENS])

    assert [answer.token_ids for answer in answers] == expected
    assert {answer.finish_reason for answer in answers} == {"length"}
    assert_nothing_leaked(engine)


def test_capabilities_name_the_path(name):
    capabilities = Engine(ARCHITECTURES[name](), slots=3, max_length=MAX_LENGTH).capabilities
    assert capabilities.path == PATHS.get(name, "attention"), capabilities
    assert bool(capabilities.ragged) == (capabilities.path != "solo")
    for ability in ("ragged", "fork", "rewind", "extend", "tree", "graph"):
        assert getattr(capabilities, ability) or getattr(capabilities, ability).reason, ability
    assert not capabilities.tree or capabilities.path == "attention"


def assert_follow(model, prompt, answer, *found):
    """The last of the logits that were found follow `prompt + answer`, the one before them one token less, ..."""
    expected = logits_reference(model, prompt, answer)[-len(found) :]
    torch.testing.assert_close(torch.stack(found), expected, atol=TOLERANCE, rtol=0)


def test_forks_and_rewinds_equal_replay(name):
    model = ARCHITECTURES[name]()
    engine = Engine(model, slots=3, max_length=MAX_LENGTH)
    if not (engine.capabilities.fork and engine.capabilities.rewind):
        pytest.skip(f"{name}: {engine.capabilities}")
    one, two = prompts_of([12, 5])

    state = engine.prefill([one, two])
    forked = engine.step(state.select([0, 0, 1]), torch.tensor([7, 8, 9]))
    forked = engine.step(forked, torch.tensor([10, 11, 12]))
    rewound = engine.step(state, torch.tensor([13, 14]))
    again = engine.step(forked.select([2, 0]), torch.tensor([15, 16]))

    assert_follow(model, one, [7, 10, 16], forked.logits[0], again.logits[1])
    assert_follow(model, one, [8, 11], forked.logits[1])
    assert_follow(model, two, [9, 12, 15], forked.logits[2], again.logits[0])
    assert_follow(model, one, [13], rewound.logits[0])
    assert_follow(model, two, [14], rewound.logits[1])
    engine.pool.check()
    del state, forked, rewound, again
    assert_nothing_leaked(engine)


def test_ragged_extend_and_keep_equal_replay(name):
    model = ARCHITECTURES[name]()
    engine = Engine(model, slots=3, max_length=MAX_LENGTH)
    if not engine.capabilities.extend:
        pytest.skip(f"{name}: {engine.capabilities}")
    prompts = prompts_of([12, 5, 8])
    drafts = [[7, 8, 9, 10], [11], [12, 13, 14]]
    accepted = [2, 1, 3]

    state = engine.prefill(prompts)
    extended = engine.extend(state, drafts)
    kept = extended.keep(accepted)
    after = engine.step(kept, torch.tensor([20, 21, 22]))

    for row, (prompt, draft, count) in enumerate(zip(prompts, drafts, accepted, strict=True)):
        found = [state.logits[row], *extended.all_logits[row, : len(draft)]]
        if count == len(draft):
            assert_follow(model, prompt, [*draft, 20 + row], *found, after.logits[row])
        else:
            assert_follow(model, prompt, draft, *found)
            assert_follow(model, prompt, [*draft[:count], 20 + row], after.logits[row])
        assert torch.equal(extended.logits[row], extended.all_logits[row, len(draft) - 1])
        assert torch.equal(kept.logits[row], extended.all_logits[row, count - 1])
        assert kept.tokens[row] == prompt + draft[:count]
    del state, extended, kept, after
    assert_nothing_leaked(engine)
