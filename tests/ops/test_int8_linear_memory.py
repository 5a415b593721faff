"""Memory of ``int8_linear``: strides of every kind, and nothing outside the buffers."""

import pytest
import torch
from support.guard import guarded, linux_only
from support.int8_linear import KERNELS, make
from support.kernels import native_kernels

from pycompress.ops import int8_linear


@linux_only
@pytest.mark.parametrize("kernel", native_kernels("int8_matmul"))
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (7, 17, 63), (13, 65, 31), (2, 129, 70)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stays_inside_its_buffers(m, n, k, dtype, kernel):
    x, weight, scale, bias = make(m, n, k, dtype)
    expected = int8_linear(x, weight, scale, bias, kernel=kernel)
    assert torch.equal(int8_linear(guarded(x), guarded(weight), guarded(scale), guarded(bias), kernel=kernel), expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_shapes_and_strides(kernel):
    x, weight, scale, bias = make(24, 10, 30)
    y = int8_linear(x, weight, scale, bias, kernel=kernel)
    assert torch.equal(int8_linear(x.view(2, 3, 4, 30), weight, scale, bias, kernel=kernel), y.view(2, 3, 4, 10))
    assert torch.equal(int8_linear(x[0], weight, scale, bias, kernel=kernel), y[0])
    assert torch.equal(int8_linear(x[::3], weight, scale, bias, kernel=kernel), y[::3])
    assert torch.equal(int8_linear(x.T.contiguous().T, weight, scale, bias, kernel=kernel), y)
    assert int8_linear(x[:0], weight, scale, bias, kernel=kernel).shape == (0, 10)
    assert int8_linear(x.new_zeros(2, 0, 30), weight, scale, bias, kernel=kernel).shape == (2, 0, 10)
