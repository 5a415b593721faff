"""``int8_matmul``: exact int8 matrix product, and the packing of weights that all int8 ops share."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .cuda import int8_linear as cuda_int8
from .cuda.extension import NAME as CUDA
from .library import define, dispatched

MAX_K = 131071
"""Largest K for which 128 * 128 * K stays below 2**31 (csrc/int8_matmul/int8_matmul.h)."""


def int8_matmul_reference(a: Tensor, b: Tensor) -> Tensor:
    """``(a.long() @ b.long().T).int()`` through float64, which is exact: every sum stays below 2**53."""
    return (a.double() @ b.double().T).to(torch.int32)


def int8_matmul(a: Tensor, b: Tensor, *, kernel: str | None = None) -> Tensor:
    """Exact product of two int8 matrices, ``b`` in weight layout.

    ``a``: (M, K) int8, ``b``: (N, K) int8, any value from -128 to 127. Returns (M, N) int32, contiguous.
    Equals ``(a.long() @ b.long().T).int()``. ``kernel`` forces a kernel of ``native.kernels("int8_matmul")``.
    Raises ``ValueError`` for shapes that do not match or K > 131071 (the sum could leave int32), ``TypeError`` for other dtypes.

    >>> int8_matmul(torch.ones(2, 3, dtype=torch.int8), torch.ones(4, 3, dtype=torch.int8))[0, 0]
    tensor(3, dtype=torch.int32)
    """
    for name, t in (("a", a), ("b", b)):
        if not isinstance(t, Tensor) or t.dtype != torch.int8:
            raise TypeError(f"int8_matmul: {name} must be an int8 tensor, got {t.dtype if isinstance(t, Tensor) else type(t).__name__}")
        if t.dim() != 2:
            raise ValueError(f"int8_matmul: {name} must have 2 dimensions, got shape {tuple(t.shape)}")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"int8_matmul: b must be (N, {a.shape[1]}) to match a {tuple(a.shape)}, got {tuple(b.shape)}")
    if a.device != b.device:
        raise ValueError(f"int8_matmul: a and b must be on one device, got {a.device} and {b.device}")
    if a.shape[1] > MAX_K:
        raise ValueError(f"int8_matmul: K must be at most {MAX_K} for an exact int32 sum, got {a.shape[1]}")
    name = kernel_for(a, kernel)
    return _op(a, b, name) if dispatched(a) or dispatched(b) else _run(a, b, name)


def kernel_for(x: Tensor, kernel: str | None, where: str = "int8_matmul") -> str:
    """The kernel for a tensor: "cuda" on a GPU that it runs on, the others on the CPU only. ``where`` names the caller in errors."""
    if x.device.type == "cuda" and kernel in (None, CUDA):
        reason = cuda_int8.unsupported(x.device)
        if reason is None or kernel is None:
            return CUDA if reason is None else native.REFERENCE
        raise ValueError(f"{where}: kernel {kernel!r} cannot run {reason}")
    name = native.resolve("int8_matmul", kernel, where)
    if x.device.type == "cpu" or name == native.REFERENCE:
        return name
    if kernel is not None:
        raise ValueError(f"{where}: kernel {kernel!r} needs a CPU tensor, got one on {x.device}")
    return native.REFERENCE


def pack_weight(weight: Tensor, kernel: str) -> Tensor:
    """An int8 weight (N, K) in the private layout of a kernel, as a flat int8 tensor ((N, K) itself for the reference)."""
    weight = weight.contiguous()
    if kernel == native.REFERENCE:
        return weight
    if kernel == CUDA:
        return cuda_int8.pack(weight)
    n, k = weight.shape
    packed = torch.empty(native.module.int8_matmul_packed_bytes(kernel, n, k), dtype=torch.int8, device="cpu")
    native.module.int8_matmul_pack(kernel, weight.data_ptr(), k, n, k, packed.data_ptr())
    return packed


def unpack_weight(packed: Tensor, n: int, k: int, kernel: str) -> Tensor:
    """The canonical (N, K) weight out of ``pack_weight``'s result."""
    if kernel == native.REFERENCE:
        return packed
    if kernel == CUDA:
        return cuda_int8.unpack(packed, n, k).contiguous()
    weight = torch.empty(n, k, dtype=torch.int8, device="cpu")
    native.module.int8_matmul_unpack(kernel, packed.data_ptr(), n, k, weight.data_ptr())
    return weight


def _run(a: Tensor, b: Tensor, kernel: str) -> Tensor:
    if kernel == native.REFERENCE:
        return int8_matmul_reference(a, b)
    if kernel == CUDA:
        return cuda_int8.matmul(a, b)
    a = a if a.stride(-1) == 1 else a.contiguous()
    out = torch.empty(a.shape[0], b.shape[0], dtype=torch.int32, device="cpu")
    packed = pack_weight(b, kernel)
    native.module.int8_matmul(kernel, *out.shape, a.shape[1], a.data_ptr(), a.stride(0), packed.data_ptr(), out.data_ptr())
    return out


_op = define(
    "int8_matmul(Tensor a, Tensor b, str kernel) -> Tensor",
    _run,
    lambda a, b, kernel: a.new_empty((a.shape[0], b.shape[0]), dtype=torch.int32),
)
