"""GPTQ: round one column at a time and let the columns still to come make up for the error."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.affine import fake_quantize_affine
from ..calibration import Forward
from ..scheme import check_bool
from .base import algorithm
from .inputs import float_weight, grid, input_moments, rounding_layers, set_rounded


@algorithm("gptq", stage="rounding", needs_data=True)
def gptq(
    model: nn.Module,
    data: Iterable[Any],
    *,
    damping: float = 0.01,
    act_order: bool = True,
    example_inputs: Any = None,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Choose the integers of a prepared model's weights by GPTQ; in place, returns the model.

    - ``damping``: share of the mean diagonal that is added to the Hessian x x^T
    - ``act_order``: columns with the largest inputs first

    Run between ``calibrate`` and ``convert``. Weights that are exactly 0 (pruned) stay 0. Layers that ``data`` does not reach keep plain
    rounding. Source: Frantar et al. 2023, arXiv 2210.17323, algorithm 1; ``act_order`` from the authors' code.

    >>> model = q.prepare(model, example_inputs); q.calibrate(model, data); gptq(model, data); model = q.convert(model)
    """
    if not 0 < damping < 1:
        raise ValueError(f"gptq: damping must be in (0, 1), got {damping}")
    check_bool("gptq", "act_order", act_order)
    layers = rounding_layers("gptq", model)
    moments = input_moments("gptq", model, layers, data, example_inputs=example_inputs, forward=forward, progress=progress)
    for name, moment in moments.items():
        weight = float_weight(layers[name])
        scale, zero_point, quantizer = grid(layers[name])
        limits = (quantizer.scheme.quant_min, quantizer.scheme.quant_max)
        parts = zip(weight, moment.gram, scale, zero_point, strict=True)
        set_rounded(layers[name], torch.stack([_round(w, h, s, z, limits, damping, act_order) for w, h, s, z in parts]))
    return model


def _round(
    weight: Tensor, hessian: Tensor, scale: Tensor, zero_point: Tensor, limits: tuple[int, int], damping: float, act_order: bool
) -> Tensor:
    """One group: weight (rows, K) and Hessian (K, K) float64 -> rounded weight."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    if mean == 0:
        hessian = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    else:
        hessian = hessian + damping * mean * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal), device=weight.device)
    weight, scale, zero_point = weight[:, order].clone(), scale[:, order], zero_point[:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)
    pruned = weight == 0
    rounded = torch.empty_like(weight)
    columns, block = weight.shape[1], 128  # updates beyond the block are applied at once, as in the paper (section 3.3, step 2)
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = torch.empty_like(weight[:, start:stop])
        for j in range(start, stop):
            column = fake_quantize_affine(weight[:, j].float(), scale[:, j], zero_point[:, j], *limits).double()
            rounded[:, j] = column.masked_fill_(pruned[:, j], 0.0)
            errors[:, j - start] = (weight[:, j] - rounded[:, j]) / upper[j, j]
            weight[:, j:stop] -= errors[:, j - start, None] * upper[j, j:stop]
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return rounded[:, torch.argsort(order)]
