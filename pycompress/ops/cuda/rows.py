"""Rows of activations as int8 on CUDA: one pass of csrc/int8_matmul/int8_quantize_cuda.cu, for the ops that quantise on the fly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import native


def quantized(module: Any, stream: int, x: Tensor, x_scale: float | None) -> tuple[Tensor, Tensor]:
    """``x`` (M, K) as int8 with rows padded by zeros, and the scale of each row: the arithmetic of ``int8_linear``, symmetric."""
    m, k = x.shape
    x = x if x.stride(1) == 1 or k == 1 else x.contiguous()
    q = torch.empty(m, -(-k // 16) * 16, dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    zero = torch.empty(m, dtype=torch.int32, device=x.device)
    module.quantize_rows(
        m, k, x.data_ptr(), x.stride(0), native.DTYPES[x.dtype], x_scale is None, False, x_scale or 0.0, 0, -127, q.data_ptr(), q.stride(0),
        scale.data_ptr(), zero.data_ptr(), x.device.index or 0, stream,
    )  # fmt: skip
    return q, scale
