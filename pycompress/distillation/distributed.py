"""Several processes under torchrun: one history, one checkpoint, one decision which epoch was best."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_synchronised(models: Sequence[nn.Module]) -> bool:
    """Whether these models train together across processes (wrapped in DistributedDataParallel, more than one process)."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return False
    return any(isinstance(model, nn.parallel.DistributedDataParallel) for model in models)


def check_not_sharded(models: Sequence[nn.Module]) -> None:
    """Raise ``ValueError`` for students sharded by FSDP: their validation and checkpoints would need collectives of their own."""
    for model in models:
        sharded = [type(module).__name__ for module in model.modules() if type(module).__name__ == "FullyShardedDataParallel"]
        sharded += [type(parameter).__name__ for parameter in model.parameters() if type(parameter.data).__name__ == "DTensor"]
        if sharded:
            raise ValueError(
                f"fit: students must be whole models or wrapped in DistributedDataParallel, got sharded ones ({sharded[0]}); "
                "use distiller.loss(batch) in a loop of your own"
            )


def rank(synchronised: bool) -> int:
    return dist.get_rank() if synchronised else 0


def sum_over_processes(values: Tensor, synchronised: bool) -> Tensor:
    """Elementwise sum of one tensor over all processes."""
    if synchronised:
        dist.all_reduce(values)
    return values


def average_gradients(parameters: Iterable[nn.Parameter], synchronised: bool) -> None:
    """Mean gradient over all processes, for parameters that DistributedDataParallel does not know (a hint's adapter)."""
    if not synchronised:
        return
    for parameter in parameters:
        if parameter.requires_grad:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(gradient)
            parameter.grad = gradient / dist.get_world_size()


def barrier(synchronised: bool) -> None:
    if synchronised:
        dist.barrier()
