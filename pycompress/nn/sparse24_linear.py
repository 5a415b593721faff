"""``Sparse24Linear``: drop-in for an ``nn.Linear`` whose weight is 2:4 sparse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import native
from ..ops.activation import check_activation
from ..ops.int8_linear import check_input
from ..ops.sparse24 import parse_nm, sparse24_compress
from ..ops.sparse24_linear import OP, sparse24_linear_packed
from .base import LAYERS
from .sparse24_weight import Sparse24Weight


@LAYERS.register("Sparse24Linear")
class Sparse24Linear(Sparse24Weight):
    """Linear layer on float32 weights of which every 4 neighbours keep 2: half the products, 53 % of the bytes.

    ``pattern`` may be any N:M; 2:4 and 1:4 have native kernels. The weight is frozen, the gradient reaches ``x``.
    See ``pycompress.ops.sparse24_linear``.

    >>> layer = Sparse24Linear.from_float(linear, mask=sparse24_mask(linear.weight.abs()))
    >>> y = layer(torch.randn(8, linear.in_features))
    """

    op = OP
    values_dtype = torch.float32

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, pattern: str = "2:4", activation: str | None = None
    ) -> None:
        super().__init__()
        check_activation("Sparse24Linear", activation)
        parse_nm("Sparse24Linear", pattern)
        self.in_features, self.out_features = in_features, out_features
        self.pattern, self.activation = pattern, activation or "none"
        self.register_packed(out_features, in_features)
        self.register_buffer("bias", torch.zeros(out_features, dtype=torch.float32) if bias else None)
        self.set_empty()

    @classmethod
    def from_float(
        cls, linear: nn.Linear, mask: Tensor | None = None, *, pattern: str = "2:4", activation: str | None = None
    ) -> Sparse24Linear:
        """Compress an ``nn.Linear``. ``mask`` (bool, True = keep) None: the weight itself must have the pattern.

        Raises ``ValueError`` for a mask or weight that has not; a weight is never pruned silently.
        """
        values, indices = sparse24_compress(linear.weight.detach().float(), mask, pattern=pattern)
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, pattern=pattern, activation=activation)
        layer.to(values.device).weight_dtype = linear.weight.dtype
        if linear.bias is not None:
            layer.bias.copy_(linear.bias.detach())
        layer._set_canonical({"values": values, "indices": indices})
        return layer.train(linear.training)

    @property
    def format(self) -> str:
        return f"{self.pattern} float32"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def num_params(self) -> int:
        kept = parse_nm("Sparse24Linear", self.pattern).kept(self.in_features)
        return self.out_features * kept + (self.out_features if self.bias is not None else 0)

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[-1:] != (self.in_features,) or input.dtype not in native.DTYPES or input.device != self.packed.device:
            check_input("Sparse24Linear", input, self.in_features, self.weight_shape, self._device)
        return sparse24_linear_packed(
            input, self.packed, self.bias, self.out_features, self.in_features, self.pattern, self.activation, self._kernel
        )

    def to_dense(self) -> nn.Linear:
        """Float layer with the same weights (a fused activation is not part of it)."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=self.packed.device, dtype=self.weight_dtype)
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
            "pattern": self.pattern,
            "activation": None if self.activation == "none" else self.activation,
        }

    def extra_repr(self) -> str:
        activation = "" if self.activation == "none" else f", activation={self.activation}"
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, format={self.format}, kernel={self.kernel}{activation}"
        )
