"""``Int8Embedding`` and ``Int4Embedding``: tables that are dequantised row by row as they are looked up.

Plain torch operations: a look-up reads a few rows, so there is nothing to win over a gather of integers and one product.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.affine import quantize_weight
from ..ops.int4 import check_group_size, dequantize_int4, int4_error, num_groups, quantize_weight_int4
from .base import LAYERS, CompressedModule


class _QuantizedEmbedding(CompressedModule):
    """Integers and ``scale`` (float32) are ordinary buffers, canonical as they are; neither changes on ``.half()``, rows that come out do.

    The integers are the buffer ``"weight"``, their name in every ``state_dict``. The attribute ``weight`` is the float table, as models
    expect that slice it and add it; assigning to it stores integers.
    """

    scale: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None) -> None:
        super().__init__()
        if padding_idx is not None and not -num_embeddings <= padding_idx < num_embeddings:
            raise ValueError(f"{type(self).__name__}: padding_idx must be within num_embeddings {num_embeddings}, got {padding_idx}")
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx if padding_idx is None or padding_idx >= 0 else padding_idx + num_embeddings

    @classmethod
    def _check(cls, embedding: nn.Embedding) -> None:
        where = f"{cls.__name__}.from_float"
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"{where}: embedding must be an nn.Embedding, got {type(embedding).__name__}")
        if embedding.max_norm is not None:
            raise ValueError(f"{where}: embedding must have max_norm=None, got {embedding.max_norm}: it would rewrite rows on look-up")

    def _apply(self, fn, recurse: bool = True):
        """Casts (``.half()``) leave scales in float32, ``weight_dtype`` follows them."""
        self._follow_cast(fn, self.scale.device)
        for name, buffer in list(self._buffers.items()):
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs) -> None:
        found = {name: state_dict.get(prefix + name) for name in self._buffers}
        problem = None
        for name, tensor in found.items():
            own = self._buffers[name]
            if tensor is not None and own is not None and tensor.dtype != own.dtype:  # copy_ would cast without a word
                problem = problem or f"{name} must be {own.dtype}, got {tensor.dtype}"
        if problem is None and found["scale"] is not None and not found["scale"].is_meta:
            problem = int4_error(found["scale"], found.get("zero_point"))
        if problem is not None:
            error_msgs.append(f"{type(self).__name__}: {prefix}{problem}")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    @property
    def int_weight(self) -> Tensor:
        """The integers that are stored."""
        return self._buffers["weight"]  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """The whole table in ``weight_dtype``, dequantized on every access."""
        return self._dequantized().to(self.weight_dtype)

    @weight.setter
    def weight(self, integers: Tensor) -> None:
        self._buffers["weight"] = integers  # register_buffer refuses the name of a property

    def _dequantized(self) -> Tensor:
        """The whole table in float32."""
        raise NotImplementedError

    @property
    def kernel(self) -> str:
        return "torch"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.num_embeddings, self.embedding_dim)

    def num_params(self) -> int:
        return self.num_embeddings * self.embedding_dim

    def _rows(self, ids: Tensor) -> Tensor:
        """Float32 rows of the table (..., embedding_dim)."""
        raise NotImplementedError

    def _check_ids(self, ids: Tensor) -> None:
        if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
            got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
            raise TypeError(f"{type(self).__name__}: ids must be an int64 or int32 tensor, got {got}")

    def forward(self, input: Tensor) -> Tensor:
        """``input``: any shape, int64 or int32. Returns (..., embedding_dim) in ``weight_dtype``."""
        self._check_ids(input)
        return self._rows(input).to(self.weight_dtype)

    def to_dense(self) -> nn.Embedding:
        options = {"device": self.scale.device, "dtype": self.weight_dtype}
        dense = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, **options)
        with torch.no_grad():
            dense.weight.copy_(self.weight)
        return dense.train(self.training)

    def config(self) -> dict[str, Any]:
        return {"num_embeddings": self.num_embeddings, "embedding_dim": self.embedding_dim, "padding_idx": self.padding_idx}

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, format={self.format}"


@LAYERS.register("Int8Embedding")
class Int8Embedding(_QuantizedEmbedding):
    """Drop-in for ``nn.Embedding``: int8 rows, one scale per row. A quarter of the memory, no gradient for the table.

    Equals ``F.embedding(ids, int_weight * scale[:, None])``. ``padding_idx`` is kept for ``to_dense``.

    >>> table = Int8Embedding.from_float(nn.Embedding(1000, 64))
    """

    format = "int8 embedding"

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        self.weight = torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8)
        self.register_buffer("scale", torch.ones(num_embeddings, dtype=torch.float32))

    @classmethod
    def from_float(cls, embedding: nn.Embedding) -> Int8Embedding:
        """Raises ``ValueError`` for NaN or infinite weights and for ``max_norm``."""
        cls._check(embedding)
        weight, scale = quantize_weight(embedding.weight)
        table = cls(embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx).to(weight.device)
        table.weight, table.scale, table.weight_dtype = weight, scale, embedding.weight.dtype
        return table.train(embedding.training)

    def _dequantized(self) -> Tensor:
        return self.int_weight.float() * self.scale[:, None]

    def _rows(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.int_weight).float() * F.embedding(ids, self.scale[:, None])


@LAYERS.register("Int4Embedding")
class Int4Embedding(_QuantizedEmbedding):
    """Drop-in for ``nn.Embedding``: int4 rows with a scale per group (format of ``pycompress.ops.int4``). No gradient for the table.

    Equals ``F.embedding(ids, dequantize_int4(int_weight, scale, zero_point, embedding_dim, group_size))``.

    >>> table = Int4Embedding.from_float(nn.Embedding(1000, 64), group_size=32)
    """

    zero_point: Tensor | None

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, *, group_size: int = 64, symmetric: bool = True
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx)
        check_group_size("Int4Embedding", group_size)
        self.group_size, self.symmetric = group_size, symmetric
        groups = (num_embeddings, num_groups(embedding_dim, group_size))
        self.weight = torch.zeros(num_embeddings, -(-embedding_dim // 2), dtype=torch.uint8)
        self.register_buffer("scale", torch.zeros(groups, dtype=torch.float32))
        self.register_buffer("zero_point", None if symmetric else torch.zeros(groups, dtype=torch.uint8))

    @classmethod
    def from_float(cls, embedding: nn.Embedding, *, group_size: int = 64, symmetric: bool = True) -> Int4Embedding:
        """Raises ``ValueError`` for NaN or infinite weights, for ``max_norm`` and for group sizes other than 32, 64 and 128."""
        cls._check(embedding)
        check_group_size("Int4Embedding.from_float", group_size)
        weight, scale, zero_point = quantize_weight_int4(embedding.weight, group_size, symmetric)
        sizes = (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx)
        table = cls(*sizes, group_size=group_size, symmetric=symmetric).to(weight.device)
        table.weight, table.scale, table.zero_point, table.weight_dtype = weight, scale, zero_point, embedding.weight.dtype
        return table.train(embedding.training)

    @property
    def format(self) -> str:  # type: ignore[override]
        return f"int4 embedding{'' if self.symmetric else ' asymmetric'}, groups of {self.group_size}"

    def _dequantized(self) -> Tensor:
        return dequantize_int4(self.int_weight, self.scale, self.zero_point, self.embedding_dim, self.group_size)

    def _rows(self, ids: Tensor) -> Tensor:
        zero_point = None if self.zero_point is None else F.embedding(ids, self.zero_point)
        rows, scale = F.embedding(ids, self.int_weight), F.embedding(ids, self.scale)
        return dequantize_int4(rows, scale, zero_point, self.embedding_dim, self.group_size)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "group_size": self.group_size, "symmetric": self.symmetric}
