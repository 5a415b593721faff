"""Config of embedding tables with integer rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..nn.embedding import Int4Embedding, Int8Embedding
from ..ops import native
from ..ops.int4 import SYMMETRIC_ZERO_POINT, check_group_size, num_groups, pack_nibbles
from .configs import QuantizationConfig
from .fake_quantize import FakeQuantize, quantized_weight
from .scheme import Scheme, check_bool
from .types import Layer


@dataclass(frozen=True)
class EmbeddingWeightOnly(QuantizationConfig):
    """Embedding tables in int8 (one scale per row) or int4 (a scale per group): a quarter or an eighth of the memory, float rows out.

    - ``bits``: 8 or 4
    - ``group_size``, ``symmetric``: int4 only: 32, 64 or 128 neighbours share a scale; False adds a zero point per group

    A table whose weight is tied to an output layer stays as it is, with a note. Together with a config for the other layers:

    >>> model = pycompress.quantize(model, {nn.Linear: Int8Dynamic(), nn.Embedding: EmbeddingWeightOnly()})
    """

    layer_types: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)

    bits: int = 8
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_bool(name, "symmetric", self.symmetric)
        if self.bits not in (4, 8) or isinstance(self.bits, bool):
            raise ValueError(f"{name}: bits must be 8 or 4, got {self.bits!r}")
        if self.bits == 8 and (self.group_size is not None or not self.symmetric):
            raise ValueError(f"{name}: group_size and symmetric=False belong to bits=4, got {self.group_size} and {self.symmetric}")
        if self.bits == 4:
            object.__setattr__(self, "group_size", 64 if self.group_size is None else self.group_size)
            check_group_size(name, self.group_size)

    def weight_quantizer(self) -> FakeQuantize:
        scheme = Scheme(granularity="channel") if self.bits == 8 else Scheme(4, self.symmetric, "group", self.group_size)
        return FakeQuantize(scheme)

    def obstacle(self, layer: Layer) -> str | None:
        if layer.weight.dtype not in native.DTYPES:
            return f"the integer tables take float32, bfloat16 and float16, its weight is {layer.weight.dtype}"
        if layer.max_norm is not None:
            return f"max_norm={layer.max_norm} would rewrite rows on look-up"
        return None

    def convert(self, layer: Layer) -> nn.Module:
        q, scale, zero_point = quantized_weight(layer)
        sizes = (layer.num_embeddings, layer.embedding_dim, layer.padding_idx)
        scale = scale.detach().float()
        if self.bits == 8:
            table = Int8Embedding(*sizes)
            table.weight, table.scale = q.to(torch.int8), scale.reshape(-1)
            return table.train(layer.training)
        assert self.group_size is not None
        groups = (layer.num_embeddings, num_groups(layer.embedding_dim, self.group_size))
        small = Int4Embedding(*sizes, group_size=self.group_size, symmetric=self.symmetric)
        small.weight, small.scale = pack_nibbles(q + SYMMETRIC_ZERO_POINT), scale.reshape(groups)
        if not self.symmetric:
            stored: Tensor = (zero_point.reshape(groups) + SYMMETRIC_ZERO_POINT).to(torch.uint8)
            small.zero_point = stored
        return small.train(layer.training)
