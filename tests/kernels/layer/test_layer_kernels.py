"""Norm, rotation and gated activation: Triton kernels against their torch references, in shapes that fit no tile."""

import pytest
import torch

from handloom.kernels import dispatch
from handloom.kernels.layer.gated import gated, gated_reference
from handloom.kernels.layer.norm import Norm, add_norm, add_norm_reference
from handloom.kernels.layer.rope import look_up, rotate_and_write, rotate_and_write_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def close(have, exact):
    """As near as one rounding of the exact result, but for sums in another order."""
    assert have.isfinite().all()
    error, eps = (have.double() - exact).abs(), torch.finfo(have.dtype).eps
    assert (error <= eps * exact.abs() + 1e-5).all(), error.max()


def wide(norm):
    if norm is None:
        return None
    parts = [None if part is None else part.double() for part in (norm.weight, norm.bias)]
    return Norm(parts[0], norm.eps, norm.offset, parts[1], norm.centered)


def norms(size, dtype):
    """Every kind of norm."""
    weight, bias = random(size, dtype=dtype, seed=5), random(size, dtype=dtype, seed=6)
    yield Norm(weight, 1e-5)
    yield Norm(weight, 1e-6, offset=1.0)
    yield Norm(None, 1e-5)
    yield Norm(None, 1e-5, centered=True)
    yield Norm(weight, 1e-5, centered=True)
    yield Norm(weight, 1e-5, bias=bias, centered=True)


# -- norms


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 33, 200])
def test_norm_with_and_without_residual(size, dtype):
    residual, post = random(3, size, dtype=dtype, seed=1), Norm(random(size, dtype=dtype, seed=2), 1e-6, 1.0)
    ways = [
        (1e-3, {}),
        (200.0, {"residual": residual, "scale": 0.3}),
        (1.0, {"residual": residual, "post": post}),
    ]
    for norm in norms(size, dtype):
        for factor, options in ways:
            x = factor * random(3, size, dtype=dtype)
            have = add_norm(x, norm, kernels="triton", **options)
            wider = {**options, "post": wide(options.get("post"))}
            if "residual" in wider:
                wider["residual"] = residual.double()
            want = add_norm_reference(x.double(), wide(norm), **wider)
            assert options or have[0] is x
            if norm.centered and size == 1:
                continue  # nothing is left of a single number: all rounding
            close(have[0], want[0])
            close(have[1], want[1])


def test_sum_alone_after_a_norm():
    x, residual = random(2, 40), random(2, 40, seed=1)
    post = Norm(random(40, seed=2), 1e-5)
    have = add_norm(x, None, residual=residual, post=post, kernels="triton")
    assert have[1] is None
    assert torch.allclose(have[0], residual + post(x), atol=1e-5)


def test_rows_with_zeros_outliers_and_nan_stay_apart():
    x = random(5, 65)
    norm = Norm(random(65, seed=3), 1e-5)
    want = add_norm(x, norm, residual=x, kernels="triton")
    other = x.clone()
    other[1], other[2, 7], other[3] = 0, 1e15, float("nan")
    have = add_norm(other, norm, residual=other, kernels="triton")
    for mine, plain in zip(have, want, strict=True):
        assert torch.equal(mine[[0, 4]], plain[[0, 4]])
        assert (mine[1] == 0).all()
        assert mine[3].isnan().all()
        assert mine[2].isfinite().all()


def test_strided_rows_are_read_in_place():
    whole = random(4, 100)
    norm = Norm(random(30, seed=3), 1e-5)
    have = add_norm(whole[:, 20:50], norm, residual=whole[:, 50:80], kernels="triton")
    want = add_norm_reference(whole[:, 20:50], norm, residual=whole[:, 50:80])
    assert torch.allclose(have[0], want[0])
    assert torch.allclose(have[1], want[1], atol=1e-5)


def test_norms_refused():
    with pytest.raises(ValueError, match="R, K"):
        add_norm(random(2, 3), Norm(None, 1e-5), residual=random(3, 3))
    with pytest.raises(ValueError, match="without a residual"):
        add_norm(random(2, 3), None)
    with pytest.raises(dispatch.KernelUnavailable, match="float64"):
        add_norm(random(2, 3).double(), Norm(None, 1e-5), kernels="triton")


# -- rotation


def heads(tokens, q, k, dim, dim_v, dtype):
    """Queries, keys and values as views of one product's result, and poisoned cells."""
    whole = random(tokens, (q + k) * dim + k * dim_v, dtype=dtype)
    parts = whole.split([q * dim, k * dim, k * dim_v], -1)
    q, k, v = (part.view(tokens, -1, size) for part, size in zip(parts, (dim, dim, dim_v), strict=True))
    stores = [
        torch.full((tokens + 4, k.shape[1], size), float("nan"), dtype=dtype, device=DEVICE)
        for size in (dim, dim_v)
    ]
    cells = torch.randperm(tokens + 4, generator=torch.Generator().manual_seed(3))[:tokens].to(DEVICE)
    return q, k, v, *stores, cells


def angles(tokens, width, dtype):
    theta = 7 * random(tokens, width, seed=4)
    return theta.cos().to(dtype), theta.sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize(("tokens", "q", "k", "dim", "dim_v", "rotated", "width"), [
    (1, 4, 2, 16, 16, 16, 16), (3, 3, 3, 10, 6, 10, 5), (2, 4, 1, 24, 24, 8, 8), (17, 2, 1, 8, 8, 4, 2),
])  # fmt: skip
def test_rotation(tokens, q, k, dim, dim_v, rotated, width, interleaved, dtype):
    q, k, v, keys, values, cells = heads(tokens, q, k, dim, dim_v, dtype)
    cos, sin = angles(tokens, width, dtype)
    for norm in (None, Norm(random(dim, dtype=dtype, seed=5), 1e-6, 1.0)):
        options = {"rotated": rotated, "interleaved": interleaved}
        want_keys, want_values = keys.double(), values.double()
        want = rotate_and_write_reference(
            q.double(), k.double(), v.double(), cos.double(), sin.double(), want_keys, want_values, cells,
            q_norm=wide(norm), k_norm=wide(norm), **options,
        )  # fmt: skip
        mine, yours = keys.clone(), values.clone()
        have = rotate_and_write(
            q, k, v, cos, sin, mine, yours, cells, q_norm=norm, k_norm=norm, kernels="triton", **options
        )
        assert have.is_contiguous()
        close(have, want)
        close(mine[cells], want_keys[cells])
        assert torch.equal(yours[cells], v)
        others = torch.ones(tokens + 4, dtype=torch.bool)
        others[cells] = False
        assert mine[others].isnan().all(), "written to another cell"
        assert yours[others].isnan().all(), "written to another cell"


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_rotation_is_that_of_transformers(kernels):
    """The two layouts as models of transformers write them."""
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as pairs
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as halves

    q, k, v, keys, values, cells = heads(3, 4, 2, 16, 16, torch.float32)
    theta = random(3, 8, seed=4)
    for theirs, interleaved in ((halves, False), (pairs, True)):
        full = theta.repeat_interleave(2, -1) if interleaved else torch.cat((theta, theta), -1)
        cos, sin = full.cos(), full.sin()
        want_q, want_k = theirs(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos[None], sin[None])
        have = rotate_and_write(
            q, k, v, cos, sin, keys, values, cells, interleaved=interleaved, kernels=kernels
        )
        assert torch.allclose(have, want_q[0].transpose(0, 1), atol=1e-6)
        assert torch.allclose(keys[cells], want_k[0].transpose(0, 1), atol=1e-6)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_no_rotation_writes_the_cells(kernels):
    q, k, v, keys, values, cells = heads(3, 4, 2, 16, 8, torch.float32)
    have = rotate_and_write(q, k, v, None, None, keys, values, cells, kernels=kernels)
    assert torch.equal(have, q)
    assert torch.equal(keys[cells], k)
    assert torch.equal(values[cells], v)


def test_nan_stays_in_its_token_and_head():
    q, k, v, keys, values, cells = heads(3, 4, 2, 16, 16, torch.float32)
    cos, sin = angles(3, 16, torch.float32)
    norm = Norm(None, 1e-5)
    options = {"q_norm": norm, "k_norm": norm, "kernels": "triton"}
    want = rotate_and_write(q, k, v, cos, sin, keys, values, cells, **options)
    q = q.clone()
    q[1, 2, 0] = float("nan")
    have = rotate_and_write(q, k, v, cos, sin, keys, values, cells, **options)
    assert have[1, 2].isnan().all()
    have[1, 2] = want[1, 2]
    assert torch.equal(have, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_angles_are_looked_up(dtype):
    """Every bit of the row of each position; of one that the table does not have, of the nearest."""
    table = random(7, 2, 12, dtype=dtype)
    table[2] = float("nan")
    positions = torch.tensor([[0, 6, 2], [3, -1, 7], [2**40, -(2**40), 5]], device=DEVICE)
    want = table[[0, 6, 2, 3, 0, 6, 6, 0, 5]].view(3, 3, 2, 12).unbind(2)
    for kernels in ("torch", "triton"):
        have = look_up(table, positions.T.contiguous().T, kernels=kernels)  # of any strides
        for mine, yours in zip(have, want, strict=True):
            torch.testing.assert_close(mine, yours, rtol=0, atol=0, equal_nan=True)
    assert look_up(table, positions[:0], kernels="triton")[0].shape == (0, 3, 12)
    with pytest.raises(ValueError, match=r"table \(7, 24\) and positions \(3, 3\) do not fit"):
        look_up(table.flatten(1), positions)


def test_rotations_refused():
    q, k, v, keys, values, cells = heads(2, 4, 2, 16, 16, torch.float32)
    cos, sin = angles(2, 16, torch.float32)
    with pytest.raises(ValueError, match="do not turn 12 of 2 tokens"):
        rotate_and_write(q, k, v, cos, sin, keys, values, cells, rotated=12)
    with pytest.raises(ValueError, match="do not fit"):
        rotate_and_write(q, k, v, cos, sin, keys[:, :1], values, cells)
    with pytest.raises(dispatch.KernelUnavailable, match=r"bfloat16 and torch\.float32"):
        rotate_and_write(q, k, v, cos, sin, keys, values.bfloat16(), cells, kernels="triton")
    centered = Norm(None, 1e-5, centered=True)
    with pytest.raises(dispatch.KernelUnavailable, match="centered"):
        rotate_and_write(q, k, v, cos, sin, keys, values, cells, q_norm=centered, kernels="triton")


# -- gated activation


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gated(name, dtype):
    both = random(3, 2 * 1100, dtype=dtype)
    both[0, :4] = torch.tensor([60.0, -60.0, 0.0, 9.0])
    gate, up = both.chunk(2, -1)
    close(gated(gate, up, name, kernels="triton"), gated_reference(gate.double(), up.double(), name))


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gated_nan_stays_where_it_is(name):
    gate, up = random(2, 40), random(2, 40, seed=1)
    want = gated(gate, up, name, kernels="triton")
    gate[0, 3], up[1, 5] = float("nan"), float("nan")
    have = gated(gate, up, name, kernels="triton")
    assert have.isnan().nonzero().tolist() == [[0, 3], [1, 5]]
    assert torch.equal(have.nan_to_num(0)[:, 6:], want[:, 6:])


def test_gated_refused():
    with pytest.raises(ValueError, match="activation='swish' is not one of silu"):
        gated(random(2, 3), random(2, 3), "swish")
    with pytest.raises(ValueError, match="R, N"):
        gated(random(2, 3), random(2, 4), "silu")
