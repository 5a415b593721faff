"""Compressed weights in the private layouts of the 2:4 kernels, for the float and the int8 op."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .cuda import sparse24 as cuda_sparse24
from .cuda import sparse24_float as cuda_float
from .cuda.extension import NAME as CUDA
from .library import define, dispatched
from .sparse24 import parse_nm

NATIVE_PATTERNS = {"2:4": 2, "1:4": 1}
"""Patterns with native kernels, and what they keep of every 4. A kernel without a path of its own for 1:4 runs it as 2:4."""

_PREFIX = {torch.int8: "int8_sparse24", torch.float32: "sparse24"}
"""Values of this dtype are packed and multiplied by the native functions of this name."""


def sparse24_kernel(op: str, x: Tensor, pattern: str, kernel: str | None) -> str:
    """The kernel for a tensor and a pattern: the reference for other patterns than ``NATIVE_PATTERNS`` and for devices other than the CPU
    and the GPUs that ``cuda.sparse24`` runs on."""
    if x.device.type == "cuda" and kernel in (None, CUDA):
        reason = cuda_sparse24.unsupported(x.device, pattern)
        if reason is None or kernel is None:
            return CUDA if reason is None else native.REFERENCE
        raise ValueError(f"{op}: kernel {kernel!r} cannot run {reason}")
    name = native.resolve(op, kernel)
    if name == native.REFERENCE or (x.device.type == "cpu" and pattern in NATIVE_PATTERNS):
        return name
    if kernel is not None:
        needs = "a CPU tensor" if x.device.type != "cpu" else f"one of the patterns {', '.join(NATIVE_PATTERNS)}"
        got = f"one on {x.device}" if x.device.type != "cpu" else repr(pattern)
        raise ValueError(f"{op}: kernel {kernel!r} needs {needs}, got {got}")
    return native.REFERENCE


def pack_sparse24(values: Tensor, indices: Tensor, k: int, pattern: str, kernel: str) -> Tensor:
    """A valid compressed weight in the layout of a kernel, as flat uint8. The reference's layout is the bytes of both in a row."""
    pack = _pack_op if dispatched(values) else _pack
    return pack(values, indices, k, pattern, kernel)


def unpack_sparse24(packed: Tensor, n: int, k: int, pattern: str, dtype: torch.dtype, kernel: str) -> tuple[Tensor, Tensor]:
    """Values and indices out of ``pack_sparse24``'s result."""
    unpack = _unpack_op if dispatched(packed) else _unpack
    values, indices = unpack(packed, n, k, pattern, dtype, kernel)
    return values, indices


def _pack(values: Tensor, indices: Tensor, k: int, pattern: str, kernel: str) -> Tensor:
    values, indices = values.detach().contiguous(), indices.contiguous()
    if kernel == native.REFERENCE:
        return torch.cat([values.view(torch.uint8).flatten(), indices.flatten()])
    if kernel == CUDA:
        if values.dtype == torch.float32:
            return cuda_float.to_flat(cuda_float.pack(values, indices))
        return cuda_sparse24.to_flat(cuda_sparse24.pack(values, indices, k, pattern))
    prefix, n = _PREFIX[values.dtype], values.shape[0]
    packed = torch.empty(_bytes(prefix, kernel, n, k, pattern), dtype=torch.uint8)
    pack = getattr(native.module, f"{prefix}_pack")
    pack(kernel, values.data_ptr(), indices.data_ptr(), n, k, NATIVE_PATTERNS[pattern], packed.data_ptr())
    return packed


def _unpack(packed: Tensor, n: int, k: int, pattern: str, dtype: torch.dtype, kernel: str) -> tuple[Tensor, Tensor]:
    p = parse_nm("unpack", pattern)
    if kernel == native.REFERENCE:
        end = n * p.kept(k) * dtype.itemsize
        return packed[:end].clone().view(dtype).view(n, p.kept(k)), packed[end:].clone().view(n, p.index_bytes(k))
    if kernel == CUDA:
        if dtype == torch.float32:
            return cuda_float.unpack(cuda_float.from_flat(packed, n, k, pattern), k, pattern)
        return cuda_sparse24.unpack(cuda_sparse24.from_flat(packed, n, k, dtype), n, k, pattern)
    values = torch.empty(n, p.kept(k), dtype=dtype)
    indices = torch.empty(n, p.index_bytes(k), dtype=torch.uint8)
    getattr(native.module, f"{_PREFIX[dtype]}_unpack")(kernel, packed.data_ptr(), n, k, p.n, values.data_ptr(), indices.data_ptr())
    return values, indices


def _bytes(prefix: str, kernel: str, n: int, k: int, pattern: str) -> int:
    return getattr(native.module, f"{prefix}_packed_bytes")(kernel, n, k, NATIVE_PATTERNS[pattern])


def _fake_pack(values, indices, k, pattern, kernel):
    if kernel == native.REFERENCE:
        return indices.new_empty(values.numel() * values.element_size() + indices.numel())
    if kernel == CUDA:
        if values.dtype == torch.float32:
            return indices.new_empty(cuda_float.packed_bytes(values.shape[0], k, pattern))
        return indices.new_empty(sum(cuda_sparse24.packed_bytes(values.shape[0], k, values.dtype)))
    return indices.new_empty(_bytes(_PREFIX[values.dtype], kernel, values.shape[0], k, pattern))


def _fake_unpack(packed, n, k, pattern, dtype, kernel):
    p = parse_nm("unpack", pattern)
    return packed.new_empty((n, p.kept(k)), dtype=dtype), packed.new_empty((n, p.index_bytes(k)))


_pack_op = define("sparse24_pack(Tensor values, Tensor indices, int k, str pattern, str kernel) -> Tensor", _pack, _fake_pack)
_unpack_op = define(
    "sparse24_unpack(Tensor packed, int n, int k, str pattern, ScalarType dtype, str kernel) -> (Tensor, Tensor)", _unpack, _fake_unpack
)
