"""What a sampler must be held against beyond `interpreted_kernels`: odd rows, odd parameters, odd shapes, invariance.

The checks run with those of `interpreted_kernels`, in the interpreter or on CUDA.
"""

import itertools

import torch
from sampling_rows import back, differences, generator, key, on

from handloom.kernels.sampling import fused as sample_fused
from handloom.kernels.sampling import rules
from handloom.kernels.sampling.sample import sample, sample_reference

COUNTS = (-1.0, 0.0, 1.0, 2.0, 199.0, 200.0, 201.0, 2.0**31 - 1)  # of a vocabulary of 200
MASSES = (0.0, 1e-6, 0.1, 0.9, 0.999999, 1.0, 1.5)
FLOORS = (0.0, 0.05, 1.0)
HEATS = (0.0, 1e-6, 0.001, 0.01, 1.0, 5.0, float("inf"))


def compared(name, device, x, settings):
    """Differences between the kernel and the reference, each under the check's name."""
    expected = sample_reference(rules.Call(x, **settings))
    got = back(sample(on(device, x), kernels="triton", **on(device, settings)))
    yield from (f"{name}: {text}" for text in differences(expected, got))


def odd_rows(vocab=300):
    """(name, float32 [2, vocab]) of the kinds that `sampling_rows.rows` does not have."""
    g = generator(31)
    normal = torch.randn(2, vocab, generator=g)
    yield "std 10", normal * 10
    yield "descending", (normal * 2).sort(dim=1, descending=True).values
    yield "one-hot", torch.zeros(2, vocab).index_fill(1, torch.tensor([17]), 1.0)
    lowest = torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min
    for value in (-torch.inf, -1e4, -1e9, *lowest):
        masked = torch.rand(2, vocab, generator=g) < 0.99
        masked[:, 5] = False
        yield f"99 % {value:.3g}", torch.where(masked, value, normal)
    yield "low heat (42, -20)", torch.full((2, vocab), -20.0).index_fill(1, torch.tensor([3, 9]), 42.0)
    yield "NaN alone", torch.full((2, vocab), torch.nan)


def kinds_of_rows(device):
    """Kept sets, tokens and numbers on odd rows, in the orders of Hugging Face and of llama.cpp."""
    k, p, m = (torch.tensor(values) for values in ([50.0, 3.0], [0.9, 0.5], [0.05, 0.2]))
    orders = {
        "k p min-p": (rules.top_k(k), rules.top_p(p), rules.min_p(m)),
        "min-p k p": (rules.min_p(m), rules.top_k(k), rules.top_p(p)),
    }
    for number, ((name, x), order) in enumerate(itertools.product(odd_rows(), orders)):
        if device == "cpu" and number % 4 not in (0, 3):
            continue  # one order a kind in the interpreter, in turn
        chosen = orders[order]
        heat = torch.tensor([0.001, 1.0] if name.startswith("low") else [1.0, 0.7])
        settings = {**key(2), "rules": chosen, "temperature": heat, "logprobs": True}
        yield from compared(f"{name}, {order}", device, x, settings)


def parameters(device, vocab=200):
    """Every value of every parameter that the rules must survive, one a row."""
    for name, make, values in (
        ("top-k", rules.top_k, COUNTS),
        ("top-p", rules.top_p, MASSES),
        ("min-p", rules.min_p, FLOORS),
        ("temperature", None, HEATS),
    ):
        x = torch.randn(len(values), vocab, generator=generator(7)) * 3
        settings = {**key(len(values)), "logprobs": True}
        settings |= (
            {"rules": (make(torch.tensor(values)),)} if make else {"temperature": torch.tensor(values)}
        )
        yield from compared(name, device, x, settings)


def shapes(device):
    """No rows, one row, tiny vocabularies, half precision, strided and transposed rows."""
    for batch, vocab in ((0, 5), (1, 1), (3, 1), (1, 2), (7, 31), (1, 129)):
        x = torch.randn(batch, vocab, generator=generator(vocab)) * 2
        chosen = (rules.top_k(torch.full((batch,), 2.0)), rules.top_p(torch.full((batch,), 0.9)))
        settings = {**key(batch), "rules": chosen, "logprobs": True}
        yield from compared(f"B={batch} V={vocab}", device, x, settings)
    wide = torch.randn(260, 6, generator=generator(2)) * 2
    chosen = (rules.top_k(torch.tensor([9.0, 0.0, 3.0])), rules.min_p(torch.tensor([0.0, 0.1, 0.0])))
    settings = {**key(3), "rules": chosen, "logprobs": True}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        given = {"transposed": wide[:, :3].to(dtype).T, "every other row": wide.T[::2].to(dtype)}
        for name, x in given.items():
            yield from compared(f"{name} {dtype}", device, x, settings)


def invariance(device, vocab=900):
    """A row's token does not depend on its place, its neighbours, their number, or how the vocabulary is split."""
    x = torch.randn(6, vocab, generator=generator(3)) * 2
    chosen = (
        rules.top_k(torch.tensor([40.0, 0, 0, 7, 0, 300])),
        rules.top_p(torch.tensor([0.9, 0.95, 1, 1, 0.5, 1])),
    )
    settings = {**key(6), "rules": chosen, "logprobs": True}

    def drawn(rows, padding=0):
        index = torch.tensor([*rows, *[0] * padding])
        picked = {name: value[index] for name, value in settings.items() if isinstance(value, torch.Tensor)}
        picked["rules"] = tuple(rule._replace(parameter=rule.parameter[index]) for rule in chosen)
        got = back(sample(on(device, x[index]), kernels="triton", logprobs=True, **on(device, picked)))
        return [part[: len(rows)] for part in got if part is not None]

    def same(text, rows, got):
        wanted = [part[list(rows)] for part in whole]
        if not all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True)):
            yield f"{text}: {wanted} != {got}"

    whole = drawn(range(6))
    order = [4, 2, 0, 5, 1, 3]
    yield from same("permuted", order, drawn(order))
    yield from same("two rows", [3, 1], drawn([3, 1]))
    yield from same("padded", [3, 1], drawn([3, 1], padding=3))
    for row in (0, 2, 3):  # an edge among few tokens, among many, and none
        yield from same(f"row {row} alone", [row], drawn([row]))
    before = sample_fused.FIRST_GROUPS
    for groups in (1, 4):
        sample_fused.FIRST_GROUPS = groups
        yield from same(f"{groups} groups a program", range(6), drawn(range(6)))
    sample_fused.FIRST_GROUPS = before


def masks(device, vocab=77):
    """Bits of a mask's last word beyond the vocabulary mean nothing, and a token's rank counts those above it."""
    x = torch.randn(2, vocab, generator=generator(4))
    clean = rules.pack_mask(torch.rand(2, vocab, generator=generator(5)) < 0.5)
    tail = torch.tensor(-1 << (vocab % 32), dtype=torch.int32)
    settings = {**key(2), "logprobs": True}
    for name, bitmask in (("clean", clean), ("garbage", torch.cat([clean[:, :-1], clean[:, -1:] | tail], 1))):
        expected = sample_reference(rules.Call(x, bitmask=clean, **settings))
        got = back(
            sample(on(device, x), kernels="triton", bitmask=bitmask.to(device), **on(device, settings))
        )
        yield from (f"{name} tail: {text}" for text in differences(expected, got))
    levels = torch.tensor([[3.0, 1, 2, 2, 1, 1, 0], [0.0, 0, 0, 0, 0, 0, 0]])
    for seed in range(5):
        got = back(sample(on(device, levels), kernels="triton", logprobs=True, **on(device, key(2, seed))))
        ranks = [[1, 4, 2, 2, 4, 4, 7], [1] * 7]
        wanted = [ranks[row][token] for row, token in enumerate(got.tokens.tolist())]
        if got.rank.tolist() != wanted:
            yield f"rank of {got.tokens.tolist()}: {got.rank.tolist()} != {wanted}"


def acceptance_checks(device):
    """Every check, as (name, iterator of failures)."""
    yield "kinds of rows", kinds_of_rows(device)
    yield "parameters", parameters(device)
    yield "shapes", shapes(device)
    yield "invariance", invariance(device)
    yield "masks", masks(device)
