"""What every packed layer promises to a model that was written for the float layer."""

import pytest
import torch
from torch import nn

from pycompress.nn import (
    Int4Linear,
    Int8Conv1d,
    Int8Conv2d,
    Int8Linear,
    Int8Sparse24Conv2d,
    Int8Sparse24Linear,
    Int8WeightOnlyConv2d,
    Int8WeightOnlyLinear,
    Sparse24Conv2d,
    Sparse24Linear,
)
from pycompress.ops import sparse24_mask


def layers():
    torch.manual_seed(0)
    linear, conv1, conv2 = nn.Linear(40, 24), nn.Conv1d(8, 12, 3), nn.Conv2d(8, 12, 3)
    yield from ((kind.from_float(linear), linear) for kind in (Int8Linear, Int8WeightOnlyLinear, Int4Linear))
    yield from ((kind.from_float(conv2), conv2) for kind in (Int8Conv2d, Int8WeightOnlyConv2d))
    yield Int8Conv1d.from_float(conv1), conv1
    for kind, layer in ((Sparse24Linear, linear), (Int8Sparse24Linear, linear), (Sparse24Conv2d, conv2), (Int8Sparse24Conv2d, conv2)):
        yield kind.from_float(layer, sparse24_mask(layer.weight.flatten(1).abs()).view_as(layer.weight)), layer


@pytest.mark.parametrize(("layer", "original"), list(layers()), ids=lambda m: type(m).__name__)
def test_weight_is_what_the_layer_multiplies_with(layer, original):
    """Models cast their inputs to ``layer.weight.dtype``: integers there would destroy the input without a word."""
    assert layer.weight.dtype == torch.float32 and layer.weight.device == original.weight.device
    assert layer.weight.shape == original.weight.shape == torch.Size(layer.weight_shape)
    assert torch.equal(layer.weight, layer.to_dense().weight)
    x = torch.randn(2, *original.weight.shape[1:2], *[5] * (original.weight.dim() - 2), generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x.to(layer.weight.dtype)), layer(x))
    state = torch.random.get_rng_state()
    assert layer.weight is not None and torch.equal(torch.random.get_rng_state(), state)
    assert "int_weight" not in layer.state_dict() and not isinstance(layer.weight, nn.Parameter)
