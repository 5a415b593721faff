"""int4 weights: the format, and every kernel by name against the reference."""

from __future__ import annotations

import functools
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pycompress.ops import dequantize_int4, int4_linear, int4_linear_reference, native, quantize_weight_int4
from pycompress.ops.affine import quantize_affine
from pycompress.ops.int4 import pack_nibbles, per_element, unpack_nibbles
from pycompress.ops.int4_linear import int4_linear_packed, pack_int4, unpack_int4
from tests.support.guard import guarded, linux_only
from tests.support.kernels import all_kernels, native_kernels

KERNELS = all_kernels("int4_matmul")
NATIVE = native_kernels("int4_matmul")
SHAPES = [(1, 1, 1), (1, 64, 128), (7, 17, 63), (13, 65, 31), (2, 129, 300), (40, 72, 512), (61, 130, 257), (3, 8, 32), (6, 16, 33)]
MODES = [{}, {"int8_activations": True}]
SIMPLE = {"group_size": 32}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def make(m, n, k, group_size=32, symmetric=True, dtype=torch.float32):
    tensors = quantize_weight_int4(torch.randn(n, k), group_size, symmetric)
    return torch.randn(m, k).to(dtype), *tensors, torch.randn(n)


def bound(x, weight, scale, zero_point, bias, group_size, dtype=torch.float32):
    """K + 4 roundings of at most eps / 2, relative to the sum of absolute products (of u and of zero_point, which are taken apart)."""
    k = x.shape[-1]
    u = unpack_nibbles(weight, k).float() + (8 if zero_point is None else per_element(zero_point.float(), k, group_size))
    size = F.linear(x.float().abs(), u * per_element(scale, k, group_size).abs()) + bias.abs() + 1e-30
    out = size.amax() * torch.finfo(dtype).eps if dtype != torch.float32 else 0
    return (k + 4) * torch.finfo(torch.float32).eps * size + out


def assert_within(actual, expected, limit):
    assert ((actual.float() - expected.float()).abs() <= limit).all(), (actual.float() - expected.float()).abs().max()


def test_there_are_native_kernels():
    assert KERNELS[-1] == "reference"
    assert (len(KERNELS) > 1) == (native.module is not None)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_equals_the_reference(m, n, k, group_size, symmetric, mode, kernel):
    x, *tensors, bias = make(m, n, k, group_size, symmetric)
    expected = int4_linear_reference(x, *tensors, bias, group_size=group_size, **mode)
    actual = int4_linear(x, *tensors, bias, group_size=group_size, kernel=kernel, **mode)
    assert_within(actual, expected, bound(x, *tensors, bias, group_size))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_native_kernels_agree_to_the_bit(m, n, k, symmetric, mode):
    x, *tensors, bias = make(m, n, k, 64, symmetric)
    results = [int4_linear(x, *tensors, bias, group_size=64, kernel=kernel, **mode) for kernel in NATIVE]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("rows", [6, 7, 65])
def test_native_kernels_agree_to_the_bit_over_many_groups(rows, group_size, symmetric, activation):
    """One register tile, several, several blocks; the last group is short, the last panel narrow."""
    x, *tensors, _ = make(rows, 75, 417, group_size, symmetric)
    options = {"group_size": group_size, "activation": activation, "int8_activations": True}
    results = [int4_linear(x, *tensors, kernel=kernel, **options) for kernel in NATIVE]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_integers_are_exact(group_size, symmetric, kernel):
    """With scales that are powers of two nothing is rounded, so the integers inside show in the output."""
    n, k = 75, 300
    u, zero = torch.randint(0, 16, (n, k)), torch.randint(0, 16, (n, -(-k // group_size)), dtype=torch.uint8)
    x = torch.randint(-127, 128, (17, k)).float() * 2.0**-5
    x[:, 3] = 127 * 2.0**-5  # largest value of each row: the dynamic scale becomes 2**-5 exactly
    scale = 2.0 ** torch.randint(-3, 2, zero.shape)
    zeros = None if symmetric else zero
    w = (u.double() - (8 if symmetric else per_element(zero.double(), k, group_size))) * per_element(scale.double(), k, group_size)
    expected = (x.double() @ w.T).float()
    for mode in MODES:
        assert torch.equal(int4_linear(x, pack_nibbles(u), scale, zeros, group_size=group_size, kernel=kernel, **mode), expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize(
    ("x_value", "u", "zero"), [(127, 15, 0), (-127, 15, 0), (127, 0, 15), (-127, 0, 15), (127, 15, 15), (127, 15, None)]
)
def test_extremes_do_not_saturate(x_value, u, zero, group_size, kernel):
    m, n, k = 7, 70, 4096 + 32
    x, weight = torch.full((m, k), float(x_value)), pack_nibbles(torch.full((n, k), u))
    groups = (n, -(-k // group_size))
    zeros = None if zero is None else torch.full(groups, zero, dtype=torch.uint8)
    for mode in MODES:
        y = int4_linear(x, weight, torch.ones(groups), zeros, group_size=group_size, kernel=kernel, **mode)
        assert (y == x_value * (u - (8 if zero is None else zero)) * k).all()


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 100),
    k=st.integers(1, 300),
    group_size=st.sampled_from([32, 64, 128]),
    symmetric=st.booleans(),
    magnitude=st.integers(-40, 40),
    seed=st.integers(0, 2**31),
)
def test_error_against_float(kernel, m, n, k, group_size, symmetric, magnitude, seed):
    """The weights are off by half a step each, the activations too if they are int8; at any magnitude."""
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(m, k, generator=generator) * 2.0**magnitude, torch.randn(n, k, generator=generator)
    weight, scale, zero_point = quantize_weight_int4(w, group_size, symmetric)
    step = per_element(scale, k, group_size)
    # Half a step for rounding; asymmetric ranges may shift by half a step more when the zero point is rounded.
    weight_error = F.linear(x.abs(), step * (0.5 if symmetric else 1.0))
    y = int4_linear(x, weight, scale, zero_point, group_size=group_size, kernel=kernel)
    assert ((y - x @ w.T).abs() <= weight_error * (1 + 1e-3)).all()
    row_error = x.abs().amax(1, keepdim=True) / 127 / 2 * dequantize_int4(weight, scale, zero_point, k, group_size).abs().sum(1)
    y = int4_linear(x, weight, scale, zero_point, group_size=group_size, int8_activations=True, kernel=kernel)
    assert ((y - x @ w.T).abs() <= (weight_error + row_error) * (1 + 1e-3)).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("k", [0, 1, 7, 32, 33, 130])
@pytest.mark.parametrize("group_size", [32, 128])
def test_format(group_size, k, symmetric):
    w = torch.randn(5, k) + (0 if symmetric else 0.7)
    weight, scale, zero_point = quantize_weight_int4(w, group_size, symmetric)
    groups = -(-k // group_size)
    assert weight.shape == (5, -(-k // 2)) and weight.dtype == torch.uint8
    assert scale.shape == (5, groups) and (zero_point is None) == symmetric
    dense = dequantize_int4(weight, scale, zero_point, k, group_size)
    step = per_element(scale, k, group_size)
    assert ((dense - w).abs() <= step * (0.5 if symmetric else 1.0) * (1 + 1e-5)).all()
    assert torch.equal(pack_nibbles(unpack_nibbles(weight, k)), weight)
    for g in range(groups):
        part = slice(g * group_size, (g + 1) * group_size)
        if symmetric:
            assert torch.equal(scale[:, g], w[:, part].abs().amax(1) / 7)
            again = quantize_affine(w[:, part], scale[:, g, None], 0, -7, 7)
            assert torch.equal(unpack_nibbles(weight, k)[:, part].int() - 8, again)
    for kernel in KERNELS:
        packed = pack_int4(weight, scale, zero_point, k, group_size, kernel)
        for tensor, back in zip((weight, scale, zero_point), unpack_int4(packed, 5, k, group_size, not symmetric, kernel), strict=True):
            assert (tensor is None and back is None) or torch.equal(tensor, back)


def test_even_elements_lie_in_low_nibbles():
    assert pack_nibbles(torch.tensor([[1, 2, 3]])).tolist() == [[0x21, 0x03]]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", MODES)
def test_rows_with_nan_or_inf_come_out_as_nan_and_no_other(mode, kernel):
    x, *tensors, bias = make(9, 20, 37)
    clean = int4_linear(x, *tensors, bias, kernel=kernel, **SIMPLE, **mode)
    x[1, 36], x[4, 0], x[7, 5] = math.nan, math.inf, -math.inf
    for activation in (None, "relu", "gelu"):
        y = int4_linear(x, *tensors, bias, activation=activation, kernel=kernel, **SIMPLE, **mode)
        assert y.isnan().all(dim=1).tolist() == [r in (1, 4, 7) for r in range(9)]
        assert y.isnan().any(dim=1).sum() == 3
    assert torch.equal(int4_linear(x, *tensors, bias, kernel=kernel, **SIMPLE, **mode)[0], clean[0])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", MODES)
def test_zeros_and_extreme_magnitudes(mode, kernel):
    x, weight, scale, zero_point, bias = make(4, 5, 40)
    x[1] = 0
    y = int4_linear(x, weight, scale, zero_point, bias, kernel=kernel, **SIMPLE, **mode)
    assert torch.equal(y[1], bias)
    assert torch.equal(int4_linear(x, weight, scale * 0, zero_point, bias, kernel=kernel, **SIMPLE, **mode), bias.expand(4, 5))
    for power in (-90, 90):
        scaled = int4_linear(x * 2.0**power, weight, scale, kernel=kernel, **SIMPLE, **mode)
        assert torch.equal(scaled, int4_linear(x, weight, scale, kernel=kernel, **SIMPLE, **mode) * 2.0**power)


def test_a_zero_weight_stays_zero():
    for symmetric in (True, False):
        weight, scale, zero_point = quantize_weight_int4(torch.zeros(3, 50), 32, symmetric)
        assert (dequantize_int4(weight, scale, zero_point, 50, 32) == 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "relu6", "hardswish"])
def test_activations(activation, kernel):
    x, *tensors, bias = make(20, 70, 33)
    expected = getattr(F, activation)(int4_linear(x, *tensors, bias, kernel=kernel, **SIMPLE))
    y = int4_linear(x, *tensors, bias, activation=activation, kernel=kernel, **SIMPLE)
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, mode, kernel):
    x, *tensors, bias = make(11, 75, 130, dtype=dtype)
    y = int4_linear(x, *tensors, bias, kernel=kernel, **SIMPLE, **mode)
    expected = int4_linear_reference(x.float(), *tensors, bias, **SIMPLE, **mode)
    assert y.dtype == dtype
    assert_within(y, expected, bound(x, *tensors, bias, 32, dtype))


@linux_only
@pytest.mark.parametrize("kernel", NATIVE)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (7, 17, 63), (13, 65, 31), (2, 129, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_stays_inside_its_buffers(m, n, k, dtype, mode, kernel):
    x, *tensors, bias = make(m, n, k, 32, False, dtype)
    expected = int4_linear(x, *tensors, bias, kernel=kernel, **SIMPLE, **mode)
    assert torch.equal(int4_linear(guarded(x), *[guarded(t) for t in tensors], guarded(bias), kernel=kernel, **SIMPLE, **mode), expected)
    packed = pack_int4(*tensors, k, 32, kernel)
    assert torch.equal(int4_linear_packed(guarded(x), guarded(packed), guarded(bias), n, k, 32, True, bool(mode), "none", kernel), expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", MODES)
def test_shapes_and_strides(mode, kernel):
    x, *tensors, bias = make(24, 10, 30)

    def call(x):
        return int4_linear(x, *tensors, bias, kernel=kernel, **SIMPLE, **mode)

    y = call(x)
    # torch's float products differ in their last bits between one row and many.
    same = torch.equal if kernel != "reference" else functools.partial(torch.allclose, atol=1e-5)
    assert same(call(x.view(2, 3, 4, 30)), y.view(2, 3, 4, 10))
    assert same(call(x[0]), y[0])
    assert same(call(x[::3]), y[::3])
    assert same(call(x.T.contiguous().T), y)
    assert call(x[:0]).shape == (0, 10)
    assert call(x.new_zeros(2, 0, 30)).shape == (2, 0, 10)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", MODES)
def test_no_depth_gives_the_bias(mode, kernel):
    tensors = quantize_weight_int4(torch.zeros(4, 0), 32)
    assert torch.equal(
        int4_linear(torch.zeros(3, 0), *tensors, torch.arange(4.0), kernel=kernel, **SIMPLE, **mode), torch.arange(4.0).expand(3, 4)
    )
    assert int4_linear(torch.zeros(3, 8), *quantize_weight_int4(torch.zeros(0, 8), 32), kernel=kernel, **SIMPLE, **mode).shape == (3, 0)


@pytest.mark.parametrize("kernel", NATIVE)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 3000, 300), (5, 700, 300), (40, 256, 300), (500, 40, 64), (70, 500, 1024)])
def test_threads_and_neighbours_do_not_change_a_bit(m, n, k, mode, kernel):
    x, *tensors, bias = make(m, n, k)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(int4_linear(x, *tensors, bias, kernel=kernel, **SIMPLE, **mode))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)
    assert torch.equal(int4_linear(x[-1:], *tensors, bias, kernel=kernel, **SIMPLE, **mode), results[0][-1:])


def test_many_python_threads_get_the_same_bits():
    x, *tensors, bias = make(33, 300, 200)
    expected = int4_linear(x, *tensors, bias, **SIMPLE)
    wrong = []

    def call():
        for _ in range(10):
            if not torch.equal(int4_linear(x, *tensors, bias, **SIMPLE), expected):
                wrong.append(1)

    workers = [threading.Thread(target=call) for _ in range(8)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert not wrong


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_is_straight_through(mode, activation, kernel):
    x, *tensors, bias = make(6, 9, 45, symmetric=False)
    upstream = torch.randn(6, 9)
    x.requires_grad_()
    int4_linear(x, *tensors, bias, activation=activation, kernel=kernel, **SIMPLE, **mode).backward(upstream)
    before = int4_linear(x.detach(), *tensors, bias, kernel=kernel, **SIMPLE, **mode).requires_grad_()
    if activation:
        getattr(F, activation)(before).backward(upstream)
        upstream = before.grad
    torch.testing.assert_close(x.grad, upstream @ dequantize_int4(*tensors, 45, 32))


def good():
    weight, scale, zero_point = quantize_weight_int4(torch.randn(4, 80), 32, symmetric=False)
    return {"x": torch.zeros(2, 80), "weight": weight, "scale": scale, "zero_point": zero_point, "group_size": 32}


BAD = {
    "group of 48": ({"group_size": 48}, ValueError, "group_size must be 32, 64 or 128, got 48"),
    "group of 0": ({"group_size": 0}, ValueError, "group_size must be 32, 64 or 128, got 0"),
    "other group": ({"group_size": 64}, ValueError, r"scale must be \(4, 2\) for K = 80 and group_size 64, got \(4, 3\)"),
    "x of wrong width": ({"x": torch.zeros(2, 82)}, ValueError, r"weight must be \(N, 41\) bytes for K = 82, got \(4, 40\)"),
    "x without dimensions": ({"x": torch.tensor(1.0)}, ValueError, r"x must be \(..., K\), got shape \(\)"),
    "double x": ({"x": torch.zeros(2, 80).double()}, TypeError, "x must be a float32, bfloat16 or float16 tensor, got torch.float64"),
    "int8 weight": (
        {"weight": torch.zeros(4, 40, dtype=torch.int8)},
        TypeError,
        "weight must be a uint8 tensor of nibbles, got torch.int8",
    ),
    "half scale": ({"scale": torch.ones(4, 3).half()}, TypeError, "scale must be torch.float32, got torch.float16"),
    "NaN scale": ({"scale": torch.full((4, 3), math.nan)}, ValueError, "scale must be finite"),
    "infinite scale": ({"scale": torch.full((4, 3), math.inf)}, ValueError, "scale must be finite"),
    "large zero point": ({"zero_point": torch.full((4, 3), 16, dtype=torch.uint8)}, ValueError, "zero_point must be from 0 to 15, got 16"),
    "float zero point": ({"zero_point": torch.ones(4, 3)}, TypeError, "zero_point must be torch.uint8, got torch.float32"),
    "long bias": ({"bias": torch.ones(5)}, ValueError, r"bias must be \(4,\)"),
    "integer bias": ({"bias": torch.ones(4, dtype=torch.int32)}, TypeError, "bias must be floating point, got torch.int32"),
    "unknown activation": (
        {"activation": "tanh"},
        ValueError,
        "must be None, 'relu', .* 'relu6' or 'hardswish', got 'tanh'",
    ),
    "unknown kernel": ({"kernel": "sse9"}, ValueError, "kernel must be one of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, text = BAD[case]
    int4_linear(**good())
    with pytest.raises(error, match="int4_linear: .*" + text):
        int4_linear(**{**good(), **change})


@pytest.mark.parametrize(
    ("weight", "error", "text"),
    [
        (torch.tensor([[math.nan]]), ValueError, "weight must be finite"),
        (torch.tensor([[math.inf]]), ValueError, "weight must be finite"),
        (torch.zeros(3), ValueError, r"weight must have 2 dimensions, got shape \(3,\)"),
        (torch.zeros(3, 2, dtype=torch.int32), TypeError, "weight must be floating point, got torch.int32"),
    ],
)
def test_bad_weights_are_not_quantized(weight, error, text):
    with pytest.raises(error, match="quantize_weight_int4: " + text):
        quantize_weight_int4(weight)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_torch_sees_one_op(symmetric, mode):
    x, *tensors, bias = make(5, 12, 45, 32, symmetric)
    expected = int4_linear(x, *tensors, bias, **SIMPLE, **mode)
    compiled = torch.compile(lambda x: int4_linear(x, *tensors, bias, **SIMPLE, **mode), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), expected)
    for kernel in {KERNELS[0], "reference"}:
        packed = pack_int4(*tensors, 45, 32, kernel)
        arguments = (packed, bias, 12, 45, 32, not symmetric, bool(mode), "none", kernel)
        torch.library.opcheck(torch.ops.pycompress.int4_linear.default, (x, *arguments))
        torch.library.opcheck(torch.ops.pycompress.int4_linear.default, (torch.randn(45, 5).T, *arguments))
        torch.library.opcheck(torch.ops.pycompress.int4_pack.default, (*tensors, 45, 32, kernel))
        torch.library.opcheck(torch.ops.pycompress.int4_dequantize.default, (packed, 12, 45, 32, not symmetric, kernel))


def test_compiled_training_step_has_the_same_gradient():
    x, *tensors, bias = make(5, 12, 45)
    step = torch.compile(lambda x: int4_linear(x, *tensors, bias, **SIMPLE), fullgraph=True, backend="aot_eager")
    eager, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    int4_linear(eager, *tensors, bias, **SIMPLE).sum().backward()
    step(compiled).sum().backward()
    torch.testing.assert_close(compiled.grad, eager.grad)
