"""Names for what the type system of ``torch.nn`` cannot say."""

from __future__ import annotations

from typing import Any

Layer = Any
"""A float ``nn.Linear`` or ``nn.ConvNd``. ``nn.Module`` declares its attributes as ``Tensor | Module``, so ``layer.weight.shape`` would not
type-check on it."""

Norm = Any
"""An ``nn.BatchNormNd``, ``nn.LayerNorm`` or RMSNorm."""
