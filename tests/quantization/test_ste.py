"""Values and gradients of fake quantization."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pycompress.ops.affine import fake_quantize_affine
from pycompress.quantization.ste import fake_quantize_lsq, fake_quantize_ste

ZERO = torch.tensor(0, dtype=torch.int32)


@pytest.mark.parametrize("function", [fake_quantize_ste, fake_quantize_lsq])
@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20),
    scale=st.floats(2.0**-10, 100.0, width=32),
    zero_point=st.integers(-128, 127),
)
def test_value_is_ops_affine_to_the_bit(function, values, scale, zero_point):
    x, scale, zero_point = torch.tensor(values), torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32)
    assert torch.equal(function(x, scale, zero_point, -128, 127), fake_quantize_affine(x, scale, zero_point, -128, 127))


def test_straight_through_gradient_is_clipped():
    x = torch.tensor([-1.3, -1.0, 0.26, 0.74, 0.76, 5.0], requires_grad=True)
    y = fake_quantize_ste(x, torch.tensor(0.25), ZERO, -3, 3)
    y.backward(torch.arange(1.0, 7.0))
    # round(x / 0.25) = -5, -4, 1, 3, 3, 20: inside only from -3 to 3
    assert x.grad.tolist() == [0.0, 0.0, 3.0, 4.0, 5.0, 0.0]


def test_no_gradient_reaches_the_scale_of_ste():
    scale = torch.tensor(0.5, requires_grad=True)
    x = torch.ones(3, requires_grad=True)
    fake_quantize_ste(x, scale, ZERO, -7, 7).sum().backward()
    assert scale.grad is None


@pytest.mark.parametrize("zero_point", [0, 2])
def test_lsq_gradient_formula(zero_point):
    """Esser et al. 2020, equation 3, element by element."""
    x = torch.tensor([-9.0, -0.4, 0.6, 1.2, 9.0])
    scale = torch.tensor(0.5, requires_grad=True)
    incoming = torch.tensor([1.0, -2.0, 3.0, 0.5, 2.0])
    fake_quantize_lsq(x, scale, torch.tensor(zero_point, dtype=torch.int32), -4, 3).backward(incoming)
    expected = 0.0
    for value, g in zip(x.tolist(), incoming.tolist(), strict=True):
        q = round(value / 0.5) + zero_point
        if q < -4:
            slope = -4 - zero_point
        elif q > 3:
            slope = 3 - zero_point
        else:
            slope = (q - zero_point) - value / 0.5
        expected += g * slope
    assert float(scale.grad) == pytest.approx(expected / (5 * 3) ** 0.5, rel=1e-5)


def test_lsq_gradient_per_row():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    together = torch.full((4, 1), 0.1).requires_grad_()
    fake_quantize_lsq(x, together, ZERO, -7, 7).square().sum().backward()
    for row in range(4):
        alone = torch.tensor(0.1, requires_grad=True)
        fake_quantize_lsq(x[row], alone, ZERO, -7, 7).square().sum().backward()
        torch.testing.assert_close(together.grad[row, 0], alone.grad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_not_hidden(bad):
    y = fake_quantize_ste(torch.tensor([bad, 1.0]), torch.tensor(0.5), ZERO, -127, 127)
    assert torch.isnan(y[0]) and y[1] == 1


def test_zero_scale_gives_zero():
    x = torch.zeros(3, requires_grad=True)
    y = fake_quantize_ste(x, torch.tensor(0.0), ZERO, -127, 127)
    assert y.abs().max() == 0


def test_half_precision_in_and_out():
    x = torch.tensor([0.3, -0.7], dtype=torch.bfloat16, requires_grad=True)
    y = fake_quantize_ste(x, torch.tensor(0.1), ZERO, -127, 127)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16
