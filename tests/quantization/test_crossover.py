"""Layers that int8 would slow down can stay float: by measurement (injected here) or by the table, with the reason in the report."""

import pytest
import torch
from torch import nn

import pycompress as pc
from pycompress.nn.base import get_note
from pycompress.nn.speed import seconds, speed_up
from pycompress.quantization import Quantizer, crossover


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


@pytest.fixture
def measured(monkeypatch):
    """int8 'runs' at 0.5x of float in layers with 8 outputs, at 2x elsewhere. The list holds the measured calls."""
    calls = []

    def fake(layer, converted, inputs):
        calls.append([tuple(x.shape) for x in inputs])
        assert layer(inputs[0]).shape == converted(inputs[0]).shape
        return 0.5 if layer.weight.shape[0] == 8 else 2.0

    monkeypatch.setattr(crossover, "speed_up", fake)
    monkeypatch.setattr(crossover, "_measured", {})
    return calls


def kinds(model):
    return [type(m).__name__ for m in model if not isinstance(m, (nn.ReLU, nn.Identity))]


@pytest.mark.parametrize("config", [pc.Int8Dynamic(), pc.Int8Static()], ids=repr)
def test_slower_layers_stay_float_and_say_so(config, measured):
    model, x = net(), torch.randn(5, 16)
    small = pc.quantize(model, config, data=[x] if isinstance(config, pc.Int8Static) else None, example_inputs=x, crossover="measure")
    assert kinds(small) == ["Int8Linear", "Int8Linear", "Linear"]
    assert get_note(small[4]) == "left as it is: int8 ran at 0.50x of float's speed here, on 5 x 32"
    assert "int8 ran at 0.50x" in str(pc.report(small, x))
    assert torch.equal(small[4].weight, model[4].weight) and not nn.utils.parametrize.is_parametrized(small[4])
    assert not small[4]._forward_pre_hooks and not hasattr(small[4], "input_quantizer")
    assert measured == [[(5, 16)], [(5, 32)], [(5, 32)]]
    again = pc.quantize(model, config, data=[x] if isinstance(config, pc.Int8Static) else None, example_inputs=x, crossover="measure")
    assert kinds(again) == kinds(small) and len(measured) == 3  # remembered


def test_without_example_inputs_one_row_and_many(measured):
    pc.quantize(net(), pc.Int8Dynamic(), crossover="measure")
    assert measured[0] == [(1, 16), (128, 16)]
    pc.quantize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv1d(4, 4, 40)), pc.Int8Dynamic(), crossover="measure")
    assert measured[-2:] == [[(1, 3, 28, 28)], [(1, 4, 40)]]


def test_table(monkeypatch):
    kernel = pc.quantize(net(), pc.Int8Dynamic())[0].kernel
    monkeypatch.setitem(crossover.TABLE, kernel, {"linear": (1024, 2000), "convolution": (0, 99), "depthwise": crossover.NEVER})
    small = pc.quantize(net(), pc.Int8Dynamic(), crossover="table")
    assert kinds(small) == ["Linear", "Int8Linear", "Linear"]
    reason = f"float is faster than int8 for linear layers of fewer than 1024 weights with the {kernel} kernel"
    assert get_note(small[0]) == f"left as it is: by the table, {reason}"
    convolutions = nn.Sequential(nn.Conv2d(4, 2, 3), nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 8, 1))
    kernel = pc.quantize(convolutions, pc.Int8Dynamic())[0].kernel
    monkeypatch.setitem(crossover.TABLE, kernel, {"linear": (1024, 2000), "convolution": (0, 99), "depthwise": crossover.NEVER})
    small = pc.quantize(convolutions, pc.Int8Dynamic(), crossover="table")
    assert kinds(small) == ["Int8Conv2d", "Conv2d", "Int8Conv2d"] and "of any size" in get_note(small[1])
    wide = pc.quantize(nn.Sequential(nn.Conv2d(4, 30, 1)), pc.Int8Dynamic(), crossover="table")
    assert "convolution layers of more than 99 weights" in get_note(wide[0])
    monkeypatch.delitem(crossover.TABLE, kernel)
    assert kinds(pc.quantize(convolutions, pc.Int8Dynamic(), crossover="table")) == ["Int8Conv2d"] * 3


def test_every_layer_may_stay_float(measured):
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    small = pc.quantize(model, pc.Int8Dynamic(), crossover="measure")
    assert kinds(small) == ["Linear"]
    quantizer = Quantizer(pc.Int8Dynamic(), crossover="measure")
    assert kinds(quantizer.convert(quantizer.prepare(model, torch.randn(3, 16), qat=True))) == ["Linear"]


def test_weight_only_formats_are_for_memory(measured):
    assert kinds(pc.quantize(net(), pc.Int8WeightOnly(), crossover="measure")) == ["Int8WeightOnlyLinear"] * 3
    assert measured == []


def test_default_converts_everything_unmeasured(measured):
    assert kinds(pc.quantize(net(), pc.Int8Dynamic())) == ["Int8Linear"] * 3 and measured == []


def test_bad_choice():
    with pytest.raises(ValueError, match="crossover must be None, 'measure' or 'table', got 'always'"):
        Quantizer(pc.Int8Dynamic(), crossover="always")
    model = net()
    with pytest.raises(ValueError, match="crossover must be None"):
        pc.quantize(model, pc.Int8Dynamic(), crossover=True, inplace=True)
    assert kinds(model) == ["Linear"] * 3


def test_the_clock():
    """A layer that works twice is slower than one that works once; more is not claimed in a test."""

    class Twice(nn.Linear):
        def forward(self, x):
            for _ in range(20):
                y = super().forward(x)
            return y

    twice, once = Twice(256, 256), nn.Linear(256, 256)
    assert speed_up(twice, once, [torch.randn(64, 256)]) > 1.0 > speed_up(once, twice, [torch.randn(64, 256)])
    assert 0 < seconds(lambda: None) < 0.1
