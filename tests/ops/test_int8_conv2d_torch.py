"""``int8_conv2d`` under autograd, as a registered op and compiled."""

import pytest
import torch
import torch.nn.functional as F
from support.int8_conv2d import DEPTHWISE, GROUPED, KERNELS, PLAIN, WINOGRAD, make, name

from pycompress.ops import int8_conv2d, native
from pycompress.ops import int8_conv2d_dispatch as dispatch
from pycompress.ops import int8_conv2d_packing as packing
from pycompress.ops.int8_conv2d_arguments import make_geometry


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("case", [PLAIN[5], PLAIN[11], WINOGRAD[1], GROUPED[1], DEPTHWISE[2]], ids=name)
def test_gradient_is_straight_through(case, activation, kernel):
    x, weight, scale, options = make(case)
    scale = scale * 2.0**-8
    bias, residual = torch.randn(len(scale)), None
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    y = int8_conv2d(x, weight, scale, bias, activation=activation, kernel=kernel, **options)
    residual = torch.randn_like(y).requires_grad_()
    y = int8_conv2d(x, weight, scale, bias, activation=activation, residual=residual, kernel=kernel, **options)
    grad = torch.randn_like(y)
    y.backward(grad)
    before = int8_conv2d(x.detach(), weight, scale, bias, residual=residual.detach(), kernel=kernel, **options).requires_grad_()
    (before if activation is None else getattr(F, activation)(before)).backward(grad)
    torch.testing.assert_close(residual.grad, before.grad)
    twin = x.detach().clone().requires_grad_()
    F.conv2d(twin, weight.float() * scale[:, None, None, None], None, *options.values()).backward(before.grad)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-4, atol=1e-5)
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_int8_result_has_no_gradient(kernel):
    x, weight, scale, options = make(PLAIN[1])
    with pytest.raises(RuntimeError, match="an int8 result has no gradient"):
        int8_conv2d(x.requires_grad_(), weight, scale, out_scale=1.0, kernel=kernel, **options)
    with torch.no_grad():
        assert int8_conv2d(x, weight, scale, out_scale=1.0, kernel=kernel, **options).dtype == torch.int8


@pytest.mark.parametrize("kernel", [native.kernels("int8_conv2d")[0], "reference"])
def test_torch_op(kernel):
    for case in (PLAIN[1], WINOGRAD[1], DEPTHWISE[0]):
        x, weight, scale, options = make(case)
        geometry = list(make_geometry("test", weight.shape, *options.values()))
        torch.library.opcheck(packing.pack_op, (weight, geometry, kernel))
        packed = packing.pack_weight(weight, geometry, kernel)
        torch.library.opcheck(packing.unpack_op, (packed, x.shape[1], geometry, kernel))
        plain = (geometry, None, None, torch.float32, None, None, None, None, False, "relu", kernel)
        chain = (geometry, 0.02, 3, torch.int8, 0.5, -1, None, None, False, "none", kernel)
        for value in (x, x.to(memory_format=torch.channels_last), x[..., 1:]):
            for arguments in (plain, chain):
                torch.library.opcheck(dispatch.op, (value, packed, scale, scale, None, *arguments))
        last = (geometry, 0.02, 3, torch.float32, None, None, None, None, True, "none", kernel)
        q = x.to(torch.int8).to(memory_format=torch.channels_last)
        torch.library.opcheck(dispatch.op, (q, packed, scale, scale, None, *last))


def test_compile():
    x, weight, scale, options = make(WINOGRAD[1])
    expected = int8_conv2d(x, weight, scale, activation="relu", **options)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(x):
        return int8_conv2d(x, weight, scale, activation="relu", **options)

    assert torch.equal(function(x), expected)
    assert torch.equal(function(x.to(memory_format=torch.channels_last)), expected)
