"""AdaRound: learn for each weight whether to round up or down."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.affine import inverse_scale
from ...progress import track
from ..calibration import Forward
from ..scheme import check_int
from .base import algorithm
from .inputs import float_weight, grid, input_moments, rounding_layers, set_rounded

_ZETA, _GAMMA = 1.1, -0.1  # stretch of the sigmoid, paper section 3.2


@algorithm("adaround", stage="rounding", needs_data=True)
def adaround(
    model: nn.Module,
    data: Iterable[Any],
    *,
    steps: int = 500,
    lr: float = 0.02,
    regularization: float = 3.0,
    example_inputs: Any = None,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Choose up or down for every weight of a prepared model so that the layers' outputs change least; in place, returns the model.

    Minimizes E|(W~ - W) x|^2 (relative to rounding to nearest) + regularization * mean(1 - |2h - 1|^beta) over h in [0, 1] with
    W~ = scale * (floor(W / scale) + h) and beta from 20 down to 2, with Adam. The expectation needs only the second moment of x, so each
    step costs one (K, K) product and no data. Rows that did not gain over rounding to nearest keep that.

    Run between ``calibrate`` and ``convert``. Zeros (pruned weights) stay 0. Source: Nagel et al. 2020, arXiv 2004.10568, equations 21-24.

    >>> adaround(model, data)
    """
    check_int("adaround", "steps", steps, 1, 10**6)
    if not (lr > 0 and regularization >= 0):
        raise ValueError(f"adaround: lr must be positive and regularization at least 0, got {lr} and {regularization}")
    layers = rounding_layers("adaround", model)
    moments = input_moments("adaround", model, layers, data, example_inputs=example_inputs, forward=forward, progress=progress)
    for name, moment in track(list(moments.items()), "adaround", progress=progress):
        layer = layers[name]
        scale, zero_point, quantizer = grid(layer)
        low = quantizer.scheme.quant_min - zero_point
        high = quantizer.scheme.quant_max - zero_point
        set_rounded(layer, _learn(float_weight(layer), moment.gram, scale.double(), low, high, steps, lr, regularization))
    return model


def _learn(weight: Tensor, gram: Tensor, scale: Tensor, low: Tensor, high: Tensor, steps: int, lr: float, weight_of_rule: float) -> Tensor:
    """All (groups, rows, K), ``gram`` (groups, K, K); returns the rounded weight."""
    exact = weight * inverse_scale(scale)
    floor = torch.floor(exact)
    # A weight that is 0 lies on the grid; rounding it up would undo pruning.
    free = (weight != 0) & (floor >= low) & (floor < high)

    def rounded(up: Tensor) -> Tensor:
        return scale * torch.where(free, floor + up, torch.round(exact).clamp(low, high))

    def error(value: Tensor) -> Tensor:
        difference = value - weight
        return ((difference @ gram) * difference).sum(dim=2)

    nearest = rounded((exact - floor > 0.5).double())
    start = error(nearest)
    fraction = (exact - floor).clamp(0.01, 0.99)
    logits = torch.logit((fraction - _GAMMA) / (_ZETA - _GAMMA)).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=lr)
    # Relative to rounding to nearest, so that one weight of the rule suits all layers.
    unit = start.sum().clamp(min=1e-30)
    for step in range(steps):
        up = (torch.sigmoid(logits) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)
        loss = error(rounded(up)).sum() / unit
        if step >= 0.2 * steps:  # warm start without the rule, as in the authors' code
            done = (step / steps - 0.2) / 0.8
            beta = 2 + 18 * 0.5 * (1 + math.cos(done * math.pi))
            loss = loss + weight_of_rule * torch.where(free, 1 - (2 * up - 1).abs() ** beta, torch.zeros_like(up)).mean()
        optimizer.zero_grad()
        with torch.enable_grad():
            loss.backward()
        optimizer.step()
    learned = rounded((logits.detach() > 0).double())
    return torch.where((error(learned) < start)[:, :, None], learned, nearest)
