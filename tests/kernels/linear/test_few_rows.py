"""Products of few rows: the Triton kernels against their torch reference, in shapes that fit no tile."""

import pytest
import torch

from handloom.kernels import dispatch
from handloom.kernels.linear.few_rows import few_rows_linear, few_rows_linear_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def case(rows, inputs, outputs, dtype):
    """x and weights of a product whose results are around one."""
    x = random(rows, inputs, dtype=dtype, seed=1)
    weights = [random(n, inputs, dtype=dtype, seed=2 + i) / inputs**0.5 for i, n in enumerate(outputs)]
    return x, [w.to(dtype) for w in weights]


def double(given):
    """Tensors, inside lists too, in float64; bytes stay what they are."""
    if isinstance(given, list):
        return [double(part) for part in given]
    return given.double() if torch.is_tensor(given) and given.dtype != torch.int8 else given


def check(x, weights, biases=None, **options):
    """The kernel's error is at most twice that of the same product rounded in x's own dtype."""
    columns = len(weights[0]) if options.get("gate") else sum(map(len, weights))
    frame = torch.full((len(x) + 2, columns), 7.25, dtype=x.dtype, device=DEVICE)
    frame[1:-1] = float("nan")
    few_rows_linear(x, weights, biases, kernels="triton", out=frame[1:-1], **options)
    have = frame[1:-1].double()
    exact = few_rows_linear_reference(
        *map(double, (x, weights, biases)), **{n: double(o) for n, o in options.items()}
    )
    slack = 4 * torch.finfo(x.dtype).eps * exact.abs().max() + 1e-5
    assert (frame[[0, -1]] == 7.25).all(), "written outside"
    assert (have - exact).abs().max() <= slack
    return frame[1:-1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 11])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, (40,)), (200, (33,)), (1100, (7,))], ids=str)
def test_one_weight(rows, inputs, outputs, dtype):
    check(*case(rows, inputs, outputs, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 200, 33), (1, 2100, 3), (3, 200, 33), (11, 64, 40)]
)
def test_a_weight_of_bytes(rows, inputs, outputs, dtype):
    x, (weight,) = case(rows, inputs, (outputs,), dtype)
    scales = weight.float().abs().amax(1) / 127
    scales[0] = 0  # an output of zeros
    bytes_ = (weight.float() / scales[:, None]).nan_to_num().round().to(torch.int8)
    bytes_[1:, 0] = -128
    have = check(x, [bytes_], [random(outputs, dtype=dtype, seed=9)], scales=scales)
    dense = few_rows_linear_reference(
        x.double(),
        [bytes_.double() * scales.double()[:, None]],
        [random(outputs, dtype=dtype, seed=9).double()],
    )
    assert (have.double() - dense).abs().max() <= 4 * torch.finfo(dtype).eps * dense.abs().max() + 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_weights_side_by_side_with_biases(rows, dtype):
    x, weights = case(rows, 96, (37, 9, 18), dtype)
    some = [random(37, dtype=dtype, seed=9), None, random(18, dtype=dtype, seed=10)]
    whole = check(x, weights, some)
    for count in (1, 2, 3):
        check(x, weights[:count], [random(len(w), dtype=dtype) for w in weights[:count]])
    alone = few_rows_linear(x, weights[1:2], kernels="triton")
    assert torch.equal(whole[:, 37:46], alone)  # where a weight lies among others does not matter


@pytest.mark.parametrize("gate", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("rows", [1, 3])
def test_gate(rows, gate):
    for dtype in DTYPES:
        x, weights = case(rows, 160, (21, 21), dtype)
        check(4 * x, weights, gate=gate)
    check(x, weights, [random(21, dtype=dtype, seed=3), random(21, dtype=dtype, seed=4)], gate=gate)


@pytest.mark.parametrize("rows", [1, 3])
def test_residual_and_scale(rows):
    for dtype in DTYPES:
        x, weights = case(rows, 96, (37,), dtype)
        residual = random(rows, 37, dtype=dtype, seed=8)
        want = check(x, weights, residual=residual, scale=0.7)
        given = few_rows_linear(x, weights, residual=residual, scale=0.7, kernels="triton", out=residual)
        assert given is residual
        assert torch.equal(given, want)


@pytest.mark.parametrize("gate", [None, "silu"])
def test_rows_do_not_touch_each_other(gate):
    """A neighbour that is NaN, infinite or huge changes no bit of a row."""
    x, weights = case(6, 96, (24, 24), torch.float32)
    want = few_rows_linear(x, weights, gate=gate, kernels="triton")
    for value in (float("nan"), float("inf"), 1e30):
        other = x.clone()
        other[[0, 3]] = value
        have = few_rows_linear(other, weights, gate=gate, kernels="triton")
        assert torch.equal(have[[1, 2, 4, 5]], want[[1, 2, 4, 5]])
        assert not torch.equal(have[[0, 3]], want[[0, 3]])
    alone = x.clone()
    alone[:, 0] = float("nan")
    assert few_rows_linear(alone[:1], weights, kernels="triton").isnan().all()


def test_views_of_one_weight_are_read_in_place():
    """Phi-3 keeps gate and factor in one tensor."""
    x, (both,) = case(1, 64, (42,), torch.float32)
    gate, up = both.chunk(2)
    want = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    assert torch.allclose(few_rows_linear(x, (gate, up), gate="silu", kernels="triton"), want, atol=1e-5)


def test_empty_and_refused():
    x, weights = case(2, 64, (5,), torch.float32)
    assert few_rows_linear(x[:0], weights, kernels="triton").shape == (0, 5)
    with pytest.raises(ValueError, match="do not fit"):
        few_rows_linear(x[:, 1:], weights)
    with pytest.raises(ValueError, match="gate='tanh' is not one of silu"):
        few_rows_linear(x, weights * 2, gate="tanh")
    with pytest.raises(ValueError, match="two weights of one shape"):
        few_rows_linear(x, weights, gate="silu")
    narrow, scales = [weights[0].to(torch.int8)], torch.ones(5, device=DEVICE)
    for given, options in ((narrow, {}), (weights, {"scales": scales}), (narrow * 2, {"scales": scales})):
        with pytest.raises(ValueError, match="scales go with one weight of int8"):
            few_rows_linear(x, given, **options)
    with pytest.raises(ValueError, match=r"float32 \[5\] is needed"):
        few_rows_linear(x, narrow, scales=scales[1:])
    with pytest.raises(dispatch.KernelUnavailable, match="17 rows"):
        few_rows_linear(x[:1].expand(17, 64), weights, kernels="triton")
    with pytest.raises(dispatch.KernelUnavailable, match="strides"):
        few_rows_linear(x, [random(5, 128)[:, ::2]], kernels="triton")
    with pytest.raises(dispatch.KernelUnavailable, match="gaps"):
        few_rows_linear(x, weights, [random(10)[::2]], kernels="triton")
    with pytest.raises(dispatch.KernelUnavailable, match="gaps"):
        few_rows_linear(x, narrow, scales=random(10)[::2], kernels="triton")
    turned = random(5, 2).T
    assert torch.equal(
        few_rows_linear(x, weights, residual=turned, kernels="triton"),
        few_rows_linear(x, weights, residual=turned.contiguous(), kernels="triton"),
    )
    with pytest.raises(dispatch.KernelUnavailable, match="float64"):
        few_rows_linear(x.double(), [w.double() for w in weights], kernels="triton")
