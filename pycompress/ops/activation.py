"""The activations that an op can apply to its result, in PyTorch; kernels number them as ``native.ACTIVATIONS`` does."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
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


def activation_gradient(activation: str, before: Tensor, grad: Tensor) -> Tensor:
    """Gradient at ``before`` of ``ACTIVATE[activation](before)``, for an upstream gradient ``grad``, in torch functions that have
    gradients of their own: what ``torch.autograd.grad`` would give, which neither second derivatives nor torch.compile allow in a
    backward pass."""
    if activation == "relu":
        return grad * (before > 0)
    if activation == "relu6":
        return grad * ((before > 0) & (before < 6))
    if activation == "silu":
        s = torch.sigmoid(before)
        return grad * (s * (1 + before * (1 - s)))
    if activation == "gelu":
        density = torch.exp(before * before * -0.5) * (1 / math.sqrt(2 * math.pi))
        return grad * (0.5 * (1 + torch.erf(before * math.sqrt(0.5))) + before * density)
    if activation == "hardswish":
        return grad * torch.where(before < -3, 0, torch.where(before > 3, 1, before / 3 + 0.5))
    return grad


def check_activation(where: str, activation: Any) -> None:
    """Raises ``ValueError`` for anything but None and the names in ``ACTIVATE``."""
    if activation is not None and activation not in ACTIVATE:
        names = [repr(name) for name in ACTIVATE if name != "none"]
        raise ValueError(f"{where}: activation must be None, {', '.join(names[:-1])} or {names[-1]}, got {activation!r}")
