"""Whether a 2:4 or 1:4 layer gains from the sparse kernels on this machine: measured, not assumed."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..ops import native
from .base import set_note
from .int8_conv2d import Int8Conv2d, explicit_padding
from .int8_linear import Int8Linear
from .int8_sparse24_conv2d import Int8Sparse24Conv2d
from .int8_sparse24_linear import Int8Sparse24Linear
from .sparse24_conv2d import Sparse24Conv2d
from .sparse24_linear import Sparse24Linear
from .speed import speed_up

SMALLEST = 128 * 128
"""Layers with fewer weights stay dense unmeasured: there the cost of a call decides, not the kernel."""
ROWS = (1, 128)
"""Numbers of input rows that are measured."""
IMAGE = 28
"""Height and width of the image that convolutions are measured on."""


def sparse24_or_dense(layer: nn.Module, pattern: str = "2:4") -> Sparse24Linear | Sparse24Conv2d | None:
    """The packed layer for an ``nn.Linear`` or ``nn.Conv2d`` whose weight has the pattern (2:4 or 1:4), or None where the dense layer
    is as fast.

    None leaves a note with the reason on the layer, which ``pycompress.report`` shows. A subclass of these and other layer types stay
    as they are. To force the packed layer, call ``Sparse24Linear.from_float`` or ``Sparse24Conv2d.from_float``.
    """
    reason = _obstacle(layer) or _loss(layer, pattern, int8=False)
    if reason is not None:
        set_note(layer, f"{pattern} zeros stay in a dense weight: {reason}")
        return None
    if isinstance(layer, nn.Linear):
        return Sparse24Linear.from_float(layer, pattern=pattern)
    assert isinstance(layer, nn.Conv2d)
    return Sparse24Conv2d.from_float(layer, pattern=pattern)


def int8_sparse24_or_reason(
    layer: nn.Module,
    weight: Tensor,
    scale: Tensor,
    *,
    x_scale: float | None = None,
    x_zero_point: int | None = None,
    asymmetric: bool = False,
) -> Int8Sparse24Linear | Int8Sparse24Conv2d | str | None:
    """The int8 layer on the sparse kernels for a float layer and its int8 ``weight``, if that has 2:4 (or 1:4) zeros.

    A text is the reason why a weight with such zeros runs on the dense int8 kernels; None: it has no such zeros.
    """
    pattern = zeros_pattern(weight)
    if pattern is None:
        return None
    if asymmetric or x_zero_point is not None:
        return f"{pattern} zeros run on the dense kernel: the sparse one has no zero point, ask for symmetric activations"
    reason = _unsupported(layer) or _loss(layer, pattern, int8=True)
    if reason is not None:
        return f"{pattern} zeros run on the dense kernel: {reason}"
    kind: Any = Int8Sparse24Linear if isinstance(layer, nn.Linear) else Int8Sparse24Conv2d
    converted: Int8Sparse24Linear | Int8Sparse24Conv2d = kind.from_float(
        layer, weight != 0, x_scale=x_scale, pattern=pattern, weight=weight, scale=scale
    )
    return converted


def zeros_pattern(weight: Tensor) -> str | None:
    """``"1:4"`` or ``"2:4"`` if no group of 4 neighbours of a weight (N, K) or (O, C, kh, kw) has more nonzeros than that; else None,
    also for K < 4, where every weight would have one."""
    flat = weight.flatten(1)
    if flat.shape[1] < 4 or flat.numel() == 0:
        return None
    groups = F.pad(flat != 0, (0, -flat.shape[1] % 4)).unflatten(1, (-1, 4))
    most = int(groups.sum(-1).max())
    return "1:4" if most <= 1 else "2:4" if most == 2 else None


def _obstacle(layer: nn.Module) -> str | None:
    """Why no float layer can be packed, whatever its speed."""
    if parametrize.is_parametrized(layer):
        return "its weight has parametrizations (fake quantization?), convert those too"
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return f"no sparse layer for {type(layer).__name__}"
    if layer.weight.dtype != torch.float32:
        return f"the sparse kernels hold float32 weights, this layer {layer.weight.dtype}"
    return _unsupported(layer)


def _unsupported(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.Linear):
        return None
    if not isinstance(layer, nn.Conv2d):
        return f"no sparse layer for {type(layer).__name__}"
    if layer.groups != 1:
        return f"the sparse convolution needs groups = 1, this layer has {layer.groups}"
    if layer.padding_mode != "zeros":
        return f"the sparse convolution pads with zeros, not padding_mode={layer.padding_mode!r}"
    try:
        explicit_padding(layer)
    except ValueError as error:
        return str(error)
    return None


def _loss(layer: Any, pattern: str, int8: bool) -> str | None:
    """Why the sparse kernels do not gain on this layer, or None if they do."""
    if layer.weight.device.type != "cpu":
        return f"no native kernel for {layer.weight.device.type} tensors"
    if missing := native.fallback_reason("int8_sparse24_linear" if int8 else "sparse24_linear"):
        return missing
    threads = torch.get_num_threads()
    if isinstance(layer, nn.Linear):
        sizes = f"{layer.in_features} x {layer.out_features}"
    else:
        sizes = f"{layer.in_channels} x {layer.out_channels} channels x {layer.kernel_size[0]} x {layer.kernel_size[1]}"
    if layer.weight.numel() < SMALLEST:
        return f"{sizes} is too small to gain"
    if isinstance(layer, nn.Linear):
        ratio = gain(layer.in_features, layer.out_features, threads, int8, pattern)
    else:
        geometry = (layer.kernel_size, layer.stride, explicit_padding(layer), layer.dilation)
        ratio = conv_gain(layer.in_channels, layer.out_channels, *geometry, threads, int8, pattern)
    if ratio < 1.0:
        return f"the sparse kernel runs at {ratio:.2f}x of the dense layer's speed here"
    return None


@cache
def gain(in_features: int, out_features: int, threads: int, int8: bool = False, pattern: str = "2:4") -> float:
    """Speed of ``Sparse24Linear`` over ``nn.Linear`` of this shape (of ``Int8Sparse24Linear`` over ``Int8Linear``): geometric mean over
    ``ROWS``. Measured once per process."""
    with torch.random.fork_rng(devices=[]):
        dense: nn.Module = nn.Linear(in_features, out_features)
        if int8:
            dense = Int8Linear.from_float(dense)
        sparse = (Int8Sparse24Linear if int8 else Sparse24Linear)(in_features, out_features, pattern=pattern)
        return speed_up(dense, sparse, [torch.randn(rows, in_features) for rows in ROWS])


@cache
def conv_gain(
    in_channels: int,
    out_channels: int,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    threads: int,
    int8: bool = False,
    pattern: str = "2:4",
) -> float:
    """Speed of ``Sparse24Conv2d`` over ``nn.Conv2d`` (of ``Int8Sparse24Conv2d`` over ``Int8Conv2d``) on one square image."""
    with torch.random.fork_rng(devices=[]):
        geometry = (in_channels, out_channels, kernel_size, stride, padding, dilation)
        dense: nn.Module = nn.Conv2d(*geometry)
        if int8:
            dense = Int8Conv2d.from_float(dense)
        sparse = (Int8Sparse24Conv2d if int8 else Sparse24Conv2d)(*geometry, pattern=pattern)
        size = [max(IMAGE, dilation[i] * (kernel_size[i] - 1) + 1) for i in range(2)]
        return speed_up(dense, sparse, [torch.randn(1, in_channels, *size)])
