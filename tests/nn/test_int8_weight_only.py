"""Layers with int8 weights and float arithmetic."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pycompress.nn import LAYERS, Int8WeightOnlyConv2d, Int8WeightOnlyLinear
from pycompress.ops.affine import quantize_weight

CONVS = [{}, {"stride": 2, "padding": 1}, {"padding": "same"}, {"groups": 2, "bias": False}, {"dilation": (1, 2), "padding": (0, 2)}]


def pairs():
    yield nn.Linear(7, 5), torch.randn(2, 3, 7)
    yield nn.Linear(1, 1, bias=False), torch.randn(1, 1)
    for options in CONVS:
        yield nn.Conv2d(4, 6, (2, 3), **options), torch.randn(2, 4, 6, 7)


@pytest.fixture(params=range(2 + len(CONVS)))
def pair(request):
    return list(pairs())[request.param]


def convert(layer):
    return (Int8WeightOnlyConv2d if isinstance(layer, nn.Conv2d) else Int8WeightOnlyLinear).from_float(layer)


def test_equals_the_float_layer_with_dequantized_weights(pair):
    layer, x = pair
    quantized = convert(layer)
    q, scale = quantize_weight(layer.weight)
    assert torch.equal(quantized.int_weight, q) and torch.equal(quantized.scale, scale)
    torch.testing.assert_close(quantized(x), quantized.to_dense()(x), rtol=1e-5, atol=1e-6)
    assert quantized.to_dense().weight.dtype == torch.float32
    assert (quantized(x) - layer(x)).norm() < 0.02 * layer(x).norm() + 1e-6


def test_gradient_of_the_input(pair):
    layer, x = pair
    quantized = convert(layer)
    x.requires_grad_()
    gradient = torch.autograd.grad(quantized(x).square().sum(), x)[0]
    expected = torch.autograd.grad(quantized.to_dense()(x).square().sum(), x)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def test_config_copy_and_pickle(pair):
    layer, x = pair
    quantized = convert(layer.eval())
    twin = LAYERS[type(quantized).__name__].from_config(quantized.config())
    twin.load_state_dict(quantized.state_dict())
    for other in (twin, copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert torch.equal(other(x), quantized(x))
    assert not quantized.training
    assert quantized.num_params() == sum(p.numel() for p in layer.parameters())
    assert quantized.num_bytes() == layer.weight.numel() + 4 * layer.weight.shape[0] * (1 + (layer.bias is not None))
    assert quantized.weight_shape == tuple(layer.weight.shape)
    assert "int8 weight-only" in repr(quantized)
    if isinstance(layer, nn.Conv2d):  # which kernel a linear layer has: tests/ops/test_int8_weight_linear.py
        assert quantized.kernel == "reference" and "float" in quantized.fallback_reason


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    layer, x = nn.Linear(4096, 3), 40 * torch.ones(2, 4096)
    with torch.no_grad():
        layer.weight.fill_(0.01)
    quantized = convert(layer).to(dtype)
    y = quantized(x.to(dtype))
    # Sums of unscaled int8 weights would overflow float16 here: 4096 * 40 * 127.
    assert y.dtype == dtype and torch.isfinite(y).all()
    assert quantized.scale.dtype == torch.float32
    torch.testing.assert_close(y.float(), F.linear(x, layer.weight, layer.bias), rtol=0.02, atol=0.1)


def test_errors():
    with pytest.raises(ValueError, match="padding_mode must be 'zeros', got 'circular'"):
        convert(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"))
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"Int8WeightOnlyLinear.from_float: weight and scale must be given together"):
        Int8WeightOnlyLinear.from_float(layer, scale=torch.ones(2))
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="weight must be finite"):
        convert(layer)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_inputs_that_are_not_float_are_refused_like_the_float_layer_does(pair, dtype):
    layer, x = pair
    with pytest.raises(RuntimeError):
        layer(x.to(dtype))
    with pytest.raises(TypeError, match=rf"Int8WeightOnly\w+: x must be a floating-point tensor, got {dtype}"):
        convert(layer)(x.to(dtype))
