"""Calls that something records or replaces, and tensors that are more than memory with strides: both go through torch's dispatcher."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from pycompress import nn as compressed
from pycompress.ops import kd_loss, native

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:.*batching rule.*:UserWarning"
)


def sparse(layer):
    """The layer with 2:4 zeros."""
    with torch.no_grad():
        layer.weight.flatten(1)[:, 0::4] = 0
        layer.weight.flatten(1)[:, 3::4] = 0
    return layer


LAYERS = {
    "Int8Linear": lambda: compressed.Int8Linear.from_float(nn.Linear(24, 8), activation="gelu"),
    "Int8WeightOnlyLinear": lambda: compressed.Int8WeightOnlyLinear.from_float(nn.Linear(24, 8)),
    "Int4Linear": lambda: compressed.Int4Linear.from_float(nn.Linear(24, 8), group_size=32),
    "Int4Linear int8": lambda: compressed.Int4Linear.from_float(nn.Linear(24, 8), group_size=32, int8_activations=True),
    "Sparse24Linear": lambda: compressed.Sparse24Linear.from_float(sparse(nn.Linear(24, 8))),
    "Int8Sparse24Linear": lambda: compressed.Int8Sparse24Linear.from_float(sparse(nn.Linear(24, 8))),
    "Int8Conv2d": lambda: compressed.Int8Conv2d.from_float(nn.Conv2d(4, 8, 3), activation="relu"),
    "Sparse24Conv2d": lambda: compressed.Sparse24Conv2d.from_float(sparse(nn.Conv2d(4, 8, 3))),
    "Int8Sparse24Conv2d": lambda: compressed.Int8Sparse24Conv2d.from_float(sparse(nn.Conv2d(4, 8, 3))),
}


def case(name):
    return LAYERS[name]().eval(), torch.randn(2, 4, 6, 6) if "Conv" in name else torch.randn(5, 24)


@pytest.mark.parametrize("name", LAYERS)
class TestLayers:
    def test_jit_trace_records_the_op(self, name):
        layer, x = case(name)
        traced = torch.jit.trace(layer, x)
        other = torch.randn_like(x)
        assert torch.equal(traced(other), layer(other))

    def test_make_fx_records_the_op(self, name):
        layer, x = case(name)
        graph = make_fx(layer)(x)
        other = torch.randn_like(x)
        assert torch.equal(graph(other), layer(other))

    def test_fake_tensors_have_shapes(self, name):
        layer, x = case(name)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = layer(mode.from_tensor(x))
        y = layer(x)
        assert fake.shape == y.shape and fake.stride() == y.stride() and fake.dtype == y.dtype

    def test_negative_view(self, name):
        layer, x = case(name)
        assert torch.equal(layer(torch._neg_view(x)), layer(-x))

    def test_vmap(self, name):
        layer, x = case(name)
        xs = torch.stack([x, 2 * x, -x])
        torch.testing.assert_close(torch.vmap(layer)(xs), torch.stack([layer(x) for x in xs]))

    def test_second_derivative(self, name):
        """Straight-through gradients are differentiable: of a penalty on them as of the float layer with the same weights."""
        layer, x = case(name)
        x.requires_grad_()
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        weight = layer.weight.detach() if hasattr(layer, "weight") else layer.to_dense().weight.detach()
        activation = {"gelu": nn.functional.gelu, "relu": nn.functional.relu}.get(getattr(layer, "activation", None), lambda y: y)
        z = x.detach().requires_grad_()
        linear = nn.functional.conv2d if "Conv" in name else nn.functional.linear
        (expected,) = torch.autograd.grad(activation(linear(z, weight, layer.bias)).square().sum(), z, create_graph=True)
        expected.square().sum().backward()
        torch.testing.assert_close(gradient, expected, rtol=0.05, atol=0.05 * float(expected.detach().abs().max()))
        torch.testing.assert_close(x.grad, z.grad, rtol=0.05, atol=0.05 * float(z.grad.abs().max()))


@pytest.mark.skipif(native.module is None, reason="the reference reads no addresses")
def test_no_memory_is_an_error():
    layer = LAYERS["Int8Linear"]()
    with pytest.raises(ValueError, match="int8_linear: x has no memory of its own"):
        layer(torch._efficientzerotensor((5, 24)))


def test_kd_loss_of_a_negative_view():
    student, teacher, options = torch.randn(4, 9), torch.randn(4, 9), {"temperature": 2.0, "soft_weight": 1.0, "hard_weight": 0.0}
    assert torch.equal(kd_loss(torch._neg_view(student), teacher, **options), kd_loss(-student, teacher, **options))
