"""The draw: only tokens that can win are looked at, and the result is that of looking at all."""

import pytest
import torch
from sampling_rows import generator, key, rows

from handloom.kernels.noise import philox
from handloom.kernels.sampling.draw import GUMBEL_SPAN, PIECE, draw, draw_reference


@pytest.mark.parametrize("vocab", [1, 2, 31, 3000])
def test_draw_is_its_reference(vocab):
    for name, x in rows(4, vocab):
        for seed in range(4):
            parts = key(4, seed)
            for greedy in (None, torch.tensor([True, False, True, False])):
                assert torch.equal(
                    draw(x, **parts, greedy=greedy), draw_reference(x, **parts, greedy=greedy)
                ), name


@pytest.mark.slow
def test_draw_is_its_reference_at_full_size():
    for seed, (name, x) in enumerate(rows(3, 151936)):
        assert torch.equal(draw(x, **key(3, seed)), draw_reference(x, **key(3, seed))), name


def test_a_row_in_pieces_is_drawn_like_a_whole_one():
    """The top in another piece each, ties, excluded tokens and infinities; a word of noise for every token."""
    vocab = 2 * PIECE + 5
    x = torch.randn(8, vocab, generator=generator(1)) * torch.tensor([0, 1e-3, 1, 3, 3, 3, 1, 1])[:, None]
    x[2] = x[2].round()
    x[3:6, [7, PIECE + 7, vocab - 1]] += torch.eye(3) * 9
    x[6, : vocab // 2] = -torch.inf
    x[7, -2:] = torch.inf
    parts = key(8)
    assert torch.equal(draw(x, **parts), draw_reference(x, **parts))


def test_ties_take_the_lowest_id():
    x = torch.full((1, 10), -torch.inf)
    x[0, [3, 8]] = 1.0
    greedy = torch.tensor([True])
    assert draw(x, **key(1), greedy=greedy).tolist() == [3]
    parts = key(1)
    noise = philox.gumbel(*parts.values(), torch.tensor([3, 8]))[0]
    assert draw(x, **parts).tolist() == [[3, 8][int(noise.argmax())]]


def test_an_offset_does_not_change_the_draw():
    """Logits on a grid that survives adding 2**14 exactly."""
    x = (torch.randn(64, 500, generator=generator(0)) * 64).round() / 64
    parts = key(64)
    assert torch.equal(draw(x, **parts), draw(x + 2.0**14, **parts))


def test_tokens_beyond_the_span_cannot_win():
    assert GUMBEL_SPAN > philox.GUMBEL_MAX - philox.GUMBEL_MIN


def test_common_noise_moves_the_token_only_where_the_law_moves():
    """Raising one logit can only turn tokens into that one: the property paired comparisons rest on."""
    x = torch.randn(400, 50, generator=generator(2))
    parts = key(400)
    before = draw(x, **parts)
    x[:, 17] += 1.0
    after = draw(x, **parts)
    changed = before != after
    assert changed.any()
    assert (after[changed] == 17).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_keys_may_be_integers_of_any_kind_and_one_for_all(dtype):
    logits = torch.randn(3, 50, generator=generator(0))
    wanted = draw(logits, *(torch.full((3,), value) for value in (7, 5, 2)))
    assert torch.equal(draw(logits, *(torch.full((3,), value, dtype=dtype) for value in (7, 5, 2))), wanted)
    assert torch.equal(draw(logits, 7, 5, 2), wanted)
    assert torch.equal(draw(logits, torch.tensor(7, dtype=dtype), 5, 2), wanted)


@pytest.mark.parametrize("seeds", [0.5, True, torch.zeros(2, dtype=torch.long), torch.zeros(3)])
def test_a_key_that_is_none_is_named(seeds):
    with pytest.raises(ValueError, match=r"seeds are integers, one or \[3\]; got"):
        draw(torch.zeros(3, 50), seeds, 0)
