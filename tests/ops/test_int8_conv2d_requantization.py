"""What comes after the sum of ``int8_conv2d``: int8 results and residuals; and int8 inputs."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.int8_conv2d import DEPTHWISE, GROUPED, KERNELS, LAYOUTS, PLAIN, WINOGRAD, make, name

from pycompress.ops import int8_conv2d, quantize_affine


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", [PLAIN[3], PLAIN[7], PLAIN[14], WINOGRAD[1], GROUPED[2], GROUPED[6], DEPTHWISE[1], DEPTHWISE[2]], ids=name)
def test_int8_in_and_out(case, kernel):
    """Int8 results are quantize(result), int8 inputs are the result of dequantize(input): bit for bit."""
    x, weight, scale, options = make(case)
    bias = torch.randint(-50, 50, (len(scale),)) * 0.5
    for x_zero_point, out_zero_point in ((None, None), (-7, 20), (127, -128)):
        quantization = {"x_scale": 2.0**-5, "x_zero_point": x_zero_point}
        q = quantize_affine(x, torch.tensor(2.0**-5), x_zero_point or 0, -127 if x_zero_point is None else -128).to(torch.int8)
        q[0, 0, 0, 0] = -128
        x = (q.float() - (x_zero_point or 0)) * 2.0**-5
        if x_zero_point is None:
            x[0, 0, 0, 0] = -127 * 2.0**-5  # a symmetric scale has no -128; as an int8 input it is taken as it is
            q[0, 0, 0, 0] = -127
        expected = int8_conv2d(x, weight, scale, bias, kernel="reference", **quantization, **options)
        y = int8_conv2d(q, weight, scale, bias, kernel=kernel, **quantization, **options)
        assert y.dtype == torch.float32 and torch.equal(y, expected)
        assert int8_conv2d(q, weight, scale, out_dtype=torch.float16, kernel=kernel, **quantization, **options).dtype == torch.float16
        step = 2.0 ** math.ceil(math.log2(expected.abs().max().item() / 100))
        integers = quantize_affine(expected, torch.tensor(step), out_zero_point or 0, -127 if out_zero_point is None else -128)
        for value in (q, q.to(memory_format=torch.channels_last), x, x.to(memory_format=torch.channels_last)):
            out = int8_conv2d(
                value, weight, scale, bias, out_scale=step, out_zero_point=out_zero_point, kernel=kernel, **quantization, **options
            )
            assert out.dtype == torch.int8 and out.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(out.int(), integers)


@pytest.mark.parametrize("kernel", KERNELS)
def test_int8_minus_128_is_taken_as_it_is(kernel):
    q = torch.full((1, 8, 5, 5), -128, dtype=torch.int8)
    for groups in (1, 8):
        weight = torch.full((8, 8 // groups, 3, 3), -128, dtype=torch.int8)
        y = int8_conv2d(q, weight, torch.ones(8), groups=groups, x_scale=1.0, kernel=kernel)
        assert torch.equal(y, torch.full((1, 8, 3, 3), 128.0 * 128 * 9 * 8 / groups))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", [PLAIN[5], PLAIN[7], PLAIN[15], WINOGRAD[1], GROUPED[5], DEPTHWISE[1]], ids=name)
def test_residual(case, layout, kernel):
    x, weight, scale, options = make(case)
    x, scale = x.to(memory_format=layout), scale * 2.0**-6
    plain = int8_conv2d(x, weight, scale, kernel=kernel, **options)
    r = torch.randint(-128, 128, plain.shape, dtype=torch.int8)
    for residual, extra in (
        (r.float() * 0.25, {}),
        (r.to(torch.bfloat16) * 0.25, {}),
        (r, {"residual_scale": 0.25}),
        (r, {"residual_scale": 0.5, "residual_zero_point": 28}),
    ):
        values = residual.float() if not extra else (r.float() - extra.get("residual_zero_point", 0)) * extra["residual_scale"]
        for activation in (None, "relu", "silu"):
            expected = plain + values if activation is None else getattr(F, activation)(plain + values)
            y = int8_conv2d(x, weight, scale, residual=residual, activation=activation, kernel=kernel, **extra, **options)
            torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6 if activation == "silu" else 0)
        for activation, out_scale in (("relu", 4.0), ("relu6", 0.25)):
            requantize = {"activation": activation, "out_scale": out_scale}
            q = int8_conv2d(x, weight, scale, residual=residual, kernel=kernel, **requantize, **extra, **options)
            assert torch.equal(q.int(), quantize_affine(getattr(F, activation)(plain + values), torch.tensor(out_scale)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
def test_nan_becomes_the_zero_point(kernel, activation):
    x, weight, scale, options = make(PLAIN[7])
    bias = torch.zeros(len(scale))
    bias[3] = math.nan
    requantize = {"activation": activation, "out_scale": 0.25, "out_zero_point": -9}
    q = int8_conv2d(x, weight, scale, bias, kernel=kernel, **requantize, **options)
    plain = int8_conv2d(x, weight, scale, kernel=kernel, **requantize, **options)
    assert (q[:, 3] == -9).all() and torch.equal(q[:, 4:], plain[:, 4:]) and torch.equal(q[:, :3], plain[:, :3])
