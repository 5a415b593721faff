"""The CUDA kernels of int8_conv2d on the host."""

from __future__ import annotations

from functools import cache
from types import ModuleType

from support.cuda_emulation import extension

TILES = ("128x128_16", "128x64_16", "128x64_8", "128x64_4", "64x64_16", "64x64_8", "64x64_4")
SOURCES = (
    *(f"csrc/int8_conv2d/int8_conv2d_gemm_{tile}_cuda.cu" for tile in TILES), "csrc/int8_conv2d/int8_conv2d_depthwise_cuda.cu",
    "csrc/int8_conv2d/int8_conv2d_quantize_cuda.cu", "csrc/bindings/bind_int8_conv2d_cuda.cpp", "tests/cuda/int8_conv2d_module.cpp",
)  # fmt: skip


@cache
def emulated() -> ModuleType:
    return extension("_C_int8_conv2d", *SOURCES, arch=80)
