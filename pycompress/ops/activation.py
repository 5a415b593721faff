"""The activations that an op can apply to its result, in PyTorch; kernels number them as ``native.ACTIVATIONS`` does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
}


def check_activation(where: str, activation: Any) -> None:
    """Raises ``ValueError`` for anything but None and the names in ``ACTIVATE``."""
    if activation is not None and activation not in ACTIVATE:
        names = [repr(name) for name in ACTIVATE if name != "none"]
        raise ValueError(f"{where}: activation must be None, {', '.join(names[:-1])} or {names[-1]}, got {activation!r}")
