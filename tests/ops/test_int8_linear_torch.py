"""``int8_linear`` under autograd, as a registered op and compiled."""

import pytest
import torch
import torch.nn.functional as F
from support.int8_linear import KERNELS, QUANTIZATION, make

from pycompress.ops import int8_linear, native


@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_gradient_is_straight_through(activation, kernel):
    x, weight, scale, bias = make(6, 9, 14)
    upstream = torch.randn(6, 9)
    x.requires_grad_()
    y = int8_linear(x, weight, scale, bias, activation=activation, kernel=kernel)
    y.backward(upstream)
    before = int8_linear(x.detach(), weight, scale, bias, kernel=kernel).requires_grad_()
    if activation:
        getattr(F, activation)(before).backward(upstream)
        upstream = before.grad
    torch.testing.assert_close(x.grad, upstream @ (weight.float() * scale[:, None]))


@pytest.mark.parametrize("quantization", QUANTIZATION[:4])
def test_torch_sees_one_op(quantization):
    x, weight, scale, bias = make(5, 12, 20)
    expected = int8_linear(x, weight, scale, bias, **quantization)

    def call(x):
        return int8_linear(x, weight, scale, bias, **quantization)

    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x), expected)
    from pycompress.ops.int8_matmul import pack_weight

    for kernel in {native.kernels("int8_matmul")[0], native.REFERENCE}:
        packed = pack_weight(weight, kernel)
        arguments = (
            packed,
            scale,
            bias,
            12,
            20,
            quantization.get("x_scale"),
            quantization.get("x_zero_point"),
            quantization.get("asymmetric", False),
            "none",
            kernel,
        )
        torch.library.opcheck(torch.ops.pycompress.int8_linear.default, (x, *arguments))
        torch.library.opcheck(torch.ops.pycompress.int8_linear.default, (torch.randn(20, 5).T, *arguments))
        torch.library.opcheck(torch.ops.pycompress.int8_pack.default, (weight, kernel))


def test_compiled_training_step_has_the_same_gradient():
    x, weight, scale, bias = make(5, 12, 20)
    step = torch.compile(lambda x: int8_linear(x, weight, scale, bias), fullgraph=True, backend="aot_eager")
    eager, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    int8_linear(eager, weight, scale, bias).sum().backward()
    step(compiled).sum().backward()
    torch.testing.assert_close(compiled.grad, eager.grad)
