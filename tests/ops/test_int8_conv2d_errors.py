"""What ``int8_conv2d`` refuses, and what it says."""

import math

import pytest
import torch

from pycompress.ops import int8_conv2d


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(1, 3, 8, 8, dtype=torch.int32)}, TypeError, "x must be a float32, .* or int8 tensor, got torch.int32"),
        ({"x": [1.0]}, TypeError, "x must be a .* tensor, got list"),
        ({"x": torch.zeros(3, 8, 8)}, ValueError, r"x must be \(N, 3, H, W\) to match the weight with groups=1, got \(3, 8, 8\)"),
        ({"x": torch.zeros(1, 4, 8, 8)}, ValueError, r"x must be \(N, 3, H, W\) .*, got \(1, 4, 8, 8\)"),
        ({"x": torch.zeros(1, 3, 2, 8)}, ValueError, r"x \(1, 3, 2, 8\) must have .* padded by \(0, 0\), hold the window \(3, 3\)"),
        ({"x": torch.zeros(1, 3, 0, 8), "padding": 2}, ValueError, r"x \(1, 3, 0, 8\) must have pixels"),
        ({"x": torch.zeros(1, 3, 8, 8, dtype=torch.int8)}, ValueError, "an int8 x needs its x_scale"),
        ({"weight": torch.zeros(4, 3, 3, 3)}, TypeError, "weight must be an int8 tensor, got torch.float32"),
        ({"weight": torch.zeros(4, 3, 3, dtype=torch.int8)}, ValueError, "weight must have 4 dimensions"),
        ({"weight": torch.zeros(4, 3, 0, 3, dtype=torch.int8)}, ValueError, "weight must have channels and taps"),
        ({"scale": torch.ones(3)}, ValueError, r"scale must be \(4,\)"),
        ({"stride": 0}, ValueError, "stride must be an integer or a pair of integers of at least 1, got 0"),
        ({"stride": (1, 2, 3)}, ValueError, r"stride must be .*, got \(1, 2, 3\)"),
        ({"padding": -1}, ValueError, "padding must be .* at least 0, got -1"),
        ({"padding": "same"}, ValueError, "padding must be .*, got 'same'"),
        ({"dilation": 1.5}, ValueError, "dilation must be .*, got 1.5"),
        ({"groups": 3}, ValueError, "groups must be a positive divisor of the 4 output channels, got 3"),
        ({"groups": 0}, ValueError, "groups must be a positive divisor"),
        ({"activation": "tanh"}, ValueError, "activation must be None, 'relu', 'gelu', 'silu', 'relu6' or 'hardswish', got 'tanh'"),
        ({"x_scale": math.nan}, ValueError, "x_scale must be a finite number"),
        ({"x_zero_point": 3}, ValueError, "x_zero_point needs a static x_scale"),
        ({"x_scale": 1.0, "x_zero_point": 128}, ValueError, "x_zero_point must be an integer from -128 to 127, got 128"),
        ({"out_scale": 0.0}, ValueError, r"out_scale must be a finite number between 2\*\*-100 and 2\*\*100, got 0.0"),
        ({"out_zero_point": 3}, ValueError, "out_zero_point needs out_scale"),
        ({"out_scale": 1.0, "out_zero_point": 300}, ValueError, "out_zero_point must be an integer from -128 to 127, got 300"),
        ({"out_scale": 1.0, "out_dtype": torch.float16}, ValueError, "out_dtype and out_scale exclude each other"),
        ({"out_dtype": torch.int8}, TypeError, "out_dtype must be float32, bfloat16 or float16, got torch.int8"),
        ({"residual": torch.zeros(1, 4, 8, 8)}, ValueError, r"residual must be \(1, 4, 6, 6\) on cpu like the result, got \(1, 4, 8, 8\)"),
        ({"residual": torch.zeros(1, 4, 6, 6).double()}, TypeError, "residual must be a float32, .*, got torch.float64"),
        ({"residual": torch.zeros(1, 4, 6, 6, dtype=torch.int8)}, ValueError, "residual_scale must be given for an int8 residual and only"),
        ({"residual": torch.zeros(1, 4, 6, 6), "residual_scale": 1.0}, ValueError, "residual_scale must be given for an int8"),
        ({"residual_scale": 1.0}, ValueError, "residual_scale needs a residual"),
        ({"kernel": "mmx"}, ValueError, "kernel must be one of .*reference.*, got 'mmx'"),
    ],
)  # fmt: skip
def test_bad_arguments(change, error, text):
    good = {"x": torch.zeros(1, 3, 8, 8), "weight": torch.zeros(4, 3, 3, 3, dtype=torch.int8), "scale": torch.ones(4)}
    int8_conv2d(**good)
    with pytest.raises(error, match=f"int8_conv2d: {text}"):
        int8_conv2d(**{**good, **change})


def test_a_sum_that_could_leave_int32_raises():
    weight = torch.zeros(1, 14564, 3, 3, dtype=torch.int8)
    with pytest.raises(ValueError, match="K must be at most 131071 for an exact int32 sum, got 131076"):
        int8_conv2d(torch.zeros(1, 14564, 3, 3), weight, torch.ones(1))
    with pytest.raises(ValueError, match="K must be at most 66311"):
        int8_conv2d(torch.zeros(1, 8000, 3, 3), weight[:, :8000], torch.ones(1), x_scale=1.0, x_zero_point=1)
