"""``Int8Sparse24Conv2d``: drop-in for an ``nn.Conv2d`` with 2:4 sparse int8 weights and int8 arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.activation import check_activation
from ..ops.affine import quantize_weight
from ..ops.int8_linear import check_activation_quantization
from ..ops.int8_sparse24_conv2d import int8_sparse24_conv2d_packed
from ..ops.int8_sparse24_linear import OP
from ..ops.sparse24 import parse_nm, sparse24_compress
from ..ops.sparse24_conv2d import check_image
from .base import LAYERS
from .int8_conv2d import explicit_padding
from .packed import Int8ActivationModule
from .sparse24_conv2d import Sparse24Conv2d
from .sparse24_weight import Sparse24Weight


@LAYERS.register("Int8Sparse24Conv2d")
class Int8Sparse24Conv2d(Sparse24Weight, Int8ActivationModule):
    """2-d convolution on int8 weights of which every 4 neighbours of the flattened (C * kh * kw) keep 2. Groups must be 1.

    Activations are quantised on the fly, symmetric: dynamic (one scale per image), or with the scale in ``x_scale`` if ``static``.
    The image is unfolded piece by piece, which ``Int8Conv2d`` avoids: it gains where channels are many.
    See ``pycompress.ops.int8_sparse24_conv2d``.

    >>> layer = Int8Sparse24Conv2d.from_float(conv, mask=sparse24_mask(conv.weight.flatten(1).abs()).view_as(conv.weight))
    >>> y = layer(torch.randn(1, conv.in_channels, 16, 16))
    """

    op = OP
    values_dtype = torch.int8
    asymmetric = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        bias: bool = True,
        *,
        static: bool = False,
        pattern: str = "2:4",
        activation: str | None = None,
    ) -> None:
        super().__init__()
        where = "Int8Sparse24Conv2d"
        check_activation(where, activation)
        parse_nm(where, pattern)
        depth = in_channels * kernel_size[0] * kernel_size[1]
        check_activation_quantization(where, depth, 1.0 if static else None, None)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = (kernel_size[0], kernel_size[1]), (stride[0], stride[1])
        self.padding, self.dilation = (padding[0], padding[1]), (dilation[0], dilation[1])
        self.static, self.pattern, self.activation = static, pattern, activation or "none"
        self.register_packed(out_channels, depth)
        self.register_buffer("scale", torch.ones(out_channels, dtype=torch.float32))
        self.register_static_activation()
        self.register_buffer("bias", torch.zeros(out_channels, dtype=torch.float32) if bias else None)
        self.set_empty()
        self._loaded()

    @classmethod
    def from_float(
        cls,
        conv: nn.Conv2d | Sparse24Conv2d,
        mask: Tensor | None = None,
        *,
        x_scale: float | None = None,
        pattern: str = "2:4",
        activation: str | None = None,
        weight: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Int8Sparse24Conv2d:
        """Quantise and compress an ``nn.Conv2d``, or quantise a ``Sparse24Conv2d``, whose pattern and activation then stay.

        ``mask`` (bool, the weight's shape, True = keep) None: the weight itself must have the pattern. ``x_scale`` None = dynamic.
        ``weight`` (int8) and ``scale`` override plain rounding. Raises ``ValueError`` for a mask or weight without the pattern, for NaN
        weights, for groups, and for padding modes other than zeros.
        """
        where = "Int8Sparse24Conv2d.from_float"
        if (weight is None) != (scale is None):
            raise ValueError(f"{where}: weight and scale must be given together")
        if isinstance(conv, Sparse24Conv2d):
            pattern, activation = conv.pattern, activation or (None if conv.activation == "none" else conv.activation)
            padding = conv.padding
        else:
            if conv.groups != 1:
                raise ValueError(f"{where}: groups must be 1, got {conv.groups}")
            if conv.padding_mode != "zeros":
                raise ValueError(f"{where}: padding_mode must be 'zeros', got {conv.padding_mode!r}")
            padding = explicit_padding(conv)
        if mask is not None and mask.shape != conv.weight.shape:
            raise ValueError(f"{where}: mask must be {tuple(conv.weight.shape)} like weight, got {tuple(mask.shape)}")
        dense = conv.weight.detach().float().flatten(1)
        check_activation_quantization(where, dense.shape[1], x_scale, None)
        flat_mask = None if mask is None else mask.flatten(1)
        sparse24_compress(dense, flat_mask, pattern=pattern)  # refuses what has not the pattern, before rounding may hide it
        keep = dense != 0 if flat_mask is None else flat_mask
        if weight is None:
            weight, scale = quantize_weight(torch.where(keep, dense, 0.0))
        values, indices = sparse24_compress(weight.detach().flatten(1), keep, pattern=pattern)
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            padding,
            conv.dilation,
            conv.bias is not None,
            static=x_scale is not None,
            pattern=pattern,
            activation=activation,
        )
        layer.to(values.device).weight_dtype = conv.weight.dtype
        with torch.no_grad():
            layer.scale.copy_(scale)
            if conv.bias is not None:
                layer.bias.copy_(conv.bias)
            if x_scale is not None:
                layer.x_scale.fill_(x_scale)
        layer._set_canonical({"values": values, "indices": indices})
        layer._loaded()
        return layer.train(conv.training)

    @property
    def format(self) -> str:
        return f"{self.pattern} int8 {'static' if self.static else 'dynamic'}"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels, *self.kernel_size)

    def num_params(self) -> int:
        return self.canonical["values"][1][0] * self.canonical["values"][1][1] + (self.out_channels if self.bias is not None else 0)

    def forward(self, input: Tensor) -> Tensor:
        check_image("Int8Sparse24Conv2d", input)
        if input.shape[1] != self.in_channels or input.device != self.packed.device:
            got = f"{tuple(input.shape)} on {input.device}"
            raise ValueError(f"Int8Sparse24Conv2d: x must have {self.in_channels} channels on {self.packed.device}, got {got}")
        return int8_sparse24_conv2d_packed(
            input,
            self.packed,
            self.scale,
            self.bias,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.pattern,
            self._x_scale,
            self.activation,
            self._kernel,
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
            bias=self.bias is not None,
            device=self.scale.device,
            dtype=self.weight_dtype,
        )
        with torch.no_grad():
            dense.weight.copy_(self.weight)
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
            "bias": self.bias is not None,
            "static": self.static,
            "pattern": self.pattern,
            "activation": None if self.activation == "none" else self.activation,
        }

    def extra_repr(self) -> str:
        activation = "" if self.activation == "none" else f", activation={self.activation}"
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"format={self.format}, kernel={self.kernel}{activation}"
        )
