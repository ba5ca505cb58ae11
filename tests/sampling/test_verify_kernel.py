"""Chain verification gives the tokens of plain sampling, whatever the draft."""

import pytest
import torch
from sampling_rows import generator

from handloom.kernels.sampling.sample import sample
from handloom.kernels.sampling.verify import verify

ROWS, STEPS, VOCAB = 6, 5, 60


def setting():
    logits = torch.randn(ROWS, STEPS, VOCAB, generator=generator(0)) * 2
    settings = {"seeds": torch.arange(ROWS), "temperature": torch.tensor([0.0, 1.0, 0.7] * 2)}
    return logits, torch.arange(ROWS) * 10, settings


def plain(logits, positions, settings):
    steps = [
        sample(logits[:, i], positions=positions + i, top_k=torch.full((ROWS,), 9), **settings).tokens
        for i in range(STEPS)
    ]
    return torch.stack(steps, dim=1)


def test_accepts_up_to_the_first_difference():
    logits, positions, settings = setting()
    expected = plain(logits, positions, settings)
    draft = expected[:, :-1].clone()
    cut = torch.tensor([0, 1, 2, 3, 4, 4])
    for row in range(ROWS - 2):
        draft[row, cut[row]] = (draft[row, cut[row]] + 1) % VOCAB
    counts = torch.tensor([4, 4, 4, 4, 4, 2])
    found = verify(
        logits, draft, positions=positions, counts=counts, top_k=torch.full((ROWS,), 9), **settings
    )
    assert found.accepted.tolist() == [0, 1, 2, 3, 4, 2]
    for row, accepted in enumerate(found.accepted):
        assert found.tokens[row, : accepted + 1].tolist() == expected[row, : accepted + 1].tolist()
        assert (found.tokens[row, accepted + 1 :] == -1).all()


def test_a_broken_position_ends_the_chain():
    logits, positions, settings = setting()
    draft = plain(logits, positions, settings)[:, :-1]
    logits[2, 1] = torch.nan
    found = verify(logits, draft, positions=positions, top_k=torch.full((ROWS,), 9), **settings)
    assert found.accepted.tolist() == [4, 4, 1, 4, 4, 4]
    assert found.tokens[2, 1] == -1


def test_wrong_draft_shape_is_named():
    logits, positions, settings = setting()
    with pytest.raises(ValueError, match=r"draft of shape \(6, 5\)"):
        verify(logits, torch.zeros(ROWS, STEPS, dtype=torch.int64), positions=positions, **settings)
