"""What rounding algorithms know about a layer: the second moment and the mean of its inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...analysis.inputs import check_model
from ..calibration import Forward, evaluating, run_batches
from ..fake_quantize import FakeQuantize, affine_quantizer, layer_quantizer, weight_quantizer
from ..prepare import prepared_layers
from ..scheme import from_rows
from ..types import Layer


@dataclass
class InputMoments:
    """Of the columns x that a layer's weight rows are multiplied with; K = in_features, or in_channels / groups * kernel size.

    ``gram``: (groups, K, K) float64, mean of x x^T. ``mean``: (groups, K). ``count``: number of columns.
    The mean squared error of a layer whose weight is off by D (rows of one group) is trace(D gram D^T).
    """

    gram: Tensor
    mean: Tensor
    count: int = 0

    def add(self, columns: Tensor) -> None:
        n = columns.shape[2]
        if n:
            columns = columns.double()
            share = n / (self.count + n)
            self.gram.mul_(1 - share).baddbmm_(columns, columns.transpose(1, 2), alpha=share / n)
            self.mean.mul_(1 - share).add_(columns.mean(dim=2), alpha=share)
            self.count += n


def rounding_layers(where: str, model: nn.Module) -> dict[str, Layer]:
    """Prepared layers with affine weights. ``ValueError`` if there is none, or if their scales are being trained."""
    check_model(where, model)
    layers = {
        name: layer
        for name, layer in prepared_layers(model).items()
        if isinstance(weight_quantizer(layer), FakeQuantize)
        and not isinstance(layer, nn.Embedding)  # a look-up has no error to make up for
    }
    if not layers:
        raise ValueError(f"{where}: model must be prepared with an affine config, call Quantizer.prepare first")
    if any(affine_quantizer(layer).learned for layer in layers.values()):
        raise ValueError(f"{where}: model must be prepared without qat='lsq', whose scales are parameters")
    return layers


def input_moments(
    where: str,
    model: nn.Module,
    layers: dict[str, Layer],
    data: Iterable[Any],
    *,
    example_inputs: Any = None,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> dict[str, InputMoments]:
    """Run the model over ``data`` with float weights (and quantized activations, once calibrated) and collect. Layers that were not
    called are left out."""
    found: dict[str, InputMoments] = {}

    def hook(name: str) -> Any:
        def collect(layer: Layer, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            columns = to_columns(layer, args[0] if args else kwargs["input"])
            if name not in found:
                groups, k, _ = columns.shape
                zeros = columns.new_zeros(groups, k, dtype=torch.float64)
                found[name] = InputMoments(zeros.new_zeros(groups, k, k), zeros)
            found[name].add(columns)

        return collect

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with float_weights(model), evaluating(model):
            run_batches(where, model, data, example_inputs=example_inputs, forward=forward, progress=progress)
    finally:
        for handle in handles:
            handle.remove()
    for name, moments in found.items():
        if not torch.isfinite(moments.gram).all():
            raise ValueError(f"{where}: input of layer {name!r} must be finite, got NaN or Inf")
    return {name: moments for name, moments in found.items() if moments.count}


@contextmanager
def float_weights(model: nn.Module) -> Iterator[None]:
    """Weight quantizers switched off."""
    parts = [layer_quantizer(layer) for layer in prepared_layers(model).values()]
    before = [(part, part.enabled) for part in parts]
    for part, _ in before:
        part.enabled = False
    try:
        yield
    finally:
        for part, enabled in before:
            part.enabled = enabled


def to_columns(layer: Layer, x: Tensor) -> Tensor:
    """Inputs as (groups, K, n), so that the output without bias is ``weight.view(groups, -1, K) @ columns``."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1]).t()[None]
    sizes: tuple[int, ...] = layer.kernel_size
    d = len(sizes)
    x = x if x.dim() == d + 2 else x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for i, (size, stride, dilation) in enumerate(zip(sizes, layer.stride, layer.dilation, strict=True)):
        x = x.unfold(2 + i, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # (N, C, out..., kernel...) -> (C, kernel..., N, out...)
    x = x.permute(1, *range(2 + d, 2 + 2 * d), 0, *range(2, 2 + d))
    groups: int = layer.groups
    return x.reshape(groups, layer.weight[0].numel(), -1)


@torch.no_grad()
def float_weight(layer: Layer) -> Tensor:
    """Effective weight before quantization (masks applied), float64, (groups, rows per group, K)."""
    quantizer = layer_quantizer(layer)
    enabled, quantizer.enabled = quantizer.enabled, False
    try:
        weight = layer.weight.detach()
    finally:
        quantizer.enabled = enabled
    return weight.double().view(getattr(layer, "groups", 1), -1, weight[0].numel())


def grid(layer: Layer) -> tuple[Tensor, Tensor, FakeQuantize]:
    """(scale float32, zero_point int32) of every weight, each (groups, rows per group, K), and the quantizer they come from."""
    quantizer = affine_quantizer(layer)
    weight = float_weight(layer)
    shaped = weight.float().view(layer.weight.shape)
    scale, zero_point = quantizer.qparams(shaped)
    rows = quantizer.rows(shaped)
    full = [from_rows(t[:, None].expand_as(rows), shaped.shape).reshape(weight.shape) for t in (scale, zero_point)]
    return full[0], full[1], quantizer


@torch.no_grad()
def set_rounded(layer: Layer, value: Tensor) -> None:
    """Let a weight that lies on the layer's grid, (groups, rows per group, K), be the quantized weight."""
    quantizer = affine_quantizer(layer)
    shape = layer.weight.shape
    scale, zero_point = quantizer.qparams(float_weight(layer).float().view(shape))
    quantizer.hold(value.float().view(shape), scale, zero_point)
