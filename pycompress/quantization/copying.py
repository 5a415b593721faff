"""Copies of models, also of those that ``copy.deepcopy`` refuses."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


def copy_model(model: nn.Module, copies: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy. ``copies``: the ``memo`` of ``copy.deepcopy``: copies by the id of the original, to use and to add to.

    Old-style ``weight_norm`` and ``spectral_norm`` and ``torch.nn.utils.prune`` keep the weight as a plain tensor with a history, which
    torch does not copy. The copy gets its values; the hook that computes it anew on every call is copied, too.
    """
    copies = {} if copies is None else copies
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, Tensor) and not value.is_leaf:
                copies[id(value)] = value.detach().clone()
    return copy.deepcopy(model, copies)
