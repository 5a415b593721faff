"""Putting the simulation onto layers and taking it off again."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn
from torch.nn.utils import parametrize

from ..nn.parametrized import remove_parametrizations
from .configs import QuantizationConfig
from .fake_quantize import ActivationQuantizer, FakeQuantize, WeightQuantizer, layer_quantizer, quantize_input, weight_quantizer
from .types import Layer

Qat = Literal["ste", "lsq"]

_SAMPLE_DIMS = {nn.Linear: 1, nn.Conv1d: 2, nn.Conv2d: 3, nn.Conv3d: 4}


def prepare_layer(name: str, layer: Layer, config: QuantizationConfig, qat: Qat | None) -> None:
    """Parametrize the weight with the config's quantizer and, if it quantizes activations, hang an ``input_quantizer`` before the layer.

    Without ``qat`` the layer computes in float until it is calibrated.
    """
    scheme = config.activation_scheme()
    static = scheme is not None and not scheme.dynamic
    simulate = qat is not None or not static
    quantizer = config.weight_quantizer()
    quantizer.config = config
    weight = layer.weight
    if isinstance(quantizer, FakeQuantize):
        if qat == "lsq":
            quantizer.learn(weight)
        elif quantizer.scheme.observer != "minmax":
            quantizer.fix(*quantizer.observe(weight))
    quantizer.enabled = simulate
    quantizer.train(layer.training).to(weight.device)
    parametrize.register_parametrization(layer, "weight", quantizer)
    if scheme is None:
        return
    sample_dims = next(dims for kind, dims in _SAMPLE_DIMS.items() if isinstance(layer, kind))
    activation = ActivationQuantizer(scheme, sample_dims, name)
    if qat == "lsq" and static:
        activation.learn()
    activation.observing = qat is not None and static
    activation.quantizing = simulate
    layer.input_quantizer = activation.train(layer.training).to(weight.device)
    layer.register_forward_pre_hook(quantize_input, with_kwargs=True)
    layer.register_load_state_dict_post_hook(simulate_if_ready)


def simulate_if_ready(layer: Layer, _: Any) -> None:
    """Hook of a prepared layer: with a scale out of a ``state_dict`` it is as good as calibrated. A plain function, so that the model
    can be copied."""
    if layer.input_quantizer.ready:
        layer_quantizer(layer).enabled = layer.input_quantizer.quantizing = True


def prepared_layers(model: nn.Module) -> dict[str, Layer]:
    """Layers with a quantizing weight parametrization, by first path, each once."""
    found: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if weight_quantizer(module) is not None:
            found.setdefault(module, name)
    return {name: module for module, name in found.items()}


def config_of(layer: Layer) -> QuantizationConfig:
    config: QuantizationConfig = layer_quantizer(layer).config
    return config


def strip_layer(layer: Layer) -> None:
    """Take the simulation off; other parametrizations (masks) stay."""
    chain = layer.parametrizations.weight
    if len(chain) > 1:
        del chain[next(i for i, part in enumerate(chain) if isinstance(part, WeightQuantizer))]
    else:
        remove_parametrizations(layer, "weight", leave_parametrized=False)
    if hasattr(layer, "input_quantizer"):
        del layer.input_quantizer
        for key, hook in list(layer._forward_pre_hooks.items()):
            if hook is quantize_input:
                del layer._forward_pre_hooks[key]
                layer._forward_pre_hooks_with_kwargs.pop(key, None)
        for key, hook in list(layer._load_state_dict_post_hooks.items()):
            if hook is simulate_if_ready:
                del layer._load_state_dict_post_hooks[key]
