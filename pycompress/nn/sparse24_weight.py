"""What the 2:4 layers share: a compressed weight that lives packed and is checked when it is loaded."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import native
from ..ops.cuda import sparse24 as cuda_sparse24
from ..ops.sparse24 import content_problem, pack_indices, parse_nm, unchecked_to_dense
from ..ops.sparse24_packing import NATIVE_PATTERNS, pack_sparse24, sparse24_kernel, unpack_sparse24
from .packed import PackedModule


class Sparse24Weight(PackedModule):
    """Mixin for layers with ``values`` and ``indices`` of a matrix (rows, depth). A subclass sets ``op``, ``values_dtype``, ``pattern``."""

    op: str
    values_dtype: torch.dtype
    pattern: str
    packed: Tensor

    def register_packed(self, rows: int, depth: int) -> None:
        """Declare the canonical tensors of a (rows, depth) matrix."""
        p = parse_nm(type(self).__name__, self.pattern)
        self._rows, self._depth = rows, depth
        self.canonical = {
            "values": (self.values_dtype, (rows, p.kept(depth))),
            "indices": (torch.uint8, (rows, p.index_bytes(depth))),
        }
        self.register_buffer("packed", None, persistent=False)

    def set_empty(self) -> None:
        """An all-zero weight: the first ``n`` positions of every group."""
        p = parse_nm(type(self).__name__, self.pattern)
        kept = p.kept(self._depth)
        first = torch.arange(p.n).repeat(kept // p.n).expand(self._rows, kept)
        self._set_canonical({"values": torch.zeros(self._rows, kept, dtype=self.values_dtype), "indices": pack_indices(first, p.bits)})

    def _set_canonical(self, tensors: dict[str, Tensor]) -> None:
        values, indices = tensors["values"], tensors["indices"]
        self._kernel = sparse24_kernel(self.op, values, self.pattern, None)
        self.packed = pack_sparse24(values, indices, self._depth, self.pattern, self._kernel)

    def _get_canonical(self) -> dict[str, Tensor]:
        values, indices = unpack_sparse24(self.packed, self._rows, self._depth, self.pattern, self.values_dtype, self._kernel)
        return {"values": values, "indices": indices}

    def _canonical_error(self, tensors: dict[str, Tensor]) -> str | None:
        pattern = parse_nm(type(self).__name__, self.pattern)
        return content_problem(tensors["values"], tensors["indices"], self._depth, pattern)

    def _matrix(self) -> Tensor:
        """The dense (rows, depth) matrix in ``values_dtype``."""
        canonical = self._get_canonical()
        return unchecked_to_dense(canonical["values"], canonical["indices"], self._depth, self.pattern)

    @property
    def _device(self) -> torch.device:
        return self.packed.device

    @property
    def int_weight(self) -> Tensor:
        return self._matrix().view(self.weight_shape)

    def _dequantized(self) -> Tensor:
        return self._matrix().view(self.weight_shape) if self.values_dtype.is_floating_point else super()._dequantized()

    @property
    def fallback_reason(self) -> str | None:
        if self._kernel != native.REFERENCE:
            return None
        device = self._device
        if device.type == "cuda" and (reason := cuda_sparse24.unsupported(device, self.pattern)):
            return f"no kernel for {reason}"
        if self.pattern not in NATIVE_PATTERNS:
            return f"native kernels run the patterns {', '.join(NATIVE_PATTERNS)}, not {self.pattern}"
        return native.fallback_reason(self.op) or f"no native kernel for {self.packed.device.type} tensors"
