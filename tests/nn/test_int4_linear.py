import copy
import os
import pickle

import pytest
import torch
from torch import nn

from pycompress.nn import LAYERS, Int4Linear
from pycompress.ops import dequantize_int4, int4_linear, native, quantize_weight_int4

VARIANTS = [{}, {"symmetric": False}, {"group_size": 32}, {"int8_activations": True}, {"int8_activations": True, "symmetric": False}]


def make(**options):
    torch.manual_seed(0)
    linear = nn.Linear(167, 21)
    return linear, Int4Linear.from_float(linear, **options), torch.randn(4, 3, 167)


@pytest.mark.parametrize("options", VARIANTS)
def test_runs_the_op(options):
    linear, layer, x = make(**options)
    group_size = options.get("group_size", 128)
    tensors = quantize_weight_int4(linear.weight, group_size, options.get("symmetric", True))
    expected = int4_linear(x, *tensors, linear.bias, group_size=group_size, int8_activations=options.get("int8_activations", False))
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.int_weight, tensors[0]) and torch.equal(layer.scale, tensors[1])
    assert layer.kernel == native.kernels("int4_matmul")[0]
    assert (layer.fallback_reason is None) == (layer.kernel != "reference")
    assert (layer(x) - linear(x)).norm() < 0.1 * linear(x).norm()


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("bias", [True, False])
def test_round_trips(options, bias):
    torch.manual_seed(0)
    layer = Int4Linear.from_float(nn.Linear(167, 21, bias), **options)
    x = torch.randn(5, 167)
    y = layer(x)
    twin = LAYERS["Int4Linear"].from_config(layer.config())
    assert not torch.equal(twin(x), y)
    twin.load_state_dict(layer.state_dict())
    for other in (twin, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), y)
        assert other.kernel == layer.kernel


def test_state_dict_is_canonical_and_memory_is_an_eighth():
    _, layer, _ = make(symmetric=False)
    state = layer.state_dict()
    assert {name: (t.dtype, tuple(t.shape)) for name, t in state.items()} == {
        "weight": (torch.uint8, (21, 84)),
        "scale": (torch.float32, (21, 2)),
        "zero_point": (torch.uint8, (21, 2)),
        "bias": (torch.float32, (21,)),
    }
    assert layer.num_bytes() == 21 * (84 + 2 * 4 + 2 + 4)
    assert layer.num_params() == 167 * 21 + 21
    assert layer.weight_shape == (21, 167)
    big = Int4Linear.from_float(nn.Linear(1024, 512))
    assert sum(b.numel() * b.element_size() for b in big.buffers()) < 1.02 * 1024 * 512 * 4.25 / 8


def test_wrong_state_leaves_the_layer_as_it_was():
    _, layer, x = make(symmetric=False)
    y, state = layer(x), layer.state_dict()
    for change, text in [
        ({"weight": torch.zeros(21, 84)}, "weight must be torch.uint8"),
        ({"scale": torch.zeros(21, 3)}, r"scale must be torch.float32 \(21, 2\), got torch.float32 \(21, 3\)"),
        ({"scale": torch.full((21, 2), float("nan"))}, "scale must be finite"),
        ({"zero_point": torch.full((21, 2), 16, dtype=torch.uint8)}, "zero_point must be from 0 to 15, got 16"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            layer.load_state_dict({**state, **change})
    with pytest.raises(RuntimeError, match=r"Missing key.*scale"):
        layer.load_state_dict({name: t for name, t in state.items() if name != "scale"})
    assert torch.equal(layer(x), y)


def test_half_keeps_scales_and_takes_half_inputs():
    _, layer, x = make()
    y, scale = layer(x), layer.scale
    layer.half()
    assert torch.equal(layer.scale, scale)
    assert torch.equal(layer(x), y)
    assert layer(x.half()).dtype == torch.float16


def test_meta_device_and_back():
    _, layer, x = make(symmetric=False)
    y, state = layer(x), layer.state_dict()
    layer.to("meta")
    assert layer.weight.device.type == "meta"
    back = layer.to_empty(device="cpu")
    back.load_state_dict(state)
    assert torch.equal(back(x), y)


def test_a_default_device_does_not_reach_the_kernels():
    _, layer, x = make()
    y = layer(x)
    with torch.device("meta"):
        assert torch.equal(layer(x), y)
        assert Int4Linear(3, 2).weight.device.type == "meta"
        assert torch.equal(copy.deepcopy(layer).int_weight, layer.int_weight)


def test_to_dense_and_repr():
    linear, layer, _ = make(group_size=64, symmetric=False, int8_activations=True)
    dense = layer.to_dense()
    assert torch.equal(dense.weight, dequantize_int4(layer.int_weight, layer.scale, layer.zero_point, 167, 64))
    assert torch.equal(dense.bias, linear.bias)
    assert "format=int8 x int4 asymmetric, groups of 64" in repr(layer)
    assert f"kernel={layer.kernel}" in repr(layer)


@pytest.mark.parametrize("options", VARIANTS)
def test_compile_export_and_gradient(options):
    _, layer, x = make(**options)
    y = layer(x)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), y)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), y)
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.to_dense().weight.sum(0).expand_as(x))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork is a POSIX call")
def test_a_forked_child_gets_the_same_bits():
    _, layer, x = make()
    y = layer(x)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(layer(x), y) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda layer: layer(torch.randn(2, 36)), ValueError, r"Int4Linear: x must be \(..., 167\), got \(2, 36\)"),
        (lambda layer: layer(torch.zeros(2, 167, dtype=torch.int64)), TypeError, "x must be a float32, bfloat16 or float16 tensor"),
        (lambda layer: Int4Linear(3, 2, group_size=16), ValueError, "group_size must be 32, 64 or 128, got 16"),
        (lambda layer: Int4Linear.from_float(nn.Linear(3, 2), group_size=3), ValueError, "group_size must be 32, 64 or 128, got 3"),
        (lambda layer: Int4Linear(3, 2, activation="swish"), ValueError, "activation must be"),
        (lambda layer: Int4Linear.from_float(nn.Linear(3, 2), weight=layer.int_weight), ValueError, "given together"),
        (
            lambda layer: Int4Linear.from_float(nn.Linear(3, 2), zero_point=layer.int_weight),
            ValueError,
            "zero_point needs weight and scale",
        ),
        (
            lambda layer: Int4Linear.from_float(nn.Linear(167, 21), weight=layer.int_weight, scale=layer.scale, symmetric=False),
            ValueError,
            "zero_point must be given if and only if symmetric is False",
        ),
        (
            lambda layer: Int4Linear.from_float(nn.Linear(167, 20), weight=layer.int_weight, scale=layer.scale),
            ValueError,
            "weight must have 20 rows",
        ),
        (
            lambda layer: Int4Linear.from_float(nn.Linear(167, 21), weight=layer.int_weight, scale=layer.scale * float("inf")),
            ValueError,
            "scale must be finite",
        ),
    ],
)
def test_bad_input(call, error, text):
    _, layer, _ = make()
    with pytest.raises(error, match=text):
        call(layer)


def test_nan_weights_are_refused():
    linear = nn.Linear(4, 4)
    linear.weight.data[1, 2] = float("nan")
    with pytest.raises(ValueError, match="weight must be finite"):
        Int4Linear.from_float(linear)
