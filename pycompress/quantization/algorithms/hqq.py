"""HQQ: half-quadratic quantization, a better zero point from the weights alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...ops.affine import dequantize_affine, quantize_affine
from ..fake_quantize import affine_quantizer
from ..scheme import check_int
from .base import algorithm
from .inputs import float_weight, rounding_layers


@algorithm("hqq", stage="rounding", needs_data=False)
@torch.no_grad()
def hqq(model: nn.Module, *, p: float = 0.7, beta: float = 10.0, growth: float = 1.01, iterations: int = 20) -> nn.Module:
    """Choose the zero points of a prepared model's weights so that sum |W - W~|^p is small; in place, returns the model.

    Alternates, for each row that shares a scale: E = shrink(W - W~), the generalized soft threshold of strength ``beta`` (times ``growth``
    each time), which takes out the large errors; then the zero point that fits W - E best. The zero point becomes a float, which
    only simulated asymmetric weights (``FakeQuant(symmetric=False)``) can have. Rows that do not gain keep theirs. Data-free; meant for
    2 to 4 bits in groups.

    Source: Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (https://mobiusml.github.io/hqq_blog/).

    >>> model = quantize(model, FakeQuant(bits=3, granularity="group", group_size=64, symmetric=False), algorithms=["hqq"])
    """
    check_int("hqq", "iterations", iterations, 1, 10**4)
    if not 0 < p <= 1 or not beta > 0 or not growth >= 1:
        raise ValueError(f"hqq: p must be in (0, 1], beta positive and growth at least 1, got {p}, {beta} and {growth}")
    layers = rounding_layers("hqq", model)
    quantizers = {name: affine_quantizer(layer) for name, layer in layers.items()}
    for name, quantizer in quantizers.items():
        if quantizer.scheme.symmetric:
            raise ValueError(f"hqq: weights must be asymmetric, FakeQuant(symmetric=False), got {quantizer.scheme} for layer {name!r}")
    for name, quantizer in quantizers.items():
        weight = float_weight(layers[name]).float().view(layers[name].weight.shape)
        scale, zero_point = quantizer.qparams(weight)
        limits = (quantizer.scheme.quant_min, quantizer.scheme.quant_max)
        quantizer.fix(scale, zero_point)
        quantizer.offset = _fit(quantizer.rows(weight), scale[:, None], zero_point[:, None], limits, p, beta, growth, iterations)[:, 0]
    return model


def _fit(
    rows: Tensor, scale: Tensor, zero_point: Tensor, limits: tuple[int, int], p: float, beta: float, growth: float, iterations: int
) -> Tensor:
    """Offset (rows, 1) with W~ = dequantize(quantize(W + offset)) - offset; the float zero point is zero_point + offset / scale."""
    unit = torch.where(scale > 0, scale, torch.ones_like(scale))
    offset = best = torch.zeros_like(scale)
    best_error = torch.full_like(scale, float("inf"))
    for _ in range(iterations + 1):
        grid = dequantize_affine(quantize_affine(rows + offset, scale, zero_point, *limits), scale, zero_point)
        difference = rows - (grid - offset)
        error = difference.abs().pow(p).sum(dim=1, keepdim=True)
        best = torch.where(error < best_error, offset, best)
        best_error = torch.minimum(error, best_error)
        # In units of a step the solver's constants suit weights of any size.
        steps = difference / unit
        sparse = unit * steps.sign() * (steps.abs() - steps.abs().clamp(min=1e-12).pow(p - 1) / beta).clamp(min=0)
        offset = (grid - (rows - sparse)).mean(dim=1, keepdim=True)
        beta *= growth
    return best
