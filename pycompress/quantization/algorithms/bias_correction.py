"""Bias correction: rounding the weights shifts the mean of a layer's output; shift it back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import Forward
from ..fake_quantize import layer_quantizer
from .base import algorithm
from .inputs import float_weight, input_moments, rounding_layers


@algorithm("bias_correction", stage="after", needs_data=True)
def bias_correction(
    model: nn.Module,
    data: Iterable[Any],
    *,
    example_inputs: Any = None,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Add (W - W~) E[x] to the bias of every prepared layer (a new one where there is none); in place, returns the model.

    The mean output of each layer alone over ``data`` becomes that of the float weight W. Run it once, after all other algorithms and
    before ``convert``. Source: Nagel et al. 2019, arXiv 1906.04721, section 4.2, with E[x] measured.

    >>> bias_correction(model, data)
    """
    layers = rounding_layers("bias_correction", model)
    moments = input_moments("bias_correction", model, layers, data, example_inputs=example_inputs, forward=forward, progress=progress)
    with torch.no_grad():
        for name, moment in moments.items():
            layer = layers[name]
            weight: Tensor = layer.weight
            quantizer = layer_quantizer(layer)
            exact = float_weight(layer)
            enabled, quantizer.enabled = quantizer.enabled, True
            difference = exact - layer.weight.double().view(exact.shape)
            quantizer.enabled = enabled
            shift = (difference @ moment.mean[:, :, None]).flatten().to(weight.dtype)
            if layer.bias is None:
                layer.bias = nn.Parameter(shift)
            else:
                layer.bias.add_(shift)
    return model
