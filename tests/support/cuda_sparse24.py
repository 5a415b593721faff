"""The CUDA kernels of 2:4 layers on the host."""

from __future__ import annotations

from functools import cache
from types import ModuleType

from support.cuda_emulation import ALIGNED, extension

SOURCES = (
    "csrc/sparse24_gemm/sparse24_i8_cuda.cu", "csrc/sparse24_gemm/sparse24_bf16_cuda.cu", "csrc/sparse24_gemm/sparse24_f16_cuda.cu",
    *(f"csrc/sparse24_gemm/sparse24_hopper_{element}_cuda.cu" for element in ("i8", "bf16", "f16")),
    "csrc/sparse24_gemm/float_few_cuda.cu", "csrc/sparse24_gemm/float_dense_cuda.cu", "csrc/int8_matmul/int8_quantize_cuda.cu",
    "csrc/bindings/bind_sparse24_cuda.cpp", "tests/cuda/sparse24_module.cpp",
)  # fmt: skip


@cache
def emulated() -> ModuleType:
    return extension("_C_sparse24", *SOURCES, arch=90, flags=ALIGNED)
