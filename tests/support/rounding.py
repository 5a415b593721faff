"""Bounds on the rounding of an epilogue, computed from its arithmetic."""

from __future__ import annotations

import torch


def rounding_bound(expected, dtype=torch.float32):
    """The epilogue has three float32 roundings of at most eps/2 each, relative to terms no larger than |y| + |bias|."""
    size = expected.float().abs().max().item() + 8
    return 4 * torch.finfo(torch.float32).eps * size + torch.finfo(dtype).eps * size * (dtype != torch.float32)
