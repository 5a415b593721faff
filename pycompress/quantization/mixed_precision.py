"""A config for each layer under a budget of bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..nn.surgery import Ignore
from .calibration import Forward
from .configs import QuantizationConfig
from .sensitivity import LayerSensitivity, sensitivity

_UNITS = 20_000


def mixed_precision(
    model: nn.Module,
    configs: Sequence[QuantizationConfig],
    data: Iterable[Any],
    *,
    bits: float,
    evaluate: Callable[[nn.Module], float] | None = None,
    ignore: Ignore = (),
    example_inputs: Any = None,
    forward: Forward | None = None,
    progress: bool | None = None,
) -> dict[str, QuantizationConfig]:
    """Choose one of ``configs`` for each layer so that the weights take at most ``bits`` bits each on average.

    Measures every layer with every config alone (``sensitivity``, which also explains the other arguments) and takes the choice with the
    smallest sum of losses, assuming that losses add up. The result is a config for ``quantize`` or ``Quantizer``. ``bits`` counts the
    weights that are quantized, without scales. Raises ``ValueError`` if no choice keeps to the budget.

    >>> model = quantize(model, mixed_precision(model, [FakeQuant(bits=b) for b in (2, 4, 8)], data, bits=4.5))
    """
    where = "mixed_precision"
    choices = list(configs)
    if len(choices) < 2:
        raise ValueError(f"{where}: configs must hold two or more to choose from, got {len(choices)}")
    smallest = min(config.bits for config in choices)
    if not bits >= smallest:
        raise ValueError(f"{where}: bits must be at least {smallest}, the least of the configs, got {bits}")
    entries = sensitivity(
        model, choices, data, evaluate=evaluate, ignore=ignore, example_inputs=example_inputs, forward=forward, progress=progress
    )
    return allocate(entries, bits)


def allocate(entries: Sequence[LayerSensitivity], bits: float) -> dict[str, QuantizationConfig]:
    """The choice with the smallest sum of losses within the budget, for given measurements.

    Dynamic programming over the bits that may be spent beyond the smallest choice of each layer, in at most ``_UNITS`` units; costs
    are rounded up to whole units, so the budget holds.
    """
    options: dict[str, list[LayerSensitivity]] = {}
    for entry in entries:
        options.setdefault(entry.layer, []).append(entry)
    least = {layer: min(entry.config.bits for entry in found) for layer, found in options.items()}
    weights = {layer: found[0].weights for layer, found in options.items()}
    needed = sum(least[layer] * weights[layer] for layer in options)
    total = sum(weights.values())
    if needed > bits * total:
        raise ValueError(f"mixed_precision: bits must be at least {needed / total:.3g}, which the smallest choices take, got {bits}")
    most = sum(max(entry.config.bits for entry in found) * weights[layer] for layer, found in options.items())
    free = min(bits * total, most) - needed
    unit = max(1.0, free / _UNITS)
    room = int(free / unit)
    # loss[b]: smallest sum of losses of the layers so far that spend at most b units
    loss = torch.zeros(room + 1, dtype=torch.float64)
    picks = []
    for layer, found in options.items():
        spent = [math.ceil((entry.config.bits - least[layer]) * weights[layer] / unit - 1e-9) for entry in found]
        with_each = torch.full((len(found), room + 1), float("inf"), dtype=torch.float64)
        for row, (entry, cost) in enumerate(zip(found, spent, strict=True)):
            if cost <= room:
                with_each[row, cost:] = loss[: room + 1 - cost] + entry.loss
        loss, pick = with_each.min(dim=0)
        picks.append((layer, found, spent, pick))
    chosen = {}
    for layer, found, spent, pick in reversed(picks):
        row = int(pick[room])
        chosen[layer] = found[row].config
        room -= spent[row]
    return {layer: chosen[layer] for layer in options}
