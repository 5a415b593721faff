"""int4 configs: converted layers compute what simulation promised."""

import pytest
import torch
from torch import nn

from pycompress.nn import Int4Linear
from pycompress.ops import quantize_weight_int4
from pycompress.quantization import Int4WeightOnly, Int8ActInt4Weight, Quantizer, quantize

CONFIGS = [
    kind(group_size, symmetric) for kind in (Int4WeightOnly, Int8ActInt4Weight) for group_size in (32, 64) for symmetric in (True, False)
]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(100, 24), nn.ReLU(), nn.Conv1d(1, 2, 3), nn.Linear(22, 5, bias=False)), torch.randn(3, 1, 100)


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_quantize(config):
    net, x = model()
    small = quantize(net, config)
    assert [type(layer) for layer in small] == [Int4Linear, nn.Identity, nn.Conv1d, Int4Linear] and small[0].activation == "relu"
    assert small[0].int8_activations == isinstance(config, Int8ActInt4Weight)
    weight, scale, zero_point = quantize_weight_int4(net[0].weight, config.group_size, config.symmetric)
    assert torch.equal(small[0].int_weight, weight) and torch.equal(small[0].scale, scale)
    assert (zero_point is None) == config.symmetric
    assert zero_point is None or torch.equal(small[0].zero_point, zero_point)
    assert (small(x) - net(x)).norm() < 0.2 * net(x).norm()


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_simulation_equals_execution(config):
    net, x = model()
    quantizer = Quantizer(config)
    prepared = quantizer.prepare(net, x)
    prepared.eval()
    simulated = prepared(x)
    torch.testing.assert_close(quantizer.convert(prepared)(x), simulated, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: Int4WeightOnly(group_size=48), ValueError, "Int4WeightOnly: group_size must be 32, 64 or 128, got 48"),
        (lambda: Int8ActInt4Weight(group_size=True), ValueError, "Int8ActInt4Weight: group_size must be 32, 64 or 128, got True"),
        (lambda: Int4WeightOnly(symmetric=1), TypeError, "Int4WeightOnly: symmetric must be True or False, got 1"),
    ],
)
def test_bad_configs(call, error, text):
    with pytest.raises(error, match=text):
        call()
