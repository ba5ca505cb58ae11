"""Penalties as an edit list: the kernel against its reference, to the bit."""

import pytest
import torch

from handloom.kernels.penalties import Penalty, penalised
from handloom.kernels.sampling.rules import unpack_mask

ROWS, VOCAB, LENGTH = 4, 77, 41


def a_penalty(generator, *, window=False):
    def flags():
        return torch.rand(ROWS, 1, generator=generator) < 0.4

    windows = torch.randint(0, 9, (ROWS, 1), generator=generator) * int(window)
    skip = flags()
    return Penalty(torch.rand(ROWS, 1, generator=generator) + 0.5, skip, flags() & ~skip, windows)


@pytest.mark.parametrize("which", ["rpf", "r", "pf"])
@pytest.mark.parametrize("window", [False, True], ids=["whole", "windowed"])
def test_the_kernel_gives_the_bits_of_the_reference(which, window):
    generator = torch.Generator().manual_seed(len(which))
    logits = 5 * torch.randn(ROWS, VOCAB, generator=generator)
    logits[0, :5] = torch.tensor([-torch.inf, torch.inf, torch.nan, 0.0, -0.0])
    history = torch.randint(-1, VOCAB + 3, (ROWS, LENGTH), generator=generator)
    history[0, :20] = torch.arange(20) % 5
    lengths, prompts = torch.tensor([40, 17, 0, 41]), torch.tensor([11, 17, 0, 3])
    rules = [a_penalty(generator, window=window) if name in which else None for name in "rpf"]
    want, have = (
        penalised(logits, history, lengths, prompts, *rules, kernels=kernels)
        for kernels in ("torch", "triton")
    )
    assert torch.equal(have.ids, want.ids)
    assert torch.equal(have.touched, want.touched)
    listed = want.ids >= 0
    assert torch.equal(have.values[listed].view(torch.int32), want.values[listed].view(torch.int32))
    for row, (ids, length) in enumerate(zip(want.ids, lengths.tolist(), strict=True)):
        text = {t for t in history[row, :length].tolist() if 0 <= t < VOCAB}
        assert sorted(ids[ids >= 0].tolist()) == sorted(text)  # each once
        assert set(unpack_mask(have.touched[row : row + 1], VOCAB)[0].nonzero().flatten().tolist()) == text
