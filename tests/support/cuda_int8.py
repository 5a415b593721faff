"""The CUDA kernels of int8_linear on the host."""

from __future__ import annotations

from functools import cache
from types import ModuleType

from support.cuda_emulation import extension

TILES = ("128x256", "128x128", "64x128", "64x64", "hopper_128x256", "hopper_128x128")
SOURCES = (
    *(f"csrc/int8_matmul/int8_gemm_{tile}_cuda.cu" for tile in TILES), "csrc/int8_matmul/int8_gemm_few_cuda.cu",
    "csrc/int8_matmul/int8_quantize_cuda.cu", "csrc/bindings/bind_int8_linear_cuda.cpp", "tests/cuda/int8_module.cpp",
)  # fmt: skip


@cache
def emulated() -> ModuleType:
    return extension("_C_int8", *SOURCES, arch=90)
