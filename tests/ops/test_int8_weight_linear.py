"""int8_weight_linear: every kernel against float64, on exact integers, on guarded memory; errors, gradient, compile."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.guard import guarded, linux_only
from support.kernels import all_kernels, native_kernels

from pycompress.nn import Int8WeightOnlyLinear
from pycompress.ops import int8_weight_linear, int8_weight_linear_reference, native, quantize_weight

OP = "int8_weight_linear"
KERNELS = all_kernels(OP)
EPS = torch.finfo(torch.float32).eps
# Around tiles of 4 rows and 4 columns and vectors of 8 and 16; empty in each dimension.
SHAPES = [(1, 1, 1), (1, 4, 16), (2, 3, 5), (3, 5, 7), (4, 4, 8), (5, 9, 15), (7, 6, 17), (8, 13, 31), (1, 70, 129), (17, 33, 257)]
EMPTY = [(0, 3, 4), (3, 0, 4), (3, 4, 0)]


def problem(m, n, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    weight = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    return x, weight, torch.rand(n, generator=generator) * 0.02 + 1e-3, torch.randn(n, generator=generator)


def assert_close(y, x, weight, scale, bias=None):
    """k float32 products and sums in any order, one product with the scale, one sum with the bias; then the output rounds."""
    dense = weight.double() * scale.double()[:, None]
    exact, terms = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    if bias is not None:
        exact, terms = exact + bias.double(), terms + bias.double().abs()
    bound = (x.shape[1] + 4) * EPS * terms
    if y.dtype != torch.float32:
        bound = bound + torch.finfo(y.dtype).eps * (exact.abs() + terms) + torch.finfo(y.dtype).tiny
    assert y.dtype == x.dtype and ((y.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES + EMPTY)
def test_equals_the_dense_product(shape, with_bias, kernel):
    x, weight, scale, bias = problem(*shape)
    bias = bias if with_bias else None
    y = int8_weight_linear(x, weight, scale, bias, kernel=kernel)
    assert y.shape == (shape[0], shape[1])
    assert_close(y, x, weight, scale, bias)


@pytest.mark.parametrize("kernel", native_kernels(OP))
@pytest.mark.parametrize("shape", SHAPES)
def test_integers_come_out_exact(shape, kernel):
    """Every sum is exact in float32 in any order, so a wrong index shows as a wrong bit."""
    _, weight, _, _ = problem(*shape)
    x = torch.randint(-9, 10, (shape[0], shape[2]), generator=torch.Generator().manual_seed(1)).float()
    y = int8_weight_linear(x, weight, torch.full((shape[1],), 0.5), kernel=kernel)
    assert torch.equal(y, (x.double() @ weight.double().T * 0.5).float())


@pytest.mark.parametrize("kernel", native_kernels(OP))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, kernel):
    x, weight, scale, bias = problem(5, 9, 130)
    x = x.to(dtype)
    y = int8_weight_linear(x, weight, scale, bias, kernel=kernel)
    exact = F.linear(x.double(), weight.double() * scale.double()[:, None], bias.double())
    assert y.dtype == dtype and (y.double() - exact).abs().max() <= 1.01 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("kernel", native_kernels(OP))
@settings(max_examples=30, deadline=None)
@given(m=st.integers(0, 20), n=st.integers(0, 40), k=st.integers(0, 200), seed=st.integers(0, 2**20))
def test_any_shape(kernel, m, n, k, seed):
    x, weight, scale, bias = problem(m, n, k, seed)
    assert_close(int8_weight_linear(x, weight, scale, bias, kernel=kernel), x, weight, scale, bias)


@pytest.mark.parametrize("kernel", native_kernels(OP))
def test_a_row_does_not_depend_on_its_neighbours_or_on_threads(kernel):
    x, weight, scale, bias = problem(11, 130, 1030)
    whole = int8_weight_linear(x, weight, scale, bias, kernel=kernel)
    for i in range(11):
        assert torch.equal(int8_weight_linear(x[i : i + 1], weight, scale, bias, kernel=kernel), whole[i : i + 1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(int8_weight_linear(x, weight, scale, bias, kernel=kernel), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kernel", KERNELS)
def test_strides_and_batch_dimensions(kernel):
    x, weight, scale, bias = problem(12, 10, 33)
    expected = int8_weight_linear(x, weight, scale, bias, kernel=kernel)
    wide = torch.zeros(12, 40)
    wide[:, 3:36] = x
    for same in (wide[:, 3:36], x.t().contiguous().t(), x.view(3, 2, 2, 33)):
        y = int8_weight_linear(same, weight, scale, bias, kernel=kernel)
        assert y.shape == (*same.shape[:-1], 10) and y.is_contiguous()
        torch.testing.assert_close(y.reshape(12, 10), expected)
    assert int8_weight_linear(x[0], weight, scale, bias, kernel=kernel).shape == (10,)
    torch.testing.assert_close(int8_weight_linear(x, weight.t().contiguous().t(), scale, bias, kernel=kernel), expected)


@linux_only
@pytest.mark.parametrize("kernel", native_kernels(OP))
@pytest.mark.parametrize("shape", SHAPES)
def test_reads_nothing_behind_its_tensors(shape, kernel):
    x, weight, scale, bias = problem(*shape)
    expected = int8_weight_linear(x, weight, scale, bias, kernel=kernel)
    assert torch.equal(int8_weight_linear(*(guarded(t) for t in (x, weight, scale, bias)), kernel=kernel), expected)


@pytest.mark.parametrize("kernel", native_kernels(OP))
def test_not_a_number_and_infinity_stay_in_their_row(kernel):
    x, weight, scale, _ = problem(4, 6, 40)
    weight[weight == 0] = 1
    x[1, 3], x[2, 39] = float("nan"), float("inf")
    y = int8_weight_linear(x, weight, scale, kernel=kernel)
    assert y[1].isnan().all() and y[2].isinf().all() and y[[0, 3]].isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_of_the_input(kernel):
    x, weight, scale, bias = problem(3, 6, 20)
    x.requires_grad_()
    grad = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    (got,) = torch.autograd.grad(int8_weight_linear(x, weight, scale, bias, kernel=kernel), x, grad)
    torch.testing.assert_close(got, grad @ (weight.float() * scale[:, None]))


@pytest.mark.parametrize("kernel", KERNELS)
def test_compile(kernel):
    torch._dynamo.reset()
    x, weight, scale, bias = problem(3, 6, 20)
    compiled = torch.compile(lambda t: int8_weight_linear(t, weight, scale, bias, kernel=kernel), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), int8_weight_linear(x, weight, scale, bias, kernel=kernel))
    layer = Int8WeightOnlyLinear.from_float(torch.nn.Linear(20, 6)).eval()
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


@pytest.mark.parametrize("kernel", native_kernels(OP))
def test_opcheck(kernel):
    x, weight, scale, bias = problem(3, 6, 20)
    torch.library.opcheck(torch.ops.pycompress.int8_weight_linear.default, (x, weight, scale, bias, kernel))


def test_float64_runs_the_reference():
    x, weight, scale, bias = problem(3, 6, 20)
    assert torch.equal(int8_weight_linear(x.double(), weight, scale, bias), int8_weight_linear_reference(x.double(), weight, scale, bias))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(6, 20)}, TypeError, "int8_weight_linear: weight must be an int8 tensor, got torch.float32"),
        ({"weight": torch.zeros(6, dtype=torch.int8)}, ValueError, "weight must have 2 dimensions"),
        ({"scale": torch.ones(5)}, ValueError, r"scale must be \(6,\) to match weight \(6, 20\), got \(5,\)"),
        ({"bias": torch.ones(7)}, ValueError, r"bias must be \(6,\)"),
        ({"x": torch.ones(3, 21)}, ValueError, r"weight must be \(N, 21\) to match x \(3, 21\), got \(6, 20\)"),
        ({"x": torch.ones(3, 21).double()}, ValueError, r"x must be \(..., 20\) on cpu, got \(3, 21\)"),
        ({"x": torch.ones(3, 20).int()}, TypeError, "x must be a floating-point tensor, got torch.int32"),
        ({"x": torch.ones(3, 20, device="meta")}, ValueError, "x must be on cpu like weight, got meta"),
        ({"kernel": "sse9"}, ValueError, "kernel must be one of"),
    ],
)
def test_errors(change, error, message):
    x, weight, scale, bias = problem(3, 6, 20)
    arguments = {"x": x, "weight": weight, "scale": scale, "bias": bias} | change
    with pytest.raises(error, match=message):
        int8_weight_linear(**arguments)


def test_the_layer_names_its_kernel():
    layer = Int8WeightOnlyLinear.from_float(torch.nn.Linear(20, 6))
    assert layer.kernel == native.kernels(OP)[0] and layer.fallback_reason == native.fallback_reason(OP)
    assert layer.to("meta").kernel == "reference"
    with pytest.raises(ValueError, match=r"Int8WeightOnlyLinear: x must be \(..., 20\) on cpu, got \(3, 21\) on cpu"):
        Int8WeightOnlyLinear(20, 6)(torch.ones(3, 21))


def test_quantize_weight_is_its_format():
    linear = torch.nn.Linear(40, 12)
    q, scale = quantize_weight(linear.weight)
    x = torch.randn(2, 40, generator=torch.Generator().manual_seed(3))
    y = int8_weight_linear(x, q, scale, linear.bias.detach())
    assert (y - linear(x)).norm() < 0.02 * linear(x).norm()
