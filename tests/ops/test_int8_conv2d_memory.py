"""Memory of ``int8_conv2d``: strides of every kind, and nothing outside the buffers."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.guard import guarded, linux_only
from support.int8_conv2d import DEPTHWISE, GROUPED, KERNELS, LAYOUTS, NATIVE, PLAIN, PLANES, WINOGRAD, make, name

from pycompress.ops import int8_conv2d
from pycompress.ops import int8_conv2d_dispatch as dispatch
from pycompress.ops import int8_conv2d_packing as packing
from pycompress.ops.int8_conv2d_arguments import Requantization, make_geometry


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", [PLAIN[2], PLAIN[6], PLAIN[7], PLAIN[9], WINOGRAD[1], GROUPED[0], DEPTHWISE[1]], ids=name)
def test_strides_of_the_input(case, kernel):
    x, weight, scale, options = make(case)
    n, c, h, w = x.shape
    expected = int8_conv2d(x, weight, scale, kernel=kernel, **options)
    big = torch.full((n + 1, c + 3, h + 2, w + 5), math.nan)
    big[1:, 2:-1, 1:-1, 3:-2] = x
    views = [big[1:, 2:-1, 1:-1, 3:-2], big.to(memory_format=torch.channels_last)[1:, 2:-1, 1:-1, 3:-2]]
    wide = x.repeat_interleave(2, 3)
    views += [wide[..., ::2], wide.to(memory_format=torch.channels_last)[..., ::2], x.repeat_interleave(2, 1)[:, ::2]]
    views += [x.transpose(2, 3).contiguous().transpose(2, 3), x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)]
    for view in views:
        assert not view.is_contiguous() or n == 1 or c == 1 or 1 in (h, w)
        y = int8_conv2d(view, weight, scale, kernel=kernel, **options)
        assert torch.equal(y, expected)
        assert y.stride() == F.conv2d(view, weight.float(), None, *options.values()).stride()
    same = x[:1].expand(3, -1, -1, -1)
    y = int8_conv2d(same, weight, scale, kernel=kernel, **options)
    assert torch.equal(y, expected[:1].expand_as(y))
    assert int8_conv2d(x[:0], weight, scale, kernel=kernel, **options).shape == (0, *expected.shape[1:])


@linux_only
@pytest.mark.parametrize("kernel", NATIVE)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", [*PLAIN[:12:2], PLAIN[3], *WINOGRAD[:4], *GROUPED[:4], *GROUPED[5:], *DEPTHWISE, *PLANES], ids=name)
def test_stays_inside_its_buffers(case, layout, kernel, monkeypatch):
    x, weight, scale, options = make(case)
    bias = torch.randn(len(scale))
    geometry = make_geometry("test", weight.shape, *options.values())
    packed = guarded(packing.pack_weight(guarded(weight), list(geometry), kernel))
    assert torch.equal(packing.unpack_weight(packed, x.shape[1], list(geometry), kernel), weight)

    def memory(t):  # guarded() keeps the order in memory, not the strides
        order = t.permute(0, 2, 3, 1) if layout == torch.channels_last else t
        copy = guarded(order.contiguous())
        return copy.permute(0, 3, 1, 2) if layout == torch.channels_last else copy

    outputs = []

    def guarded_result(x, n, channels, size, dtype, channels_last):
        dense = guarded(torch.empty((n, *size, channels) if channels_last else (n, channels, *size), dtype=dtype))
        outputs.append(dense.permute(0, 3, 1, 2) if channels_last else dense)
        return outputs[-1]

    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        value = (x * 8).to(dtype)
        x_scale = None if dtype == torch.float32 else 0.25
        for out_dtype in (torch.float32, torch.float16, torch.int8):
            residual = torch.randn(len(x), len(weight), *geometry.out_size(*x.shape[2:])).to(out_dtype)
            after = Requantization(out_dtype, *((1.0, None, 1.0, 3) if out_dtype == torch.int8 else ()))
            arguments = (geometry, x_scale, None, *after, "relu", kernel)
            expected = dispatch.run(value.to(memory_format=layout), packed, scale, bias, residual, *arguments)
            inputs = (memory(value), packed, guarded(scale), guarded(bias), memory(residual))
            with monkeypatch.context() as patch:
                patch.setattr(dispatch, "_new_result", guarded_result)
                y = dispatch.run(*inputs, *arguments)
            assert y is outputs[-1] and torch.equal(y, expected)
