"""Drafts without a second model, and rules: lossless where they say so, and what they cost."""

import pytest
import torch
from architectures import ARCHITECTURES
from helpers import assert_nothing_leaked, tiny_llama

from handloom import Engine, ParameterError, SamplingParams, laws
from handloom.strategies import JacobiDraft, SuffixDraft, early_exit, speculative
from handloom.strategies.acceleration.acceptance import EPSILON, typical

PROMPTS = [[5, 9, 17, 5, 9], [40], [3, 3, 8, 21, 60, 2, 11, 3, 3], [7, 70, 7, 70]]


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_llama(num_hidden_layers=3))


DRAFTS = {
    "suffixes": lambda e: SuffixDraft([[5, 1, 2], [1, 2, 3, 3, 5]], least=0.0),
    "jacobi": lambda e: JacobiDraft(),
    "early exit": lambda e: early_exit(e, 2),
}


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("rule", ["ratio", "coupled"])
def test_greedy_equals_greedy(engine, name, rule):
    plain = engine.generate(PROMPTS, max_new_tokens=11)
    ours = speculative(engine, PROMPTS, draft=DRAFTS[name](engine), num_draft=3, rule=rule, max_new_tokens=11)
    assert [r.token_ids for r in ours] == [r.token_ids for r in plain]
    assert_nothing_leaked(engine)


@pytest.mark.parametrize("name", DRAFTS)
def test_the_law_stays(name):
    tiny = Engine(tiny_llama(vocab_size=6, num_hidden_layers=3))
    params = SamplingParams(temperature=1.2, top_k=4, max_new_tokens=3)
    laws.exact_distribution(
        speculative, tiny, [1, 2], params, draws=800, batch=400, draft=DRAFTS[name](tiny), num_draft=2
    )


def test_suffixes_by_hand():
    """1 2 was followed by 3 twice and by 4 once; the longest end wins; a draft goes on while it is sure enough."""
    draft = SuffixDraft([[1, 2, 3, 5], [1, 2, 3, 6], [1, 2, 4], [9, 2, 7]], least=0.6)
    assert draft([8, 1, 2], 4) == [3]  # 2/3, then 5 or 6 by halves: 1/3
    assert SuffixDraft([[1, 2, 3, 5], [1, 2, 3, 6], [1, 2, 4]], least=0.3)([1, 2], 4) == [3, 5]
    assert draft([9, 2], 4) == [7]
    assert draft([50], 4) == []
    assert draft([30, 31, 30], 2) == [31, 30]  # the row's own text counts, too
    assert draft([1, 2], 0) == []


def test_suffixes_of_earlier_outputs_save_passes(engine):
    plain = engine.generate(PROMPTS, max_new_tokens=24)
    seen = SuffixDraft([r.prompt_token_ids + r.token_ids for r in plain])
    ours = speculative(engine, PROMPTS, draft=seen, num_draft=7, max_new_tokens=24)
    assert [r.token_ids for r in ours] == [r.token_ids for r in plain]
    assert max(r.passes for r in ours) <= 5  # one for the prompt, then eight tokens a pass
    assert all(r.acceptance == 1 for r in ours)


def test_guesses_by_hand():
    draft = JacobiDraft(size=1)
    assert draft([4], 3) == [4, 4, 4]
    draft.observe([4], [4, 4], [7, 8, 9])  # behind 4: 7; behind the wrong drafts: 8, 9
    assert draft([4, 7], 2) == [8, 9]
    assert draft([4, 8], 3) == [9]
    draft.observe([7], [8, 9], [1, 7, 2])
    assert draft([7], 2) == [2]  # the newer guess


def test_early_exit_is_the_first_layers(engine):
    draft = early_exit(engine, 1)
    state = engine.prefill(PROMPTS, hidden=True)
    last = torch.stack([h[n - 1] for h, n in zip(state.hidden(1), state.counts, strict=True)])
    torch.testing.assert_close(draft.prefill(PROMPTS).logits, engine.head(last), rtol=0, atol=1e-4)
    assert draft.model.lm_head.weight is engine.model.lm_head.weight
    assert len(engine.model.model.layers) == 3 == engine.model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "qwen3"])
def test_early_exit_of_other_architectures(name):
    engine = Engine(ARCHITECTURES[name]())
    draft = early_exit(engine, 1)
    plain = engine.generate(PROMPTS, max_new_tokens=5)
    assert [r.token_ids for r in speculative(engine, PROMPTS, draft=draft, max_new_tokens=5)] == [
        r.token_ids for r in plain
    ]


def test_typical_acceptance_by_hand():
    """p = (.5, .3, .15, .05): entropy 1.142, level min(.09, .3 * .319) = .09; tokens 0 to 2 are typical, 3 is not."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    keys = [torch.zeros(1, dtype=torch.long)] * 3

    class Keys:
        seeds, positions, streams = keys

    accepted = [int(typical(logits, torch.tensor([[v]]), None, Keys, None)[1]) == 0 for v in (0, 1, 2, 3, -1)]
    assert accepted == [True, True, True, False, False]
    assert EPSILON == 0.09


def test_typical_acceptance_takes_what_the_model_finds_probable(engine):
    """Every accepted draft token is above the level in the model's own law, which others are not."""
    asked = {"temperature": 1.0, "seed": 3, "max_new_tokens": 12}
    for result in speculative(
        engine, PROMPTS, draft=lambda tokens, count: [44] * count, rule="typical", **asked
    ):
        assert (result.accepted > 0) <= (44 in result.token_ids)
        for token, logprob in zip(result.token_ids[1:], result.logprobs[1:], strict=True):
            assert token != 44 or logprob > -8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: SuffixDraft(longest=0), "longest >= 1"),
        (lambda e: JacobiDraft(0), "size >= 1"),
        (lambda e: early_exit(e, 3), r"not in 1\.\.2"),
        (lambda e: speculative(e, PROMPTS, rule="x"), "none of ratio, coupled, typical"),
    ],
)
def test_out_of_range_is_an_error(engine, call, message):
    with pytest.raises(ParameterError, match=message):
        call(engine)
