"""Lottery tickets: masks found late, weights from early on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .mask import Mask


@torch.no_grad()
def rewind(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Set parameters and buffers back to ``state``, an earlier ``state_dict()`` of the model, and keep the masks. Returns the model.

    ``state`` may come from before or after the pruner was made. Iterative magnitude pruning with rewinding (Frankle and Carbin 2019,
    arXiv:1803.03635; to an early epoch instead of the start: Frankle et al. 2020, arXiv:1912.05671) is:

    >>> early = copy.deepcopy(model.state_dict())
    >>> pruner = Pruner(model, x, ratio=0.9, schedule="exponential", steps=10)
    >>> for _ in range(10): train(model); pruner.step(); rewind(model, early)

    ``ValueError`` before anything is changed if ``state`` does not fit. Clear the optimizer's state too: make a new one.
    """
    masks = {f"{name}.mask".lstrip(".") for name, module in model.named_modules() if isinstance(module, Mask)}
    current = {key: value for key, value in model.state_dict().items() if key not in masks}
    plain = {_plain(key): value for key, value in state.items()}
    for key, value in current.items():
        old = plain.get(_plain(key))
        if old is None or old.shape != value.shape:
            got = "none" if old is None else f"shape {tuple(old.shape)}"
            raise ValueError(f"rewind: state must hold {_plain(key)!r} with shape {tuple(value.shape)}, got {got}")
    for key, value in current.items():
        value.copy_(plain[_plain(key)])
    return model


def _plain(key: str) -> str:
    """The name a weight has without masks."""
    return key.replace("parametrizations.weight.original", "weight")
