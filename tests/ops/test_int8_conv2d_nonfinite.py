"""Images with NaN or Inf in ``int8_conv2d``."""

import math

import pytest
import torch
from support.int8_conv2d import DEPTHWISE, GROUPED, KERNELS, LAYOUTS, PLAIN, WINOGRAD, make, name

from pycompress.ops import int8_conv2d


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", [PLAIN[3], PLAIN[5], PLAIN[7], WINOGRAD[2], GROUPED[1], DEPTHWISE[0], DEPTHWISE[10]], ids=name)
def test_images_with_nan_or_inf_come_out_as_nan_and_no_other(case, kernel, layout):
    case = (4, *case[1:])
    x, weight, scale, options = make(case)
    clean = int8_conv2d(x.to(memory_format=layout), weight, scale, kernel=kernel, **options)
    x[0, -1, -1, -1], x[2, 0, 1, 1], x[3, 1, 0, 1] = math.nan, math.inf, -math.inf
    for quantization in ({}, {"x_scale": 0.02}, {"x_scale": 0.02, "x_zero_point": 3}):
        for dtype in (torch.float32, torch.bfloat16):
            y = int8_conv2d(
                x.to(dtype).to(memory_format=layout), weight, scale, activation="relu", kernel=kernel, **quantization, **options
            )
            assert y.isnan().flatten(1).all(1).tolist() == [True, False, True, True]
            assert not y[1].isnan().any()
    y = int8_conv2d(x.to(memory_format=layout), weight, scale, kernel=kernel, **options)
    assert torch.equal(y[1], clean[1])
    q = int8_conv2d(x, weight, scale, x_scale=0.02, out_scale=1.0, out_zero_point=-9, kernel=kernel, **options)
    assert (q[0] == -9).all() and (q[2:] == -9).all() and not (q[1] == -9).all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("at", [(1, 1), (0, 1), (1, 0), (10, 10)])
def test_nan_that_no_tap_meets_counts(at, groups, kernel, layout):
    case = (2, 8, 11, 11, 8, (3, 3), (2, 2), (0, 0), (2, 2), groups)
    x, weight, scale, options = make(case)
    x[1, 3, at[0], at[1]] = math.nan
    for quantization in ({}, {"x_scale": 0.02}):
        y = int8_conv2d(x.to(memory_format=layout), weight, scale, kernel=kernel, **quantization, **options)
        assert y.isnan().flatten(1).all(1).tolist() == [False, True]
        assert not y[0].isnan().any()
