"""The simulation computes what the executed layers compute: the same integers, to the bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.quantizable import normal, seeded
from torch import Tensor, nn

from pycompress.nn.int8_conv1d import Int8Conv1d
from pycompress.ops.affine import dequantize_affine
from pycompress.quantization import Int8Dynamic, Int8Static, Int8WeightOnly, Quantizer
from pycompress.quantization.fake_quantize import quantized_weight

LINEAR_ONLY = Int8Dynamic(symmetric=False)
CONFIGS = [Int8Dynamic(), Int8Static(), Int8Static(symmetric=True), Int8Static(observer="percentile", observer_options={"percentile": 90})]


def prepare(layer: nn.Module, config, data: Tensor) -> tuple[nn.Module, nn.Module]:
    """(simulation, executed layer)"""
    quantizer = Quantizer(config)
    prepared = quantizer.prepare(layer, data)
    quantizer.calibrate(prepared, data)
    return prepared, quantizer.convert(prepared)


def integer_sums(prepared: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Exact sums of the simulated integers (float64 holds them) and the scale of each output."""
    part = prepared.input_quantizer
    scale, zero_point = part.qparams(x)
    q_x = (part.integers(x) - zero_point).double()
    q_w, w_scale, _ = quantized_weight(prepared)
    if isinstance(prepared, nn.Linear):
        return F.linear(q_x, q_w.double()), scale * w_scale
    convolve = F.conv1d if isinstance(prepared, nn.Conv1d) else F.conv2d
    sums = convolve(q_x, q_w.double(), None, prepared.stride, prepared.padding, prepared.dilation, prepared.groups)
    return sums, scale * w_scale.view(-1, *[1] * (x.dim() - 2))


@pytest.mark.parametrize("config", [*CONFIGS, LINEAR_ONLY], ids=repr)
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (2, 5, 64), (129, 33)])
def test_linear_integers(config, shape):
    layer = seeded(nn.Linear(shape[-1], 13))
    x = normal(*shape, seed=1)
    prepared, executed = prepare(layer, config, x[:1])
    q_w, scale, _ = quantized_weight(prepared)
    assert torch.equal(executed.int_weight.int(), q_w) and torch.equal(executed.scale, scale)
    sums, step = integer_sums(prepared, x)
    if prepared.input_quantizer.scheme.dynamic is False:
        assert float(executed.x_scale) == float(prepared.input_quantizer.scale)
    found = torch.round((executed(x).double() - layer.bias.double()) / step.double())
    # Sums below 2**20 come through float32 with an error far below one half, so rounding recovers them exactly.
    assert sums.abs().max() < 2**20
    assert torch.equal(found, sums)


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize(
    "options", [{}, {"padding": 1, "stride": 2}, {"padding": (2, 1), "dilation": 2}, {"groups": 3, "padding": 1}, {"padding": "same"}]
)
def test_conv_integers(config, options):
    """Padding matters: behind a zero point, a padded 0 is the integer zero_point."""
    layer = seeded(nn.Conv2d(3, 6, 3, **options))
    x = normal(2, 3, 9, 8, seed=1) + 0.7
    prepared, executed = prepare(layer, config, x[:1])
    sums, step = integer_sums(prepared, x)
    found = torch.round((executed(x).double() - layer.bias.double()[:, None, None]) / step.double())
    assert torch.equal(found, sums)


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("options", [{}, {"padding": 2, "stride": 2, "dilation": 2}, {"groups": 3, "padding": "same"}])
def test_conv1d_integers(config, options):
    layer = seeded(nn.Conv1d(3, 6, 3, **options))
    x = normal(2, 3, 11, seed=1) + 0.7
    prepared, executed = prepare(layer, config, x[:1])
    assert isinstance(executed, Int8Conv1d)
    sums, step = integer_sums(prepared, x)
    assert torch.equal(torch.round((executed(x).double() - layer.bias.double()[:, None]) / step.double()), sums)


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5), k=st.integers(1, 40), seed=st.integers(0, 2**16), magnitude=st.floats(-12, 12), symmetric=st.booleans())
def test_any_linear(rows, k, seed, magnitude, symmetric):
    layer = seeded(nn.Linear(k, 3, bias=False), seed=seed)
    x = 10.0**magnitude * normal(rows, k, seed=seed)
    for config in (Int8Dynamic(symmetric), Int8Static(symmetric=symmetric)):
        prepared, executed = prepare(layer, config, x)
        sums, step = integer_sums(prepared, x)
        assert torch.equal(torch.round(executed(x).double() / step.double().expand_as(sums)), sums)


@pytest.mark.parametrize("config", [*CONFIGS, Int8WeightOnly()], ids=repr)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_float_outputs_agree(kind, config):
    """The float epilogue differs by rounding only; the bound follows from the number of float32 additions."""
    layer = seeded(nn.Linear(50, 7) if kind == "linear" else nn.Conv2d(5, 4, 3, padding=1))
    x = normal(*((9, 50) if kind == "linear" else (2, 5, 6, 6)), seed=1)
    prepared, executed = prepare(layer, config, x)
    weight, k = prepared.weight.detach(), prepared.weight[0].numel()
    magnitude = layer_output(layer, x.abs(), weight.abs(), layer.bias.abs())
    # The inputs are quantized to at most 1.01 times their largest value; 4 covers the epilogue on both sides.
    bound = (k + 4) * torch.finfo(torch.float32).eps * 1.01 * (magnitude + x.abs().max() * weight.abs().sum())
    assert ((prepared(x) - executed(x)).abs() <= bound).all()


def layer_output(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x, weight, bias) if isinstance(layer, nn.Linear) else F.conv2d(x, weight, bias, padding=layer.padding)


@pytest.mark.parametrize("config", [*CONFIGS[:3], LINEAR_ONLY], ids=repr)
def test_error_bound_against_float(config):
    """|y' - y| <= sum |x' - x| |w'| + |x| |w' - w| with half a step per value (calibrated on the data itself)."""
    layer = seeded(nn.Linear(40, 6))
    x = normal(16, 40, seed=1)
    prepared, executed = prepare(layer, config, x)
    scale, _ = prepared.input_quantizer.qparams(x)
    q_w, w_scale, _ = quantized_weight(prepared)
    w = dequantize_affine(q_w, w_scale[:, None])
    bound = F.linear((scale / 2).expand_as(x), w.abs()) + F.linear(x.abs(), (w_scale / 2)[:, None].expand_as(w))
    assert ((executed(x) - layer(x)).abs() <= 1.001 * bound + 1e-5).all()


def test_nan_and_inf_come_out_as_nan_on_both_sides():
    layer = seeded(nn.Linear(4, 3))
    x = normal(3, 4)
    for config in (Int8Dynamic(), LINEAR_ONLY, Int8Static()):
        prepared, executed = prepare(layer, config, x)
        bad = x.clone()
        bad[1, 2] = float("nan")
        bad[2, 0] = float("inf")
        for model in (prepared, executed):
            y = model(bad)
            assert torch.isfinite(y[0]).all() and torch.isnan(y[1:]).all()
