"""Laws that every processor must obey, parametrised over all of them."""

import pytest
import torch
from rule_cases import ON

from handloom.params.sampling_params import SamplingParams
from handloom.pipeline.pipeline import Context, Pipeline
from handloom.pipeline.processors import DEFAULT_ORDER

VOCAB = 48
EOS = frozenset({7})
PROMPT = [3, 5, 3, 9, 3, 5]

RULES = {rule.name: rule for rule in DEFAULT_ORDER}
EVERY = pytest.mark.parametrize("name", RULES)


def request(name, **more):
    return SamplingParams(**{"temperature": 1.0, **ON[name], **more})


def off():
    return SamplingParams(temperature=1.0)


def logits_of(rows, step=0):
    """Random rows, one of them with excluded tokens, one with ties."""
    x = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(step)) * 2
    x[1::3, ::4] = -torch.inf
    x[2::3] = x[2::3].round()
    return x


def context_of(histories, prompts=None, seeds=None):
    width = max(map(len, histories))
    prompts = prompts or [len(PROMPT)] * len(histories)
    return Context(
        tokens=torch.tensor([list(h) + [-1] * (width - len(h)) for h in histories]),
        lengths=torch.tensor([len(h) for h in histories]),
        prompt_lengths=torch.tensor(prompts),
        seeds=torch.tensor(seeds or list(range(len(histories)))),
        streams=torch.zeros(len(histories), dtype=torch.int64),
    )


def rows_for(name, requests):
    pipeline = Pipeline([RULES[name]()], name="one rule")
    return pipeline.bind(requests, [PROMPT] * len(requests), vocab_size=VOCAB, eos_token_ids=EOS)


def same(a, b):
    """Bit equality, with NaN equal to NaN."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_every_rule_has_a_case():
    assert set(ON) == set(RULES)


@EVERY
def test_the_case_changes_something(name):
    rows = rows_for(name, [request(name)] * 3)
    x = logits_of(3)
    histories = [PROMPT] * 3 if name in ("suppress_first", "forced_tokens") else [[*PROMPT, 9, 3]] * 3
    assert not same(rows.apply(x, context_of(histories)), x)


@EVERY
def test_off_is_identity_and_costs_nothing(name):
    rows = rows_for(name, [off()] * 3)
    x = logits_of(3)
    assert rows.apply(x, context_of([PROMPT] * 3)) is x
    assert not rows.active()


@EVERY
def test_off_rows_are_bit_identical_beside_rows_that_are_on(name):
    rows = rows_for(name, [request(name), off(), request(name), off(), off()])
    x = logits_of(5)
    x[4, 3] = -0.0
    x[4, 5] = 0.0
    result = rows.apply(x, context_of([[*PROMPT, 9, 3, 5]] * 5))
    for row in (1, 3, 4):
        assert same(result[row], x[row])


@EVERY
def test_batch_equals_solo(name):
    histories = [[*PROMPT, 9, 3, 5], PROMPT, [*PROMPT, 3], [*PROMPT, 5, 3, 5, 3]]
    requests = [request(name)] * 4
    x = logits_of(4)
    together = rows_for(name, requests).apply(x, context_of(histories, seeds=[5, 6, 7, 8]))
    for i, history in enumerate(histories):
        alone = rows_for(name, requests[:1]).apply(x[i : i + 1], context_of([history], seeds=[5 + i]))
        assert same(alone[0], together[i])


@EVERY
def test_excluded_tokens_make_no_nan_and_stay_excluded(name):
    rows = rows_for(name, [request(name)] * 4)
    x = logits_of(4)
    x[0, 1:] = -torch.inf  # a single survivor
    x[1] = torch.where(torch.arange(VOCAB) % 2 == 0, -torch.inf, x[1])
    x[2] = 1.5  # flat
    x[3, 5:] = torch.finfo(torch.float32).min  # a finite mask
    result = rows.apply(x, context_of([[*PROMPT, 3]] * 4))
    assert not result.isnan().any()
    if name != "forced_tokens":
        assert (result[x == -torch.inf] == -torch.inf).all()


@EVERY
def test_input_is_untouched(name):
    rows = rows_for(name, [request(name), off()])
    x = logits_of(2)
    before = x.clone()
    context = context_of([[*PROMPT, 9, 3]] * 2)
    tokens = context.tokens.clone()
    rows.sample(x, context)
    assert same(x, before)
    assert torch.equal(context.tokens, tokens)


@EVERY
def test_truncation_keeps_a_token_and_changes_no_logit(name):
    rule = RULES[name]
    if rule.kind != "keep":
        pytest.skip("not a truncation rule")
    x = logits_of(6)
    result = rows_for(name, [request(name)] * 6).apply(x, context_of([PROMPT] * 6))
    kept = result > -torch.inf
    assert kept.any(-1).all()
    assert torch.equal(result[kept], x[kept])
    if rule.keeps_argmax:
        assert torch.equal(result.argmax(-1), x.argmax(-1))


@EVERY
def test_keeps_argmax_tells_the_truth_about_edits(name):
    if not RULES[name].keeps_argmax:
        pytest.skip("makes no such promise")
    x = logits_of(40, step=3)
    result = rows_for(name, [request(name)] * 40).apply(x, context_of([PROMPT] * 40))
    top = x.amax(-1, keepdim=True)
    assert (result.gather(-1, x.argmax(-1, keepdim=True)) == result.amax(-1, keepdim=True)).all()
    assert ((result == result.amax(-1, keepdim=True)) <= (x == top)).all()


@EVERY
def test_greedy_rows_skip_what_only_concerns_sampling(name):
    rows = rows_for(name, [request(name, temperature=0.0, dynatemp_range=0.0)])
    assert bool(rows.active()) == (not RULES[name].sampling_only)


def walk(rows, histories, tokens, start=0):
    """Feed `tokens` (a list of lists, one per row) step by step; returns the rows and every step's output."""
    histories, outputs = [list(history) for history in histories], []
    for step in range(len(tokens[0])):
        context = context_of(histories, seeds=[11] * len(histories))
        x = logits_of(1, step=start + step).expand(len(histories), -1).clone()
        outputs.append(rows.apply(x, context))
        chosen = [row[step] for row in tokens]
        rows = rows.accept(torch.tensor(chosen), context)
        for history, token in zip(histories, chosen, strict=True):
            history.append(token)
    return rows, histories, outputs


@EVERY
def test_fork_and_rewind_equal_replay(name):
    first, left, right = [3, 5, 9], [3, 5], [1, 3]
    rows, histories, _ = walk(rows_for(name, [request(name)]), [list(PROMPT)], [first])
    forked = rows.select([0, 0])
    _, _, branches = walk(forked, histories * 2, [left, right], start=3)
    for branch, tokens in enumerate((left, right)):
        _, _, replayed = walk(rows_for(name, [request(name)]), [list(PROMPT)], [first + tokens])
        _, _, rewound = walk(rows, histories, [tokens], start=3)
        for step in range(2):
            assert same(branches[step][branch], replayed[3 + step][0])
            assert same(rewound[step][0], replayed[3 + step][0])
