"""``example_inputs``: one form for every function that runs a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def split_inputs(where: str, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the call that ``example_inputs`` stands for.

    A tensor is the only argument, a tuple or list holds the positional ones, a mapping the keyword ones.
    """
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        strange = [key for key in example_inputs if not isinstance(key, str)]
        if strange:
            raise TypeError(f"{where}: example_inputs must have argument names as keys, got {strange[0]!r}")
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise TypeError(f"{where}: example_inputs must be a tensor, a tuple or a dict, got {type(example_inputs).__name__}")


def check_model(where: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model must be a torch.nn.Module, got {type(model).__name__}")
