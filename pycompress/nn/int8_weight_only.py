"""Layers with int8 weights and float arithmetic: a quarter of the memory where int8 activations would cost too much accuracy."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import native
from ..ops.affine import quantize_weight
from ..ops.cuda.extension import NAME as CUDA
from ..ops.cuda.extension import fallback_reason, kernel_for
from ..ops.cuda.weight_only import pad_int8
from ..ops.int8_weight_linear import int8_weight_linear_unchecked
from .base import LAYERS
from .packed import PackedModule

_REASON = "weight-only int8 widens its weights and multiplies in float"


class _Int8WeightOnly(PackedModule):
    """``weight`` (int8) and ``scale`` (float32, one per output channel)."""

    bias: Tensor | None
    format = "int8 weight-only"

    def _register(self, shape: tuple[int, ...], bias: bool) -> None:
        self.canonical = {"weight": (torch.int8, shape)}
        self.register_buffer("packed", None, persistent=False)
        self.register_buffer("scale", torch.ones(shape[0], dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(shape[0], dtype=torch.float32) if bias else None)
        self._set_canonical({"weight": torch.zeros(shape, dtype=torch.int8)})

    def _fill(self, layer: nn.Linear | nn.Conv2d, weight: Tensor | None, scale: Tensor | None) -> None:
        if (weight is None) != (scale is None):
            raise ValueError(f"{type(self).__name__}.from_float: weight and scale must be given together")
        if weight is None or scale is None:
            weight, scale = quantize_weight(layer.weight)
        self.to(weight.device).weight_dtype = layer.weight.dtype
        with torch.no_grad():
            self.scale.copy_(scale)
            if self.bias is not None:
                self.bias.copy_(layer.bias)
        self._set_canonical({"weight": weight.detach()})
        self.train(layer.training)

    def _set_canonical(self, tensors: dict[str, Tensor]) -> None:
        self._kernel = native.REFERENCE
        self.packed = tensors["weight"].contiguous()

    def _get_canonical(self) -> dict[str, Tensor]:
        return {"weight": self.int_weight}

    @property
    def int_weight(self) -> Tensor:
        """Canonical int8 weight."""
        return self.packed

    def _float(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        # Scaled before the product, not after: unscaled sums of int8 values would leave the range of float16.
        return self._dequantized().to(dtype), None if self.bias is None else self.bias.to(dtype)

    def _refuse_dtype(self, x: Tensor) -> None:
        """Weights cast to integers would be zeros, and so would the result."""
        raise TypeError(f"{type(self).__name__}: x must be a floating-point tensor, got {x.dtype}")

    @property
    def fallback_reason(self) -> str | None:
        return _REASON

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.canonical["weight"][1]

    def num_params(self) -> int:
        return self.packed.numel() + (0 if self.bias is None else self.bias.numel())


@LAYERS.register("Int8WeightOnlyLinear")
class Int8WeightOnlyLinear(_Int8WeightOnly):
    """Drop-in for ``nn.Linear``: int8 weights, float activations.

    Equals ``F.linear(x, weight, bias)``; float32, bfloat16 and float16 run :func:`pycompress.ops.int8_weight_linear`, other dtypes write
    out a float weight on every call.

    >>> layer = Int8WeightOnlyLinear.from_float(nn.Linear(64, 32))
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self._register((out_features, in_features), bias)

    @classmethod
    def from_float(cls, linear: nn.Linear, *, weight: Tensor | None = None, scale: Tensor | None = None) -> Int8WeightOnlyLinear:
        """``weight`` (int8) and ``scale`` override plain rounding. Raises ``ValueError`` for NaN or infinite weights."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None)
        layer._fill(linear, weight, scale)
        return layer

    def _set_canonical(self, tensors: dict[str, Tensor]) -> None:
        weight = tensors["weight"]
        self._kernel = kernel_for("int8_weight_linear", weight, None, "Int8WeightOnlyLinear")
        self.packed = pad_int8(weight) if self._kernel == CUDA else weight.contiguous()

    @property
    def int_weight(self) -> Tensor:
        """Canonical int8 weight (out_features, in_features); the rows of ``packed`` may be padded."""
        return self.packed[:, : self.in_features].contiguous()

    def num_params(self) -> int:
        return self.out_features * self.in_features + (0 if self.bias is None else self.out_features)

    @property
    def fallback_reason(self) -> str | None:
        if self._kernel != native.REFERENCE:
            return None
        return fallback_reason("int8_weight_linear", self.packed.device)

    def forward(self, input: Tensor) -> Tensor:
        if not input.is_floating_point():
            self._refuse_dtype(input)
        if input.shape[-1:] != (self.in_features,) or input.device != self.scale.device:
            got = f"{tuple(input.shape)} on {input.device}"
            raise ValueError(f"Int8WeightOnlyLinear: x must be (..., {self.in_features}) on {self.scale.device}, got {got}")
        return int8_weight_linear_unchecked(input, self.packed, self.scale, self.bias, self._kernel)

    def to_dense(self) -> nn.Linear:
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=self.scale.device, dtype=self.weight_dtype)
        with torch.no_grad():
            dense.weight.copy_(self.weight)
            if self.bias is not None:
                dense.bias.copy_(self.bias)
        return dense.train(self.training)

    def config(self) -> dict[str, Any]:
        return {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None}

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, format={self.format}"


@LAYERS.register("Int8WeightOnlyConv2d")
class Int8WeightOnlyConv2d(_Int8WeightOnly):
    """Drop-in for ``nn.Conv2d``: int8 weights, activations and sums in the dtype of ``x``. Zero padding only.

    >>> layer = Int8WeightOnlyConv2d.from_float(nn.Conv2d(3, 8, 3, padding="same"))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = tuple(kernel_size), tuple(stride), tuple(dilation)
        self.padding = padding if isinstance(padding, str) else tuple(padding)
        self._register((out_channels, in_channels // groups, *self.kernel_size), bias)

    @classmethod
    def from_float(cls, conv: nn.Conv2d, *, weight: Tensor | None = None, scale: Tensor | None = None) -> Int8WeightOnlyConv2d:
        """As ``Int8WeightOnlyLinear.from_float``; raises ``ValueError`` for padding modes other than zeros too."""
        if conv.padding_mode != "zeros":
            raise ValueError(f"Int8WeightOnlyConv2d.from_float: padding_mode must be 'zeros', got {conv.padding_mode!r}")
        geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        layer = cls(conv.in_channels, conv.out_channels, *geometry, conv.bias is not None)
        layer._fill(conv, weight, scale)
        return layer

    def _geometry(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    def forward(self, input: Tensor) -> Tensor:
        if not input.is_floating_point():
            self._refuse_dtype(input)
        return F.conv2d(input, *self._float(input.dtype), **self._geometry())

    def to_dense(self) -> nn.Conv2d:
        options = {"bias": self.bias is not None, "device": self.scale.device, "dtype": self.weight_dtype}
        dense = nn.Conv2d(self.in_channels, self.out_channels, self.kernel_size, **self._geometry(), **options)
        with torch.no_grad():
            dense.weight.copy_(self.weight)
            if self.bias is not None:
                dense.bias.copy_(self.bias)
        return dense.train(self.training)

    def config(self) -> dict[str, Any]:
        geometry = {name: list(value) if isinstance(value, tuple) else value for name, value in self._geometry().items()}
        sizes = {"in_channels": self.in_channels, "out_channels": self.out_channels, "kernel_size": list(self.kernel_size)}
        return {**sizes, **geometry, "bias": self.bias is not None}

    def extra_repr(self) -> str:
        sizes = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        return f"{sizes}, bias={self.bias is not None}, format={self.format}"
