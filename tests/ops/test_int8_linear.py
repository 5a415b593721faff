"""Every kernel of ``int8_linear`` against the reference and against float."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.int8_linear import KERNELS, QUANTIZATION, SHAPES, make
from support.rounding import rounding_bound

from pycompress.ops import int8_linear, int8_linear_reference, quantize_affine, quantize_weight, symmetric_scale


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("quantization", QUANTIZATION)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_equals_the_reference(m, n, k, quantization, kernel):
    x, weight, scale, bias = make(m, n, k)
    expected = int8_linear_reference(x, weight, scale, bias, **quantization)
    torch.testing.assert_close(
        int8_linear(x, weight, scale, bias, kernel=kernel, **quantization), expected, rtol=0, atol=rounding_bound(expected)
    )


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("quantization", QUANTIZATION)
def test_integers_are_exact(kernel, quantization):
    """With scales that are powers of two the epilogue is exact, so the integers inside show in the output."""
    weight = torch.randint(-127, 128, (33, 70), dtype=torch.int8)
    x = torch.randn(9, 70) * 2
    zero_point = quantization.get("x_zero_point")
    if "x_scale" in quantization:
        quantization = {**quantization, "x_scale": 2.0**-5}
    elif "asymmetric" in quantization:
        zero_point = -28
        x.clamp_(-100 * 2.0**-5, 155 * 2.0**-5)  # 255 steps of 2**-5, zero at step 100
        x[:, 3], x[:, 5] = -100 * 2.0**-5, 155 * 2.0**-5
    else:
        x.clamp_(-127 * 2.0**-5, 127 * 2.0**-5)
        x[:, 3] = 127 * 2.0**-5  # largest value of each row: the dynamic scale becomes 2**-5 exactly
    q = quantize_affine(x, torch.tensor(2.0**-5), zero_point or 0, -127 if zero_point is None else -128) - (zero_point or 0)
    expected = (q.long() @ weight.long().T).float() * 2.0**-7
    assert torch.equal(int8_linear(x, weight, torch.full((33,), 2.0**-2), kernel=kernel, **quantization), expected)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(("m", "n", "k"), [(125, 150, 1100), (7, 64, 70), (26, 80, 513), (241, 17, 64)])
def test_integers_are_exact_across_blocks_and_panels(m, n, k, activation, kernel):
    """More rows than a block, more depth than an AVX2 panel widens at once, panels of every width; scales are powers of two."""
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    q = torch.randint(-127, 128, (m, k))
    q[:, -1] = 127  # the largest value of each row: its scale is 2**-5 exactly
    bias = torch.arange(n) * 2.0**-7
    expected = (q @ weight.long().T).float() * 2.0**-7 + bias
    y = int8_linear(q * 2.0**-5, weight, torch.full((n,), 2.0**-2), bias, activation=activation, kernel=kernel)
    assert torch.equal(y, expected.relu() if activation else expected)


ROWS = {
    "narrow": lambda m, k: torch.randn(m, k) * 12,
    "bell": lambda m, k: torch.randn(m, k) * 40,
    "heavy tails": lambda m, k: torch.randn(m, k) ** 5 * 2,
    "two values": lambda m, k: torch.randint(0, 2, (m, k)) * 254.0 - 127,
    "edges": lambda m, k: torch.tensor([0.0, 1, -1, 31, 32, -32, 63, 64, -64, 126, 127, -127])[torch.randint(12, (m, k))],
    "mixed": lambda m, k: torch.randn(m, k) * torch.tensor([12.0, 12, 12, 12, 40, 1e4])[torch.randint(6, (m, 1))],
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("zero_point", [None, 0, 100, -128])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 48, 260), (5, 35, 128), (23, 20, 129), (130, 17, 515)])
def test_integers_are_exact_for_rows_of_every_kind(m, n, k, rows, zero_point, kernel):
    """The AVX2 kernel stores rows as bytes whose products cannot saturate, with corrections, or as int16: by their values."""
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    weight[0], weight[1], weight[2] = 127, -127, -128  # the sums that saturate first
    low = -127 if zero_point is None else -128 - zero_point
    high = 127 if zero_point is None else 127 - zero_point
    q = ROWS[rows](m, k).round().clamp(low, high).long()
    quantization = {}
    if zero_point is None:
        q[:, -1] = 127  # the largest value of each row: its scale is 2**-5 exactly
    else:
        quantization = {"x_scale": 2.0**-5, "x_zero_point": zero_point}
    y = int8_linear(q * 2.0**-5, weight, torch.full((n,), 2.0**-2), kernel=kernel, **quantization)
    assert torch.equal(y, (q @ weight.long().T).float() * 2.0**-7)


@pytest.mark.parametrize("kernel", KERNELS)
def test_rounds_half_to_even(kernel):
    halves = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.0]])
    eye = torch.eye(8, dtype=torch.int8)
    expected = torch.tensor([[0.0, 2, 2, 0, -2, -2, 126, 127]])
    assert torch.equal(int8_linear(halves, eye, torch.ones(8), kernel=kernel), expected)
    assert torch.equal(int8_linear(halves, eye, torch.ones(8), x_scale=1.0, kernel=kernel), expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_static_quantization_clamps(kernel):
    x = torch.tensor([[1e30, -1e30, 1000.0, -1000.0, 127.4, -128.6]])
    eye = torch.eye(6, dtype=torch.int8)
    y = int8_linear(x, eye, torch.ones(6), x_scale=1.0, kernel=kernel)
    assert y.tolist() == [[127, -127, 127, -127, 127, -127]]
    y = int8_linear(x, eye, torch.ones(6), x_scale=1.0, x_zero_point=-3, kernel=kernel)
    assert y.tolist() == [[130, -125, 130, -125, 127, -125]]


@pytest.mark.parametrize("kernel", KERNELS)
def test_zero_and_tiny_rows(kernel):
    x, weight, scale, bias = make(4, 5, 19)
    x[1], x[2] = 0, 1e-40
    y = int8_linear(x, weight, scale, bias, kernel=kernel)
    assert torch.equal(y[1], bias)
    assert torch.equal(y[2], bias)
    x[3] = 3e38
    assert int8_linear(x, weight, scale * 1e-6, bias, kernel=kernel)[3].isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "relu6", "hardswish"])
def test_activations(activation, kernel):
    x, weight, scale, bias = make(40, 70, 33)
    plain = int8_linear(x, weight, scale, bias, kernel=kernel)
    expected = getattr(F, activation)(plain)
    y = int8_linear(x, weight, scale, bias, activation=activation, kernel=kernel)
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_activations_far_out(activation, kernel):
    values = torch.tensor([[-1e30, -100.0, -20.0, -5.0, -1e-3, 0.0, 1e-3, 5.0, 20.0, 100.0, 1e30]])
    n = values.shape[1]
    y = int8_linear(torch.zeros(1, 4), torch.zeros(n, 4, dtype=torch.int8), torch.ones(n), values[0], activation=activation, kernel=kernel)
    torch.testing.assert_close(y, getattr(F, activation)(values), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 30), n=st.integers(1, 100), k=st.integers(1, 200), magnitude=st.integers(-30, 30), seed=st.integers(0, 2**31))
def test_error_against_float(kernel, m, n, k, magnitude, seed):
    """|y - float| <= sum over k of |x| * step_w / 2 + |w| * step_x / 2 + both steps / 4, at any magnitude."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator) * 2.0**magnitude
    w = torch.randn(n, k, generator=generator)
    weight, scale = quantize_weight(w)
    step = symmetric_scale(x.abs().amax(1))
    bound = (x.abs().sum(1)[:, None] * scale + step[:, None] * w.abs().sum(1) + k * step[:, None] * scale / 2) / 2
    error = (int8_linear(x, weight, scale, kernel=kernel) - x @ w.T).abs()
    assert (error <= bound * (1 + 1e-4)).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_depth_gives_the_bias(kernel):
    y = int8_linear(torch.zeros(3, 0), torch.zeros(4, 0, dtype=torch.int8), torch.ones(4), torch.arange(4.0), kernel=kernel)
    assert torch.equal(y, torch.arange(4.0).expand(3, 4))
