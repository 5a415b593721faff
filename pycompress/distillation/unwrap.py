"""The user's model behind wrappers: DistributedDataParallel, DataParallel, torch.compile."""

from __future__ import annotations

from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """The innermost model, whose module paths and state_dict keys are the user's own.

    >>> unwrap(nn.DataParallel(model)) is model
    True
    """
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile's OptimizedModule
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model
