"""Shapes, quantizations and inputs for the tests of ``int8_linear``."""

from __future__ import annotations

import torch

from pycompress.ops import quantize_weight
from support.kernels import all_kernels

SHAPES = [(1, 1, 1), (1, 65, 129), (3, 7, 5), (6, 64, 64), (13, 130, 257), (50, 33, 1000), (130, 17, 66)]
QUANTIZATION = [
    {},
    {"asymmetric": True},
    {"x_scale": 0.02},
    {"x_scale": 0.013, "x_zero_point": -31},
    {"x_scale": 0.03, "x_zero_point": 127},
]
KERNELS = all_kernels("int8_matmul")


def make(m, n, k, dtype=torch.float32):
    weight, scale = quantize_weight(torch.randn(n, k))
    return torch.randn(m, k).to(dtype), weight, scale, torch.randn(n)
