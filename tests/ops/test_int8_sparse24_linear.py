import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.guard import guarded, linux_only
from support.kernels import all_kernels, native_kernels
from support.sparse24 import EMPTY, SHAPES, sparse_int8

from pycompress.ops import int8_linear, int8_sparse24_linear, int8_sparse24_linear_reference, native, quantize_affine, sparse24_compress
from pycompress.ops.sparse24_packing import pack_sparse24, unpack_sparse24

OP = "int8_sparse24_linear"
KERNELS = all_kernels(OP)


def ones(n):
    return torch.ones(n)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_equals_the_reference_to_the_bit(pattern, kernel):
    """Without a bias the epilogue is one rounding of an exact integer times an exact product, so every bit must agree."""
    for m, n, k in SHAPES:
        _, values, indices = sparse_int8(n, k, pattern)
        x, scale = torch.randn(m, k), torch.rand(n) + 0.1
        expected = int8_sparse24_linear_reference(x, values, indices, scale, pattern=pattern)
        assert expected.abs().max() > 0
        assert torch.equal(int8_sparse24_linear(x, values, indices, scale, pattern=pattern, kernel=kernel), expected), (m, n, k)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 70),
    k=st.integers(1, 300),
    pattern=st.sampled_from(["2:4", "1:4"]),
    seed=st.integers(0, 2**31),
)
def test_any_shape(kernel, m, n, k, pattern, seed):
    torch.manual_seed(seed)
    dense, values, indices = sparse_int8(n, k, pattern)
    x, scale = torch.randn(m, k), torch.rand(n) + 0.1
    y = int8_sparse24_linear(x, values, indices, scale, pattern=pattern, kernel=kernel)
    assert torch.equal(y, int8_linear(x, dense, scale, kernel=native.REFERENCE))
    torch.testing.assert_close(y, int8_linear(x, dense, scale))  # and the dense kernels agree


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("k", [4, 512, 4100, 131068])
@pytest.mark.parametrize("weight", [-128, 127])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("m", [3, 9])
def test_extremes_neither_saturate_nor_overflow(m, sign, weight, k, kernel):
    """Every product at its limit, all of one sign: pairs of 16-bit sums that would saturate, and long sums."""
    dense = torch.zeros(9, k, dtype=torch.int8)
    dense.view(9, -1, 4)[..., [0, 3]] = weight
    y = int8_sparse24_linear(torch.full((m, k), sign), *sparse24_compress(dense), ones(9), x_scale=1 / 127, kernel=kernel)
    exact = torch.tensor(float(weight * 127 * sign) * (k // 2), dtype=torch.float64)
    assert torch.equal(y, (exact.float() * torch.tensor(1 / 127)).expand(m, 9))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("weight", [-128, 127])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_extremes_of_1_4(sign, weight, kernel):
    for m, k in ((1, 4), (9, 64), (17, 4100), (3, 131068)):
        dense = torch.zeros(9, k, dtype=torch.int8)
        dense.view(9, -1, 4)[..., 2] = weight
        compressed = sparse24_compress(dense, pattern="1:4")
        y = int8_sparse24_linear(torch.full((m, k), sign), *compressed, ones(9), x_scale=1 / 127, pattern="1:4", kernel=kernel)
        exact = torch.tensor(float(weight * 127 * sign) * (k // 4), dtype=torch.float64)
        assert torch.equal(y, (exact.float() * torch.tensor(1 / 127)).expand(m, 9))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize("static", [True, False])
def test_integers_are_exact(static, pattern, kernel):
    """With scales that are powers of two the epilogue is exact, so the integers inside show in the output."""
    dense, values, indices = sparse_int8(33, 71, pattern)
    x = (torch.randn(19, 71) * 2).clamp(-127 * 2.0**-5, 127 * 2.0**-5)
    x[:, 3] = 127 * 2.0**-5  # the largest value of each row: the dynamic scale becomes 2**-5 exactly
    q = quantize_affine(x, torch.tensor(2.0**-5))
    expected = (q.long() @ dense.long().T).float() * 2.0**-7
    scale = torch.full((33,), 2.0**-2)
    x_scale = 2.0**-5 if static else None
    y = int8_sparse24_linear(x, values, indices, scale, x_scale=x_scale, pattern=pattern, kernel=kernel)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_empty_dimensions(kernel):
    for m, n, k in EMPTY:
        _, values, indices = sparse_int8(n, k)
        y = int8_sparse24_linear(torch.randn(m, k), values, indices, ones(n), torch.full((n,), 3.0), kernel=kernel)
        assert y.shape == (m, n)
        assert (y == 3).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu", "relu6", "hardswish"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_activation_and_dtypes(dtype, activation, kernel):
    for m, n, k in ((3, 21, 70), (37, 40, 70)):
        _, values, indices = sparse_int8(n, k)
        x, scale, bias = torch.randn(m, k).to(dtype), torch.rand(n) / 50 + 0.01, torch.randn(n)
        y = int8_sparse24_linear(x, values, indices, scale, bias, activation=activation, kernel=kernel)
        plain = int8_sparse24_linear_reference(x.float(), values, indices, scale, bias)
        expected = getattr(F, activation)(plain) if activation else plain
        assert y.dtype == dtype
        # Three float32 roundings relative to terms no larger than |y| + |bias|, the activation's, and the output's.
        bound = (plain.abs().max() + 8) * 4 * torch.finfo(torch.float32).eps + 2e-6
        bound += torch.finfo(dtype).eps * (expected.abs().max() if dtype != torch.float32 else 0)
        torch.testing.assert_close(y.float(), expected, rtol=0, atol=bound.item())


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_with_nan_or_inf_come_out_as_nan_and_no_other(kernel):
    _, values, indices = sparse_int8(20, 37)
    x = torch.randn(9, 37)
    clean = int8_sparse24_linear(x, values, indices, ones(20), kernel=kernel)
    x[1, 36], x[4, 0], x[7, 5] = math.nan, math.inf, -math.inf
    for x_scale in (None, 0.02):
        y = int8_sparse24_linear(x, values, indices, ones(20), x_scale=x_scale, kernel=kernel)
        assert y.isnan().all(dim=1).tolist() == [r in (1, 4, 7) for r in range(9)]
        assert y.isnan().any(dim=1).sum() == 3
    y = int8_sparse24_linear(x, values, indices, ones(20), kernel=kernel)
    assert torch.equal(y[[0, 2, 3, 5, 6, 8]], clean[[0, 2, 3, 5, 6, 8]])


@pytest.mark.parametrize("kernel", KERNELS)
def test_zero_and_tiny_rows_and_clamping(kernel):
    _, values, indices = sparse_int8(5, 19)
    x, bias = torch.randn(4, 19), torch.randn(5)
    x[1], x[2] = 0, 1e-40
    y = int8_sparse24_linear(x, values, indices, ones(5), bias, kernel=kernel)
    assert torch.equal(y[1], bias)
    assert torch.equal(y[2], bias)
    eye = torch.eye(6, dtype=torch.int8)
    halves = torch.tensor([[1e30, -1e30, 127.4, -128.6, 2.5, -1.5]])
    y = int8_sparse24_linear(halves, *sparse24_compress(eye), ones(6), x_scale=1.0, kernel=kernel)
    assert y.tolist() == [[127, -127, 127, -127, 2, -2]]


@pytest.mark.parametrize("kernel", KERNELS)
def test_leading_dimensions_and_strides(kernel):
    _, values, indices = sparse_int8(11, 36)
    x = torch.randn(4, 6, 40)
    expected = int8_sparse24_linear(x[1:4, ::2, 3:39].contiguous().view(9, 36), values, indices, ones(11), kernel=kernel)
    assert torch.equal(int8_sparse24_linear(x[1:4, ::2, 3:39], values, indices, ones(11), kernel=kernel), expected.view(3, 3, 11))
    column = torch.randn(36, 5)
    assert torch.equal(
        int8_sparse24_linear(column.T, values, indices, ones(11), kernel=kernel),
        int8_sparse24_linear(column.T.contiguous(), values, indices, ones(11), kernel=kernel),
    )
    assert int8_sparse24_linear(torch.randn(36), values, indices, ones(11), kernel=kernel).shape == (11,)
    assert int8_sparse24_linear(torch.randn(2, 0, 36), values, indices, ones(11), kernel=kernel).shape == (2, 0, 11)


@linux_only
@pytest.mark.parametrize("kernel", native_kernels(OP))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_stays_inside_its_buffers(pattern, dtype, kernel):
    for m, n, k in ((1, 1, 1), (7, 17, 63), (13, 65, 31), (33, 24, 130)):
        _, values, indices = sparse_int8(n, k, pattern)
        x, scale, bias = torch.randn(m, k).to(dtype), torch.rand(n) + 0.1, torch.randn(n)
        expected = int8_sparse24_linear(x, values, indices, scale, bias, pattern=pattern, kernel=kernel)
        parts = [guarded(t) for t in (x, values, indices, scale, bias)]
        assert torch.equal(int8_sparse24_linear(*parts, pattern=pattern, kernel=kernel), expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_packing_loses_nothing_and_stays_small(pattern, kernel):
    for n, k in ((1, 1), (17, 63), (65, 33), (128, 1024)):
        _, values, indices = sparse_int8(n, k, pattern)
        packed = pack_sparse24(values, indices, k, pattern, kernel)
        v, i = unpack_sparse24(packed, n, k, pattern, torch.int8, kernel)
        assert torch.equal(v, values)
        assert torch.equal(i, indices)
    assert packed.numel() <= {"2:4": 0.63, "1:4": 0.32}[pattern] * 128 * 1024


@pytest.mark.parametrize("kernel", KERNELS)
def test_threads_change_nothing(kernel):
    before = torch.get_num_threads()
    try:
        for m, n, k in ((1, 600, 1000), (40, 300, 500), (300, 100, 200)):
            _, values, indices = sparse_int8(n, k)
            x = torch.randn(m, k)
            torch.set_num_threads(1)
            expected = int8_sparse24_linear(x, values, indices, ones(n), kernel=kernel)
            torch.set_num_threads(2)
            assert torch.equal(int8_sparse24_linear(x, values, indices, ones(n), kernel=kernel), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_straight_through_gradient(activation, kernel):
    dense, values, indices = sparse_int8(20, 34)
    x, scale, bias = torch.randn(6, 34, requires_grad=True), torch.rand(20) / 50, torch.randn(20)
    grad = torch.randn(6, 20)
    int8_sparse24_linear(x, values, indices, scale, bias, activation=activation, kernel=kernel).backward(grad)
    before = int8_sparse24_linear(x.detach(), values, indices, scale, bias, kernel=kernel).requires_grad_()
    (getattr(F, activation)(before) if activation else before).backward(grad)
    torch.testing.assert_close(x.grad, before.grad @ (dense.float() * scale[:, None]), rtol=1e-5, atol=1e-5)


def test_other_patterns_run_the_reference():
    dense, values, indices = sparse_int8(6, 30, "2:8")
    x = torch.randn(3, 30)
    y = int8_sparse24_linear(x, values, indices, ones(6), pattern="2:8")
    assert torch.equal(y, int8_linear(x, dense, ones(6), kernel=native.REFERENCE))
    if KERNELS[0] != native.REFERENCE:
        with pytest.raises(ValueError, match=f"kernel '{KERNELS[0]}' needs one of the patterns 2:4, 1:4, got '2:8'"):
            int8_sparse24_linear(x, values, indices, ones(6), pattern="2:8", kernel=KERNELS[0])


GOOD = {"x": torch.zeros(2, 4), "values": torch.zeros(3, 2, dtype=torch.int8), "indices": torch.full((3, 1), 4, dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(2, 4, dtype=torch.int32)}, TypeError, "x must be a float32, bfloat16 or float16 tensor, got torch.int32"),
        ({"x": torch.zeros(2, 8)}, ValueError, r"values and indices of a 2:4 weight with K=8 must be \(3, 4\) and \(3, 1\)"),
        ({"values": torch.zeros(3, 2)}, TypeError, "weight must be an int8 tensor, got torch.float32"),
        (
            {"indices": torch.full((3, 1), 5, dtype=torch.uint8)},
            ValueError,
            r"indices must rise .* got \[1, 1\] in row 0, group 0",
        ),
        ({"scale": torch.ones(4)}, ValueError, r"scale must be \(3,\)"),
        ({"scale": torch.ones(3, dtype=torch.float64)}, TypeError, "scale must be float32, got torch.float64"),
        ({"bias": torch.ones(2)}, ValueError, r"bias must be \(3,\)"),
        ({"x_scale": float("nan")}, ValueError, "x_scale must be a finite number"),
        ({"activation": "tanh"}, ValueError, "activation must be None, 'relu', 'gelu', 'silu', 'relu6' or 'hardswish', got 'tanh'"),
        ({"pattern": "4:2"}, ValueError, "pattern must be 'N:M'"),
        ({"kernel": "warp9"}, ValueError, r"kernel must be one of .*reference on this machine, got 'warp9'"),
    ],
)
def test_bad_input(change, error, text):
    arguments = {**GOOD, "scale": torch.ones(3), **change}
    with pytest.raises(error, match="int8_sparse24_linear: .*" + text):
        int8_sparse24_linear(**arguments)


def test_torch_sees_one_op():
    _, values, indices = sparse_int8(8, 36)
    x, scale, bias = torch.randn(5, 36), ones(8), torch.randn(8)
    compiled = torch.compile(int8_sparse24_linear, fullgraph=True, backend="aot_eager")
    expected = int8_sparse24_linear(x, values, indices, scale, bias)
    assert torch.equal(compiled(x, values, indices, scale, bias), expected)
    for kernel in KERNELS:
        packed = pack_sparse24(values, indices, 36, "2:4", kernel)
        op = torch.ops.pycompress.int8_sparse24_linear.default
        torch.library.opcheck(op, (x, packed, scale, bias, 8, 36, "2:4", None, "none", kernel))
        torch.library.opcheck(torch.ops.pycompress.sparse24_pack.default, (values, indices, 36, "2:4", kernel))
        torch.library.opcheck(torch.ops.pycompress.sparse24_unpack.default, (packed, 8, 36, "2:4", torch.int8, kernel))
