"""The int8 2:4 convolution: every kernel against the reference, and the layer around it."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from support.kernels import all_kernels
from torch import nn

from pycompress.nn import Int8Conv2d, Int8Sparse24Conv2d, Sparse24Conv2d
from pycompress.ops import int8_sparse24_conv2d, int8_sparse24_conv2d_reference, quantize_weight, sparse24_compress, sparse24_mask

GEOMETRIES = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": (2, 1), "padding": (1, 2), "dilation": 2},
    {"kernel_size": (1, 5), "padding": (0, 2)},
]
FORMATS = [torch.contiguous_format, torch.channels_last]


@functools.cache
def generator():
    return torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(shape, generator=generator())


def sparse_conv(c=5, o=19, bias=True, pattern="2:4", **geometry):
    conv = nn.Conv2d(c, o, bias=bias, **geometry)
    with torch.no_grad():
        weight = randn(*conv.weight.shape)
        conv.weight.copy_(weight * sparse24_mask(weight.flatten(1).abs(), pattern).view_as(weight))
        if bias:
            conv.bias.copy_(randn(o))
    return conv


def pairs(geometry):
    return {name: (value, value) if isinstance(value, int) else value for name, value in geometry.items()}


@pytest.mark.parametrize("kernel", all_kernels("int8_sparse24_linear"))
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("x_scale", [None, 0.03])
def test_every_kernel_equals_the_reference(x_scale, geometry, pattern, kernel):
    for size, memory_format in zip(((9, 8), (7, 23)), FORMATS, strict=True):
        conv, x = sparse_conv(pattern=pattern, **geometry), randn(3, 5, *size).contiguous(memory_format=memory_format)
        x[1] *= 100  # scales are per image
        q, scale = quantize_weight(conv.weight)
        compressed = sparse24_compress(q.flatten(1), pattern=pattern)
        y = int8_sparse24_conv2d(x, *compressed, scale, None, x_scale=x_scale, pattern=pattern, kernel=kernel, **geometry)
        expected = int8_sparse24_conv2d_reference(x, *compressed, scale, None, x_scale=x_scale, pattern=pattern, **pairs(geometry))
        assert torch.equal(y, expected)  # the sums are exact, and one product per output has one rounding
        assert y.is_contiguous(memory_format=memory_format)
        bias = conv.bias.detach()
        y = int8_sparse24_conv2d(
            x, *compressed, scale, bias, x_scale=x_scale, pattern=pattern, kernel=kernel, activation="relu", **geometry
        )
        torch.testing.assert_close(y, F.relu(expected + bias[:, None, None]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", all_kernels("int8_sparse24_linear"))
def test_awkward_images(kernel):
    conv = sparse_conv(kernel_size=3, padding=1)
    q, scale = quantize_weight(conv.weight)
    compressed = sparse24_compress(q.flatten(1))
    x = randn(4, 5, 6, 6)
    x[0] = 0
    x[1, 2, 3, 3] = float("nan")
    x[2, 0, 0, 0] = float("-inf")
    y = int8_sparse24_conv2d(x, *compressed, scale, conv.bias.detach(), kernel_size=3, padding=1, kernel=kernel)
    assert torch.equal(y[0], conv.bias[:, None, None].expand(19, 6, 6))
    assert y[1:3].isnan().all()
    assert y[3].isfinite().all()
    empty = int8_sparse24_conv2d(x[:0], *compressed, scale, kernel_size=3, padding=1, kernel=kernel)
    assert empty.shape == (0, 19, 6, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype):
    layer, x = Int8Sparse24Conv2d.from_float(sparse_conv(kernel_size=3)), randn(2, 5, 7, 7).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), layer(x.float()), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("x_scale", [None, 0.02])
def test_layer_equals_int8_conv2d_on_the_same_weight(x_scale, bias):
    conv, x = sparse_conv(bias=bias, kernel_size=3, padding="same"), randn(2, 5, 9, 9)
    layer = Int8Sparse24Conv2d.from_float(conv, x_scale=x_scale)
    dense = Int8Conv2d.from_float(conv, x_scale=x_scale)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-6, atol=1e-5)
    assert torch.equal(layer.int_weight, dense.int_weight)
    assert torch.equal(layer.to_dense().weight, dense.to_dense().weight)
    assert layer.format == f"2:4 int8 {'dynamic' if x_scale is None else 'static'}"
    twin = Int8Sparse24Conv2d.from_config(layer.config())
    twin.load_state_dict(layer.state_dict())
    assert set(layer.state_dict()) >= {"values", "indices", "scale"}
    for other in (twin, copy.deepcopy(layer), Int8Sparse24Conv2d.from_float(Sparse24Conv2d.from_float(conv), x_scale=x_scale)):
        assert torch.equal(other(x), layer(x))
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_gradient_is_straight_through():
    conv, x = sparse_conv(kernel_size=3, stride=2, padding=1), randn(2, 5, 9, 9).requires_grad_()
    layer = Int8Sparse24Conv2d.from_float(conv, activation="silu")
    y = layer(x)
    grad = randn(*y.shape)
    y.backward(grad)
    before = Int8Sparse24Conv2d.from_float(conv)(x.detach()).requires_grad_()
    inner = torch.autograd.grad(F.silu(before), before, grad)[0]
    expected = torch.nn.grad.conv2d_input(x.shape, layer.to_dense().weight, inner, 2, 1)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("conv", "text"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "groups must be 1, got 2"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding_mode must be 'zeros', got 'reflect'"),
        (nn.Conv2d(4, 4, 3), "weight must keep at most 2 of every 4 along K"),
    ],
)
def test_what_it_cannot_do(conv, text):
    with pytest.raises(ValueError, match=text):
        Int8Sparse24Conv2d.from_float(conv)


def test_bad_input():
    layer = Int8Sparse24Conv2d(3, 4, (3, 3))
    with pytest.raises(ValueError, match="x must have 3 channels on cpu, got"):
        layer(torch.randn(1, 4, 5, 5))
    with pytest.raises(ValueError, match=r"int8_sparse24_conv2d: kernel_size \(3, 3\) must fit into the padded image"):
        layer(torch.randn(1, 3, 2, 2))
    state = layer.state_dict()
    state["indices"][0, 0] = 0b0000_0000  # both kept at position 0
    with pytest.raises(RuntimeError, match="indices must rise strictly"):
        Int8Sparse24Conv2d(3, 4, (3, 3)).load_state_dict(state)


@pytest.mark.parametrize("kernel", all_kernels("int8_sparse24_linear"))
@pytest.mark.parametrize("memory_format", FORMATS)
def test_threads_change_nothing(memory_format, kernel):
    """Few positions share out the channels among the threads, many positions the rows."""
    before = torch.get_num_threads()
    try:
        for size, o in ((6, 260), (24, 40)):
            conv, x = sparse_conv(40, o, kernel_size=3, padding=1), randn(1, 40, size, size).contiguous(memory_format=memory_format)
            q, scale = quantize_weight(conv.weight)
            compressed = sparse24_compress(q.flatten(1))
            torch.set_num_threads(1)
            expected = int8_sparse24_conv2d(x, *compressed, scale, kernel_size=3, padding=1, kernel=kernel)
            torch.set_num_threads(2)
            assert torch.equal(int8_sparse24_conv2d(x, *compressed, scale, kernel_size=3, padding=1, kernel=kernel), expected)
    finally:
        torch.set_num_threads(before)
