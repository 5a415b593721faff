"""Convolutions of every kind for the tests of ``int8_conv2d``, and inputs that make its results show the integers."""

from __future__ import annotations

import torch

from pycompress.ops import int8_conv2d_dispatch as dispatch
from pycompress.ops import int8_conv2d_packing as packing
from pycompress.ops.int8_conv2d_arguments import Requantization, make_geometry
from support.kernels import all_kernels, native_kernels

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
    # pixels that AVX2 encodes as rows of a linear layer, with strides, and padding, which it does not encode
    (2, 132, 9, 13, 130, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (1, 256, 11, 14, 144, (1, 1), (2, 3), (0, 0), (1, 1), 1),
    (1, 128, 5, 6, 128, (1, 1), (1, 1), (1, 2), (1, 1), 1),
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
    geometry = make_geometry("test", weight.shape, *(options[key] for key in names))
    packed = packing.pack_weight(weight, list(geometry), kernel)
    after = Requantization(x.dtype)
    return dispatch.run(x, packed, scale, bias, None, geometry, x_scale, x_zero_point, *after, "none", kernel, algorithm)
