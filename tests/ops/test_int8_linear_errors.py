"""What ``int8_linear`` and its extension refuse, and what they say."""

import math

import pytest
import torch

from pycompress.ops import int8_linear, native

BAD = {
    "x of wrong width": (
        {"x": torch.randn(64, 512), "weight": torch.zeros(256, 768, dtype=torch.int8), "scale": torch.ones(256)},
        ValueError,
        r"weight must be \(N, 512\) to match x \(64, 512\), got \(256, 768\)",
    ),
    "x without dimensions": ({"x": torch.tensor(1.0)}, ValueError, r"weight must be \(N, \?\) to match x \(\)"),
    "integer x": (
        {"x": torch.zeros(2, 8, dtype=torch.int32)},
        TypeError,
        "x must be a float32, bfloat16 or float16 tensor, got torch.int32",
    ),
    "double x": ({"x": torch.zeros(2, 8, dtype=torch.float64)}, TypeError, "got torch.float64"),
    "float weight": ({"weight": torch.zeros(4, 8)}, TypeError, "weight must be an int8 tensor, got torch.float32"),
    "weight of one dimension": ({"weight": torch.zeros(8, dtype=torch.int8)}, ValueError, "weight must have 2 dimensions"),
    "short scale": ({"scale": torch.ones(3)}, ValueError, r"scale must be \(4,\) to match weight \(4, 8\), got \(3,\)"),
    "half scale": ({"scale": torch.ones(4).half()}, TypeError, "scale must be float32, got torch.float16"),
    "long bias": ({"bias": torch.ones(5)}, ValueError, r"bias must be \(4,\)"),
    "integer bias": ({"bias": torch.ones(4, dtype=torch.int32)}, TypeError, "bias must be floating point, got torch.int32"),
    "zero static scale": ({"x_scale": 0.0}, ValueError, "x_scale must be a finite number"),
    "NaN static scale": ({"x_scale": math.nan}, ValueError, "x_scale must be a finite number .* got nan"),
    "infinite static scale": ({"x_scale": math.inf}, ValueError, "x_scale must be a finite number"),
    "zero point without scale": ({"x_zero_point": 3}, ValueError, "x_zero_point needs a static x_scale"),
    "zero point out of range": (
        {"x_scale": 1.0, "x_zero_point": 128},
        ValueError,
        "x_zero_point must be an integer from -128 to 127, got 128",
    ),
    "asymmetric static without zero point": ({"x_scale": 1.0, "asymmetric": True}, ValueError, "needs an x_zero_point"),
    "unknown activation": (
        {"activation": "tanh"},
        ValueError,
        "must be None, 'relu', .* 'relu6' or 'hardswish', got 'tanh'",
    ),
    "unknown kernel": ({"kernel": "sse9"}, ValueError, "kernel must be one of"),
    "deep zero point": (
        {"x": torch.zeros(1, 66312), "weight": torch.zeros(4, 66312, dtype=torch.int8), "x_scale": 1.0, "x_zero_point": 1},
        ValueError,
        "K must be at most 66311",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    change, error, text = BAD[case]
    good = {"x": torch.zeros(2, 8), "weight": torch.zeros(4, 8, dtype=torch.int8), "scale": torch.ones(4)}
    int8_linear(**good)
    with pytest.raises(error, match="int8_linear: .*" + text):
        int8_linear(**{**good, **change})


@pytest.mark.skipif(native.module is None, reason="no extension")
def test_the_extension_refuses_what_is_no_call():
    call, options = native.module.int8_linear, (4, 8, True, False, 0.0, 0, -127, 0)
    plan = native.module.int8_linear_plan("", *options)
    with pytest.raises(TypeError, match="int8_linear: expected a plan and 8 integers, got 1 arguments"):
        call(plan)
    with pytest.raises(TypeError):
        call(plan, 1, 2, 3, 4, 5, 6, 7, "8")
    for wrong in (object(), native.module.int4_linear_plan("", 4, 8, 32, False, False, 0)):
        with pytest.raises(ValueError, match="PyCapsule"):
            call(wrong, *range(8))
    with pytest.raises(ValueError, match="no kernel 'sse9'"):
        native.module.int8_linear_plan("sse9", *options)
