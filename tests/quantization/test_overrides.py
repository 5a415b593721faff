"""Layers that compute something else than their torch type stay what they are: subclasses that override, instances with a method put on."""

from __future__ import annotations

import pytest
import torch
from support.quantizable import normal, seeded
from torch import Tensor, nn

import pycompress as pc
from pycompress.nn.base import get_note
from pycompress.quantization import cross_layer_equalization, fold_batch_norm
from pycompress.quantization.overrides import own_method


class Standardized(nn.Conv2d):
    """Weight standardization, as in timm and BiT."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class CalledOtherwise(nn.Linear):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class ActivatedNorm(nn.BatchNorm2d):
    """BatchNorm and activation in one module, as in timm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class OwnReLU(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=-1)


def tripled(layer: nn.Module) -> nn.Module:
    """The layer with a forward of its own on the instance."""
    once = layer.forward
    layer.forward = lambda x: 3 * once(x)
    return layer


def pair(first: nn.Module, norm: nn.Module) -> nn.Module:
    norm.running_mean.normal_(), norm.running_var.uniform_(0.3, 3)
    return seeded(nn.Sequential(first, norm, nn.Flatten(), nn.Linear(8 * 6 * 6, 5))).eval()


def test_own_method():
    assert own_method(nn.Conv2d(1, 1, 1), nn.Conv2d) is None and own_method(nn.BatchNorm1d(2), nn.BatchNorm1d) is None
    assert own_method(Standardized(1, 1, 1), nn.Conv2d) == "_conv_forward"
    assert own_method(CalledOtherwise(1, 1), nn.Linear) == "__call__"
    assert own_method(tripled(nn.Linear(1, 1)), nn.Linear) == "forward"


@pytest.mark.parametrize("config", [pc.Int8Dynamic(), pc.Int8Static(), pc.Int8WeightOnly()], ids=repr)
@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Standardized(3, 8, 3), "left as it is: Standardized has a _conv_forward of its own"),
        (tripled(nn.Conv2d(3, 8, 3)), "left as it is: Conv2d has a forward of its own"),
    ],
)
@torch.no_grad()
def test_the_layer_stays(layer, reason, config):
    model, x = pair(layer, nn.BatchNorm2d(8)), normal(2, 3, 8, 8)
    small = pc.quantize(model, config, data=[x], example_inputs=x)
    assert type(small[0]) is type(layer) and get_note(small[0]) == reason
    assert torch.equal(small[1](small[0](x)), model[1](model[0](x)))


@pytest.mark.parametrize(
    ("layer", "norm", "reason"),
    [
        (Standardized(3, 8, 3), nn.BatchNorm2d(8), "kept: a Standardized has a _conv_forward of its own"),
        (tripled(nn.Conv2d(3, 8, 3)), nn.BatchNorm2d(8), "kept: a Conv2d has a forward of its own"),
        (nn.Conv2d(3, 8, 3), ActivatedNorm(8), "kept: a ActivatedNorm has a forward of its own"),
        (nn.Conv2d(3, 8, 3), tripled(nn.BatchNorm2d(8)), "kept: a BatchNorm2d has a forward of its own"),
    ],
)
@torch.no_grad()
def test_nothing_is_folded(layer, norm, reason):
    model, x = pair(layer, norm), normal(2, 3, 8, 8)
    folded = fold_batch_norm(model)
    assert get_note(folded[1]) == reason and torch.equal(folded(x), model(x))


@pytest.mark.parametrize("activation", [tripled(nn.ReLU()), OwnReLU()])
@torch.no_grad()
def test_nothing_is_fused(activation):
    model, x = seeded(nn.Sequential(nn.Conv2d(3, 8, 3), tripled(nn.Identity()), activation, nn.Conv2d(8, 8, 3))), normal(2, 3, 8, 8)
    for config in (pc.Int8Dynamic(), pc.Int8Static()):
        plain, fused = (pc.quantize(model, config, data=[x], fuse=fuse) for fuse in (False, True))
        assert [type(module) for module in fused] == [type(module) for module in plain] and torch.equal(fused(x), plain(x))


@pytest.mark.parametrize("between", [OwnReLU(), tripled(nn.ReLU()), nn.ReLU()])
@torch.no_grad()
def test_cross_layer_equalization_leaves_them_alone(between):
    first = tripled(nn.Linear(6, 6)) if type(between) is nn.ReLU and "forward" not in vars(between) else nn.Linear(6, 6)
    model, x = seeded(nn.Sequential(first, between, nn.Linear(6, 4))), normal(5, 6)
    model[0].weight[0] *= 100
    assert torch.equal(cross_layer_equalization(model)(x), model(x))
