"""The laws hold for what is right, and name the first divergence of what is wrong."""

import math
import re

import pytest
import torch
from helpers import tiny_llama

from handloom import Engine, ParameterError, Processor, SamplingParams, laws
from handloom.kernels import dispatch
from handloom.laws import naive
from handloom.pipeline.processors import DEFAULT_ORDER, Edit, Keep
from handloom.strategies import beam_search, speculative

PROMPTS = [[5, 9, 17], [40], [3, 3, 8, 21, 60, 2, 11]]


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_llama())


def second_thoughts(engine, prompts, params=None, *, gap=0.1, max_new_tokens=6):
    """The strategy in the documentation of `handloom.strategies`."""
    state = engine.prefill(prompts)
    for _ in range(max_new_tokens):
        probs, ids = state.logits.softmax(-1).topk(2)  # [B, 2]
        torn = probs[:, 0] - probs[:, 1] < gap
        tokens = torch.where(torn, ids[:, 1], ids[:, 0])  # [B]
        state = engine.step(state, tokens)
    return state.new_tokens


# -- batch equals solo


@pytest.mark.parametrize("strategy", [Engine.generate, naive.generate, speculative, beam_search])
def test_batch_equals_solo_holds(engine, strategy):
    laws.batch_equals_solo(strategy, engine, PROMPTS, max_new_tokens=6)


def test_a_strategy_of_plain_token_lists_is_checked_too(engine):
    laws.batch_equals_solo(second_thoughts, engine, PROMPTS, gap=0.5)


def test_batch_equals_solo_names_the_first_divergence(engine):
    def meddling(engine, prompts, params=None):
        """Whoever is last in a batch of several says 1 as its third token."""
        tokens = second_thoughts(engine, prompts, max_new_tokens=4)
        if len(prompts) > 1:
            tokens[-1][2] = 100 - tokens[-1][2]
        return tokens

    true = second_thoughts(engine, PROMPTS, max_new_tokens=4)[2][2]
    with pytest.raises(AssertionError) as caught:
        laws.batch_equals_solo(meddling, engine, PROMPTS)
    assert str(caught.value) == (
        f"batch_equals_solo: result 2 differs first at output position 2: "
        f"token {100 - true} in a batch, token {true} alone"
    )


def test_batch_equals_solo_notices_the_order(engine):
    def ordered(engine, prompts, params=None):
        tokens = second_thoughts(engine, prompts, max_new_tokens=3)
        return [row[:-1] if len(prompts) > 1 and len(prompts[0]) == 7 else row for row in tokens]

    with pytest.raises(AssertionError, match=r"position 2: the end in the reversed batch, token \d+ alone"):
        laws.batch_equals_solo(ordered, engine, PROMPTS)


# -- cached equals naive, argmax


def test_cached_equals_naive_holds(engine):
    params = [
        SamplingParams(max_new_tokens=9, repetition_penalty=1.2),
        SamplingParams(max_new_tokens=7, temperature=1.0, top_p=0.8, seed=4, n=2),
        SamplingParams(max_new_tokens=5),
    ]
    laws.cached_equals_naive(engine, PROMPTS, params)
    laws.cached_equals_naive(engine, PROMPTS, strategy=speculative, max_new_tokens=8, num_draft=2)


def test_cached_equals_naive_tells_how_close_it_was(engine):
    def forgetful(engine, prompts, params=None, **options):
        results = engine.generate(prompts, **options)
        results[1].token_ids[3] = 0
        return results

    true = naive.generate(engine, [PROMPTS[1]], max_new_tokens=5)[0].token_ids
    logits = naive.next_logits(engine.model, [PROMPTS[1] + true[:3]])[0]
    gap = f"{float(logits[0] - logits[true[3]]):.2e}"
    message = (
        f"result 1 differs first at output position 3: token 0 with the cache, token {true[3]} without; "
    )
    message += f"cache-free their logits differ by {gap}"
    with pytest.raises(AssertionError, match=re.escape(message)):
        laws.cached_equals_naive(engine, PROMPTS, strategy=forgetful, max_new_tokens=5)


def test_temperature_zero_is_argmax(engine):
    for strategy in (Engine.generate, speculative, naive.generate):
        laws.temperature_zero_is_argmax(
            strategy, engine, PROMPTS, max_new_tokens=6, repetition_penalty=1.3, temperature=0.9, seed=1
        )
    with pytest.raises(AssertionError, match=r"prompt \d, output position \d: token \d+ has logit"):
        laws.temperature_zero_is_argmax(second_thoughts, engine, PROMPTS, gap=0.9)


# -- distributions


def uniform(vocab, **fields):
    model = tiny_llama(vocab_size=vocab, **fields)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    return Engine(model)


def test_the_law_of_a_uniform_model_by_hand():
    """4 tokens of which 3 ends: (3,) has 1/4, (3 others) x (4 tokens) have 1/16 each."""
    law = laws.sequence_law(
        uniform(4, eos_token_id=3), [1, 2], SamplingParams(temperature=1.0, max_new_tokens=2)
    )
    assert law.pop((3,)) == pytest.approx(1 / 4)
    assert law == {(a, b): pytest.approx(1 / 16) for a in range(3) for b in range(4)}


def test_the_law_with_processors_by_hand():
    """Greedy: one sequence. A bias of log 2 on token 1: 2/4, 1/4, 1/4. A banned repeat: the seen ones go."""
    engine = uniform(3)
    assert laws.sequence_law(engine, [1], SamplingParams(max_new_tokens=2)) == {(0, 0): 1.0}
    params = SamplingParams(temperature=1.0, max_new_tokens=1, logit_bias={1: math.log(2)})
    assert laws.sequence_law(engine, [1], params) == {
        (0,): pytest.approx(0.25),
        (1,): pytest.approx(0.5),
        (2,): pytest.approx(0.25),
    }
    params = SamplingParams(temperature=1.0, max_new_tokens=2, no_repeat_ngram_size=1)
    assert laws.sequence_law(engine, [1], params) == {(0, 2): pytest.approx(0.5), (2, 0): pytest.approx(0.5)}


def test_the_law_follows_the_memory_of_processors():
    """XTC aside, mirostat's threshold depends on the path; its law still sums to 1 and samples agree with it."""
    engine = Engine(tiny_llama(vocab_size=6))
    params = SamplingParams(temperature=2.0, mirostat=2, mirostat_tau=1.5, mirostat_eta=0.5, max_new_tokens=3)
    law = laws.sequence_law(engine, [1, 2, 3], params)
    assert sum(law.values()) == pytest.approx(1.0)
    for path, probability in list(law.items())[:3]:
        assert (
            laws.sequence_law(engine, [1, 2, 3], params.replace(forced_tokens=dict(enumerate(path))))[path]
            == 1.0
        )
        assert probability < 1.0


def test_a_tree_too_large_to_enumerate_is_an_error(engine):
    with pytest.raises(ParameterError, match="more than 300000 sequences"):
        laws.sequence_law(engine, [1], SamplingParams(temperature=5.0, max_new_tokens=3))


@pytest.mark.parametrize(
    ("counts", "law", "p_value"),
    [
        ({"a": 60, "b": 40}, {"a": 0.5, "b": 0.5}, 0.0455),  # chi2 = 4, 1 degree of freedom
        ({"a": 30, "b": 30, "c": 40}, {"a": 0.3, "b": 0.3, "c": 0.4}, 1.0),
        (
            {"a": 88, "b": 10, "c": 2},
            {"a": 0.94, "b": 0.04, "c": 0.02},
            0.0114,
        ),  # b and c are one cell: 12 of 6
        ({"a": 100}, {"a": 1.0}, 1.0),
    ],
)
def test_chi_square_by_hand(counts, law, p_value):
    assert laws.chi_square(counts, law, 100) == pytest.approx(p_value, abs=2e-4)


@pytest.mark.parametrize("samples", [True, False])
def test_exact_distribution_of_generate(samples):
    """False alarms: 1e-6."""
    engine = Engine(tiny_llama(vocab_size=5, eos_token_id=4), slots=64)
    params = SamplingParams(temperature=1.5, top_p=0.9, max_new_tokens=3)
    draws = 2000 if samples else 400
    laws.exact_distribution(Engine.generate, engine, [1, 2], params, draws=draws, samples=samples)


def test_exact_distribution_catches_a_wrong_temperature_and_the_impossible():
    """Temperature 1 for 1.5, and a truncation left out; missed with a probability far below 1e-6."""
    engine = Engine(tiny_llama(vocab_size=5), slots=64)
    params = SamplingParams(temperature=1.5, max_new_tokens=2)

    def too_cold(engine, prompts, params):
        return engine.generate(prompts, params[0].replace(temperature=1.0))

    with pytest.raises(AssertionError, match=r"p-value .* the worst of 25 sequences is \("):
        laws.exact_distribution(too_cold, engine, [1, 2], params, draws=1000)

    def untruncated(engine, prompts, params):
        return engine.generate(prompts, params[0].replace(top_k=0))

    with pytest.raises(AssertionError, match=r"drew \(.*\), which has probability 0"):
        laws.exact_distribution(untruncated, engine, [1, 2], params.replace(top_k=1), draws=20)


def test_lossless_takes_greedy_and_sampled_prompts():
    """False alarms: 1e-6."""
    engine = Engine(tiny_llama(vocab_size=5), slots=64)
    params = [SamplingParams(max_new_tokens=6), SamplingParams(temperature=1.5, max_new_tokens=2)]
    laws.lossless(speculative, engine, [[1, 2, 1, 2], [3]], params, test={"draws": 500}, num_draft=3)
    with pytest.raises(AssertionError, match="lossless: result 0 differs first"):
        laws.lossless(second_thoughts, engine, [[1, 2, 1, 2]], max_new_tokens=6, gap=0.9)


# -- States


def test_fork_and_rewind_equal_replay(engine):
    laws.fork_and_rewind_equal_replay(engine, PROMPTS)


def test_fork_and_rewind_notices_a_row_that_forgets():
    class Forgetful(Engine):
        def step(self, state, tokens, *, hidden=False):
            new = super().step(state, tokens, hidden=hidden)
            new.logits[-1] += 0.1
            return new

    with pytest.raises(AssertionError, match=r"new State of step number \d+, row \d+ \(\d+ tokens\)"):
        laws.fork_and_rewind_equal_replay(Forgetful(tiny_llama()), PROMPTS)


# -- processors


def test_check_processor_passes_every_built_in_rule():
    on = {"temperature": 0.7, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.5, "dry_multiplier": 0.8}
    on |= {"mirostat": 2, "adaptive_target": 0.3, "banned_tokens": [0, 5], "no_repeat_ngram_size": 2}
    on |= {"xtc_probability": 0.5, "frequency_penalty": 0.4, "penalty_scope": "all"}
    checked = 0
    for rule in DEFAULT_ORDER:
        mine = {name: value for name, value in on.items() if name in rule().fields}
        if mine:
            laws.check_processor(rule, SamplingParams(**{"temperature": 1.0, **mine}))
            checked += 1
    assert checked >= 11


def test_check_processor_takes_rules_with_their_own_parameters_and_functions():
    from handloom.pipeline.processors import Temperature, TopP

    laws.check_processor(Temperature(0.7))
    laws.check_processor(TopP(0.8))
    laws.check_processor(lambda logits, context: logits * 2)


class InPlace(Processor):
    def apply(self, logits, context):
        return logits.mul_(0.5)


class Coupled(Processor):
    def apply(self, logits, context):
        return logits - logits.nan_to_num(neginf=0.0).mean()


class Spreading(Processor):
    def apply(self, logits, context):
        return logits - logits.mean(-1, keepdim=True)


class Liar(Processor):
    keeps_argmax = True

    def apply(self, logits, context):
        return -logits.nan_to_num(neginf=0.0)


class Random(Processor):
    def apply(self, logits, context):
        return logits + torch.rand(())


class Counting(Processor):
    """Its memory is advanced in place, so a rewound row sees the future."""

    def start(self, context):
        return {"count": torch.zeros_like(context.lengths)}

    def apply(self, logits, context):
        return logits + context.memory["count"][:, None]

    def accept(self, memory, tokens, context):
        memory["count"] += 1
        return memory


class OffButNot(Processor):
    """Says that top_a = 0 is off, and changes the rows that are off through the rows that are on."""

    defaults = {"top_a": 0.0}
    kind = "edit"

    def on(self, settings):
        return True

    def active(self, params, row=0):
        return params.top_a != 0.0

    def apply(self, logits, context):
        return logits + 1.0


class Fixed(Keep):
    """Claims to keep the same tokens at every temperature."""

    defaults = {"distance": 0.0}
    scale_free = True

    def level(self, statistics, distance):
        return statistics.maximum - distance


def test_check_processor_catches_a_rule_that_is_not_the_same_at_every_temperature():
    with pytest.raises(AssertionError, match=r"check_processor\(Fixed\), scale_free: step 0"):
        laws.check_processor(Fixed(2.0))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (InPlace, "the input is untouched: step 0, row 0, token 0"),
        (Coupled, "batch equals solo: step 0"),
        (Spreading, "NaN from logits without any"),
        (Liar, "keeps_argmax, yet the most likely token changed"),
        (Random, "batch equals solo|repeatable"),
        (Counting, "rewind to step|batch equals solo|repeatable"),
        (OffButNot, "off is identity: step 0, row 0"),
    ],
)
def test_check_processor_catches(rule, message):
    on = SamplingParams(temperature=1.0, top_a=0.2) if rule is OffButNot else None
    with pytest.raises(AssertionError, match=rf"check_processor\({rule.__name__}\).*({message})"):
        laws.check_processor(rule, on)


class Strays(Edit):
    """Writes to a token that it does not list."""

    identity_when_off = True

    def listed(self, context):
        return context.lengths[:, None] % 7

    def write(self, buffer, ids, context):
        buffer.scatter_(1, ids + 1, 2.0)


class OwnBits(Edit):
    """Its way to exclude in torch is not what its mask says."""

    def mask(self, context):
        return torch.full((4, 2), 0x7FFFFFFF, dtype=torch.int32)

    def exclude(self, buffer, context):
        buffer[:, 30] = -torch.inf


class SpoilsOff(Edit):
    """Its exclusion reaches rows that are off."""

    defaults = {"top_a": 0.0}

    def mask(self, context):
        return torch.full((len(context.lengths), 2), 0x0FFFFFFF, dtype=torch.int32)

    def exclude(self, buffer, context):
        buffer[:, 28:32] = -torch.inf


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Strays, "the sampler's edits: step"),
        (OwnBits, "the sampler's edits: step 0, row 0, token 30"),
        (SpoilsOff, "off is identity"),
    ],
)
def test_check_processor_catches_edits_that_the_sampler_would_make_otherwise(rule, message):
    on = SamplingParams(temperature=1.0, top_a=0.2) if rule is SpoilsOff else None
    with pytest.raises(AssertionError, match=rf"check_processor\({rule.__name__}\).*{message}"):
        laws.check_processor(rule, on)


def test_check_processor_runs_device_functions():
    pytest.importorskip("triton")
    if not dispatch.interpreting():
        pytest.skip("needs the interpreter")
    import device_edits

    class Shift(Edit):
        defaults = {"shift": 0.0}
        device = device_edits.shifted

        def point(self, logits, ids, value):
            return logits + value * (ids % 3)

    laws.check_processor(Shift(2.0))
    Shift.device = device_edits.shifted_wrongly
    with pytest.raises(AssertionError, match="the draw of the Triton kernels: step 3"):
        laws.check_processor(Shift(2.0))


def test_check_processor_holds_a_kernel_against_the_reference():
    def halve(logits, context):
        return logits * 0.5

    laws.check_processor(halve, kernel=lambda rows, logits, context: logits / 2)
    with pytest.raises(AssertionError, match="kernel off by"):
        laws.check_processor(halve, kernel=lambda rows, logits, context: logits / 2 + 1e-3, atol=1e-6)
    with pytest.raises(AssertionError, match="the kernel's kept tokens: step 0"):
        laws.check_processor(halve, kernel=lambda rows, logits, context: logits.nan_to_num(neginf=-9.0) / 2)
