import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.guard import guarded, linux_only
from support.kernels import all_kernels, native_kernels
from support.sparse24 import EMPTY, SHAPES, sparse_float

from pycompress.ops import native, sparse24_linear
from pycompress.ops.sparse24_packing import pack_sparse24, unpack_sparse24

OP = "sparse24_linear"
KERNELS = all_kernels(OP)
EPS = torch.finfo(torch.float32).eps


def assert_close(y, x, dense, bias=None, dtype=torch.float32):
    """k + 1 float32 additions in any order err by at most (k + 2) * eps times the sum of absolute terms; then the output rounds."""
    terms = x.double().abs() @ dense.double().abs().T
    exact = x.double() @ dense.double().T
    if bias is not None:
        terms, exact = terms + bias.double().abs(), exact + bias.double()
    bound = (x.shape[-1] + 2) * EPS * terms + 1e-30
    if dtype != torch.float32:
        bound = bound + torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_equals_the_dense_product(with_bias, kernel):
    for m, n, k in SHAPES:
        dense, values, indices = sparse_float(n, k)
        x, bias = torch.randn(m, k), torch.randn(n) if with_bias else None
        assert_close(sparse24_linear(x, values, indices, bias, kernel=kernel), x, dense, bias)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_integers_come_out_exact(pattern, kernel):
    """Small integers: every sum is exact in float32, in any order, so a wrong index shows as a wrong bit."""
    for m, n, k in SHAPES:
        dense, values, indices = sparse_float(n, k, pattern)
        dense, values = (dense * 8).round(), (values * 8).round()
        x = torch.randint(-9, 10, (m, k)).float()
        y = sparse24_linear(x, values, indices, pattern=pattern, kernel=kernel)
        assert torch.equal(y, (x.double() @ dense.double().T).float()), (m, n, k)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 140),
    n=st.integers(1, 70),
    k=st.integers(1, 300),
    pattern=st.sampled_from(["2:4", "1:4"]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(kernel, m, n, k, pattern, seed):
    torch.manual_seed(seed)
    dense, values, indices = sparse_float(n, k, pattern)
    x = torch.randn(m, k)
    assert_close(sparse24_linear(x, values, indices, pattern=pattern, kernel=kernel), x, dense)


@pytest.mark.parametrize("kernel", KERNELS)
def test_empty_dimensions(kernel):
    for m, n, k in EMPTY:
        _, values, indices = sparse_float(n, k)
        y = sparse24_linear(torch.randn(m, k), values, indices, torch.full((n,), 3.0), kernel=kernel)
        assert y.shape == (m, n)
        assert (y == 3).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_half_precision(pattern, dtype, kernel):
    for m, n, k in ((3, 21, 70), (37, 40, 70), (64, 130, 36), (70, 9, 5)):
        dense, values, indices = sparse_float(n, k, pattern)
        x, bias = torch.randn(m, k).to(dtype), torch.randn(n)
        assert_close(sparse24_linear(x, values, indices, bias, pattern=pattern, kernel=kernel), x, dense, bias, dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "relu6", "hardswish"])
def test_activations(activation, kernel):
    for m, n, k in ((3, 21, 70), (37, 40, 70), (70, 9, 33)):
        _, values, indices = sparse_float(n, k)
        x, bias = torch.randn(m, k), torch.randn(n)
        plain = sparse24_linear(x, values, indices, bias, kernel=kernel)
        y = sparse24_linear(x, values, indices, bias, activation=activation, kernel=kernel)
        torch.testing.assert_close(y, getattr(F, activation)(plain), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_reaches_its_row_only(kernel):
    """Rows of x share tiles and transposed blocks; none may leak into another."""
    for m in (3, 40, 70, 130):
        dense, values, indices = sparse_float(12, 37)
        x = torch.randn(m, 37)
        x[1, 5], x[2, 36] = float("nan"), float("inf")
        y = sparse24_linear(x, values, indices, kernel=kernel)
        assert y[1][dense[:, 5] != 0].isnan().all()
        assert not y[2][dense[:, 36] != 0].isfinite().any()
        others = [r for r in range(m) if r not in (1, 2)]
        assert y[others].isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_leading_dimensions_and_strides(kernel):
    dense, values, indices = sparse_float(11, 36)
    x = torch.randn(4, 40, 40)[1:4, ::2, 2:38]
    y = sparse24_linear(x, values, indices, kernel=kernel)
    assert y.shape == (3, 20, 11)
    assert_close(y.view(60, 11), x.reshape(60, 36), dense)
    column = torch.randn(36, 45)
    assert_close(sparse24_linear(column.T, values, indices, kernel=kernel), column.T, dense)
    assert sparse24_linear(torch.randn(36), values, indices, kernel=kernel).shape == (11,)
    assert sparse24_linear(torch.randn(2, 0, 36), values, indices, kernel=kernel).shape == (2, 0, 11)


@linux_only
@pytest.mark.parametrize("kernel", native_kernels(OP))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_stays_inside_its_buffers(pattern, dtype, kernel):
    for m, n, k in ((1, 1, 1), (7, 17, 63), (33, 65, 31), (65, 24, 130), (111, 9, 70)):
        _, values, indices = sparse_float(n, k, pattern)
        x, bias = torch.randn(m, k).to(dtype), torch.randn(n)
        expected = sparse24_linear(x, values, indices, bias, pattern=pattern, kernel=kernel)
        parts = [guarded(t) for t in (x, values, indices, bias)]
        assert torch.equal(sparse24_linear(*parts, pattern=pattern, kernel=kernel), expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_packing_loses_nothing_and_stays_small(pattern, kernel):
    for n, k in ((1, 1), (17, 63), (65, 33), (128, 1024)):
        _, values, indices = sparse_float(n, k, pattern)
        packed = pack_sparse24(values, indices, k, pattern, kernel)
        v, i = unpack_sparse24(packed, n, k, pattern, torch.float32, kernel)
        assert torch.equal(v, values)
        assert torch.equal(i, indices)
    assert packed.numel() <= {"2:4": 0.57, "1:4": 0.29}[pattern] * 128 * 1024 * 4


@pytest.mark.parametrize("kernel", KERNELS)
def test_threads_change_nothing(kernel):
    before = torch.get_num_threads()
    try:
        for m, n, k in ((1, 600, 400), (40, 300, 200), (70, 200, 200), (300, 100, 100)):
            _, values, indices = sparse_float(n, k)
            x = torch.randn(m, k)
            torch.set_num_threads(1)
            expected = sparse24_linear(x, values, indices, kernel=kernel)
            torch.set_num_threads(2)
            y = sparse24_linear(x, values, indices, kernel=kernel)
            tolerance = 1e-5 if kernel == native.REFERENCE else 0  # torch may split the reference's product differently
            torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("activation", "pattern"), [(None, "2:4"), ("relu", "1:4"), ("gelu", "2:4"), (None, "1:4")])
def test_gradient(activation, pattern, kernel):
    dense, values, indices = sparse_float(20, 34, pattern)
    x, bias, grad = torch.randn(40, 34, requires_grad=True), torch.randn(20), torch.randn(40, 20)
    sparse24_linear(x, values, indices, bias, pattern=pattern, activation=activation, kernel=kernel).backward(grad)
    twin = x.detach().clone().requires_grad_()
    y = F.linear(twin, dense, bias)
    (getattr(F, activation)(y) if activation else y).backward(grad)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-4)


def test_other_patterns_run_the_reference():
    dense, values, indices = sparse_float(6, 30, "2:8")
    x = torch.randn(3, 30)
    assert_close(sparse24_linear(x, values, indices, pattern="2:8"), x, dense)


GOOD = {"x": torch.zeros(2, 4), "values": torch.zeros(3, 2), "indices": torch.full((3, 1), 4, dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(2, 4, dtype=torch.float64)}, TypeError, "x must be a float32, bfloat16 or float16 tensor, got torch.float64"),
        ({"x": torch.zeros(2, 8)}, ValueError, r"with K=8 must be \(3, 4\) and \(3, 1\), got \(3, 2\)"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must be \(..., K\), got shape \(\)"),
        ({"values": torch.zeros(3, 2, dtype=torch.int8)}, TypeError, "values must be float32, got torch.int8"),
        (
            {"indices": torch.full((3, 1), 1, dtype=torch.uint8)},
            ValueError,
            r"indices must rise .* got \[1, 0\] in row 0, group 0",
        ),
        ({"bias": torch.ones(2)}, ValueError, r"bias must be \(3,\) to match values \(3, 2\), got \(2,\)"),
        ({"bias": torch.ones(3, dtype=torch.int32)}, TypeError, "bias must be floating point, got torch.int32"),
        ({"activation": "tanh"}, ValueError, "activation must be None, 'relu', 'gelu', 'silu', 'relu6' or 'hardswish', got 'tanh'"),
        ({"kernel": "warp9"}, ValueError, r"kernel must be one of .*reference on this machine, got 'warp9'"),
    ],
)
def test_bad_input(change, error, text):
    with pytest.raises(error, match="sparse24_linear: .*" + text):
        sparse24_linear(**{**GOOD, **change})


def test_torch_sees_one_op():
    _, values, indices = sparse_float(8, 36)
    x, bias = torch.randn(5, 36), torch.randn(8)
    compiled = torch.compile(sparse24_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, values, indices, bias), sparse24_linear(x, values, indices, bias))
    for kernel in KERNELS:
        packed = pack_sparse24(values, indices, 36, "2:4", kernel)
        torch.library.opcheck(torch.ops.pycompress.sparse24_linear.default, (x, packed, bias, 8, 36, "2:4", "none", kernel))
    _, values, indices = sparse_float(8, 36, "1:4")
    compiled = torch.compile(sparse24_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, values, indices, pattern="1:4"), sparse24_linear(x, values, indices, pattern="1:4"))
