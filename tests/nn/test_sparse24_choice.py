import pytest
import torch
from support.kernels import native_kernels
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from pycompress.nn import Sparse24Linear, sparse24_choice
from pycompress.nn.base import get_note
from pycompress.nn.sparse24_choice import conv_gain, gain, int8_sparse24_or_reason, sparse24_or_dense
from pycompress.ops import quantize_weight, sparse24_mask
from pycompress.pruning import Pruner

needs_native = pytest.mark.skipif(not native_kernels("sparse24_linear"), reason="no native kernel")


def big_linear():
    linear = nn.Linear(160, 128)
    with torch.no_grad():
        linear.weight.mul_(sparse24_mask(linear.weight.abs()))
    return linear


@needs_native
def test_a_layer_that_gains_is_packed(monkeypatch):
    monkeypatch.setattr(sparse24_choice, "gain", lambda *_: 1.7)
    linear, x = big_linear(), torch.randn(3, 160)
    layer = sparse24_or_dense(linear)
    assert isinstance(layer, Sparse24Linear)
    torch.testing.assert_close(layer(x), linear(x))


@needs_native
def test_a_layer_that_loses_stays_dense_and_says_so(monkeypatch):
    monkeypatch.setattr(sparse24_choice, "gain", lambda *_: 0.8)
    linear = big_linear()
    assert sparse24_or_dense(linear) is None
    assert "runs at 0.80x of the dense layer's speed here" in get_note(linear)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (nn.Conv1d(3, 4, 3), "no sparse layer for Conv1d"),
        (nn.Conv2d(3, 4, 3), "3 x 4 channels x 3 x 3 is too small to gain"),
        (nn.Conv2d(4, 4, 3, groups=2), "needs groups = 1, this layer has 2"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "pads with zeros, not padding_mode='reflect'"),
        (nn.Conv2d(4, 4, 2, padding="same"), "padding='same' needs"),
        (weight_norm(nn.Linear(8, 8)), "its weight has parametrizations"),
        (nn.Linear(160, 128).bfloat16(), "hold float32 weights, this layer torch.bfloat16"),
        (nn.Linear(8, 8), "8 x 8 is too small to gain"),
    ],
)
@needs_native
def test_reasons(layer, text):
    assert sparse24_or_dense(layer) is None
    assert text in get_note(layer)


@needs_native
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize("int8", [False, True])
def test_measuring_leaves_the_random_numbers_alone(int8, pattern):
    gain.cache_clear()
    torch.manual_seed(3)
    expected = torch.randn(1)
    torch.manual_seed(3)
    assert gain(64, 64, 1, int8, pattern) > 0
    assert conv_gain(8, 8, (3, 3), (1, 1), (0, 0), (20, 20), 1, int8, pattern) > 0  # wider than the usual image
    assert torch.equal(torch.randn(1), expected)


@needs_native
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_what_is_measured_has_the_pattern(monkeypatch, pattern):
    asked = []
    monkeypatch.setattr(sparse24_choice, "gain", lambda *arguments: asked.append(arguments) or 1.7)
    linear = nn.Linear(160, 128)
    with torch.no_grad():
        linear.weight.mul_(sparse24_mask(linear.weight.abs(), "1:4"))
    assert sparse24_or_dense(linear, pattern).pattern == pattern
    weight, scale = quantize_weight(linear.weight)
    assert int8_sparse24_or_reason(linear, weight, scale).pattern == "1:4"
    assert [(int8, nm) for *_, int8, nm in asked] == [(False, pattern), (True, "1:4")]


@needs_native
def test_pruner_makes_the_layers(monkeypatch):
    monkeypatch.setattr(sparse24_choice, "gain", lambda *_: 1.7)
    model, x = nn.Sequential(nn.Linear(160, 128), nn.ReLU(), nn.Linear(128, 4)), torch.randn(3, 160)
    pruner = Pruner(model, x, pattern="2:4")
    pruner.step()
    masked = model(x)
    model = pruner.convert()
    assert isinstance(model[0], Sparse24Linear)
    assert type(model[2]) is nn.Linear
    assert "too small" in get_note(model[2])
    torch.testing.assert_close(model(x), masked)
