"""Multiply-accumulates of the layers whose arithmetic is known, from the shapes of one call.

Every formula is written with ``size(weight)``: with ``Tensor.numel`` it gives the dense count, with ``count_nonzero``
the count that is left when products with a zero weight are skipped. Biases and activations are not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..nn.base import CompressedModule

Size = Callable[[torch.Tensor], int]
Formula = Callable[[Any, tuple[Any, ...], dict[str, Any], Any, Size], int]


def _per_output(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, size: Size) -> int:
    """Linear, Bilinear, convolution: each output position uses every weight once. weight (O, ...), out has O channels."""
    channels = module.weight.shape[0]
    return out.numel() // channels * size(module.weight) if channels else 0


def _per_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, size: Size) -> int:
    """Transposed convolution: each input position uses every weight once. weight (C, O / groups, ...)."""
    channels = module.weight.shape[0]
    return _first(args, kwargs).numel() // channels * size(module.weight) if channels else 0


def _elementwise(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, size: Size) -> int:
    """Normalisation: in the end one multiply-add per element."""
    return out.numel()


def _lookup(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, size: Size) -> int:
    return 0


def _recurrent(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, size: Size) -> int:
    """RNN, LSTM, GRU and their cells: each token goes through every weight matrix once."""
    tokens = _first(args, kwargs)
    tokens = tokens.data if isinstance(tokens, nn.utils.rnn.PackedSequence) else tokens
    rows = tokens.numel() // module.input_size if module.input_size else 0
    return rows * sum(size(weight) for weight in _matrices(module))


def _attention(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, size: Size) -> int:
    """nn.MultiheadAttention: four projections, then Q K^T and (weights) V."""
    query, key, value = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key", "value")))
    weights = (
        module.in_proj_weight.chunk(3)
        if module.in_proj_weight is not None
        else (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    )
    rows = [each.numel() // each.shape[-1] for each in (query, key, value)]
    keys = key.shape[1] if key.dim() == 3 and module.batch_first else key.shape[0]
    keys += int(module.bias_k is not None) + int(module.add_zero_attn)
    projections = sum(n * size(weight) for n, weight in zip(rows, weights, strict=True)) + rows[0] * size(module.out_proj.weight)
    return projections + 2 * rows[0] * keys * module.embed_dim


_FORMULAS: list[tuple[tuple[type, ...], Formula]] = [
    ((_ConvTransposeNd,), _per_input),
    ((nn.Linear, nn.Bilinear, _ConvNd), _per_output),
    ((_NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU, nn.RMSNorm), _elementwise),
    ((nn.Embedding, nn.EmbeddingBag), _lookup),
    ((nn.RNNBase, nn.RNNCellBase), _recurrent),
    ((nn.MultiheadAttention,), _attention),
]


def formula_for(module: nn.Module) -> Formula | None:
    """The formula of a layer type, or None. A compressed layer is counted as the dense layer it stands for."""
    if isinstance(module, CompressedModule):
        return _compressed if formula_for(dense_layer(module)) is not None else None
    return next((formula for types, formula in _FORMULAS if isinstance(module, types)), None)


def dense_layer(module: CompressedModule) -> nn.Module:
    """The float layer inside ``module.to_dense()`` (which may have an activation behind it)."""
    dense = module.to_dense()
    return next((part for part in dense.modules() if isinstance(getattr(part, "weight", None), torch.Tensor)), dense)


def nonzeros(weight: torch.Tensor) -> int:
    return int(torch.count_nonzero(weight))


def _compressed(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, size: Size) -> int:
    dense = dense_layer(module)
    formula = formula_for(dense)
    assert formula is not None  # formula_for has looked
    return formula(dense, args, kwargs, out, size)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _matrices(module: nn.Module) -> list[torch.Tensor]:
    names = [name for name, _ in module.named_parameters(recurse=False)] + list(getattr(module, "parametrizations", {}))
    return [weight for name in names if (weight := getattr(module, name)).dim() >= 2]
