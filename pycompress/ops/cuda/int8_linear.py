"""``int8_matmul`` and ``int8_linear`` on CUDA: the weight's layout, the choice of a kernel, and the calls.

Two launches: rows of x are quantised in one pass, then one kernel multiplies, scales, adds the bias and activates
(csrc/int8_matmul/int8_linear_cuda.h). Any M, N and K: rows are padded to 16 bytes in the workspace, the rest is predicated.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import native
from . import extension

CONFIGS = {
    "128x256": (128, 256), "128x128": (128, 128), "64x128": (64, 128), "64x64": (64, 64),
    "few_16x16": (16, 16), "few_16x8": (16, 8), "few_32x16": (32, 16),
    "hopper_128x256": (128, 256), "hopper_128x128": (128, 128),
}  # fmt: skip
"""Rows and columns that a block computes, by configuration, as in the header (a test compares)."""
HOPPER = (9, 0)
"""The compute capability that the ``hopper`` configurations are for: newer GPUs do not have its instructions."""
_TIME = {"128x256": 1.0, "128x128": 1.0, "64x128": 1.5, "64x64": 2.0, "hopper_128x256": 0.6, "hopper_128x128": 0.7}
"""Time of a product. ``mma.sync``: what it reads from shared memory, 32 (1 / rows + 1 / columns of a warp's tile). Hopper's
instructions are said to be 1.6 times as fast; smaller tiles read more from the L2 cache. Guesses: no GPU has run them yet."""
_LAUNCH_COST = 0.25
"""Time to fill and to empty a block's pipeline, in units of the products of a 128 x 128 tile. Likewise."""
_CLUSTER_ROWS = {"hopper_128x256": 256}
"""Rows of a cluster of blocks, where that is not one block."""


def choose(m: int, n: int, multiprocessors: int, capability: tuple[int, int] = (8, 0)) -> str:
    """The configuration for a product of M x N outputs: few rows stream the weights, else the tile with the least time for the busiest
    multiprocessor.

    >>> choose(1, 4096, 132), choose(4096, 4096, 132), choose(100, 300, 132)
    ('few_16x8', '128x256', '64x64')
    >>> choose(1, 4096, 132, HOPPER), choose(4096, 4096, 132, HOPPER), choose(512, 4096, 132, HOPPER)
    ('few_16x8', 'hopper_128x256', 'hopper_128x128')
    """
    if m <= 16:
        return "few_16x16" if -(-n // 16) >= 4 * multiprocessors else "few_16x8"
    if m <= 32:
        return "few_32x16"
    hopper = capability == HOPPER and max(m, n) < 2**30  # where they count in 32 bits

    def cost(name: str) -> float:
        bm, bn = CONFIGS[name]
        rows = _CLUSTER_ROWS.get(name, bm)
        blocks = -(-m // rows) * rows // bm * -(-n // bn)
        return -(-blocks // multiprocessors) * (bm * bn / 128**2 * _TIME[name] + _LAUNCH_COST)

    return min((name for name in _TIME if hopper or not name.startswith("hopper")), key=cost)


def _chosen(m: int, n: int, device: torch.device) -> str:
    return choose(m, n, extension.multiprocessors(device), extension.capability(device.index or 0))


def padded(k: int) -> int:
    """Bytes of a row of int8 operands: kernels read 16 at a time."""
    return -(-k // 16) * 16


def packed_bytes(n: int, k: int) -> int:
    return n * padded(k) + padded(4 * n)


def pack(weight: Tensor) -> Tensor:
    """An int8 weight (N, K) as flat int8: rows padded with zeros, then the sum of each row as int32, padded likewise."""
    (n, k), sums = weight.shape, weight.sum(1, dtype=torch.int32)
    return torch.cat([F.pad(weight, (0, padded(k) - k)).flatten(), F.pad(sums.view(torch.int8), (0, padded(4 * n) - 4 * n))])


def unpack(packed: Tensor, n: int, k: int) -> Tensor:
    """The weight (N, K) out of ``pack``'s result: a view where K is a multiple of 16."""
    return packed[: n * padded(k)].view(n, padded(k))[:, :k]


def unsupported(device: torch.device) -> str | None:
    """Why the kernels do not run on this CUDA device, or None."""
    reason = extension.unsupported(device.index or 0)
    return None if reason is None else f"on {device}: {reason}"


def linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    n: int,
    k: int,
    x_scale: float | None,
    x_zero_point: int | None,
    asymmetric: bool,
    activation: str,
    config: str | None = None,
) -> Tensor:
    """``int8_linear_packed`` on torch's current stream. ``config`` forces a kernel: one that takes as many rows, and runs on the device."""
    rows = x.reshape(-1, k) if k else x.reshape(x.shape[:-1].numel(), 0)
    if k > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    m, kp = rows.shape[0], padded(k)
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if m == 0 or n == 0:
        return out.view(*x.shape[:-1], n)
    module, stream, device = _target(x)
    # Integers, scales and zero points of the rows; m * kp is a multiple of 16, so all are aligned.
    workspace = torch.empty(m * (kp + 8), dtype=torch.int8, device=x.device)
    q = workspace.data_ptr()
    row_scale, row_zero = q + m * kp, q + m * kp + 4 * m
    zeroed = asymmetric or x_zero_point is not None
    module.quantize_rows(
        m, k, rows.data_ptr(), rows.stride(0), native.DTYPES[x.dtype], x_scale is None, asymmetric, x_scale or 0.0, x_zero_point or 0,
        -128 if zeroed else -127, q, kp, row_scale, row_zero, device, stream,
    )  # fmt: skip
    module.int8_gemm(
        config or _chosen(m, n, x.device), m, n, kp, q, kp, packed.data_ptr(), kp,
        row_scale, row_zero if zeroed else 0, scale.data_ptr(), packed.data_ptr() + n * kp, 0 if bias is None else bias.data_ptr(),
        native.ACTIVATIONS[activation], out.data_ptr(), native.DTYPES[x.dtype], device, stream,
    )  # fmt: skip
    return out.view(*x.shape[:-1], n)


INT32 = 3
"""The number of int32 outputs in csrc/int8_matmul/int8_linear_cuda.h."""


def matmul(a: Tensor, b: Tensor, config: str | None = None) -> Tensor:
    """``int8_matmul`` on torch's current stream."""
    (m, k), n = a.shape, b.shape[0]
    out = torch.empty(m, n, dtype=torch.int32, device=a.device)
    if m == 0 or n == 0:
        return out
    module, stream, device = _target(a)
    a, b = _operand(a), _operand(b)
    module.int8_gemm(
        config or _chosen(m, n, a.device), m, n, padded(k), a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0),
        0, 0, 0, 0, 0, 0, out.data_ptr(), INT32, device, stream,
    )  # fmt: skip
    return out


def _operand(t: Tensor) -> Tensor:
    """An int8 matrix whose rows start at multiples of 16 bytes and are padded with zeros: the tensor itself where it is one already."""
    if t.shape[1] % 16 == 0 and t.stride(1) == 1 and t.stride(0) % 16 == 0 and t.stride(0) >= t.shape[1] and t.data_ptr() % 16 == 0:
        return t
    return F.pad(t, (0, padded(t.shape[1]) - t.shape[1])).clone(memory_format=torch.contiguous_format)


def _target(x: Tensor) -> tuple[Any, int, int]:
    return extension.module, extension.stream(x.device), x.device.index or 0
