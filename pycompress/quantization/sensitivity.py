"""How much each layer suffers from quantization, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..analysis.inputs import check_model
from ..nn.surgery import Ignore, check_ignore
from ..progress import track
from .calibration import Forward, batch_inputs, evaluating
from .configs import QuantizationConfig
from .fake_quantize import weight_quantizer
from .prepare import prepared_layers
from .quantizer import Quantizer
from .types import Layer


@dataclass(frozen=True)
class LayerSensitivity:
    """What quantizing one layer alone costs."""

    layer: str
    config: QuantizationConfig
    loss: float
    """``evaluate`` of the float model minus that with the layer quantized; without ``evaluate``, the relative error of the output."""
    weights: int
    """Number of weights in the layer."""


def sensitivity(
    model: nn.Module,
    configs: QuantizationConfig | Sequence[QuantizationConfig],
    data: Iterable[Any],
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    ignore: Ignore = (),
    example_inputs: Any = None,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> list[LayerSensitivity]:
    """Quantize each layer alone, with each config, and measure; most sensitive first. The model is not touched.

    - ``data``: batches to calibrate on, and to compare outputs on if there is no ``evaluate``
    - ``evaluate(model)``: a number where more is better, accuracy for instance. Without it the loss is
      ``|y' - y|^2 / |y|^2`` over all floating point outputs y of the float model
    - other arguments: see ``quantize``

    >>> for entry in sensitivity(model, Int8Static(), data)[:3]: print(entry.layer, entry.loss)
    """
    where = "sensitivity"
    check_model(where, model)
    ignore = check_ignore(where, model, ignore)
    choices = [configs] if isinstance(configs, QuantizationConfig) else list(configs)
    if not choices:
        raise ValueError(f"{where}: configs must hold at least one config, got none")
    batches = [data] if isinstance(data, Tensor) else list(data)
    if not batches:
        raise ValueError(f"{where}: data must hold at least one batch, got none")
    call = forward or (lambda model, batch: _call(where, model, batch, example_inputs))
    results = []
    for config in choices:
        quantizer = Quantizer(config, ignore=ignore)
        prepared = quantizer.prepare(model, example_inputs)
        quantizer.calibrate(prepared, batches, forward=forward, progress=progress)
        layers = prepared_layers(prepared)
        with evaluating(prepared):
            with only(layers, None):
                if evaluate is not None:
                    measure, reference = evaluate, float(evaluate(prepared))
                else:
                    outputs = [_flat(call(prepared, batch)) for batch in batches]
                    measure, reference = _error_measure(call, batches, outputs), 0.0
            for name, layer in track(list(layers.items()), f"sensitivity to {type(config).__name__}", progress=progress):
                with only(layers, name):
                    loss = reference - float(measure(prepared))
                results.append(LayerSensitivity(name, config, loss, layer.weight.numel()))
    return sorted(results, key=lambda entry: -entry.loss)


@contextmanager
def only(layers: dict[str, Layer], name: str | None) -> Iterator[None]:
    """Switch off the simulation of all prepared layers but one (of all, for None). A layer that was never calibrated stays off."""
    switches: list[tuple[Any, str, bool]] = []
    for key, layer in layers.items():
        parts = [(weight_quantizer(layer), "enabled"), (getattr(layer, "input_quantizer", None), "quantizing")]
        for part, switch in parts:
            if part is not None:
                before = getattr(part, switch)
                switches.append((part, switch, before))
                setattr(part, switch, before and key == name)
    try:
        yield
    finally:
        for part, switch, before in switches:
            setattr(part, switch, before)


def _call(where: str, model: nn.Module, batch: Any, example_inputs: Any) -> Any:
    args, kwargs = batch_inputs(where, batch, example_inputs)
    return model(*args, **kwargs)


def _error_measure(call: Forward, batches: list[Any], outputs: list[Tensor]) -> Callable[[nn.Module], float]:
    size = sum(float(output.square().sum()) for output in outputs)

    def measure(model: nn.Module) -> float:
        error = sum(float((_flat(call(model, batch)) - output).square().sum()) for batch, output in zip(batches, outputs, strict=True))
        return -error / size if size > 0 else -error

    return measure


def _flat(output: Any) -> Tensor:
    """All floating point tensors of a model's output in one."""
    parts = list(_tensors(output))
    if not parts:
        raise TypeError(f"sensitivity: the model must return tensors, got {type(output).__name__}; give evaluate or forward")
    return torch.cat([part.detach().double().flatten() for part in parts])


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
