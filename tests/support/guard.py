"""Buffers that end exactly where readable memory ends: a kernel that reads or writes one byte too far crashes the test run."""

from __future__ import annotations

import ctypes
import mmap
import sys

import pytest
import torch
from torch import Tensor

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="guard pages are made with mmap and mprotect")

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_alive: list[mmap.mmap] = []  # tensors point into these; unmapping under a live tensor would crash


def guarded(tensor: Tensor) -> Tensor:
    """A copy of a contiguous tensor whose last byte is the last byte before an inaccessible page."""
    page = mmap.PAGESIZE
    size = tensor.numel() * tensor.element_size()
    pages = -(-max(size, 1) // page) + 1
    memory = mmap.mmap(-1, pages * page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert _libc.mprotect(ctypes.c_void_p(base + (pages - 1) * page), page, 0) == 0
    _alive.append(memory)
    if size == 0:
        return tensor.clone()
    start = (pages - 1) * page - size
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    copy.copy_(tensor)
    return copy
