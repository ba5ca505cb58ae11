"""Values of the Triton kernels in the interpreter; run as a program, in a process of its own.

Prints one line a failure and exits with their number; `--share i/n` runs every n-th check from the i-th on.
On a machine with a GPU, `python -m benchmarks.gpu` runs the same checks on CUDA.
"""

import contextlib
import mmap
import os
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import quick_interpreter
import torch
import triton
import triton.language as tl
from interpreted_acceptance import acceptance_checks
from sampling_rows import back, differences, edits, generator, key, on, rows

from handloom.kernels.device.wide import bins, frame
from handloom.kernels.device.wide import draw as wide_draw
from handloom.kernels.noise import (
    philox,
)
from handloom.kernels.noise import (
    philox_triton as triton_noise,
)
from handloom.kernels.sampling import (
    fused as sample_fused,
)
from handloom.kernels.sampling import (
    rules,
)
from handloom.kernels.sampling.draw import draw, draw_reference
from handloom.kernels.sampling.sample import sample, sample_reference

MOST_PASSES = 2.0  # the bins, and the list; the second generation of the kernels before took 4.3 to 6.2
LISTS = ("LIST", "WIDE_LIST")  # lengths of the lists of candidates, constants of the launcher
NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE, which `mmap` names from Python 3.13 on


def choices(g, batch, *values):
    return torch.tensor(values)[torch.randint(len(values), (batch,), generator=g)].float()


def rule_sets(g, batch, vocab):
    """The pipelines to check, by name; parameters differ from row to row."""
    k = rules.top_k(choices(g, batch, 0, 1, 50, vocab // 2, vocab + 1))
    p = rules.top_p(choices(g, batch, 0.0, 0.1, 0.9, 0.999, 1.0))
    m = rules.min_p(choices(g, batch, 0.0, 0.05, 1.0))
    yield "open", ()
    yield "k p min-p", (k, p, m)
    yield "p", (rules.top_p(choices(g, batch, 0.1, 0.5, 0.99)),)
    eta, top_a = rules.eta(choices(g, batch, 0, 1e-3)), rules.top_a(choices(g, batch, 0, 0.2))
    sigma, less = rules.top_n_sigma(choices(g, batch, 0, 1.5)), rules.p_less(choices(g, batch, 0, 1))
    yield "values", (sigma, eta, top_a, less, k, rules.epsilon(choices(g, batch, 0, 1e-3)))
    exact = rules.top_k(choices(g, batch, 0, 1, 50, vocab // 2), ties="lowest")
    xtc = rules.xtc(choices(g, batch, 0.02, 0.1), choices(g, batch, 0, 0.5, 1))
    yield "xtc, exact k, p", (xtc, exact, p)
    top_h = rules.top_h(choices(g, batch, 0, 0.3, 0.8, 1), choices(g, batch, 0, 1))
    bent = rules.tail_free(choices(g, batch, 0.5, 0.97, 1))
    yield (
        "k, typical, tail-free, top-h, xtc",
        (k, rules.typical(choices(g, batch, 0.5, 0.95, 1)), bent, top_h, xtc),
    )
    yield "typical", (rules.typical(choices(g, batch, 0.1, 0.5, 0.95)),)
    yield "exact k, tail-free, top-h", (exact, bent, top_h)


@contextlib.contextmanager
def lists_of(short, wide):
    """The kernels' lists of candidates have these lengths."""
    before = [getattr(sample_fused, name) for name in LISTS]
    for name, length in zip(LISTS, (short, wide), strict=True):
        setattr(sample_fused, name, length)
    yield
    for name, length in zip(LISTS, before, strict=True):
        setattr(sample_fused, name, length)


def sampling(device, batch, vocab, whole=(), first=0):
    """The fused sampler against the reference on every kind of row; yields descriptions of differences.

    Of each kind one pipeline in the interpreter and two on CUDA, in turn from `first` on, and all of those in `whole`.
    """
    g, step = generator(vocab), 8 if device == "cpu" else 4
    for number, (name, x) in enumerate(rows(batch, vocab)):
        for case, (pipeline, chosen) in enumerate(rule_sets(g, batch, vocab)):
            if (case - number - first) % step and name not in whole:
                continue
            x_given = x.bfloat16() if case == 1 else x
            settings = {
                **key(batch, number),
                "temperature": choices(g, batch, 1.0, 0.7, 0.0, 5.0, 1e-3, float("inf")),
                "logprobs": case > 0,
                "rules": chosen,
            }
            if case % 2:
                settings["edits"] = edits(batch, vocab, number)
            if (number + case) % 3 == 0:
                settings["bitmask"] = rules.pack_mask(torch.rand(batch, vocab, generator=g) < 0.8)
            expected = sample_reference(rules.Call(x_given, **settings))
            got = back(sample(on(device, x_given), kernels="triton", **on(device, settings)))
            yield from (f"{name} {pipeline} V={vocab}: {text}" for text in differences(expected, got))


def beyond(check, longest, *arguments, **named):
    """A check where the short list is of 16 tokens, and that for wide rows of `longest`."""
    with lists_of(16, longest):
        yield from check(*arguments, **named)


def noise(device):
    """Words and noise, bit for bit."""
    ids = torch.cat([torch.arange(3000), torch.tensor([151935, 2**31 - 1])])
    parts = {
        "seeds": torch.tensor([2**63 - 1, 7]),
        "positions": torch.tensor([2**31 + 5, 3]),
        "streams": torch.tensor([0, 2]),
    }
    values = torch.full((2, len(ids)), torch.nan, device=device)
    words = torch.zeros(2, len(ids), dtype=torch.int64, device=device)
    arguments = [*on(device, parts).values(), ids.to(device), values, words, len(ids)]
    triton_noise.gumbel_kernel[(2, 2)](*arguments, BLOCK=2048, enable_fp_fusion=False)
    if not torch.equal(words.cpu(), philox.philox_words_reference(*parts.values(), ids)):
        yield "noise: words differ"
    if not torch.equal(values.cpu().view(torch.int32), philox.gumbel(*parts.values(), ids).view(torch.int32)):
        yield "noise: bits differ"


def outputs(device):
    """Poisoned outputs are written whole, canary rows around them are not, strides are followed, a plan is reused."""
    batch, vocab = 3, 333
    wide = torch.full((batch + 2, vocab + 40), torch.nan)
    wide[1:-1, 16 : 16 + vocab] = torch.randn(batch, vocab, generator=generator(1))
    x = wide[1:-1, 16 : 16 + vocab]
    chosen = (rules.top_k(torch.tensor([20, 0, 5])),)
    settings = {**key(batch), "rules": chosen, "logprobs": True}
    expected = sample_reference(rules.Call(x, **settings))
    held = on(device, settings)
    given = on(device, wide)[1:-1, 16 : 16 + vocab]
    plan = sample_fused.Plan(given, rules=held["rules"], logprobs=True)
    canary = torch.full((batch + 2,), -77, dtype=torch.int64, device=device)
    for buffer in (plan.statistics, plan.records, plan.values, plan.floats):
        buffer.fill_(torch.nan)
    for buffer in (
        plan.active,
        plan.counters,
        plan.lists,
        plan.frames,
        plan.sums,
        plan.bin_counts,
        plan.wide_lists,
    ):
        buffer.fill_(2**30)
    for turn in range(2):
        out = canary[1:-1]
        drawn = back(sample_fused.sample_fused(rules.Call(given, **held), plan=plan, out=out))
        yield from (f"outputs, turn {turn}: {text}" for text in differences(expected, drawn))
        if canary[[0, -1]].tolist() != [-77, -77]:
            yield "outputs: a canary was overwritten"
    held["rules"] = plan.rules
    held["positions"] += 1  # parameters and positions are read from memory, not baked in
    moved = back(sample_fused.sample_fused(rules.Call(given, **held), plan=plan))
    later = sample_reference(rules.Call(x, **{**settings, "positions": settings["positions"] + 1}))
    yield from (f"outputs, moved: {text}" for text in differences(later, moved))


def highest(device):
    """The highest raw log-probabilities from the same two launches, in and beyond the list, with and without a plan."""
    for number, (name, x) in enumerate(rows(2, 600)):
        if sample_fused.LIST < 100 and name not in (
            "normal",
            "equal",
            "integers",
            "third -inf",
            "one left",
            "broken",
        ):
            continue
        settings = {**key(2), "n_top": (1, 5, 20, 64)[number % 4]}
        if number % 2:
            settings["edits"] = edits(2, 600)
        x = x.bfloat16() if number % 3 == 0 else x
        expected = sample_reference(rules.Call(x, **settings))
        got = back(sample(on(device, x), kernels="triton", **on(device, settings)))
        yield from (f"highest {name}: {text}" for text in differences(expected, got))
    x, settings = dict(rows(2, 600))["normal"], {**key(2), "n_top": 3}
    given, held = on(device, x), on(device, settings)
    plan = sample_fused.Plan(given, n_top=3)
    plan.top_ids.fill_(-5)
    drawn = sample_fused.sample_fused(rules.Call(given, **held), plan=plan)
    if drawn.top_ids.data_ptr() != plan.top_ids.data_ptr():
        yield "highest: the plan's buffer was not used"
    yield from (
        f"highest, plan: {text}"
        for text in differences(sample_reference(rules.Call(x, **settings)), back(drawn))
    )


def far_rows(device):
    """Rows that start beyond 2**31 elements, of logits and of masks, in memory that is reserved but never touched."""
    stride, vocab, batch = 2**30 + 64, 300, 3
    x = torch.randn(batch, vocab, generator=generator(8))
    mask = rules.pack_mask(torch.rand(batch, vocab, generator=generator(9)) < 0.5)
    far, far_mask = (
        reserved(part.shape, stride, dtype, device)
        for part, dtype in ((x, torch.bfloat16), (mask, torch.int32))
    )
    far.copy_(x)
    far_mask.copy_(mask)
    near = far.to("cpu", copy=True).contiguous()
    settings = {**key(batch), "logprobs": True, "n_top": 3}
    expected = sample_reference(rules.Call(near, bitmask=mask, **settings))
    got = back(sample(far, kernels="triton", bitmask=far_mask, **on(device, settings)))
    yield from (f"far rows: {text}" for text in differences(expected, got))


def reserved(shape, stride, dtype, device):
    """A strided view [rows, columns] of memory whose pages exist only where they are touched."""
    length = (shape[0] - 1) * stride + shape[1]
    if device == "cpu":
        size = length * torch.tensor([], dtype=dtype).element_size()
        space = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        whole = torch.frombuffer(space, dtype=dtype)
    else:
        whole = torch.empty(length, dtype=dtype, device=device)
    return whole.as_strided(tuple(shape), (stride, 1))


def far_masks(device):
    """A deviation of finite masks near the lowest float is that of the reference."""
    x = torch.randn(3, 600, generator=generator(12)) * 3
    lowest = torch.tensor([torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, -1e20])
    x = torch.where(torch.arange(600) % 3 == 0, lowest[:, None], x)
    for n in (0.5, 2.1, 2.15):  # a third is masked: it lies 1 / sqrt(2 / 9) = 2.12 deviations down
        settings = {**key(3), "rules": (rules.top_n_sigma(torch.full((3,), n)),), "logprobs": True}
        got = back(sample(on(device, x), kernels="triton", **on(device, settings)))
        yield from (
            f"far masks n={n}: {text}"
            for text in differences(sample_reference(rules.Call(x, **settings)), got)
        )


def xtc_first(device):
    """With a count or min-p behind it, XTC as first rule is settled in the short list."""
    x = torch.randn(2, 2000, generator=generator(6)) * 3
    for name, behind in (
        ("k", rules.top_k(torch.tensor([4.0, 3.0]))),
        ("min-p", rules.min_p(torch.full((2,), 0.1))),
    ):
        settings = {
            **key(2),
            "rules": (rules.xtc(torch.full((2,), 0.2), torch.ones(2)), behind),
            "logprobs": True,
        }
        given = rules.Call(on(device, x), **on(device, settings))
        plan = sample_fused.Plan.of(given)
        got = back(sample_fused.sample_fused(given, plan=plan))
        yield from (
            f"{name}: {text}" for text in differences(sample_reference(rules.Call(x, **settings)), got)
        )
        if plan.counters[:, 1].any():
            yield f"{name}: left to the launches for wide rows"


class Counted:
    """A device function that counts its calls in the interpreter."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *arguments, **named):
        """Call the function."""
        self.calls += 1
        return self.function(*arguments, **named)


def passes(device, vocab=16384):
    """How often a row is read after the first launch, of which more is left than the short list holds.

    Of counts, one is within the list for wide rows, and the other is not.
    """
    if device != "cpu":
        return  # compiled code cannot be counted
    normal = torch.randn(1, vocab, generator=generator(0))
    for kind, rule in (("flat", "p"), ("ties", "p"), ("flat", 1000), ("flat", 9000), ("ties", 50)):
        x = normal * 1e-3 if kind == "flat" else (normal * 2).round()
        chosen = (
            rules.top_p(torch.tensor([0.95])) if rule == "p" else rules.top_k(torch.tensor([float(rule)])),
        )
        readers = [(bins, "read"), (wide_draw, "read"), (frame, "load_groups")]
        plain = [getattr(module, name) for module, name in readers]
        counters = [Counted(function) for function in plain]
        for (module, name), counter in zip(readers, counters, strict=True):
            setattr(module, name, counter)
        settings = {**key(1), "temperature": torch.tensor([0.8]), "rules": chosen}
        drawn = sample(x, **settings, kernels="triton")
        for (module, name), function in zip(readers, plain, strict=True):
            setattr(module, name, function)
        passes = (
            sum(counter.calls for counter in counters) * sample_fused.WIDE_GROUPS * sample_fused.GROUP / vocab
        )
        if passes > MOST_PASSES:
            yield f"passes: {kind} {rule}: {passes:.2f} passes over the row, at most {MOST_PASSES} expected"
        if not torch.equal(drawn.tokens, sample_reference(rules.Call(x, **settings)).tokens):
            yield f"passes: {kind} {rule}: another token than the reference's"


def beside_wide_rows(device, vocab=16384):
    """The highest log-probabilities leave a wide row's list of groups alone, where a token of the first group wins."""
    x = torch.randn(1, vocab, generator=generator(0)) * 1e-3
    x[:, 12800::128] += 2
    chosen = {"rules": (rules.top_p(torch.tensor([0.95])),), "n_top": 3}
    calls = (rules.Call(x, **key(1, seed), **chosen) for seed in range(1000))
    expected, call = next((d, c) for c in calls if (d := sample_reference(c)).tokens < 128)
    settings = on(device, {"seeds": call.seeds, "positions": call.positions, **chosen})
    got = back(sample(on(device, x), kernels="triton", **settings))
    yield from differences(expected, got)


def drawing(device):
    """`draw` on the kernels."""
    for name, x in rows(2, 300):
        parts, greedy = key(2), torch.tensor([True, False])
        expected = draw_reference(x, **parts, greedy=greedy)
        got = draw(x.to(device), **on(device, parts), greedy=greedy.to(device), kernels="triton").cpu()
        if not torch.equal(expected, got):
            yield f"draw {name}: {expected.tolist()} != {got.tolist()}"


@triton.jit
def capped(x, token_ids, cap):
    return tl.where(x > cap, cap, x)


@triton.jit
def half_of_best(maximum, log_mass, entropy, collision, count, mean, deviation, parameter):
    return maximum - parameter


def own_rule(device):
    """A user's own edit and rule run in the kernel as in torch."""
    batch, vocab = 2, 300
    x = torch.randn(batch, vocab, generator=generator(5)) * 3
    limit = rules.Rule(
        "value", torch.tensor([1.0, 2.5]), lambda stats, gap: stats.maximum - gap, half_of_best
    )
    edit = rules.Pointwise(
        torch.tensor([4.0, 6.0]), lambda logits, ids, cap: torch.minimum(logits, cap), capped
    )
    settings = {**key(batch), "logprobs": True}
    expected = sample_reference(rules.Call(x, rules=(limit,), pointwise=(edit,), **settings))
    moved = {"rules": (limit._replace(parameter=limit.parameter.to(device)),)}
    moved["pointwise"] = (edit._replace(parameter=edit.parameter.to(device)),)
    got = back(sample(x.to(device), kernels="triton", **on(device, settings), **moved))
    yield from (f"own rule: {text}" for text in differences(expected, got))


def checks(device):
    """Every check, as (name, iterator of failures)."""
    yield "noise", noise(device)
    yield "outputs", outputs(device)
    yield "own rule", own_rule(device)
    yield "sampling", sampling(device, 2, 700, ("normal",))
    yield "sampling, candidates beyond the list", beyond(sampling, 128, device, 2, 300, first=3)
    yield "sampling, candidates beyond every list", beyond(sampling, 32, device, 2, 300, ("equal",), first=6)
    yield "drawing", drawing(device)
    yield "highest", highest(device)
    yield "highest, candidates beyond the list", beyond(highest, 128, device)
    yield "far masks", far_masks(device)
    yield "XTC first", xtc_first(device)
    yield "beside wide rows", beside_wide_rows(device)
    yield "passes", passes(device)
    yield from acceptance_checks(device)
    if sys.platform == "linux":
        yield "far rows", far_rows(device)


def main():
    """Run every check, those named, or one share of them (`--share 0/4`); returns the number of failures."""
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    quick_interpreter.install()
    found = list(checks("cuda" if torch.cuda.is_available() else "cpu"))
    wanted = sys.argv[1:] or [name for name, _ in found]
    if wanted[0] == "--share":
        share, shares = map(int, wanted[1].split("/"))
        wanted = [name for name, _ in found][share::shares]
    if unknown := set(wanted) - {name for name, _ in found}:
        sys.exit(
            f"no check is called {', '.join(unknown)}; there are: {', '.join(name for name, _ in found)}"
        )
    failures = 0
    for name, texts in found:
        for text in texts if name in wanted else ():
            failures += 1
            sys.stdout.write(f"{name}: {text[:400]}\n")
    sys.stdout.write(f"{failures} failures\n")
    return min(failures, 100)


if __name__ == "__main__":
    sys.exit(main())
