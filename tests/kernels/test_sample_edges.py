"""Where the paths of `sample` used to differ or to complain: fractional counts, finite masks, unknown statistics."""

import dataclasses
import math
import warnings

import pytest
import torch
from device_edits import at_least
from sampling_rows import differences, edits, generator, oracle

from handloom import Context, Keep, Pipeline, SamplingParams
from handloom.kernels.device.row import DONE, FRAMED, LEFT
from handloom.kernels.device.wide.rows import ABOVE, GUESSED, HIGHEST, LISTED_SO_FAR, LOWEST
from handloom.kernels.noise.philox import exp_reference
from handloom.kernels.sampling import fused
from handloom.kernels.sampling.cpu import sample_cpu
from handloom.kernels.sampling.fused import Plan, sample_fused
from handloom.kernels.sampling.reference import apply_edits, sample_reference, temperatures, truncate
from handloom.kernels.sampling.rules import (
    Call,
    Pointwise,
    Replaced,
    Rule,
    Statistics,
    dynamic_temperature,
    entropy_temperature,
    eta,
    min_p,
    pack_mask,
    tail_free,
    top_h,
    top_k,
    top_n_sigma,
    top_p,
    touched_bits,
    typical,
    xtc,
)
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


def frame_after(logits, share, *more):
    """(frame, mode) of a call of the kernels with top-p first."""
    call = Call(logits, **key(1), rules=(top_p(torch.tensor([share])), *more), logprobs="chosen")
    plan = Plan.of(call)
    drawn = sample_fused(call, plan=plan)
    expected = sample_reference(call)
    assert drawn.tokens.tolist() == expected.tokens.tolist()
    torch.testing.assert_close(drawn.logprob, expected.logprob, rtol=0, atol=1e-4)
    return plan.frames[0].tolist(), plan.counters[0, 1].item()


def test_a_wide_nucleus_is_found_between_guessed_bounds_and_where_the_guess_is_wrong():
    """20,480 almost equal tokens; then the sampled groups, every fifth, are more likely than all others."""
    noise = torch.randn(1, 20_480, generator=generator(3)) * 1e-3
    frame, mode = frame_after(noise, 0.9)
    above, listed = frame[ABOVE.value], frame[LISTED_SO_FAR.value]
    assert (mode, frame[GUESSED.value]) == (FRAMED.value, 1)
    assert above < 0.9 * 20_480 < above + listed < 20_480
    assert listed < 4_000
    misleading = noise - (torch.arange(20_480) // 128 % 5 != 0).float()
    frame, mode = frame_after(misleading, 0.8)
    within = (misleading > noise.min() - 0.5).sum().item()
    assert (mode, frame[GUESSED.value]) == (FRAMED.value, 1)
    # the boundary, which lies among the others, is not there
    assert frame[ABOVE.value] + frame[LISTED_SO_FAR.value] <= within


def test_a_value_limit_inside_a_wide_nucleus_is_found_in_its_frame():
    """12,000 almost equal tokens, more than the list takes, and a limit that ends before the nucleus does."""
    noise = torch.randn(1, 20_480, generator=generator(5)) * 1e-3
    logits = torch.where(torch.arange(20_480) % 20 < 12, noise, noise - 1)
    frame, mode = frame_after(logits, 0.99, min_p(torch.tensor([0.5])))
    limit = (logits.max() + math.log(0.5)).view(torch.int32).item() ^ 0x7FFFFFFF  # of a negative float
    limit = limit if limit < 2**31 else limit - 2**32
    assert (mode, frame[GUESSED.value]) == (FRAMED.value, 1)
    assert frame[LOWEST.value] <= limit <= frame[HIGHEST.value]


def test_a_short_nucleus_needs_no_further_launch():
    logits = -1.8 * torch.log(torch.randperm(20_480, generator=generator(4)) + 1.0)[None]
    _, mode = frame_after(logits, 0.7)
    assert mode == DONE.value


@pytest.mark.parametrize(
    "rules",
    [
        (top_k, 50, typical, 0.9, top_h, 0.9, top_p, 0.8),
        (typical, 0.5, min_p, 0.2),
        (top_k, 100, tail_free, 0.97),
        (top_n_sigma, 4.0, eta, 1e-3),
    ],
)
def test_rules_by_entropy_distance_and_moments_are_read_off_the_order(rules):
    """No search, and XTC behind each of them (and curvature): 160 groups, so that a bound leaves a short list."""
    logits = -1.8 * torch.log(torch.randperm(20_480, generator=generator(6)) + 1.0)[None]
    made = [make(torch.tensor([float(value)])) for make, value in zip(rules[::2], rules[1::2], strict=True)]
    call = Call(logits, **key(1), rules=(*made, xtc(torch.tensor([0.05]), torch.ones(1))), logprobs=True)
    plan = Plan.of(call)
    assert not differences(sample_reference(call), sample_fused(call, plan=plan))
    assert plan.counters[0, 1].item() == DONE.value


@pytest.mark.parametrize(("short", "longest"), [(256, 8192), (16, 128), (16, 32)])
def test_tail_free_sampling_takes_ties_alike_in_and_beyond_the_lists(monkeypatch, short, longest):
    """Many equal logits: places in the list are by id, and wide rows go from run to run."""
    monkeypatch.setattr(fused, "LIST", short)
    monkeypatch.setattr(fused, "WIDE_LIST", longest)
    logits = (logits_of(6, 250) * 2).round()
    counts, shares = torch.tensor([3.0, 20, 60, 200, 60, 0]), torch.tensor([0.9, 0.5, 0.8, 0.97, 0.6, 0.7])
    for ties in ("keep", "lowest"):
        first = xtc(torch.full((6,), 0.02), torch.tensor([0.0, 1, 1, 1, 0, 0]))
        call = Call(logits, **key(6), rules=(first, top_k(counts, ties), tail_free(shares)), logprobs=True)
        expected = sample_reference(call)
        assert (expected.kept < (logits >= 0).sum(1)).any()
        plan = Plan.of(call)
        assert not differences(expected, sample_fused(call, plan=plan))
        assert (plan.counters[:, 1] == DONE.value).all() == (short == 256)
        assert not differences(expected, sample_cpu(call))


def test_adaptive_temperatures_have_the_same_bits_on_every_path():
    """Dynamic, by theta, none, and greedy; behind edits and a mask; against float64."""
    x, one = logits_of(4, 300) * torch.tensor([0.5, 6.0, 3.0, 3.0])[:, None], torch.ones(4)
    adaptive = dynamic_temperature(one * 1.1, one * 0.5, torch.tensor([2.0, 1.0, 1.0, 1.0]))
    adaptive[:, 1] = entropy_temperature(one * 0.9, one * 0.8, one * 0.3)[:, 1]
    adaptive[:, 2] = 0.0
    given = torch.tensor([0.3, 1.0, 0.7, 0.0])
    mask = torch.rand(4, 300, generator=generator(2)) < 0.8
    call = Call(
        x, **key(4), temperature=given, adaptive=adaptive, edits=edits(4, 300, 4), bitmask=pack_mask(mask),
        logprobs="chosen",
    )  # fmt: skip
    edited = apply_edits(x, **call.changes)
    found = temperatures(edited, given, adaptive)
    weights = edited.double().softmax(1)
    entropy = torch.special.entr(weights).sum(1)
    share = entropy / edited.isfinite().sum(1).log()
    expected = 0.6 + share ** adaptive[3].double()
    expected[1] = 0.9 * 0.8 ** (0.3 / entropy[1])
    expected[2:] = given[2:]
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)
    plan, reference = Plan.of(call), sample_reference(call)
    drawn = sample_fused(call, plan=plan)
    assert torch.equal(plan.temperatures, found)
    assert torch.equal(drawn.tokens, reference.tokens)
    assert torch.equal(sample_cpu(call).tokens, reference.tokens)
    torch.testing.assert_close(drawn.logprob, reference.logprob, rtol=0, atol=1e-5)
    plain = dataclasses.replace(call, adaptive=None)
    assert torch.equal(sample_reference(plain).tokens[2:], reference.tokens[2:])


def test_the_exponential_is_right_to_its_last_bits():
    x = torch.linspace(-86, 87, 30_001)
    assert exp_reference(torch.zeros(1)) == 1
    torch.testing.assert_close(exp_reference(x).double(), x.double().exp(), rtol=2e-7, atol=0)


def adversarial_rows():
    """[5, 640]: all mass in one bin of the distances, ties at the edges of eight bins, denormals, one token more than
    the list of 64 takes, and one whose boundary is in a bin that is listed."""
    g = generator(9)
    x = torch.full((5, 640), -1e4)
    x[0] = -1 - torch.rand(640, generator=g) / 300
    x[1] = -(1 + torch.randperm(640, generator=g) % 8 / 128)
    x[2] = torch.randint(-400, 400, (640,), generator=g) * 1e-42
    x[3, torch.randperm(640, generator=g)[:64]] = -1 - torch.arange(64) * 1e-4
    x[[0, 1, 3], [5, 300, 639]] = 0.0
    x[4] = torch.randn(640, generator=g) * 2
    return x


def test_boundaries_in_bins_are_those_of_float64_however_the_row_is_split(monkeypatch):
    """Five programs a row and two, short lists, rows together and alone."""
    for name, length in (("LIST", 16), ("WIDE_LIST", 64), ("WIDE_GROUPS", 1)):
        monkeypatch.setattr(fused, name, length)
    x, shares = adversarial_rows(), torch.tensor([0.35, 0.62, 0.8779, 0.55, 0.93])
    call = Call(x, **key(5), logprobs=True, rules=(top_p(shares),))
    plan = Plan.of(call)
    drawn = sample_fused(call, plan=plan)
    assert plan.counters[:, 1].tolist() == [LEFT.value] * 5
    for row in range(5):
        kept, margin = oracle(x[row].numpy(), top_p=float(shares[row]))
        assert margin > 1e-6
        assert (drawn.kept[row], kept[drawn.tokens[row]]) == (kept.sum(), True), row
    assert not differences(sample_reference(call), drawn)
    monkeypatch.setattr(fused, "WIDE_GROUPS", 4)
    for row in (1, 3):
        one = slice(row, row + 1)
        own = {name: value[one] for name, value in key(5).items()}
        alone = sample(x[one], **own, logprobs=True, rules=(top_p(shares[one]),), kernels="triton")
        for whole, part in zip(drawn[:6], alone[:6], strict=True):
            assert torch.equal(whole[one], part)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_new_logit_hides_no_nan(kernels):
    """Nor does a mask, or an edit that makes a number of it; its neighbours in the list stay edited."""
    x = logits_of(2, 300)
    x[1, 7] = torch.nan
    ids = torch.tensor([[7, 200], [7, 200]], dtype=torch.int32)
    listed = Replaced(ids, torch.tensor([[-1.0, 50.0]] * 2), touched_bits(ids, 300))
    mask = pack_mask(torch.arange(300).expand(2, -1) != 7)
    least = Pointwise(torch.zeros(2), lambda x, ids, value: torch.where(x > value, x, value), at_least)
    for more in ({}, {"bitmask": mask}, {"pointwise": (least,)}):
        assert sample(x, **key(2), edits=listed, kernels=kernels, **more).tokens.tolist() == [200, -1]


def test_programs_of_several_tiles_look_up_the_edits_of_each(monkeypatch):
    """Four tiles of one program, of which the third and the last hold the listed tokens."""
    monkeypatch.setattr(fused, "FEW_PROGRAMS", 1)
    x = logits_of(1, 7000)
    x[0, [4100, 6999]] = torch.tensor([90.0, 80.0])
    ids = torch.tensor([[4100, 6999]], dtype=torch.int32)
    listed = Replaced(ids, torch.tensor([[-90.0, -80.0]]), touched_bits(ids, 7000))
    plan = Plan.of(call := Call(x, **key(1), edits=listed, temperature=torch.zeros(1)))
    assert fused.first_tiles(1, plan.vocab_groups) == 4
    maxima = plan.statistics[0, 0, : plan.vocab_groups]
    x[0, ids[0].long()] = -torch.inf
    assert sample_fused(call, plan=plan).tokens == x.argmax()
    assert maxima.equal(torch.nn.functional.pad(x, (0, 40), value=-torch.inf).view(-1, 128).amax(1))


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
