"""Configs of the layers with int4 weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..nn.int4_linear import Int4Linear
from ..ops import native
from ..ops.int4 import SYMMETRIC_ZERO_POINT, check_group_size, num_groups, pack_nibbles
from .configs import QuantizationConfig
from .fake_quantize import FakeQuantize, quantized_weight
from .layers import float_twin
from .scheme import Scheme, check_bool


@dataclass(frozen=True)
class Int4WeightOnly(QuantizationConfig):
    """int4 weights with a scale per group of inputs, float activations: an eighth of the memory, made for few rows. Linear only.

    - ``group_size``: 32, 64 or 128 neighbours along the input dimension share a scale
    - ``symmetric``: False adds a zero point (0 to 15) per group

    >>> model = pycompress.quantize(model, Int4WeightOnly(group_size=64))
    """

    layer_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    int8_activations: ClassVar[bool] = False

    group_size: int = 128
    symmetric: bool = True

    def __post_init__(self) -> None:
        check_group_size(type(self).__name__, self.group_size)
        check_bool(type(self).__name__, "symmetric", self.symmetric)

    def weight_quantizer(self) -> FakeQuantize:
        return FakeQuantize(Scheme(4, self.symmetric, "group", self.group_size))

    def obstacle(self, layer: nn.Module) -> str | None:
        weight: Tensor = layer.weight  # type: ignore[assignment]
        if weight.dtype not in native.DTYPES:
            return f"the int4 layers take float32, bfloat16 and float16, its weight is {weight.dtype}"
        return None

    def convert(self, layer: nn.Module) -> nn.Module:
        q, scale, zero_point = quantized_weight(layer)
        n, k = q.shape
        groups = (n, num_groups(k, self.group_size))
        # Simulated integers run from -8 to 7, stored ones from 0 to 15.
        tensors: dict[str, Any] = {"weight": pack_nibbles(q + SYMMETRIC_ZERO_POINT), "scale": scale.detach().float().reshape(groups)}
        if not self.symmetric:
            tensors["zero_point"] = (zero_point.reshape(groups) + SYMMETRIC_ZERO_POINT).to(torch.uint8)
        options: dict[str, Any] = {"group_size": self.group_size, "symmetric": self.symmetric, "int8_activations": self.int8_activations}
        return Int4Linear.from_float(float_twin(layer), **options, **tensors)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Int8ActInt4Weight(Int4WeightOnly):
    """int4 weights with a scale per group, int8 activations (dynamic, per token, symmetric): made for many rows. Linear only.

    On CPUs without VNNI faster than int8 weights; ``group_size`` and ``symmetric`` as in ``Int4WeightOnly``.

    >>> model = pycompress.quantize(model, Int8ActInt4Weight(group_size=128))
    """

    int8_activations: ClassVar[bool] = True

    def activation_scheme(self) -> Scheme:
        return Scheme(granularity="token")
