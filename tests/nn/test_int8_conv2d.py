import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pycompress.nn import Int8Conv2d
from pycompress.nn.int8_conv1d import Int8Conv1d
from pycompress.ops import int8_conv2d, native, quantize_affine, quantize_weight

STATIC = [{}, {"x_scale": 0.03}, {"x_scale": 0.03, "x_zero_point": 5}, {"x_scale": 0.03, "out_scale": 0.02}]
CONVS = [
    lambda: nn.Conv2d(12, 21, 3, padding=1),
    lambda: nn.Conv2d(12, 20, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=4),
    lambda: nn.Conv2d(12, 12, 3, stride=2, padding="valid", groups=12, bias=False),
]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """dynamo limits recompilations per code object, and every layer here shares one ``forward``."""
    torch.compiler.reset()


def make(index=0, **kwargs):
    conv = CONVS[index]()
    return conv, Int8Conv2d.from_float(conv, **kwargs), torch.randn(2, 12, 9, 10)


@pytest.mark.parametrize("static", STATIC)
@pytest.mark.parametrize("index", range(3))
def test_runs_the_op(index, static):
    conv, layer, x = make(index, **static)
    weight, scale = quantize_weight(conv.weight)
    sizes = {"stride": conv.stride, "padding": layer.padding, "dilation": conv.dilation, "groups": conv.groups}
    assert torch.equal(layer(x), int8_conv2d(x, weight, scale, conv.bias, **sizes, **static))
    assert torch.equal(layer.int_weight, weight)
    assert layer.kernel == native.kernels("int8_conv2d")[0]
    assert (layer.fallback_reason is None) == (layer.kernel != "reference")


@pytest.mark.parametrize("index", range(3))
def test_close_to_float(index):
    conv, layer, x = make(index)
    assert (layer(x) - conv(x)).norm() < 0.013 * conv(x).norm()
    image = layer(x[0])
    assert image.shape == conv(x[0]).shape
    assert torch.equal(image, layer(x[:1])[0])


@pytest.mark.parametrize("static", STATIC)
@pytest.mark.parametrize("index", range(3))
def test_round_trips(index, static):
    _, layer, x = make(index, **static)
    y = layer(x)
    twin = Int8Conv2d.from_config(layer.config())
    assert not torch.equal(twin(x), y)
    twin.load_state_dict(layer.state_dict())
    for other in (twin, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), y)
        assert other.kernel == layer.kernel


def test_state_dict_is_canonical_and_memory_is_not_doubled():
    _, layer, _ = make(x_scale=0.1, out_scale=0.2, out_zero_point=4)
    assert {key: value.dtype for key, value in layer.state_dict().items()} == {
        "weight": torch.int8,
        "scale": torch.float32,
        "x_scale": torch.float32,
        "out_scale": torch.float32,
        "out_zero_point": torch.int32,
        "bias": torch.float32,
    }
    assert layer.weight.shape == (21, 12, 3, 3)
    assert layer.num_params() == 21 * 12 * 9 + 21
    big = Int8Conv2d.from_float(nn.Conv2d(256, 128, 3))
    assert sum(b.numel() * b.element_size() for b in big.buffers()) < 1.02 * 256 * 128 * 9


def test_wrong_state_leaves_the_layer_as_it_was():
    _, layer, x = make()
    y, good = layer(x), layer.state_dict()
    with pytest.raises(RuntimeError, match=r"weight must be torch.int8 \(21, 12, 3, 3\), got torch.int8 \(21, 12, 3, 2\)"):
        layer.load_state_dict({**good, "weight": torch.zeros(21, 12, 3, 2, dtype=torch.int8)})
    assert torch.equal(layer(x), y)


def test_half_meta_and_default_device():
    _, layer, x = make()
    y, state = layer(x), layer.state_dict()
    with torch.device("meta"):
        assert torch.equal(layer(x), y)
        assert torch.equal(copy.deepcopy(layer).int_weight, layer.int_weight)
    layer.half()
    assert layer.scale.dtype == torch.float32
    assert torch.equal(layer(x), y)
    assert layer(x.half()).dtype == torch.float16
    layer.to("meta")
    back = layer.to_empty(device="cpu")
    back.load_state_dict(state)
    assert torch.equal(back(x), y)


def test_memory_format_follows_the_input():
    _, layer, x = make()
    y = layer(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, layer(x)) and layer(x).is_contiguous()


@pytest.mark.parametrize("static", STATIC)
def test_compile_and_export(static):
    _, layer, x = make(**static)
    y = layer(x)
    for value in (x, x.to(memory_format=torch.channels_last)):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(value)
        assert torch.equal(compiled, y) and compiled.stride() == layer(value).stride()
        assert torch.equal(torch.export.export(layer, (value,)).module()(value), y)


def test_gradient_is_that_of_the_dense_layer():
    _, layer, x = make(activation="relu")
    x.requires_grad_()
    layer(x).square().sum().backward()
    twin = x.detach().clone().requires_grad_()
    dense = layer.to_dense()(twin)
    dense.backward(2 * layer(x).detach() * (layer(x).detach() > 0))
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-4)
    assert x.grad.abs().sum() > 0


def test_to_dense_and_repr():
    conv, layer, _ = make(1)
    dense = layer.to_dense()
    assert (dense.weight - conv.weight).abs().max() <= layer.scale.max() / 2 * 1.0001
    assert torch.equal(dense.bias, conv.bias)
    assert (dense.stride, dense.dilation, dense.groups) == (conv.stride, conv.dilation, conv.groups)
    assert "format=int8 dynamic" in repr(layer) and f"kernel={layer.kernel}" in repr(layer)


def test_a_residual_block_in_int8_equals_its_simulation():
    """Between the convolutions nothing is float; step by step the block is quantize(dequantize()) of the float arithmetic."""
    steps = {"x": 2.0**-5, "a": 2.0**-4, "b": 2.0**-3}
    first, second = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 1)
    layers = [
        Int8Conv2d.from_float(first, x_scale=steps["x"], out_scale=steps["a"], activation="relu"),
        Int8Conv2d.from_float(second, x_scale=steps["a"], out_scale=steps["b"], activation="relu"),
    ]
    for layer in layers:  # powers of two: every float in between is exact
        layer.scale.copy_(2.0 ** layer.scale.log2().round())
        layer.bias.copy_((layer.bias * 64).round() / 64)
    q = torch.randint(-127, 128, (2, 16, 9, 8), dtype=torch.int8)
    inner = layers[0](q)
    out = layers[1](inner, q, steps["x"])
    assert inner.dtype == out.dtype == torch.int8
    dense = [layer.to_dense() for layer in layers]
    x = q.float() * steps["x"]
    a = quantize_affine(F.relu(dense[0](x.double().float())), torch.tensor(steps["a"]))
    assert torch.equal(inner.int(), a)
    b = quantize_affine(F.relu(dense[1](a.float() * steps["a"]) + x), torch.tensor(steps["b"]))
    assert torch.equal(out.int(), b)
    with pytest.raises(ValueError, match="residual_scale must be given for an int8 residual"):
        layers[1](inner, q)


@pytest.mark.parametrize("static", STATIC)
def test_conv1d(static):
    conv = nn.Conv1d(8, 6, 5, stride=2, padding=2, groups=2)
    layer, x = Int8Conv1d.from_float(conv, **static), torch.randn(3, 8, 33)
    y = layer(x)
    assert layer.weight.shape == conv.weight.shape and y.shape == conv(x).shape
    step = static.get("out_scale", 1.0)
    assert (y.float() * step - conv(x)).norm() < 0.05 * conv(x).norm()
    assert torch.equal(layer(x[0]), layer(x[:1])[0])
    twin = Int8Conv1d.from_config(layer.config())
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), y) and torch.equal(pickle.loads(pickle.dumps(layer))(x), y)
    assert layer.to_dense().weight.shape == conv.weight.shape
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), y)
    with pytest.raises(ValueError, match=r"x must be \(N, 8, L\) or \(8, L\)"):
        layer(torch.zeros(1, 2, 8, 33))


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: Int8Conv2d(4, 4, (3, 3), activation="tanh"), "activation must be"),
        (lambda: Int8Conv2d(4, 4, (3, 3), asymmetric=True), "asymmetric activations need static=True"),
        (lambda: Int8Conv2d(4, 4, (3, 3), asymmetric_output=True), "asymmetric_output needs int8_output=True"),
        (lambda: Int8Conv2d(4, 6, (3, 3), groups=3), "groups must be a positive divisor of the 4 input channels"),
        (lambda: Int8Conv2d(6, 4, (3, 3), groups=3), "groups must be a positive divisor of the 4 output channels"),
        (lambda: Int8Conv2d(4, 4, (3, 3), stride=(0, 1)), "stride must be"),
        (lambda: Int8Conv2d.from_float(nn.Conv2d(4, 4, 3, padding_mode="reflect")), "padding_mode must be 'zeros', got 'reflect'"),
        (lambda: Int8Conv2d.from_float(nn.Conv2d(4, 4, 2, padding="same")), "padding='same' needs"),
        (lambda: Int8Conv2d.from_float(nn.Conv2d(4, 4, 3), x_zero_point=1), "x_zero_point needs x_scale"),
        (lambda: Int8Conv2d.from_float(nn.Conv2d(4, 4, 3), out_zero_point=1), "out_zero_point needs out_scale"),
        (lambda: Int8Conv2d.from_float(nn.Conv2d(4, 4, 3), x_scale=float("inf")), "x_scale must be a finite number"),
        (lambda: Int8Conv2d.from_float(nn.Conv2d(4, 4, 3), weight=torch.zeros(4, 4, 3, 3)), "weight and scale must be given together"),
        (lambda: Int8Conv2d.from_float(nn.Conv2d(4, 4, 3))(torch.zeros(1, 5, 8, 8)), r"x must be \(N, 4, H, W\)"),
        (lambda: Int8Conv2d.from_float(nn.Conv2d(4, 4, 3))(torch.zeros(1, 4, 8, 8, dtype=torch.int8)), "an int8 x needs its x_scale"),
    ],
)
def test_bad_arguments(build, text):
    with pytest.raises(ValueError, match=text):
        build()


def test_from_float_takes_its_own_kind_of_convolution():
    with pytest.raises(TypeError, match=r"Int8Conv1d.from_float: conv must be a Conv1d, got Conv2d"):
        Int8Conv1d.from_float(nn.Conv2d(4, 4, 3))
    with pytest.raises(TypeError, match=r"Int8Conv2d.from_float: conv must be a Conv2d, got Conv1d"):
        Int8Conv2d.from_float(nn.Conv1d(4, 4, 3))


def test_a_layer_that_gets_int8_results_keeps_the_dtype_of_its_weight():
    layer = Int8Conv2d.from_float(nn.Conv2d(3, 4, 3).bfloat16(), x_scale=0.1)
    assert layer.with_int8_output(0.1).weight.dtype == torch.bfloat16
