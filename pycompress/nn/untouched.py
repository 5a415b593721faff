"""Run a model without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .base import CompressedModule


def devices(model: nn.Module) -> set[torch.device]:
    """Devices on which parameters and buffers live."""
    return {t.device for t in (*model.parameters(), *model.buffers())}


@contextmanager
def untouched(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode without gradients; afterwards modes, buffers and random number generators are as before.

    Observers and running statistics may move while the block runs; buffers (except the weights of compressed layers,
    which no forward pass changes) are copied at the start and put back at the end.
    """
    modes = {module: module.training for module in model.modules()}
    kept = [
        (module, name, buffer, buffer.detach().clone(), None if buffer.is_inference() else buffer._version)
        for module in modes
        if not isinstance(module, CompressedModule)
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    gpus = [device for device in devices(model) if device.type == "cuda"]
    with torch.random.fork_rng(devices=gpus), torch.no_grad():
        try:
            model.eval()
            yield model
        finally:
            for module, mode in modes.items():
                module.training = mode
            for module, name, buffer, copy, version in kept:
                module._buffers[name] = buffer
                if version is not None and buffer._version != version:
                    buffer.copy_(copy)
