"""The CUDA kernels of the weight-only layers on the host."""

from __future__ import annotations

from functools import cache
from types import ModuleType

from support.cuda_emulation import ALIGNED, extension

SOURCES = (
    *(f"csrc/weight_only/{name}_cuda.cu" for name in ("int8_weight_few", "int4_weight_few", "weight_dequantize")),
    *(f"csrc/weight_only/int4_int8_{name}_cuda.cu" for name in ("few", "gemm_64x64", "gemm_128x128")),
    "csrc/int8_matmul/int8_quantize_cuda.cu",
    "csrc/bindings/bind_weight_only_cuda.cpp", "tests/cuda/weight_only_module.cpp",
)  # fmt: skip


@cache
def emulated() -> ModuleType:
    return extension("_C_weight_only", *SOURCES, arch=80, flags=ALIGNED)
