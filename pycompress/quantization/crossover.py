"""Where int8 stops to gain: small layers, few rows, machines without a kernel. There ``convert`` can leave a layer in float."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from ..nn.base import CompressedModule
from ..nn.speed import speed_up
from ..ops import native
from .types import Layer

Crossover = Literal["measure", "table"]

ROWS = (1, 128)
"""Rows that a linear layer is measured on where no example input told."""
IMAGE = 28
"""Height and width (or length) of the image for convolutions, likewise."""

NEVER = (math.inf, math.inf)
TABLE: dict[str, dict[str, tuple[float, float]]] = {
    # Least and most weights between which int8 was the faster one at both 1 and 128 rows (linear), on an image of 28 x 28 (convolution,
    # depthwise; with more channels in a depthwise one, quantizing its input costs more than its few products save), dynamic, one thread
    # of a Zen 4: python benchmarks/crossover.py.
    "avx512_vnni": {"linear": (65536, math.inf), "convolution": (576, math.inf), "depthwise": (0, 576)},
    "avx_vnni": {"linear": (4096, math.inf), "convolution": (576, math.inf), "depthwise": (0, 1152)},  # Emerald Rapids
    "avx2": {"linear": (131072, math.inf), "convolution": (576, math.inf), "depthwise": (0, 576)},
    "scalar": {"linear": NEVER, "convolution": NEVER, "depthwise": NEVER},
    "reference": {"linear": NEVER, "convolution": NEVER, "depthwise": NEVER},
}

_measured: dict[tuple[Any, ...], float] = {}


def slower(layer: Layer, converted: CompressedModule, shapes: Sequence[tuple[int, ...]], how: Crossover) -> str | None:
    """Why the float ``layer`` is the faster one, or None if ``converted`` is at least as fast (or the layer is on an accelerator, where
    nothing is measured).

    ``shapes``: of the inputs it was called with, none if unknown. "measure": a few milliseconds per kind of layer, once per process.
    "table": ``TABLE``; a kernel that is not in it counts as faster.
    """
    if layer.weight.device.type != "cpu":
        return None
    if how == "table":
        kind = kind_of(layer)
        least, most = TABLE.get(converted.kernel, {}).get(kind, (0, math.inf))
        weights = layer.weight.numel()
        if least <= weights <= most:
            return None
        what = (
            "any size" if least == math.inf else f"fewer than {int(least)} weights" if weights < least else f"more than {int(most)} weights"
        )
        return f"left as it is: by the table, float is faster than int8 for {kind} layers of {what} with the {converted.kernel} kernel"
    shapes = tuple(shapes) or default_shapes(layer)
    key = (type(layer).__name__, layer.extra_repr(), str(layer.weight.dtype), converted.format, converted.kernel, shapes)
    key = (*key, torch.get_num_threads())
    if key not in _measured:
        dtype = layer.weight.dtype if layer.weight.dtype in native.DTYPES else torch.float32
        generator = torch.Generator().manual_seed(0)
        _measured[key] = speed_up(layer, converted, [torch.randn(shape, generator=generator).to(dtype) for shape in shapes])
    ratio = _measured[key]
    if ratio >= 1.0:
        return None
    return f"left as it is: int8 ran at {ratio:.2f}x of float's speed here, on {' and '.join(' x '.join(map(str, s)) for s in shapes)}"


def kind_of(layer: Layer) -> str:
    if isinstance(layer, nn.Linear):
        return "linear"
    return "depthwise" if layer.groups == layer.in_channels > 1 else "convolution"


def default_shapes(layer: Layer) -> tuple[tuple[int, ...], ...]:
    if isinstance(layer, nn.Linear):
        return tuple((rows, layer.in_features) for rows in ROWS)
    reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return ((1, layer.in_channels, *(max(IMAGE, n) for n in reach)),)
