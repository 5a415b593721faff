"""int8 convolutions on a real GPU: every configuration, exact, in both memory formats, captured, on other streams and devices."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pycompress.nn import Int8Conv1d, Int8Conv2d
from pycompress.ops import int8_conv2d
from pycompress.ops.affine import quantize_affine
from pycompress.ops.cuda import extension
from pycompress.ops.cuda.int8_conv2d import CONFIGS, choose, conv2d, layout, pack, unpack
from pycompress.ops.int8_conv2d import Requantization, make_geometry

_reason = "no CUDA device" if not torch.cuda.is_available() else extension.unsupported(torch.cuda.current_device())
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_reason is not None, reason=f"CUDA kernels do not run here: {_reason}")]

# n, c, h, w, o, kernel, stride, padding, dilation, groups
CASES = [
    (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (2, 3, 9, 11, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (8, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    (1, 5, 6, 7, 9, (2, 3), (1, 2), (4, 5), (1, 1), 1),
    (4, 24, 57, 55, 40, (3, 2), (2, 1), (1, 1), (1, 2), 1),
    (32, 64, 56, 56, 64, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (16, 256, 14, 14, 1024, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (1, 512, 7, 7, 512, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 33, 31, 32, 130, (3, 3), (1, 1), (2, 2), (2, 2), 1),
    (4, 128, 28, 28, 128, (3, 3), (1, 1), (1, 1), (1, 1), 32),
    (2, 9, 9, 9, 30, (3, 2), (1, 2), (2, 2), (2, 2), 3),
    (8, 96, 56, 56, 96, (3, 3), (2, 2), (1, 1), (1, 1), 96),
    (3, 35, 15, 33, 35, (5, 3), (2, 3), (2, 1), (1, 2), 35),
    (2, 768, 7, 7, 768, (7, 7), (1, 1), (3, 3), (1, 1), 768),
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]
QUANTIZATION = [{}, {"x_scale": 2.0**-5}, {"x_scale": 2.0**-5, "x_zero_point": -31}]


def make(case):
    """An input whose dynamic scale is 2**-5 and scales that are powers of two: the epilogue is exact, so results show the integers."""
    n, c, h, w, o, kernel_size, stride, padding, dilation, groups = case
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, h, w, generator=generator).clamp_(-127 * 2.0**-5, 127 * 2.0**-5)
    x[:, 0, 0, 0] = 127 * 2.0**-5
    weight = torch.randint(-128, 128, (o, c // groups, *kernel_size), dtype=torch.int8, generator=generator)
    scale = 2.0 ** torch.randint(-4, 3, (o,), generator=generator)
    return x.cuda(), weight.cuda(), scale.cuda(), {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_integers_are_exact(case, memory_format):
    x, weight, scale, options = make(case)
    x = x.to(memory_format=memory_format)
    for quantization in QUANTIZATION:
        zero_point = quantization.get("x_zero_point")
        q = quantize_affine(x, torch.tensor(2.0**-5, device="cuda"), zero_point or 0, -127 if zero_point is None else -128)
        total = F.conv2d((q - (zero_point or 0)).double(), weight.double(), None, *options.values())
        want = (total * 2.0**-5 * scale[:, None, None].double()).float()
        y = int8_conv2d(x, weight, scale, kernel=extension.NAME, **quantization, **options)
        assert torch.equal(y, want), quantization
        assert y.is_contiguous(memory_format=memory_format)
        if quantization:  # int8 in, int8 out
            q = q.to(torch.int8)
            assert torch.equal(int8_conv2d(q, weight, scale, **quantization, **options), want)
            step = 2.0 ** math.ceil(math.log2(want.abs().max().item() / 100))
            got = int8_conv2d(q, weight, scale, out_scale=step, out_zero_point=3, **quantization, **options)
            assert torch.equal(got.int(), quantize_affine(want, torch.tensor(step, device="cuda"), 3, -128))


@pytest.mark.parametrize("config", list(CONFIGS))
@pytest.mark.parametrize("splits", [1, 3, 16])
def test_every_configuration_and_shared_depth(config, splits):
    c = {16: 80, 8: 24, 4: 4}[CONFIGS[config][2]]
    x, weight, scale, options = make((3, c, 40, 41, 150, (3, 3), (1, 1), (1, 1), (1, 1), 1))
    geometry = make_geometry("test", weight.shape, *options.values())
    want = int8_conv2d(x, weight, scale, kernel="reference", **options)
    for _ in range(3):
        got = conv2d(
            x, pack(weight, 1), scale, None, None, geometry, None, None, *Requantization(torch.float32)[:-1], "none",
            out_size=(40, 41), channels_last=False, out_channels_last=False, config=config, splits=splits,
        )  # fmt: skip
        assert torch.equal(got, want)


def test_the_largest_sum():
    x = torch.full((1, 14563, 3, 3), -128, dtype=torch.int8, device="cuda")
    weight = torch.full((70, 14563, 3, 3), -128, dtype=torch.int8, device="cuda")
    y = int8_conv2d(x, weight, torch.ones(70, device="cuda"), x_scale=1.0)
    assert bool((y == float(128 * 128 * 14563 * 9)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [CASES[2], CASES[5], CASES[9], CASES[11]], ids=str)
def test_residual_and_activation(case, dtype):
    x, weight, scale, options = make(case)
    scale, bias = scale * 2.0**-10, torch.randn(len(scale), generator=torch.Generator().manual_seed(1)).cuda()
    for memory_format in LAYOUTS:
        value = x.to(dtype).to(memory_format=memory_format)
        plain = int8_conv2d(value, weight, scale, bias, kernel="reference", **options)
        r = torch.randint(-128, 128, plain.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(2)).cuda()
        for residual, extra in ((r.to(dtype) * 0.25, {}), (r, {"residual_scale": 0.5, "residual_zero_point": 28})):
            for activation in ("relu", "gelu", "silu", "relu6", "hardswish"):
                extra |= {"residual": residual, "activation": activation}
                got = int8_conv2d(value, weight, scale, bias, **extra, **options)
                want = int8_conv2d(value, weight, scale, bias, kernel="reference", **extra, **options)
                tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
                assert torch.allclose(got.float(), want.float(), rtol=tolerance, atol=tolerance * float(want.float().abs().max()))


def test_images_with_nan_or_inf_come_out_as_nan_and_no_other():
    for case in ((4, *CASES[5][1:]), (4, *CASES[11][1:])):
        x, weight, scale, options = make(case)
        x[0, -1, -1, -1], x[2, 0, 1, 1], x[3, 1, 0, 1] = math.nan, math.inf, -math.inf
        for memory_format in LAYOUTS:
            for quantization in QUANTIZATION:
                y = int8_conv2d(x.to(memory_format=memory_format), weight, scale, activation="relu", **quantization, **options)
                assert y.isnan().flatten(1).all(1).tolist() == [True, False, True, True] and not y[1].isnan().any()


def test_packing_on_the_device():
    for case in CASES:
        _, weight, _, options = make(case)
        packed = pack(weight, options["groups"])
        assert packed.is_cuda and torch.equal(unpack(packed, weight.shape, options["groups"]), weight)


@pytest.mark.parametrize("groups", [1, 64])
def test_layer_moves_captures_streams_and_compiles(groups):
    layer = Int8Conv2d.from_float(torch.nn.Conv2d(64, 64, 3, padding=1, groups=groups), activation="relu")
    x = torch.randn(2, 64, 14, 15, generator=torch.Generator().manual_seed(2)).cuda()
    on_cpu, state = layer(x.cpu()), {name: t.clone() for name, t in layer.state_dict().items()}
    layer.cuda()
    assert layer.kernel == extension.NAME and layer.fallback_reason is None
    assert all(torch.equal(t.cpu(), state[name]) for name, t in layer.state_dict().items())
    torch.cuda.set_sync_debug_mode("error")
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            y = layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.allclose(y.cpu(), on_cpu, rtol=1e-4, atol=1e-4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x)
    for _ in range(2):  # counters of shared tiles start anew
        graph.replay()
        assert torch.equal(captured, y)
    assert torch.allclose(torch.compile(layer, fullgraph=True)(x), y)


def test_a_chain_captures_with_shared_depth():
    first = Int8Conv2d.from_float(torch.nn.Conv2d(256, 512, 3, padding=1), x_scale=0.03, out_scale=0.02, activation="relu").cuda()
    second = Int8Conv2d.from_float(torch.nn.Conv2d(512, 512, 3, padding=1), x_scale=0.02).cuda()
    multiprocessors = extension.multiprocessors(torch.device("cuda"))
    assert choose(49, layout(512, 512, 3, 3, 1), multiprocessors)[1] > 1
    x = torch.randn(1, 256, 7, 7, device="cuda")
    y = second(first(x))
    assert y.is_contiguous()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = second(first(x))
    for _ in range(3):
        graph.replay()
        assert torch.equal(captured, y)


def test_one_dimension_and_gradients():
    layer = Int8Conv1d.from_float(torch.nn.Conv1d(80, 128, 5, stride=2, padding=2)).cuda()
    x = torch.randn(2, 80, 301, device="cuda", requires_grad=True)
    dense = layer.to_dense()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        y, want = layer(x), dense(x)
        assert (y - want).norm() < 0.02 * want.norm()
        got, expected = (torch.autograd.grad(t.sum(), x)[0] for t in (y, want))
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)
    weight, scale = layer.int_weight.unsqueeze(2), layer.scale
    with pytest.raises(ValueError, match="must be on cuda:0 like weight, got cpu"):
        int8_conv2d(x.detach().cpu().unsqueeze(2), weight, scale)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_device():
    x, weight, scale, options = make(CASES[5])
    want = int8_conv2d(x, weight, scale, **options)
    got = int8_conv2d(x.to("cuda:1"), weight.to("cuda:1"), scale.to("cuda:1"), **options)
    assert torch.equal(got.cpu(), want.cpu()) and torch.cuda.current_device() == 0
