"""Every kernel of ``int8_conv2d`` against the reference and against float."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.int8_conv2d import CASES, DEPTHWISE, GROUPED, KERNELS, LAYOUTS, NATIVE, PLAIN, PLANES, QUANTIZATION, WINOGRAD, make, name
from support.rounding import rounding_bound

from pycompress.ops import int8_conv2d, int8_conv2d_reference, quantize_affine, quantize_weight


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_integers_are_exact(case, kernel, layout):
    x, weight, scale, options = make(case)
    for quantization in QUANTIZATION:
        zero_point = quantization.get("x_zero_point")
        q = quantize_affine(x, torch.tensor(2.0**-5), zero_point or 0, -127 if zero_point is None else -128) - (zero_point or 0)
        total = F.conv2d(q.double(), weight.double(), None, *options.values())
        expected = (total * 2.0**-5 * scale[:, None, None].double()).float()
        y = int8_conv2d(x.to(memory_format=layout), weight, scale, kernel=kernel, **quantization, **options)
        assert torch.equal(y, expected), quantization
        assert y.stride() == F.conv2d(x.to(memory_format=layout), weight.float(), None, *options.values()).stride()


@pytest.mark.parametrize("kernel", NATIVE)
@pytest.mark.parametrize(
    ("weight_value", "x_value", "zero_point"), [(-128, 127, -128), (127, 127, -128), (-128, -128, 127), (127, -127, None)]
)
def test_extremes_do_not_saturate(weight_value, x_value, zero_point, kernel):
    for c, o, size in ((60, 20, 3), (129, 3, 1), (700, 2, 3)):
        weight = torch.full((o, c, size, size), weight_value, dtype=torch.int8)
        x = (torch.full((1, c, 6, 9), float(x_value)) - (zero_point or 0)) * 2.0**-4
        options = {"padding": size // 2, "x_scale": 2.0**-4, "x_zero_point": zero_point}
        expected = int8_conv2d_reference(x, weight, torch.ones(o), **{**options, "padding": (size // 2, size // 2)})
        assert torch.equal(int8_conv2d(x, weight, torch.ones(o), kernel=kernel, **options), expected)


@pytest.mark.parametrize("kernel", NATIVE)
def test_static_quantization_clamps_and_rounds_half_to_even(kernel):
    values = torch.tensor([1e30, -1e30, 1000.0, -1000.0, 127.4, -128.6, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -127.5, 3e38, -3e38, 0.0])
    for c in (1, 4, 17):
        x = values.repeat(c).view(1, c, 1, -1)
        weight = torch.eye(c, dtype=torch.int8).view(c, c, 1, 1)
        for zero_point in (None, -3, 127):
            expected = int8_conv2d_reference(x, weight, torch.ones(c), x_scale=1.0, x_zero_point=zero_point)
            for layout in LAYOUTS:
                y = int8_conv2d(x.to(memory_format=layout), weight, torch.ones(c), x_scale=1.0, x_zero_point=zero_point, kernel=kernel)
                assert torch.equal(y, expected)
            depthwise = int8_conv2d(
                x, torch.ones(c, 1, 1, 1, dtype=torch.int8), torch.ones(c), groups=c, x_scale=1.0, x_zero_point=zero_point, kernel=kernel
            )
            assert torch.equal(depthwise, expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_zero_and_tiny_images(kernel):
    x, weight, scale, options = make((3, 8, 6, 6, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1))
    bias = torch.randn(5)
    x[0], x[1], x[2] = 0, 1e-40, 3e38
    y = int8_conv2d(x, weight, scale * 1e-6, bias, kernel=kernel, **options)
    assert torch.equal(y[:2], bias[:, None, None].expand(2, 5, 6, 6))
    assert y[2].isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "relu6", "hardswish"])
@pytest.mark.parametrize("case", [PLAIN[3], PLAIN[5], WINOGRAD[1], GROUPED[5], DEPTHWISE[1], PLANES[2]], ids=name)
def test_bias_and_activation(case, activation, kernel):
    x, weight, scale, options = make(case)
    scale, bias = scale * 1e-3, torch.randn(len(scale))
    for layout in LAYOUTS:
        x = x.to(memory_format=layout)
        plain = int8_conv2d(x, weight, scale, kernel=kernel, **options) + bias[:, None, None]
        y = int8_conv2d(x, weight, scale, bias, activation=activation, kernel=kernel, **options)
        torch.testing.assert_close(y, getattr(F, activation)(plain), rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [PLAIN[3], PLAIN[5], PLAIN[7], WINOGRAD[1], GROUPED[0], DEPTHWISE[1], DEPTHWISE[10]], ids=name)
def test_half_precision(case, dtype, kernel):
    x, weight, scale, options = make(case, dtype)
    scale, bias = scale * 2.0**-6, torch.randn(len(scale))
    for quantization in QUANTIZATION[:3]:
        for layout in LAYOUTS:
            y = int8_conv2d(x.to(memory_format=layout), weight, scale, bias, kernel=kernel, **quantization, **options)
            expected = int8_conv2d_reference(x.float(), weight, scale, bias, **quantization, **options)
            assert y.dtype == dtype
            torch.testing.assert_close(y.float(), expected, rtol=0, atol=rounding_bound(expected, dtype))


@pytest.mark.parametrize("kernel", NATIVE)
@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 3),
    groups=st.integers(1, 5),
    channels=st.integers(1, 20),
    outputs=st.integers(1, 20),
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    window=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    quantization=st.sampled_from(QUANTIZATION),
    layout=st.sampled_from(LAYOUTS),
    depthwise=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_convolution(
    kernel, n, groups, channels, outputs, size, window, stride, padding, dilation, quantization, layout, depthwise, seed
):
    generator = torch.Generator().manual_seed(seed)
    if depthwise:
        groups, channels, outputs = groups * channels, 1, 1
    x = torch.randn(n, channels * groups, *size, generator=generator).clamp_(-127 * 2.0**-5, 127 * 2.0**-5)
    x[:, 0, 0, 0] = 127 * 2.0**-5
    x = x.to(memory_format=layout)
    weight = torch.randint(-128, 128, (outputs * groups, channels, *window), dtype=torch.int8, generator=generator)
    scale = 2.0 ** torch.randint(-4, 3, (outputs * groups,), generator=generator).float()
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if any(s + 2 * p < d * (k - 1) + 1 for s, p, d, k in zip(size, padding, dilation, window, strict=True)):
        with pytest.raises(ValueError, match="hold the window"):
            int8_conv2d(x, weight, scale, kernel=kernel, **quantization, **options)
        return
    expected = int8_conv2d_reference(x, weight, scale, **quantization, **options)
    assert torch.equal(int8_conv2d(x, weight, scale, kernel=kernel, **quantization, **options), expected)


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=15, deadline=None)
@given(c=st.integers(1, 40), o=st.integers(1, 20), size=st.integers(3, 12), magnitude=st.integers(-30, 30), seed=st.integers(0, 2**31))
def test_error_against_float(kernel, c, o, size, magnitude, seed):
    """|y - float| <= sum over the window of |x| * step_w / 2 + |w| * step_x / 2 + both steps / 4, at any magnitude."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, c, size, size, generator=generator) * 2.0**magnitude
    w = torch.randn(o, c, 3, 3, generator=generator)
    weight, scale = quantize_weight(w)
    step = x.abs().amax((1, 2, 3)) / 127
    from_weights = F.conv2d(x.abs(), torch.ones(1, c, 3, 3)) * scale[:, None, None]
    from_x = step[:, None, None, None] * w.abs().sum((1, 2, 3))[:, None, None]
    from_both = c * 9 * step[:, None, None, None] * scale[:, None, None] / 2
    error = (int8_conv2d(x, weight, scale, kernel=kernel) - F.conv2d(x, w)).abs()
    assert (error <= (from_weights + from_x + from_both) / 2 * (1 + 1e-4)).all()
