"""``Int8Conv2d``: drop-in for ``nn.Conv2d`` with int8 weights and int8 arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import native
from ..ops.affine import quantize_weight
from ..ops.int8_conv2d import int8_conv2d
from ..ops.int8_linear import check_activation_quantization
from .base import LAYERS
from .packed import Int8ActivationModule


@LAYERS.register("Int8Conv2d")
class Int8Conv2d(Int8ActivationModule):
    """2-d convolution: int8 weights per output channel, int8 activations, exact integer sums, float in and out.

    Dynamic activations (one symmetric scale per image) unless ``static``; see ``pycompress.ops.int8_conv2d``.

    >>> layer = Int8Conv2d.from_float(nn.Conv2d(3, 8, 3, padding=1))
    >>> y = layer(torch.randn(1, 3, 16, 16))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        bias: bool = True,
        *,
        static: bool = False,
        asymmetric: bool = False,
        activation: str | None = None,
    ) -> None:
        super().__init__()
        if activation not in native.ACTIVATIONS:
            raise ValueError(f"Int8Conv2d: activation must be None, 'relu', 'gelu' or 'silu', got {activation!r}")
        if asymmetric and not static:
            raise ValueError("Int8Conv2d: asymmetric activations need static=True")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.padding, self.dilation = tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation)
        self.static, self.asymmetric, self.activation = static, asymmetric, activation or "none"
        depth = in_channels // groups * self.kernel_size[0] * self.kernel_size[1]
        check_activation_quantization("Int8Conv2d", depth, 1.0 if static else None, 0 if asymmetric else None)
        self.canonical = {"weight": (torch.int8, self.weight_shape)}
        self.register_buffer("packed", None, persistent=False)
        self.register_buffer("scale", torch.ones(out_channels))
        self.register_static_activation()
        self.register_buffer("bias", torch.zeros(out_channels) if bias else None)
        self._set_canonical({"weight": torch.zeros(self.weight_shape, dtype=torch.int8)})
        self._loaded()

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d,
        *,
        x_scale: float | None = None,
        x_zero_point: int | None = None,
        activation: str | None = None,
        weight: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Int8Conv2d:
        """Quantise an ``nn.Conv2d``. ``x_scale`` None = dynamic; ``weight`` (int8) and ``scale`` override plain rounding.

        Raises ``ValueError`` for NaN weights, string padding with even kernels, and padding modes other than zeros.
        """
        if (weight is None) != (scale is None):
            raise ValueError("Int8Conv2d.from_float: weight and scale must be given together")
        if conv.padding_mode != "zeros":
            raise ValueError(f"Int8Conv2d.from_float: padding_mode must be 'zeros', got {conv.padding_mode!r}")
        if weight is None:
            weight, scale = quantize_weight(conv.weight)
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            explicit_padding(conv),
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            static=x_scale is not None,
            asymmetric=x_zero_point is not None,
            activation=activation,
        )
        check_activation_quantization("Int8Conv2d.from_float", weight[0].numel(), x_scale, x_zero_point)
        layer.to(weight.device)
        with torch.no_grad():
            layer.scale.copy_(scale)
            if conv.bias is not None:
                layer.bias.copy_(conv.bias)
            if x_scale is not None:
                layer.x_scale.fill_(x_scale)
            if x_zero_point is not None:
                layer.x_zero_point.fill_(x_zero_point)
        layer._set_canonical({"weight": weight.detach()})
        layer._loaded()
        return layer.train(conv.training)

    def _set_canonical(self, tensors: dict[str, Tensor]) -> None:
        self._kernel = native.REFERENCE
        self.packed = tensors["weight"].contiguous()

    def _get_canonical(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    @property
    def weight(self) -> Tensor:
        """Canonical int8 weight (out_channels, in_channels / groups, kh, kw)."""
        return self.packed

    @property
    def fallback_reason(self) -> str | None:
        if self._kernel != native.REFERENCE:
            return None
        return native.fallback_reason("int8_conv2d") or f"no native kernel for {self.packed.device.type} tensors"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    def num_params(self) -> int:
        o, c, kh, kw = self.weight_shape
        return o * c * kh * kw + (o if self.bias is not None else 0)

    def forward(self, x: Tensor) -> Tensor:
        return int8_conv2d(
            x,
            self.weight,
            self.scale,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            x_scale=self._x_scale,
            x_zero_point=self._x_zero_point,
            activation=self.activation,
        )

    def to_dense(self) -> nn.Conv2d:
        """Float layer with the dequantised weights (a fused activation is not part of it)."""
        dense = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            device=self.scale.device,
        )
        with torch.no_grad():
            dense.weight.copy_(self.weight.float() * self.scale[:, None, None, None])
            if self.bias is not None:
                dense.bias.copy_(self.bias)
        return dense.train(self.training)

    def config(self) -> dict[str, Any]:
        return {
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "kernel_size": list(self.kernel_size),
            "stride": list(self.stride),
            "padding": list(self.padding),
            "dilation": list(self.dilation),
            "groups": self.groups,
            "bias": self.bias is not None,
            "static": self.static,
            "asymmetric": self.asymmetric,
            "activation": self.activation,
        }

    def extra_repr(self) -> str:
        activation = "" if self.activation == "none" else f", activation={self.activation}"
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"groups={self.groups}, format={self.format}, kernel={self.kernel}{activation}"
        )


def explicit_padding(conv: nn.Conv2d) -> tuple[int, int]:
    """Padding as numbers. ``"same"`` with an odd total needs different amounts on both sides, which no kernel here takes."""
    if not isinstance(conv.padding, str):
        return tuple(conv.padding)
    if conv.padding == "valid":
        return (0, 0)
    totals = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if any(t % 2 for t in totals):
        raise ValueError(f"Int8Conv2d.from_float: padding='same' needs dilation * (kernel_size - 1) even, got {conv.kernel_size}")
    return (totals[0] // 2, totals[1] // 2)
