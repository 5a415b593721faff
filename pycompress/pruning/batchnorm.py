"""BatchNorm statistics after pruning: the cheapest repair there is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..analysis.inputs import check_model
from ..progress import track
from .inputs import call_of, modes_kept


def recalibrate_batchnorm(model: nn.Module, data: Iterable[Any], *, inputs: int = 1, progress: bool | None = None) -> nn.Module:
    """Estimate the running mean and variance of all BatchNorm layers anew, as plain averages over ``data``. Returns the model.

    Pruned layers give other activations than those the old averages describe; a few hundred samples without labels often restore most
    of the accuracy (EagleEye, Li et al. 2020, arXiv:2007.02491, section 3.3). Only BatchNorm runs in train mode: no dropout, no
    gradients, no change of weights. A batch is a tensor, a tuple that starts with the model's ``inputs`` arguments, or a dict.
    If a batch fails, the old averages are put back.

    >>> model = recalibrate_batchnorm(prune(model, x, pattern="channel", ratio=0.5), loader)
    """
    check_model("recalibrate_batchnorm", model)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        raise ValueError("recalibrate_batchnorm: model must have a BatchNorm layer with running averages, got none")
    momenta = [norm.momentum for norm in norms]
    before = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    batches = 0
    try:
        with modes_kept(model), torch.no_grad():
            model.eval()
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain average over all batches
                norm.train()
            for batch in track(data, "recalibrate", progress=progress):
                args, kwargs, _ = call_of("recalibrate_batchnorm", batch, inputs)
                model(*args, **kwargs)
                batches += 1
        if batches == 0:
            raise ValueError("recalibrate_batchnorm: data must yield at least one batch, got none")
    except BaseException:
        for norm, buffers in zip(norms, before, strict=True):
            for name, buffer in norm.named_buffers():
                buffer.copy_(buffers[name])
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model
