"""``Int8Sparse24Linear``: drop-in for an ``nn.Linear`` with 2:4 sparse int8 weights and int8 arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import native
from ..ops.activation import check_activation
from ..ops.affine import quantize_weight
from ..ops.int8_linear import check_activation_quantization, check_input
from ..ops.int8_sparse24_linear import OP, int8_sparse24_linear_packed
from ..ops.sparse24 import parse_nm, sparse24_compress
from .base import LAYERS
from .packed import Int8ActivationModule
from .sparse24_linear import Sparse24Linear
from .sparse24_weight import Sparse24Weight


@LAYERS.register("Int8Sparse24Linear")
class Int8Sparse24Linear(Sparse24Weight, Int8ActivationModule):
    """Linear layer on int8 weights of which every 4 neighbours keep 2: half the products and 63 % of the bytes of ``Int8Linear``.

    Activations are quantised on the fly, symmetric: dynamic (one scale per row), or with the scale in ``x_scale`` if ``static``.
    ``pattern`` may be any N:M; 2:4 and 1:4 have native kernels. See ``pycompress.ops.int8_sparse24_linear``.

    >>> layer = Int8Sparse24Linear.from_float(linear, mask=sparse24_mask(linear.weight.abs()))
    >>> y = layer(torch.randn(8, linear.in_features))
    """

    op = OP
    values_dtype = torch.int8
    asymmetric = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        static: bool = False,
        pattern: str = "2:4",
        activation: str | None = None,
    ) -> None:
        super().__init__()
        check_activation("Int8Sparse24Linear", activation)
        parse_nm("Int8Sparse24Linear", pattern)
        check_activation_quantization("Int8Sparse24Linear", in_features, 1.0 if static else None, None)
        self.in_features, self.out_features = in_features, out_features
        self.static, self.pattern, self.activation = static, pattern, activation or "none"
        self.register_packed(out_features, in_features)
        self.register_buffer("scale", torch.ones(out_features, dtype=torch.float32))
        self.register_static_activation()
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float32) if bias else None)
        self.set_empty()
        self._loaded()

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear | Sparse24Linear,
        mask: Tensor | None = None,
        *,
        x_scale: float | None = None,
        pattern: str = "2:4",
        activation: str | None = None,
        weight: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Int8Sparse24Linear:
        """Quantise and compress an ``nn.Linear``, or quantise a ``Sparse24Linear``, whose pattern and activation then stay.

        ``mask`` (bool, True = keep) None: the weight itself must have the pattern. ``x_scale`` None = dynamic. ``weight`` (int8) and
        ``scale`` override plain rounding. Raises ``ValueError`` for a mask or weight without the pattern and for NaN weights.
        """
        where = "Int8Sparse24Linear.from_float"
        if (weight is None) != (scale is None):
            raise ValueError(f"{where}: weight and scale must be given together")
        check_activation_quantization(where, linear.in_features, x_scale, None)
        if isinstance(linear, Sparse24Linear):
            pattern, activation = linear.pattern, activation or (None if linear.activation == "none" else linear.activation)
        dense = linear.weight.detach().float()
        sparse24_compress(dense, mask, pattern=pattern)  # refuses what has not the pattern, before rounding may hide it
        mask = dense != 0 if mask is None else mask
        if weight is None:
            weight, scale = quantize_weight(torch.where(mask, dense, 0.0))
        values, indices = sparse24_compress(weight.detach(), mask, pattern=pattern)
        has_bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, has_bias, static=x_scale is not None, pattern=pattern, activation=activation)
        layer.to(values.device).weight_dtype = linear.weight.dtype
        with torch.no_grad():
            layer.scale.copy_(scale)
            if has_bias:
                layer.bias.copy_(linear.bias)
            if x_scale is not None:
                layer.x_scale.fill_(x_scale)
        layer._set_canonical({"values": values, "indices": indices})
        layer._loaded()
        return layer.train(linear.training)

    @property
    def format(self) -> str:
        return f"{self.pattern} int8 {'static' if self.static else 'dynamic'}"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def num_params(self) -> int:
        kept = parse_nm("Int8Sparse24Linear", self.pattern).kept(self.in_features)
        return self.out_features * kept + (self.out_features if self.bias is not None else 0)

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-1:] != (self.in_features,) or input.dtype not in native.DTYPES or input.device != self.scale.device:
            check_input("Int8Sparse24Linear", input, self.in_features, self.weight_shape, self._device)
        return int8_sparse24_linear_packed(
            input,
            self.packed,
            self.scale,
            self.bias,
            self.out_features,
            self.in_features,
            self.pattern,
            self._x_scale,
            self.activation,
            self._kernel,
        )

    def to_dense(self) -> nn.Linear:
        """Float layer with the dequantised weights (a fused activation is not part of it)."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=self.scale.device, dtype=self.weight_dtype)
        with torch.no_grad():
            dense.weight.copy_(self.weight)
            if self.bias is not None:
                dense.bias.copy_(self.bias)
        return dense.train(self.training)

    def config(self) -> dict[str, Any]:
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "static": self.static,
            "pattern": self.pattern,
            "activation": None if self.activation == "none" else self.activation,
        }

    def extra_repr(self) -> str:
        activation = "" if self.activation == "none" else f", activation={self.activation}"
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, format={self.format}, kernel={self.kernel}{activation}"
        )
