"""``Sparse24Conv2d``: drop-in for an ``nn.Conv2d`` whose weight is 2:4 sparse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.activation import check_activation
from ..ops.sparse24 import parse_nm, sparse24_compress
from ..ops.sparse24_conv2d import check_image, sparse24_conv2d_packed
from ..ops.sparse24_linear import OP
from .base import LAYERS
from .int8_conv2d import explicit_padding
from .sparse24_weight import Sparse24Weight


@LAYERS.register("Sparse24Conv2d")
class Sparse24Conv2d(Sparse24Weight):
    """2-d convolution on float32 weights of which every 4 neighbours of the flattened (C * kh * kw) keep 2.

    Groups must be 1. The weight is frozen, the gradient reaches ``x``. See ``pycompress.ops.sparse24_conv2d``.

    >>> layer = Sparse24Conv2d.from_float(conv, mask=sparse24_mask(conv.weight.flatten(1).abs()).view_as(conv.weight))
    >>> y = layer(torch.randn(1, conv.in_channels, 16, 16))
    """

    op = OP
    values_dtype = torch.float32

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
        pattern: str = "2:4",
        activation: str | None = None,
    ) -> None:
        super().__init__()
        check_activation("Sparse24Conv2d", activation)
        parse_nm("Sparse24Conv2d", pattern)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride = (kernel_size[0], kernel_size[1]), (stride[0], stride[1])
        self.padding, self.dilation = (padding[0], padding[1]), (dilation[0], dilation[1])
        self.pattern, self.activation = pattern, activation or "none"
        self.register_packed(out_channels, in_channels * self.kernel_size[0] * self.kernel_size[1])
        self.register_buffer("bias", torch.zeros(out_channels, dtype=torch.float32) if bias else None)
        self.set_empty()

    @classmethod
    def from_float(
        cls, conv: nn.Conv2d, mask: Tensor | None = None, *, pattern: str = "2:4", activation: str | None = None
    ) -> Sparse24Conv2d:
        """Compress an ``nn.Conv2d``. ``mask`` (bool, the weight's shape, True = keep) None: the weight itself must have the pattern.

        Raises ``ValueError`` for a mask or weight that has not, for groups, and for padding modes other than zeros.
        """
        where = "Sparse24Conv2d.from_float"
        if conv.groups != 1:
            raise ValueError(f"{where}: groups must be 1, got {conv.groups}")
        if conv.padding_mode != "zeros":
            raise ValueError(f"{where}: padding_mode must be 'zeros', got {conv.padding_mode!r}")
        if mask is not None and mask.shape != conv.weight.shape:
            raise ValueError(f"{where}: mask must be {tuple(conv.weight.shape)} like weight, got {tuple(mask.shape)}")
        padding = explicit_padding(conv)
        flat = conv.weight.detach().float().flatten(1)
        values, indices = sparse24_compress(flat, None if mask is None else mask.flatten(1), pattern=pattern)
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            padding,
            conv.dilation,
            conv.bias is not None,
            pattern=pattern,
            activation=activation,
        )
        layer.to(values.device).weight_dtype = conv.weight.dtype
        if conv.bias is not None:
            layer.bias.copy_(conv.bias.detach())
        layer._set_canonical({"values": values, "indices": indices})
        return layer.train(conv.training)

    @property
    def format(self) -> str:
        return f"{self.pattern} float32"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels, *self.kernel_size)

    def num_params(self) -> int:
        return self.canonical["values"][1][0] * self.canonical["values"][1][1] + (self.out_channels if self.bias is not None else 0)

    def forward(self, input: Tensor) -> Tensor:
        check_image("Sparse24Conv2d", input)
        if input.shape[1] != self.in_channels or input.device != self.packed.device:
            got = f"{tuple(input.shape)} on {input.device}"
            raise ValueError(f"Sparse24Conv2d: x must have {self.in_channels} channels on {self.packed.device}, got {got}")
        return sparse24_conv2d_packed(
            input,
            self.packed,
            self.bias,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.pattern,
            self.activation,
            self._kernel,
        )

    def to_dense(self) -> nn.Conv2d:
        """Float layer with the same weights (a fused activation is not part of it)."""
        dense = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            bias=self.bias is not None,
            device=self.packed.device,
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
            "pattern": self.pattern,
            "activation": None if self.activation == "none" else self.activation,
        }

    def extra_repr(self) -> str:
        activation = "" if self.activation == "none" else f", activation={self.activation}"
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"format={self.format}, kernel={self.kernel}{activation}"
        )
