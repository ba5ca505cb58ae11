"""The end of a step: the kernel against its reference, where rows end, idle, and have nothing drawable."""

import pytest
import torch

from handloom.kernels.append import append


def given(rows, top, stops, width=11, size=4):
    """Rows at different places: a limit reached, a stop id drawn, an idle one, one without a token."""
    generator = torch.Generator().manual_seed(rows)

    def ints(high, *shape):
        return torch.randint(high, shape, generator=generator)

    numbers = torch.zeros(3, rows + 5, dtype=torch.long)[:, :rows]
    numbers[0], numbers[1], numbers[2] = ints(width - 2, rows), 1, width
    numbers[2, 0] = numbers[0, 0] + 1
    numbers[:, -1] = 0
    tokens = ints(50, rows)
    tokens[rows // 2] = -1
    ends = torch.full((rows, stops), -1)
    ends[1 % rows, -1] = tokens[1 % rows]
    best = None
    if top:
        best = ints(50, rows, top), torch.randn(rows, top, generator=generator)
    logprobs = torch.randn(rows, generator=generator), torch.randn(rows, generator=generator)
    logprobs[1][rows // 2] = torch.nan
    changed = {
        "results": torch.full((rows, 3 + 2 * top), torch.nan, dtype=torch.double),
        "ids": torch.full((rows,), -7),
        "fed": torch.full((3, rows + 1), -7)[:, :rows],
        "history": torch.full((rows, width), -1),
        "positions": numbers[0][:, None],
        "active": numbers[1][:, None],
    }
    table = ints(99, rows, width // size + 3).int()[:, :-1]
    fixed = {"table": table, "block_size": size, "limits": numbers[2][:, None], "stops": ends}
    return (tokens, logprobs, best), changed, fixed


@pytest.mark.parametrize(("rows", "top", "stops"), [(1, 0, 8), (3, 3, 1), (5, 1, 9), (2, 40, 33)])
def test_the_kernel_does_what_the_reference_does(rows, top, stops):
    results = []
    for kernels in ("torch", "triton"):
        drawn, changed, fixed = given(rows, top, stops)
        append(*drawn, **changed, **fixed, kernels=kernels)
        results.append(changed)
    for name, want in results[0].items():
        torch.testing.assert_close(results[1][name], want, rtol=0, atol=0, equal_nan=True, msg=name)


def test_rows_go_on_until_a_stop_id_or_their_limit():
    drawn, changed, fixed = given(5, 1, 2)
    before = changed["positions"][:, 0].clone()
    append(*drawn, **changed, **fixed, kernels="torch")
    assert changed["active"][:, 0].tolist() == [0, 0, 1, 1, 0]  # its limit, a stop id, -, -, idle
    assert (changed["positions"][:, 0] - before).tolist() == [0, 0, 1, 1, 0]
    cells = [
        int(table[at // 4]) * 4 + at % 4 for at, table in zip(before.tolist(), fixed["table"], strict=True)
    ]
    assert changed["fed"].tolist() == [before.tolist(), cells, (before + 1).tolist()]
    assert changed["ids"][2] == 0  # nothing was drawn
    assert changed["history"].gather(1, before[:, None])[:, 0].tolist() == changed["ids"].tolist()
    assert changed["results"][:, 0].tolist() == changed["ids"].tolist()
