"""``int4_linear`` with int8 activations on CUDA: the choice of a kernel and the call.

Two launches: rows of x are quantised in one pass, then one kernel widens nibbles in registers, multiplies in integers and scales each group
(csrc/weight_only/int4_int8_gemm.cuh, and int4_int8_few_cuda.cu for few rows). The layout is that of float activations
(``weight_only.pack_int4``), the bits are those of the CPU's kernels, whatever the configuration.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from . import extension
from .rows import quantized
from .weight_only import FEW_ROWS, int4_weight

CONFIGS = {
    "few_8x8": (8, 8), "few_8x16": (8, 16), "few_16x8": (16, 8), "few_16x16": (16, 16), "64x64": (64, 64), "128x128": (128, 128),
}  # fmt: skip
"""Rows and columns that a block computes, by configuration, as in the header (a test compares)."""


def choose(m: int, n: int, multiprocessors: int) -> str:
    """The configuration: streams the weight for few rows, else the larger tile if it still fills the device.

    >>> choose(1, 4096, 132), choose(16, 1024, 132), choose(64, 4096, 132), choose(4096, 4096, 132)
    ('few_8x16', 'few_16x8', '64x64', '128x128')
    """
    if m <= FEW_ROWS:
        rows = 8 if m <= 8 else 16
        blocks = -(-m // rows) * -(-n // 16)
        return f"few_{rows}x{16 if 4 * blocks >= 3 * multiprocessors else 8}"
    return "128x128" if -(-m // 128) * -(-n // 128) >= multiprocessors else "64x64"


def linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, n: int, group_size: int, asymmetric: bool, activation: str, config: str | None = None
) -> Tensor:
    """``int4_linear`` with int8 activations on torch's current stream; ``packed`` from ``pack_int4``. ``config`` forces a kernel."""
    k, m = x.shape[-1], x.shape[:-1].numel()
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m == 0 or n == 0:
        return out.view(*x.shape[:-1], n)
    module, stream = extension.module, extension.stream(x.device)
    q, row_scale = quantized(module, stream, x.reshape(m, k), None)
    module.int4_int8(
        config or choose(m, n, extension.multiprocessors(x.device)), m, n, k, q.data_ptr(), q.stride(0), row_scale.data_ptr(),
        *int4_weight(packed, n, k, group_size, asymmetric), 0 if bias is None else bias.data_ptr(), native.ACTIVATIONS[activation],
        out.data_ptr(), native.DTYPES[x.dtype], x.device.index or 0, stream,
    )  # fmt: skip
    return out.view(*x.shape[:-1], n)
