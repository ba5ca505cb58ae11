"""Several candidates a token, and a draft judged as a whole: the law of plain decoding, in fewer passes."""

from types import SimpleNamespace

import pytest
import torch
from helpers import assert_nothing_leaked, recorded, tiny_llama

from handloom import Engine, ParameterError, SamplingParams, laws
from handloom.strategies import speculative
from handloom.strategies.acceleration.acceptance import block, ratio
from handloom.strategies.acceleration.drafting.drafts import Drafts

PROMPTS = [[5, 9, 17, 5, 9], [40], [3, 3, 8, 21, 60, 2, 11, 3, 3], [7, 70, 7, 70]]
TREE = {"num_draft": (3, 2)}
BLOCK = {"num_draft": 3, "rule": "block"}
EVERYTHING = [
    SamplingParams(temperature=0.9, top_k=20, top_p=0.9, seed=1, max_new_tokens=9, n=2),
    SamplingParams(temperature=1.1, mirostat=2, mirostat_tau=2.0, seed=2, max_new_tokens=6),
    SamplingParams(repetition_penalty=1.4, no_repeat_ngram_size=2, max_new_tokens=8),
    SamplingParams(temperature=0.7, dry_multiplier=0.8, frequency_penalty=0.5, seed=3, max_new_tokens=7),
]


def tokens_of(results):
    return [result.token_ids for result in results]


def forked(tokens, count):
    """Two lines with a common beginning, which have little to do with the model."""
    line = [(tokens[-1] * 7 + place) % 5 for place in range(count)]
    return [line, [*line[:-1], (tokens[-1] + 1) % 5]] if line else []


@pytest.mark.parametrize("options", [TREE, BLOCK, {"num_draft": (2, 1, 2), "rule": "coupled"}], ids=str)
def test_greedy_equals_greedy(engine, draft, options):
    plain = engine.generate(PROMPTS, max_new_tokens=11)
    for model in (draft, engine):
        ours = speculative(engine, PROMPTS, draft=model, max_new_tokens=11, **options)
        assert tokens_of(ours) == tokens_of(plain)
        for one, other in zip(ours, plain, strict=True):
            assert one.raw_logprobs == pytest.approx(other.raw_logprobs, abs=1e-4)
    depth = 3 if options is not TREE else 2
    assert all(
        r.passes == 1 + -(-10 // (depth + 1)) for r in ours
    )  # a draft that is the model is always right
    assert_nothing_leaked(engine)
    assert_nothing_leaked(draft)


def test_coupled_equals_plain_sampling_with_the_same_seed(engine, draft):
    plain = engine.generate(PROMPTS, EVERYTHING)
    for source, widths in ((draft, (3, 2)), (forked, 3)):
        ours = speculative(engine, PROMPTS, EVERYTHING, draft=source, num_draft=widths, rule="coupled")
        assert tokens_of(ours) == tokens_of(plain)


@pytest.mark.parametrize("options", [TREE, BLOCK], ids=["tree", "block"])
def test_batch_equals_solo(engine, draft, options):
    laws.batch_equals_solo(speculative, engine, PROMPTS, EVERYTHING, draft=draft, **options)


LAWS = {
    "plain": {"temperature": 1.5},
    "truncated": {"temperature": 2.0, "top_k": 4, "top_p": 0.8, "repetition_penalty": 1.3},
    "memory": {"temperature": 2.0, "mirostat": 2, "mirostat_tau": 1.5, "frequency_penalty": 0.3},
}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("options", [{"num_draft": (2, 2)}, {"num_draft": 2, "rule": "block"}], ids=str)
def test_the_law_is_that_of_plain_decoding(name, options):
    """Four tokens, so that a second round begins within; false alarms: 1e-6."""
    target, other = (
        Engine(tiny_llama(vocab_size=5, eos_token_id=4, num_hidden_layers=layers)) for layers in (2, 1)
    )
    params = SamplingParams(**LAWS[name], max_new_tokens=4)
    laws.exact_distribution(
        speculative, target, [1, 2, 3], params, draws=700, batch=700, draft=other, **options
    )


@pytest.mark.parametrize("rule", ["ratio", "coupled", "block"])
def test_the_law_with_certain_drafts(rule):
    """Lines that a function gives: a tree of two, or one of them. False alarms: 1e-6."""
    engine = Engine(tiny_llama(vocab_size=5, eos_token_id=4))
    source = (lambda tokens, count: forked(tokens, count)[:1]) if rule == "block" else forked
    params = SamplingParams(temperature=1.5, max_new_tokens=3)
    options = {"draft": source, "num_draft": 2, "rule": rule}
    laws.exact_distribution(speculative, engine, [1, 2, 3], params, draws=600, batch=600, **options)


def test_rows_accept_paths_of_different_lengths_through_trees_of_different_sizes(engine):
    """The second branch is right in row 0 and the first in row 1 for one token; row 2 has nothing to draft."""
    answers = engine.generate(PROMPTS[:3], max_new_tokens=9)

    def draft(tokens, count):
        row = next(i for i, prompt in enumerate(PROMPTS) if tokens[: len(prompt)] == prompt)
        truth = answers[row].token_ids[len(tokens) - len(PROMPTS[row]) :][:count]
        wrong = [(token + 1) % 101 for token in truth]
        return ([wrong, truth], [[*truth[:1], *wrong[1:]], wrong[:1]], [])[row] if truth else []

    with recorded(engine.model) as passes:
        ours = speculative(engine, PROMPTS[:3], draft=draft, num_draft=3, max_new_tokens=9)
    assert tokens_of(ours) == tokens_of(answers)
    # Row 0: the prompt's token, then 4 a pass of 1 + 6. Row 1: 2 a pass of 1 + 4, with room for 3, 3, 3 and 1 drafts.
    assert [(r.drafted, r.accepted, r.passes) for r in ours] == [(12, 6, 3), (14, 4, 5), (0, 0, 9)]
    assert max(width for _, width in passes.shapes[1:]) == 7  # behind the pass of all prompts


# -- rules by hand

P, Q = torch.tensor([[1 / 3, 2 / 3]]), torch.tensor([[2 / 3, 1 / 3]])


def drawn(rows, rule):
    """How many of two draft tokens a rule accepts in each of many rows, with p = (1/3, 2/3) and q = (2/3, 1/3)."""
    keys = {"seeds": torch.arange(rows), "streams": torch.zeros(rows, dtype=torch.long)}
    lines = torch.multinomial(Q[0], 2 * rows, True, generator=torch.Generator().manual_seed(0)).view(rows, 2)
    if rule == "block":
        context = SimpleNamespace(positions=torch.ones(rows, dtype=torch.long), **keys)
        places = block(P.log().expand(rows, 3, 2), lines, Q.expand(rows, 3, 2), context, None)[1]
        return (places >= 0).sum(1).float()
    going, count = torch.ones(rows, dtype=torch.bool), torch.zeros(rows)
    for j in range(2):
        context = SimpleNamespace(positions=torch.full((rows,), 1 + j), **keys)
        law = Q.expand(rows, 1, 2)
        going &= ratio(P.log().expand(rows, 2), lines[:, j : j + 1], law, context, None)[1] >= 0
        count += going
    return count


def test_a_block_accepts_more_than_its_tokens_do():
    """The paper's example: 10/9 tokens in the mean by tokens, 11/9 as a block. 5 sigma of 4,000 rows."""
    assert drawn(4000, "ratio").mean().item() == pytest.approx(10 / 9, abs=0.07)
    assert drawn(4000, "block").mean().item() == pytest.approx(11 / 9, abs=0.07)


def test_candidates_are_tried_one_after_the_other():
    """p = (.2, .5, .3), q = (.8, .1, .1): the first is accepted by 1/4; what is left of p is (0, 2/3, 1/3), and q
    without it (0, 1/2, 1/2), so that token 1 is accepted for sure, token 2 by 2/3. 5 sigma of 4,000 rows."""
    rows = 4000
    keys = {"seeds": torch.arange(rows), "positions": torch.ones(rows, dtype=torch.long)}
    context = SimpleNamespace(streams=torch.zeros(rows, dtype=torch.long), **keys)
    p, q = (torch.tensor([each]).expand(rows, 3) for each in ([0.2, 0.5, 0.3], [0.8, 0.1, 0.1]))
    for second, share in ((1, 1.0), (2, 2 / 3)):
        proposed = torch.tensor([[0, second]]).expand(rows, 2)
        tokens, place = ratio(p.log(), proposed, q[:, None], context, None)
        assert (place == 0).float().mean().item() == pytest.approx(0.25, abs=0.035)
        assert (place == 1).float().mean().item() == pytest.approx(0.75 * share, abs=0.04)
        assert (tokens[place < 0] == 1).all()  # behind token 2 only token 1 is left


# -- several drafts


def test_merged_drafts_by_hand():
    """A line of a model and two of a function: one beginning in common; every source keeps its own tries and laws."""
    model = Drafts(1, torch.arange(12.0).view(1, 1, 3, 4))
    model.add(0, 2, model.add(0, 1, -1))
    both = Drafts.merged([model, Drafts.certain([[[1, 3], [0]]], [2])], torch.zeros(1, 4))
    assert (both.tokens, both.parents) == ([[1, 2, 3, 0]], [[-1, 0, 0, -1]])
    assert both.below(0, -1) == [(0, 0), (0, 1), (3, 1)]
    assert both.below(0, 0) == [(1, 0), (2, 1)]
    assert both.laws.shape == (1, 2, 5, 4)
    assert both.laws[0, 0, :2].tolist() == [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]
    assert both.laws[0, 1, :2].tolist() == [
        [0.0, 1.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 1.0],
    ]  # sure of its first child
    assert not both.laws[0, :, 2:].any()


def test_two_sources_that_propose_one_token():
    """p = (.2, .8), two sources of q = (.8, .2) that both say 0: by 1/4 the first; what is left of p is (0, 1)."""
    rows = 4000
    keys = {"seeds": torch.arange(rows), "positions": torch.ones(rows, dtype=torch.long)}
    context = SimpleNamespace(streams=torch.zeros(rows, dtype=torch.long), **keys)
    p, q = torch.tensor([[0.2, 0.8]]).expand(rows, 2), torch.tensor([[[0.8, 0.2]] * 2]).expand(rows, 2, 2)
    for said, second in (([0, 0], 0.0), ([0, 1], 1.0)):
        proposed, sources = (torch.tensor([each]).expand(rows, 2) for each in (said, [0, 1]))
        _, place = ratio(p.log(), proposed, q, context, None, sources)
        assert (place == 0).float().mean().item() == pytest.approx(0.25, abs=0.035)
        assert (place[place != 0] == 1).float().mean().item() == second


@pytest.mark.parametrize("widths", [2, (2, 1)], ids=str)
def test_the_law_with_several_drafts(widths):
    """Two models, and one beside a function: false alarms one in 10^6 each."""
    target, one, two = (
        Engine(tiny_llama(vocab_size=4, eos_token_id=3, num_hidden_layers=layers)) for layers in (2, 1, 3)
    )
    params = SamplingParams(temperature=1.5, max_new_tokens=4)
    for drafts in ([one, two], [one, forked_small]):
        options = {"draft": drafts, "num_draft": widths}
        laws.exact_distribution(speculative, target, [1, 2, 3], params, draws=600, batch=600, **options)


def forked_small(tokens, count):
    return [[(tokens[-1] + place) % 4 for place in range(count)]]


def test_several_drafts_are_one_tree(engine, draft):
    """Greedy: the tokens of plain decoding, as few passes as the better draft needs, each prompt as it is alone."""
    plain = engine.generate(PROMPTS, max_new_tokens=11)
    alone = speculative(engine, PROMPTS, draft=draft, num_draft=3, max_new_tokens=11)
    both = speculative(engine, PROMPTS, draft=[draft, forked], num_draft=3, max_new_tokens=11)
    assert tokens_of(both) == tokens_of(plain)
    assert all(one.passes <= other.passes for one, other in zip(both, alone, strict=True))
    perfect = speculative(engine, PROMPTS, draft=[draft, engine], num_draft=3, max_new_tokens=11)
    assert all(r.passes == 1 + -(-10 // 4) for r in perfect)
    laws.batch_equals_solo(
        speculative,
        engine,
        PROMPTS,
        EVERYTHING,
        draft=[draft, Engine(tiny_llama(num_hidden_layers=3))],
        num_draft=(2, 1),
    )
    assert_nothing_leaked(engine)


def test_it_streams(engine, draft):
    events = list(speculative(engine, PROMPTS, EVERYTHING, draft=draft, stream=True, **TREE))
    found = {(e.request, e.sample): e.generation for e in events if e.generation is not None}
    results = speculative(engine, PROMPTS, EVERYTHING, draft=draft, **TREE)
    assert tokens_of(found[key] for key in sorted(found)) == tokens_of(results)
    for result in results:
        own = [e for e in events if (e.request, e.sample) == (result.request, result.sample)]
        assert [e.token_id for e in own] == result.token_ids
        assert own[-1].generation.passes == result.passes < result.n_new + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draft": (2, 0)}, "holds a 0"),
        ({"num_draft": (2, 2), "rule": "block"}, "one line of drafts"),
        ({"num_draft": 2, "rule": "block", "draft": [forked, forked]}, "one line of drafts"),
    ],
)
def test_what_it_cannot_do_is_an_error(engine, draft, options, message):
    with pytest.raises(ParameterError, match=message):
        speculative(engine, PROMPTS, max_new_tokens=4, **{"draft": draft, **options})
