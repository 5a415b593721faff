"""``int8_linear`` in bfloat16 and float16."""

import pytest
import torch
from support.int8_linear import KERNELS, QUANTIZATION, make
from support.kernels import native_kernels
from support.rounding import rounding_bound

from pycompress.ops import int8_linear, int8_linear_reference


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantization", QUANTIZATION[:4])
def test_half_precision(quantization, dtype, kernel):
    x, weight, scale, bias = make(11, 75, 130, dtype)
    y = int8_linear(x, weight, scale, bias, kernel=kernel, **quantization)
    expected = int8_linear_reference(x.float(), weight, scale, bias, **quantization)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=rounding_bound(expected, dtype))


@pytest.mark.parametrize("kernel", native_kernels("int8_matmul"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_value_survives(dtype, kernel):
    """Identity weights and a power-of-two scale: outputs are the inputs, rounded as torch rounds them."""
    everything = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    finite = everything[everything.isfinite()].float()
    n = 64
    values = finite[: finite.numel() // n * n].view(-1, n)
    zeros, weight = torch.zeros(1, 4, dtype=dtype), torch.zeros(n, 4, dtype=torch.int8)
    for row in values[:: max(1, values.shape[0] // 97)]:
        y = int8_linear(zeros, weight, torch.ones(n), row * 1.001, kernel=kernel)
        assert torch.equal(y[0], (row * 1.001).to(dtype))
