"""What rounding algorithms know about a layer: the second moment and the mean of its inputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...analysis.inputs import check_model
from ...nn.input_moments import InputMoments, to_columns
from ..calibration import Forward, evaluating, run_batches
from ..fake_quantize import FakeQuantize, affine_quantizer, layer_quantizer, weight_quantizer
from ..prepare import prepared_layers
from ..scheme import from_rows
from ..types import Layer


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
