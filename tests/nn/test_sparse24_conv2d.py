import copy

import pytest
import torch
import torch.nn.functional as F
from support.kernels import all_kernels
from torch import nn

from pycompress.nn import Sparse24Conv2d
from pycompress.ops import sparse24_compress, sparse24_conv2d, sparse24_mask

GEOMETRIES = [
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2},
    {"kernel_size": (1, 5), "padding": (0, 2)},
]


def sparse_conv(c=5, o=19, bias=True, pattern="2:4", **geometry):
    conv = nn.Conv2d(c, o, bias=bias, **geometry)
    with torch.no_grad():
        conv.weight.mul_(sparse24_mask(conv.weight.flatten(1).abs(), pattern).view_as(conv.weight))
    return conv


@pytest.mark.parametrize("kernel", all_kernels("sparse24_linear"))
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(("activation", "pattern"), [(None, "2:4"), ("relu", "2:4"), ("relu", "1:4")])
def test_equals_conv2d(activation, pattern, geometry, kernel):
    for size in ((9, 8), (7, 23)):  # 49 to 184 positions: around the tile of 64
        conv, x = sparse_conv(pattern=pattern, **geometry), torch.randn(2, 5, *size)
        values, indices = sparse24_compress(conv.weight.detach().flatten(1), pattern=pattern)
        y = sparse24_conv2d(x, values, indices, conv.bias.detach(), pattern=pattern, activation=activation, kernel=kernel, **geometry)
        expected = conv(x)
        torch.testing.assert_close(y, F.relu(expected) if activation else expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("bias", "pattern"), [(True, "2:4"), (False, "2:4"), (True, "1:4")])
def test_layer_equals_the_conv_it_came_from(bias, pattern):
    conv, x = sparse_conv(bias=bias, pattern=pattern, kernel_size=3, padding="same"), torch.randn(2, 5, 9, 9)
    layer = Sparse24Conv2d.from_float(conv, pattern=pattern)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.weight, conv.weight)
    assert torch.equal(layer.to_dense().weight, conv.weight)
    twin = Sparse24Conv2d.from_config(layer.config())
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_gradient():
    conv, x = sparse_conv(kernel_size=3, stride=2, padding=1), torch.randn(2, 5, 9, 9, requires_grad=True)
    y = Sparse24Conv2d.from_float(conv, activation="relu")(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    twin = x.detach().clone().requires_grad_()
    F.relu(conv(twin)).backward(grad)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-5)


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
        Sparse24Conv2d.from_float(conv)


def test_bad_input():
    layer = Sparse24Conv2d(3, 4, (3, 3))
    with pytest.raises(ValueError, match="x must have 3 channels on cpu, got"):
        layer(torch.randn(1, 4, 5, 5))
    with pytest.raises(ValueError, match=r"x must be \(B, C, H, W\), got shape \(3, 5, 5\)"):
        layer(torch.randn(3, 5, 5))
    with pytest.raises(ValueError, match=r"kernel_size \(3, 3\) must fit into the padded image"):
        layer(torch.randn(1, 3, 2, 2))
    assert layer(torch.randn(0, 3, 5, 5)).shape == (0, 4, 3, 3)
