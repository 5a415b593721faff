"""How a batch from a data loader becomes a call of the model, and what is left of it for the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.inputs import split_inputs

LABELS = ("labels", "label")


def call_of(where: str, batch: Any, inputs: int | frozenset[str]) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...]]:
    """Positional arguments, keyword arguments and targets in a batch.

    ``inputs``: how many entries of a tuple the model takes, or the names of its keyword arguments.

    - a tensor is the only argument;
    - a tuple or list starts with the model's arguments, the rest are targets;
    - a mapping holds keyword arguments; ``labels`` or ``label`` is the target unless the model takes it itself.
    """
    if isinstance(batch, Tensor):
        return (batch,), {}, ()
    if isinstance(batch, Mapping):
        wanted = inputs if isinstance(inputs, frozenset) else frozenset(batch) - set(LABELS)
        missing = sorted(wanted - set(batch))
        if missing:
            raise ValueError(f"{where}: a batch must hold {missing[0]!r} as example_inputs does, got the keys {', '.join(map(str, batch))}")
        return (), {key: batch[key] for key in wanted}, tuple(batch[key] for key in LABELS if key in batch and key not in wanted)
    if isinstance(batch, (tuple, list)):
        count = inputs if isinstance(inputs, int) else 1
        if len(batch) < count:
            raise ValueError(f"{where}: a batch must hold the model's {count} inputs, got {len(batch)} entries")
        return tuple(batch[:count]), {}, tuple(batch[count:])
    raise TypeError(f"{where}: a batch must be a tensor, a tuple or a mapping, got {type(batch).__name__}")


def inputs_of(where: str, example_inputs: Any) -> int | frozenset[str]:
    """What ``call_of`` has to know about a model, told by its ``example_inputs``."""
    args, kwargs = split_inputs(where, example_inputs)
    return frozenset(kwargs) if kwargs else len(args)


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of a model's output, in order: nested tuples, lists and mappings (so also Hugging Face outputs)."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [tensor for entry in value.values() for tensor in tensors_in(entry)]
    if isinstance(value, (tuple, list)):
        return [tensor for entry in value for tensor in tensors_in(entry)]
    return []


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put every module's train/eval mode back at the end."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def run(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The tensors of the model's output on ``example_inputs``, in eval mode; modes are put back."""
    args, kwargs = split_inputs("Pruner", example_inputs)
    with modes_kept(model):
        model.eval()
        return tensors_in(model(*args, **kwargs))


def check_runs(where: str, model: nn.Module, example_inputs: Any) -> list[torch.Size]:
    """Output shapes of the model; ``ValueError`` if it cannot be called with ``example_inputs``."""
    split_inputs(where, example_inputs)
    try:
        with torch.no_grad():
            outputs = run(model, example_inputs)
    except Exception as error:
        raise ValueError(f"{where}: the model must accept example_inputs, got {type(error).__name__}: {error}") from error
    return [tensor.shape for tensor in outputs]
