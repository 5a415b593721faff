"""How much of a student masks hold at zero, so that weights of one sparsity are never exchanged for those of another."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from .unwrap import unwrap


def masked_entries(models: Iterable[nn.Module]) -> int:
    """Zeros in all mask buffers: ``mask`` of a ``Pruner``, ``weight_mask`` of ``torch.nn.utils.prune``.

    Other buffers with such names (an attention mask) do no harm: they are the same in every epoch.
    """
    return sum(
        int((buffer == 0).sum())
        for model in models
        for name, buffer in unwrap(model).named_buffers()
        if name.rpartition(".")[2].endswith("mask")
    )
