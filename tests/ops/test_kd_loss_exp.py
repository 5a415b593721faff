"""The exponential that all sweeps share: error against float64 over its whole range."""

import pytest
import torch
from support.kernels import native_kernels

from pycompress.ops import native


def exp2(x: torch.Tensor, kernel: str) -> torch.Tensor:
    y = torch.empty_like(x)
    native.module.kd_loss_exp2(kernel, x.data_ptr(), x.numel(), y.data_ptr())
    return y


@pytest.mark.parametrize("kernel", native_kernels("kd_loss"))
def test_error_is_below_three_ulp(kernel):
    # every float in [0, 1) rounded to 2^-21, in both signs, and a grid over the range
    fine = torch.arange(2**21, dtype=torch.float32) / 2**21
    for x in (fine, -fine, torch.linspace(-125.9, 63.9, 2**21), -torch.logspace(-30, 0, 2**16)):
        want = torch.exp2(x.double())
        got = exp2(x, kernel).double()
        ulp = 2.0 ** (torch.floor(torch.log2(want)) - 23)
        assert float(((got - want).abs() / ulp).max()) < 3.0


@pytest.mark.parametrize("kernel", native_kernels("kd_loss"))
def test_special_values(kernel):
    x = torch.tensor([0.0, 1.0, -1.0, 63.0, -126.0, -200.0, -1e30, -float("inf"), float("nan")])
    got = exp2(x, kernel)
    assert got[:5].tolist() == [1.0, 2.0, 0.5, 2.0**63, 2.0**-126]
    assert not got[5:8].any() and got[8].isnan()
