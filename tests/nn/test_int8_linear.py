import copy
import pickle

import pytest
import torch
from torch import nn

from pycompress.nn import Int8Linear
from pycompress.ops import int8_linear, native, quantize_weight

STATIC = [{}, {"asymmetric": True}, {"x_scale": 0.03}, {"x_scale": 0.03, "x_zero_point": 5}]


def make(**kwargs):
    linear = nn.Linear(37, 21)
    return linear, Int8Linear.from_float(linear, **kwargs), torch.randn(4, 3, 37)


@pytest.mark.parametrize("static", STATIC)
def test_runs_the_op(static):
    linear, layer, x = make(**static)
    weight, scale = quantize_weight(linear.weight)
    assert torch.equal(layer(x), int8_linear(x, weight, scale, linear.bias, **static))
    assert torch.equal(layer.int_weight, weight)
    assert layer.kernel == native.kernels("int8_matmul")[0]
    assert (layer.fallback_reason is None) == (layer.kernel != "reference")


def test_close_to_float():
    linear, layer, x = make()
    assert (layer(x) - linear(x)).norm() < 0.012 * linear(x).norm()


@pytest.mark.parametrize("static", STATIC)
@pytest.mark.parametrize("bias", [True, False])
def test_round_trips(static, bias):
    layer = Int8Linear.from_float(nn.Linear(37, 21, bias), **static)
    x = torch.randn(5, 37)
    y = layer(x)
    twin = Int8Linear.from_config(layer.config())
    assert not torch.equal(twin(x), y)
    twin.load_state_dict(layer.state_dict())
    for other in (twin, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), y)
        assert other.kernel == layer.kernel


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_keep_their_buffers(copied):
    """The packed weight too, in its old place: memory reports, moves and torch.export find it among the buffers."""
    _, layer, x = make()
    twin = copied(layer)
    assert list(dict(twin.named_buffers())) == list(dict(layer.named_buffers()))
    assert torch.equal(torch.export.export(twin, (x,)).module()(x), layer(x))


def test_state_dict_is_canonical_and_memory_is_not_doubled():
    _, layer, _ = make(x_scale=0.1)
    state = layer.state_dict()
    assert {k: v.dtype for k, v in state.items()} == {
        "weight": torch.int8,
        "scale": torch.float32,
        "x_scale": torch.float32,
        "bias": torch.float32,
    }
    assert layer.num_bytes() == 37 * 21 + 21 * 4 + 21 * 4 + 4
    assert layer.num_params() == 37 * 21 + 21
    big = Int8Linear.from_float(nn.Linear(1024, 512))
    assert sum(b.numel() * b.element_size() for b in big.buffers()) < 1.02 * 1024 * 512


def test_wrong_state_leaves_the_layer_as_it_was():
    _, layer, x = make()
    y = layer(x)
    good = layer.state_dict()
    for change, text in [
        ({"weight": torch.zeros(21, 37)}, "weight must be torch.int8"),
        ({"weight": torch.zeros(21, 36, dtype=torch.int8)}, r"weight must be torch.int8 \(21, 37\), got torch.int8 \(21, 36\)"),
    ]:
        with pytest.raises(RuntimeError, match=text):
            layer.load_state_dict({**good, **change})
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        layer.load_state_dict({k: v for k, v in good.items() if k != "weight"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*extra"):
        layer.load_state_dict({**good, "extra": torch.ones(1)})
    assert torch.equal(layer(x), y)


def test_half_keeps_scales_and_takes_half_inputs():
    _, layer, x = make()
    y = layer(x)
    layer.half()
    assert layer.scale.dtype == torch.float32
    assert torch.equal(layer(x), y)
    assert layer(x.half()).dtype == torch.float16


def test_meta_device_and_back():
    _, layer, x = make()
    y, state = layer(x), layer.state_dict()
    layer.to("meta")
    assert layer.weight.device.type == "meta"
    back = layer.to_empty(device="cpu")
    back.load_state_dict(state)
    assert torch.equal(back(x), y)


def test_a_default_device_does_not_reach_the_kernels():
    _, layer, x = make()
    y = layer(x)
    with torch.device("meta"):  # a buffer allocated there has no address: this crashed
        assert torch.equal(layer(x), y)
        assert Int8Linear(3, 2).weight.device.type == "meta"
        assert torch.equal(copy.deepcopy(layer).int_weight, layer.int_weight)


def test_to_dense_and_repr():
    linear, layer, _ = make()
    dense = layer.to_dense()
    assert (dense.weight - linear.weight).abs().max() <= layer.scale.max() / 2 * 1.0001
    assert torch.equal(dense.bias, linear.bias)
    assert "format=int8 dynamic" in repr(layer)
    assert f"kernel={layer.kernel}" in repr(layer)


def test_compile_export_and_gradient():
    _, layer, x = make(x_scale=0.02, x_zero_point=-4)
    y = layer(x)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), y)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), y)
    x.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda layer: layer(torch.randn(2, 36)), ValueError, r"weight must be \(N, 36\) to match x \(2, 36\), got \(21, 37\)"),
        (lambda layer: layer(torch.zeros(2, 37, dtype=torch.int64)), TypeError, "x must be a float32, bfloat16 or float16 tensor"),
        (lambda layer: Int8Linear.from_float(nn.Linear(3, 2), x_scale=-1.0), ValueError, "x_scale must be a finite number"),
        (lambda layer: Int8Linear.from_float(nn.Linear(3, 2), weight=torch.zeros(2, 3, dtype=torch.int8)), ValueError, "given together"),
        (lambda layer: Int8Linear(3, 2, activation="swish"), ValueError, "activation must be"),
        (lambda layer: Int8Linear(131072, 2), ValueError, "K must be at most 131071"),
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
        Int8Linear.from_float(linear)
