"""Weights of ``int8_conv2d`` in the private layouts of its kernels, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .cuda import int8_conv2d as cuda_conv2d
from .cuda.extension import NAME as CUDA
from .library import define


def pack_weight(weight: Tensor, geometry: list[int], kernel: str) -> Tensor:
    """An int8 weight (O, C / groups, kh, kw) in the private layout of a kernel, as a flat int8 tensor (itself for the reference)."""
    weight = weight.contiguous()
    if kernel == native.REFERENCE:
        return weight
    if kernel == CUDA:
        return cuda_conv2d.pack(weight, geometry[-1])
    sizes = (1, weight.shape[1] * geometry[-1], 1, 1, *geometry)
    packed = torch.empty(native.module.int8_conv2d_packed_bytes(kernel, sizes), dtype=torch.int8, device="cpu")
    native.module.int8_conv2d_pack(kernel, sizes, weight.data_ptr(), packed.data_ptr())
    return packed


def unpack_weight(packed: Tensor, channels: int, geometry: list[int], kernel: str) -> Tensor:
    """The canonical weight (O, C / groups, kh, kw) out of ``pack_weight``'s result; ``channels`` = C."""
    if kernel == native.REFERENCE:
        return packed
    if kernel == CUDA:
        return cuda_conv2d.unpack(packed, (geometry[0], channels // geometry[-1], geometry[1], geometry[2]), geometry[-1])
    weight = torch.empty(geometry[0], channels // geometry[-1], geometry[1], geometry[2], dtype=torch.int8, device="cpu")
    native.module.int8_conv2d_unpack(kernel, (1, channels, 1, 1, *geometry), packed.data_ptr(), weight.data_ptr())
    return weight


def _fake_pack(weight, geometry, kernel):
    if kernel == native.REFERENCE:
        return torch.empty_like(weight, memory_format=torch.contiguous_format)
    if kernel == CUDA:
        return weight.new_empty(cuda_conv2d.packed_bytes(weight.shape, geometry[-1]))
    return weight.new_empty(native.module.int8_conv2d_packed_bytes(kernel, (1, weight.shape[1] * geometry[-1], 1, 1, *geometry)))


pack_op = define(
    "int8_conv2d_pack(Tensor weight, int[] geometry, str kernel) -> Tensor",
    lambda weight, geometry, kernel: pack_weight(weight, geometry, kernel).clone(),
    _fake_pack,
)
unpack_op = define(
    "int8_conv2d_unpack(Tensor packed, SymInt channels, int[] geometry, str kernel) -> Tensor",
    lambda packed, channels, geometry, kernel: unpack_weight(packed, channels, geometry, kernel).clone(),
    lambda packed, channels, geometry, kernel: packed.new_empty((geometry[0], channels // geometry[-1], geometry[1], geometry[2])),
)
