"""Layers of other libraries that are linear layers under another name."""

from __future__ import annotations

from torch import nn

from .types import Layer


def is_transposed_linear(module: nn.Module) -> bool:
    """``transformers.pytorch_utils.Conv1D``, the layer of GPT-2: ``x @ weight + bias``, weight (inputs, outputs). Told by its name, so that
    transformers need not be installed."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def as_linear(module: Layer) -> nn.Linear:
    """The same function as an ``nn.Linear``, in the module's mode, with a weight of its own.

    >>> linear = as_linear(gpt2.transformer.h[0].mlp.c_fc)
    """
    inputs, outputs = module.weight.shape
    linear = nn.Linear(inputs, outputs, device="meta", dtype=module.weight.dtype)
    linear.weight = nn.Parameter(module.weight.detach().t().contiguous(), requires_grad=module.weight.requires_grad)
    linear.bias = nn.Parameter(module.bias.detach().clone(), requires_grad=module.bias.requires_grad)
    return linear.train(module.training)
