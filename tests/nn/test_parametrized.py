from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from pycompress.nn.parametrized import remove_parametrizations


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.parametrize("leave", [True, False])
def test_a_copy_keeps_its_weight(leave):
    layer = nn.Linear(3, 2)
    plain = layer.weight.detach().clone()
    for name in ("weight", "bias"):
        parametrize.register_parametrization(layer, name, Double())
    twin = copy.deepcopy(layer)
    remove_parametrizations(twin, "weight", leave_parametrized=leave)
    assert torch.equal(twin.weight, 2 * plain if leave else plain) and isinstance(twin.weight, nn.Parameter)
    assert torch.equal(layer.weight, 2 * plain) and torch.equal(layer.bias, twin.bias)
    remove_parametrizations(twin, "bias")
    assert type(twin) is nn.Linear
    assert torch.equal(copy.deepcopy(layer)(torch.ones(1, 3)), layer(torch.ones(1, 3)))


def test_nothing_to_remove():
    with pytest.raises(ValueError, match="does not have a parametrization on weight"):
        remove_parametrizations(nn.Linear(3, 2), "weight")
