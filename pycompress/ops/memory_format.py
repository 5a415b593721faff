"""Contiguous or channels_last: what strides tell, and the mark of int8 tensors, whose strides do not."""

from __future__ import annotations

import torch
from torch import Tensor

from .library import tracing


def suggests_channels_last(x: Tensor) -> bool:
    """torch's ``suggest_memory_format() == channels_last`` (c10/core/MemoryFormat.h), which Python does not offer."""
    least = 0
    for d in (1, 3, 2, 0):
        size, stride = x.shape[d], x.stride(d)
        if size == 0 or stride < least or (d == 1 and stride == 0) or (d == 0 and least == x.stride(1)):
            return False
        least = stride * max(size, 1)
    return True


def memory_format_of(x: Tensor) -> torch.memory_format:
    return torch.channels_last if suggests_channels_last(x) else torch.contiguous_format


_NCHW = "_pycompress_nchw"
TRACEABLE_MARKS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 6)
"""Dynamo of older torch traces no attributes of tensors (pytorch#134844): there, compiled chains of int8 layers end in channels_last."""


def _marked(x: Tensor) -> bool:
    return (TRACEABLE_MARKS or not tracing()) and getattr(x, _NCHW, False)


def is_nchw(x: Tensor) -> bool:
    """Whether a float result of ``x`` is to be contiguous: floats tell by their strides, int8 by the mark of ``remember_nchw``."""
    return _marked(x) if x.dtype == torch.int8 else not suggests_channels_last(x)


def remember_nchw(y: Tensor, nchw: bool) -> Tensor:
    """Mark an int8 tensor, which is channels_last, that stands between layers of a model that runs on contiguous tensors. An attribute, as
    strides have no room for it; torch.compile and torch.export see it, too."""
    if nchw and y.dtype == torch.int8 and (TRACEABLE_MARKS or not tracing()):
        setattr(y, _NCHW, True)
    return y


def view_of(x: Tensor, view: Tensor) -> Tensor:
    """``view``, marked like ``x``."""
    return remember_nchw(view, _marked(x))
