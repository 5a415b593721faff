import math
import os
import sys
import threading

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.guard import guarded, linux_only
from support.kernels import all_kernels, native_kernels

from pycompress.ops import int8_conv2d, int8_conv2d_reference, native, quantize_affine, quantize_weight

conv = sys.modules["pycompress.ops.int8_conv2d"]

# n, c, h, w, o, (kh, kw), stride, padding, dilation, groups
PLAIN = [
    (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (2, 3, 9, 11, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 1, 7, 5, 4, (3, 3), (3, 3), (1, 1), (1, 1), 1),
    (1, 3, 31, 30, 20, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    (1, 5, 8, 9, 65, (2, 4), (1, 2), (1, 3), (1, 1), 1),
    (3, 16, 9, 14, 17, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    (1, 17, 8, 8, 33, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (2, 64, 7, 9, 70, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    (1, 20, 6, 13, 9, (1, 1), (1, 1), (1, 2), (1, 1), 1),
    (1, 6, 12, 40, 8, (1, 5), (1, 1), (0, 2), (1, 1), 1),
    (1, 6, 40, 3, 8, (5, 1), (3, 1), (2, 0), (2, 1), 1),
    (1, 33, 11, 12, 12, (3, 3), (1, 1), (2, 2), (2, 2), 1),
    (1, 4, 13, 13, 7, (3, 2), (3, 1), (0, 4), (1, 3), 1),
    (1, 1024, 2, 3, 66, (1, 1), (1, 1), (0, 0), (1, 1), 1),
]
WINOGRAD = [
    (1, 4, 1, 1, 1, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 16, 14, 14, 17, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (3, 40, 17, 19, 20, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    (1, 36, 5, 50, 70, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (1, 512, 6, 5, 16, (3, 3), (1, 1), (2, 0), (1, 1), 1),
]
GROUPED = [
    (1, 24, 12, 9, 48, (3, 3), (1, 1), (1, 1), (1, 1), 6),
    (2, 12, 9, 9, 30, (3, 2), (1, 2), (2, 2), (2, 2), 3),
    (1, 8, 9, 9, 24, (3, 3), (1, 1), (1, 1), (1, 1), 8),
    (1, 64, 6, 6, 128, (3, 3), (2, 2), (1, 1), (1, 1), 2),
    (1, 4, 40, 40, 4, (23, 23), (1, 1), (11, 11), (1, 1), 4),  # depthwise with too many taps for exact float sums
    (2, 64, 9, 9, 32, (3, 3), (1, 1), (1, 1), (1, 1), 8),
    (1, 128, 7, 14, 64, (5, 5), (1, 2), (2, 2), (1, 1), 16),
    (1, 32, 7, 9, 16, (1, 3), (1, 1), (0, 3), (1, 2), 2),
    (1, 12, 5, 6, 15, (2, 3), (1, 1), (1, 1), (1, 1), 3),
    (1, 24, 6, 21, 10, (1, 1), (1, 1), (0, 0), (1, 1), 2),
]
DEPTHWISE = [
    (2, 8, 12, 9, 8, (3, 3), (1, 1), (1, 1), (1, 1), 8),
    (1, 35, 15, 33, 35, (3, 3), (2, 2), (1, 1), (1, 1), 35),
    (1, 17, 13, 12, 17, (5, 3), (2, 3), (2, 1), (1, 2), 17),
    (1, 16, 3, 70, 16, (1, 7), (1, 1), (0, 3), (1, 1), 16),
    (1, 2, 1, 1, 2, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    (1, 64, 7, 7, 64, (7, 7), (1, 1), (3, 3), (1, 1), 64),
    (1, 6, 40, 90, 6, (5, 5), (2, 2), (2, 2), (1, 1), 6),
    (1, 70, 9, 20, 70, (3, 3), (1, 1), (4, 5), (1, 1), 70),
    (2, 5, 11, 21, 5, (3, 3), (1, 2), (2, 2), (2, 2), 5),
    (1, 3, 9, 200, 3, (9, 6), (1, 4), (4, 3), (1, 1), 3),
    (1, 4, 130, 130, 4, (3, 3), (1, 1), (1, 1), (1, 1), 4),
    (1, 19, 10, 10, 19, (3, 3), (5, 5), (1, 1), (1, 1), 19),
]
# Pixels in the lanes: runs over row ends, phases of strides in both directions, dwords of channels and of taps, groups of few columns,
# padding beyond the kernel, an image narrower than a vector and one of several vectors, channels that leave L1
PLANES = [
    (1, 8, 3, 3, 8, (5, 5), (2, 2), (4, 4), (1, 1), 1),
    (1, 16, 20, 21, 24, (3, 3), (2, 2), (5, 5), (1, 1), 4),
    (1, 10, 14, 14, 30, (3, 3), (2, 2), (1, 1), (1, 1), 5),
    (2, 3, 17, 40, 9, (3, 5), (2, 4), (1, 2), (2, 1), 1),
    (1, 32, 6, 47, 20, (3, 3), (3, 2), (1, 0), (1, 1), 2),
    (1, 44, 9, 6, 44, (1, 1), (1, 1), (0, 0), (1, 1), 11),
    (1, 1100, 7, 10, 13, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (1, 64, 30, 33, 16, (2, 2), (1, 2), (0, 1), (2, 3), 1),
]
CASES = PLAIN + WINOGRAD + GROUPED + DEPTHWISE + PLANES
QUANTIZATION = [{}, {"x_scale": 2.0**-5}, {"x_scale": 2.0**-5, "x_zero_point": -31}, {"x_scale": 2.0**-5, "x_zero_point": 127}]
KERNELS = all_kernels("int8_conv2d")
NATIVE = native_kernels("int8_conv2d")
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def name(case):
    n, c, h, w, o, k, s, p, d, g = case
    return f"{n}x{c}x{h}x{w}-{o}-k{k[0]}{k[1]}-s{s[0]}{s[1]}-p{p[0]}{p[1]}-d{d[0]}{d[1]}-g{g}"


def make(case, dtype=torch.float32):
    """An input whose dynamic scale is 2**-5 and scales that are powers of two: the epilogue is exact, so results show the integers."""
    n, c, h, w, o, kernel_size, stride, padding, dilation, groups = case
    x = torch.randn(n, c, h, w).clamp_(-127 * 2.0**-5, 127 * 2.0**-5)
    x[:, 0, 0, 0] = 127 * 2.0**-5
    top = 128 if c < 512 else 40  # |sum| < 2**25 for Winograd
    weight = torch.randint(-top, top, (o, c // groups, *kernel_size), dtype=torch.int8)
    scale = 2.0 ** torch.randint(-4, 3, (o,))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return x.to(dtype), weight, scale.float(), options


def run(x, weight, scale, bias=None, *, kernel, algorithm, x_scale=None, x_zero_point=None, **options):
    """One algorithm of a native kernel."""
    names = ("stride", "padding", "dilation", "groups")
    geometry = conv.make_geometry("test", weight.shape, *(options[key] for key in names))
    packed = conv.pack_weight(weight, list(geometry), kernel)
    after = conv.Requantization(x.dtype)
    return conv._run(x, packed, scale, bias, None, geometry, x_scale, x_zero_point, *after, "none", kernel, algorithm)


def rounding_bound(expected, dtype=torch.float32):
    """The epilogue has three float32 roundings of at most eps/2 each, relative to terms no larger than |y| + |bias|."""
    size = expected.float().abs().max().item() + 8
    return 4 * torch.finfo(torch.float32).eps * size + torch.finfo(dtype).eps * size * (dtype != torch.float32)


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
@pytest.mark.parametrize("case", PLAIN + WINOGRAD + GROUPED + PLANES, ids=name)
def test_algorithms_agree(case, kernel):
    x, weight, scale, options = make(case)
    bias = torch.randint(-50, 50, scale.shape) * 0.5
    expected = run(x, weight, scale, bias, kernel=kernel, algorithm="direct", **options)
    for algorithm, applies, layouts in (
        ("winograd", case in WINOGRAD and kernel != "scalar", LAYOUTS),
        ("planes", has_planes(case, kernel), LAYOUTS[:1]),
        ("grouped", has_grouped(case, kernel), LAYOUTS),
    ):
        if not applies:
            with pytest.raises(ValueError, match=f"algorithm '{algorithm}' does not apply"):
                run(x, weight, scale, bias, kernel=kernel, algorithm=algorithm, **options)
            continue
        for layout in layouts:
            y = run(x.to(memory_format=layout), weight, scale, bias, kernel=kernel, algorithm=algorithm, **options)
            assert torch.equal(y, expected)


def has_planes(case, kernel):
    """Dwords of four channels up to stride 2, of four taps while a window of them fits 16 bytes."""
    _, c, _, _, _, (_, kw), (_, stride), _, (_, dilation), groups = case
    channels = (c // groups % 4 == 0 or (groups == 1 and (kw == 1 or dilation > 1))) and stride <= 2
    return kernel == "avx512_vnni" and (channels or stride + dilation <= 5)


def has_grouped(case, kernel):
    """As many groups as fill 16 output channels, with all their inputs in 64 bytes (AVX2: 32 bytes of int16)."""
    _, c, _, _, o, _, _, _, _, groups = case
    merged = max(m for m in range(1, groups + 1) if groups % m == 0 and (m == 1 or o // groups * m <= 16))
    if kernel not in ("avx512_vnni", "avx2") or groups == 1 or o == groups == c:
        return False
    step, most = (4, 64) if kernel == "avx512_vnni" else (2, 16)
    return c // groups % step == 0 and o // groups * merged <= 16 and c // groups * merged <= most


@pytest.mark.parametrize("kernel", NATIVE)
def test_an_algorithm_that_does_not_apply_raises(kernel):
    x, weight, scale, options = make(DEPTHWISE[0])
    for algorithm in ("direct", "winograd", "planes", "grouped"):
        with pytest.raises(ValueError, match=f"algorithm '{algorithm}' does not apply"):
            run(x, weight, scale, kernel=kernel, algorithm=algorithm, **options)
    x, weight, scale, options = make(WINOGRAD[1])
    with pytest.raises(ValueError, match="algorithm must be 'direct', 'planes', 'grouped', 'winograd' or 'depthwise', got 'fft'"):
        run(x, weight, scale, kernel=kernel, algorithm="fft", **options)


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


@pytest.mark.parametrize("kernel", [k for k in NATIVE if k != "scalar"])
def test_winograd_is_exact_up_to_its_limit_and_not_used_beyond(kernel):
    """|sum| < 2**25: 127 * 255 * 9 * 115 = 33.5 M is just below, one more channel of full weights is not."""

    def chosen(weight, zero_point):
        geometry = conv.make_geometry("test", weight.shape, 1, 1, 1, 1)
        packed = conv.pack_weight(weight, list(geometry), kernel)
        sizes = (8, weight.shape[1], 64, 64, *geometry)
        return native.module.int8_conv2d_algorithm(kernel, sizes, packed.data_ptr(), False, zero_point, -128)

    weight = torch.full((64, 116, 3, 3), 127, dtype=torch.int8)
    weight[:, 115:] = 0
    assert 127 * 255 * 9 * 115 < 2**25 < 127 * 255 * 9 * 116
    assert chosen(weight, -128) == "winograd"
    x = torch.full((1, 116, 12, 12), 255 * 2.0**-3)
    options = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "x_scale": 2.0**-3, "x_zero_point": -128}
    expected = int8_conv2d_reference(x, weight, torch.ones(64), **options)
    assert expected.max() == 127 * 255 * 9 * 115 * 2.0**-3
    assert torch.equal(run(x, weight, torch.ones(64), kernel=kernel, algorithm="winograd", **options), expected)
    assert torch.equal(run(x, -weight, torch.ones(64), kernel=kernel, algorithm="winograd", **options), -expected)
    weight[3, 115:] = 127
    assert chosen(weight, -128) in ("direct", "planes")
    assert chosen(weight, 0) == "winograd"
    weight[3, 60:] *= -1  # both signs never meet the same end of the range
    assert chosen(weight, -128) == "winograd"
    with pytest.raises(ValueError, match="'winograd' does not apply"):
        run(x, torch.full_like(weight, 127), torch.ones(64), kernel=kernel, algorithm="winograd", **options)


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


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", [PLAIN[3], PLAIN[7], WINOGRAD[1], GROUPED[2], GROUPED[6], DEPTHWISE[1], DEPTHWISE[2]], ids=name)
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
@pytest.mark.parametrize("case", [PLAIN[5], WINOGRAD[1], GROUPED[5], DEPTHWISE[1]], ids=name)
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
        q = int8_conv2d(x, weight, scale, residual=residual, activation="relu", out_scale=4.0, kernel=kernel, **extra, **options)
        assert torch.equal(q.int(), quantize_affine(F.relu(plain + values), torch.tensor(4.0)))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", [PLAIN[2], PLAIN[6], PLAIN[7], PLAIN[9], WINOGRAD[1], GROUPED[0], DEPTHWISE[1]], ids=name)
def test_strides_of_the_input(case, kernel):
    x, weight, scale, options = make(case)
    n, c, h, w = x.shape
    expected = int8_conv2d(x, weight, scale, kernel=kernel, **options)
    big = torch.full((n + 1, c + 3, h + 2, w + 5), math.nan)
    big[1:, 2:-1, 1:-1, 3:-2] = x
    views = [big[1:, 2:-1, 1:-1, 3:-2], big.to(memory_format=torch.channels_last)[1:, 2:-1, 1:-1, 3:-2]]
    wide = x.repeat_interleave(2, 3)
    views += [wide[..., ::2], wide.to(memory_format=torch.channels_last)[..., ::2], x.repeat_interleave(2, 1)[:, ::2]]
    views += [x.transpose(2, 3).contiguous().transpose(2, 3), x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)]
    for view in views:
        assert not view.is_contiguous() or n == 1 or c == 1 or 1 in (h, w)
        y = int8_conv2d(view, weight, scale, kernel=kernel, **options)
        assert torch.equal(y, expected)
        assert y.stride() == F.conv2d(view, weight.float(), None, *options.values()).stride()
    same = x[:1].expand(3, -1, -1, -1)
    y = int8_conv2d(same, weight, scale, kernel=kernel, **options)
    assert torch.equal(y, expected[:1].expand_as(y))
    assert int8_conv2d(x[:0], weight, scale, kernel=kernel, **options).shape == (0, *expected.shape[1:])


@linux_only
@pytest.mark.parametrize("kernel", NATIVE)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", [*PLAIN[:12:2], PLAIN[3], *WINOGRAD[:4], *GROUPED[:4], *GROUPED[5:], *DEPTHWISE, *PLANES], ids=name)
def test_stays_inside_its_buffers(case, layout, kernel, monkeypatch):
    x, weight, scale, options = make(case)
    bias = torch.randn(len(scale))
    geometry = conv.make_geometry("test", weight.shape, *options.values())
    packed = guarded(conv.pack_weight(guarded(weight), list(geometry), kernel))
    assert torch.equal(conv.unpack_weight(packed, x.shape[1], list(geometry), kernel), weight)

    def memory(t):  # guarded() keeps the order in memory, not the strides
        order = t.permute(0, 2, 3, 1) if layout == torch.channels_last else t
        copy = guarded(order.contiguous())
        return copy.permute(0, 3, 1, 2) if layout == torch.channels_last else copy

    outputs = []

    def guarded_result(x, n, channels, size, dtype, channels_last):
        dense = guarded(torch.empty((n, *size, channels) if channels_last else (n, channels, *size), dtype=dtype))
        outputs.append(dense.permute(0, 3, 1, 2) if channels_last else dense)
        return outputs[-1]

    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        value = (x * 8).to(dtype)
        x_scale = None if dtype == torch.float32 else 0.25
        for out_dtype in (torch.float32, torch.float16, torch.int8):
            residual = torch.randn(len(x), len(weight), *geometry.out_size(*x.shape[2:])).to(out_dtype)
            after = conv.Requantization(out_dtype, *((1.0, None, 1.0, 3) if out_dtype == torch.int8 else ()))
            arguments = (geometry, x_scale, None, *after, "relu", kernel)
            expected = conv._run(value.to(memory_format=layout), packed, scale, bias, residual, *arguments)
            inputs = (memory(value), packed, guarded(scale), guarded(bias), memory(residual))
            with monkeypatch.context() as patch:
                patch.setattr(conv, "_new_result", guarded_result)
                y = conv._run(*inputs, *arguments)
            assert y is outputs[-1] and torch.equal(y, expected)


@pytest.mark.parametrize("kernel", NATIVE)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_packing_is_reversible(case, kernel):
    _, weight, _, options = make(case)
    geometry = conv.make_geometry("test", weight.shape, *options.values())
    packed = conv.pack_weight(weight, list(geometry), kernel)
    assert torch.equal(conv.unpack_weight(packed, weight.shape[1] * options["groups"], list(geometry), kernel), weight)


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


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("case", [PLAIN[5], PLAIN[11], WINOGRAD[1], GROUPED[1], DEPTHWISE[2]], ids=name)
def test_gradient_is_straight_through(case, activation, kernel):
    x, weight, scale, options = make(case)
    scale = scale * 2.0**-8
    bias, residual = torch.randn(len(scale)), None
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    y = int8_conv2d(x, weight, scale, bias, activation=activation, kernel=kernel, **options)
    residual = torch.randn_like(y).requires_grad_()
    y = int8_conv2d(x, weight, scale, bias, activation=activation, residual=residual, kernel=kernel, **options)
    grad = torch.randn_like(y)
    y.backward(grad)
    before = int8_conv2d(x.detach(), weight, scale, bias, residual=residual.detach(), kernel=kernel, **options).requires_grad_()
    (before if activation is None else getattr(F, activation)(before)).backward(grad)
    torch.testing.assert_close(residual.grad, before.grad)
    twin = x.detach().clone().requires_grad_()
    F.conv2d(twin, weight.float() * scale[:, None, None, None], None, *options.values()).backward(before.grad)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-5)
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_int8_result_has_no_gradient(kernel):
    x, weight, scale, options = make(PLAIN[1])
    with pytest.raises(RuntimeError, match="an int8 result has no gradient"):
        int8_conv2d(x.requires_grad_(), weight, scale, out_scale=1.0, kernel=kernel, **options)
    with torch.no_grad():
        assert int8_conv2d(x, weight, scale, out_scale=1.0, kernel=kernel, **options).dtype == torch.int8


@pytest.mark.parametrize("kernel", NATIVE)
@pytest.mark.parametrize(
    "case",
    [
        (2, 64, 30, 31, 96, *WINOGRAD[0][5:]),
        (2, 48, 29, 30, 70, *PLAIN[5][5:]),
        (2, 96, 30, 30, 96, *DEPTHWISE[0][5:9], 96),
        (2, 64, 29, 31, 70, *PLAIN[6][5:]),
        (1, 512, 5, 9, 200, *PLAIN[6][5:]),
        (2, 3, 90, 91, 24, *PLAIN[3][5:]),
        (2, 64, 30, 31, 64, *PLANES[2][5:9], 16),
    ],
    ids=name,
)
def test_threads_do_not_change_the_result(case, kernel):
    x, weight, scale, options = make(case)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results += [int8_conv2d(x.to(memory_format=layout), weight, scale * 1.1, kernel=kernel, **options) for layout in LAYOUTS]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("kernel", NATIVE)
def test_eight_python_threads_at_once(kernel):
    cases = [
        make((2, 32, 20, 21, 40, *WINOGRAD[0][5:])),
        make((2, 24, 20, 21, 40, *PLAIN[5][5:])),
        make((2, 40, 20, 21, 40, *DEPTHWISE[0][5:9], 40)),
    ]
    expected = [int8_conv2d(x, weight, scale, kernel=kernel, **options) for x, weight, scale, options in cases]
    wrong = []

    def work(seed):
        for i in range(12):
            x, weight, scale, options = cases[(seed + i) % 3]
            if not torch.equal(int8_conv2d(x, weight, scale, kernel=kernel, **options), expected[(seed + i) % 3]):
                wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kernel", NATIVE)
def test_after_fork(kernel):
    x, weight, scale, options = make((2, 64, 30, 30, 64, *WINOGRAD[0][5:]))
    expected = int8_conv2d(x, weight, scale, kernel=kernel, **options)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(int8_conv2d(x, weight, scale, kernel=kernel, **options), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("kernel", [native.kernels("int8_conv2d")[0], "reference"])
def test_torch_op(kernel):
    for case in (PLAIN[1], WINOGRAD[1], DEPTHWISE[0]):
        x, weight, scale, options = make(case)
        geometry = list(conv.make_geometry("test", weight.shape, *options.values()))
        torch.library.opcheck(conv._pack_op, (weight, geometry, kernel))
        packed = conv.pack_weight(weight, geometry, kernel)
        torch.library.opcheck(conv._unpack_op, (packed, x.shape[1], geometry, kernel))
        plain = (geometry, None, None, torch.float32, None, None, None, None, False, "relu", kernel)
        chain = (geometry, 0.02, 3, torch.int8, 0.5, -1, None, None, False, "none", kernel)
        for value in (x, x.to(memory_format=torch.channels_last), x[..., 1:]):
            for arguments in (plain, chain):
                torch.library.opcheck(conv._op, (value, packed, scale, scale, None, *arguments))
        last = (geometry, 0.02, 3, torch.float32, None, None, None, None, True, "none", kernel)
        q = x.to(torch.int8).to(memory_format=torch.channels_last)
        torch.library.opcheck(conv._op, (q, packed, scale, scale, None, *last))


def test_compile():
    x, weight, scale, options = make(WINOGRAD[1])
    expected = int8_conv2d(x, weight, scale, activation="relu", **options)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x):
        return int8_conv2d(x, weight, scale, activation="relu", **options)

    assert torch.equal(function(x), expected)
    assert torch.equal(function(x.to(memory_format=torch.channels_last)), expected)


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
