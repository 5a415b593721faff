"""Rows with NaN or Inf in ``int8_linear``."""

import math

import pytest
import torch
from support.int8_linear import KERNELS, make

from pycompress.ops import int8_linear


@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_with_nan_or_inf_come_out_as_nan_and_no_other(kernel):
    x, weight, scale, bias = make(9, 20, 37)
    clean = int8_linear(x, weight, scale, bias, kernel=kernel)
    x[1, 36], x[4, 0], x[7, 5] = math.nan, math.inf, -math.inf
    for quantization in ({}, {"x_scale": 0.02}):
        y = int8_linear(x, weight, scale, bias, kernel=kernel, **quantization)
        assert y.isnan().all(dim=1).tolist() == [r in (1, 4, 7) for r in range(9)]
        assert y.isnan().any(dim=1).sum() == 3
    y = int8_linear(x, weight, scale, bias, kernel=kernel)
    assert torch.equal(y[0], clean[0])
    relu = int8_linear(x, weight, scale, bias, activation="relu", kernel=kernel)
    assert relu[1].isnan().all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_half_rows_with_nan_or_inf(activation, dtype, kernel):
    x, weight, scale, bias = make(31, 83, 50, dtype)
    clean = int8_linear(x, weight, scale, bias, activation=activation, kernel=kernel)
    x[1, 49], x[30, 0] = math.nan, math.inf
    y = int8_linear(x, weight, scale, bias, activation=activation, kernel=kernel)
    assert y[[1, 30]].isnan().all()
    assert torch.equal(y[2:30], clean[2:30])
