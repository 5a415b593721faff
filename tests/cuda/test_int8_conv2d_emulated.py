"""The CUDA kernels of int8_conv2d on the host: every configuration against the reference, with scales that make results show integers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support.cuda_emulation import ORDERS, needs_compiler
from support.cuda_int8_conv2d import emulated
from support.guard import guarded

from pycompress.ops.affine import quantize_affine
from pycompress.ops.cuda import extension
from pycompress.ops.cuda.int8_conv2d import CONFIGS, choose, conv2d, layout, pack, packed_bytes, unpack
from pycompress.ops.int8_conv2d import Requantization, int8_conv2d_reference, make_geometry
from pycompress.ops.memory_format import suggests_channels_last

# n, c, h, w, o, (kh, kw), stride, padding, dilation, groups
CASES = {
    "one pixel": (1, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "3 channels": (2, 3, 9, 11, 5, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "first layer": (1, 3, 23, 22, 20, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    "padding above the kernel": (1, 5, 6, 7, 9, (2, 3), (1, 2), (4, 5), (1, 1), 1),
    "8 channels": (1, 8, 8, 9, 33, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "24 channels": (2, 24, 7, 6, 11, (3, 2), (2, 1), (1, 1), (1, 2), 1),
    "16 channels": (3, 16, 9, 7, 17, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    "1x1": (1, 48, 9, 8, 70, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1 padded": (1, 20, 6, 13, 9, (1, 1), (1, 1), (1, 2), (1, 1), 1),
    "dilated": (1, 33, 11, 12, 12, (3, 3), (1, 1), (2, 2), (2, 2), 1),
    "deep": (1, 400, 3, 4, 8, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "wide": (1, 16, 5, 30, 150, (1, 5), (1, 1), (0, 2), (1, 1), 1),
    "4 groups": (1, 64, 6, 6, 128, (3, 3), (2, 2), (1, 1), (1, 1), 4),
    "small groups": (1, 24, 8, 7, 48, (3, 3), (1, 1), (1, 1), (1, 1), 12),
    "odd groups": (2, 9, 9, 9, 30, (3, 2), (1, 2), (2, 2), (2, 2), 3),
    "depth multiplier": (1, 8, 9, 9, 24, (3, 3), (1, 1), (1, 1), (1, 1), 8),
    "depthwise": (2, 8, 12, 9, 8, (3, 3), (1, 1), (1, 1), (1, 1), 8),
    "depthwise odd": (1, 35, 15, 9, 35, (5, 3), (2, 3), (2, 1), (1, 2), 35),
    "depthwise 1 tap": (2, 6, 4, 4, 6, (1, 1), (1, 1), (0, 0), (1, 1), 6),
    "depthwise wide": (1, 40, 4, 7, 40, (7, 7), (1, 1), (3, 3), (1, 1), 40),
    "depthwise 3 by 2": (2, 9, 11, 13, 9, (3, 3), (2, 2), (1, 1), (1, 1), 9),
    "depthwise 5": (1, 36, 6, 12, 36, (5, 5), (1, 1), (2, 2), (1, 1), 36),
    "depthwise 5 by 2": (1, 4, 9, 11, 4, (2, 5), (1, 2), (4, 7), (2, 1), 4),
    "depthwise 7 by 2": (1, 8, 7, 19, 8, (7, 7), (2, 2), (3, 3), (1, 1), 8),
    "depthwise row": (1, 12, 1, 30, 12, (1, 9), (1, 1), (0, 4), (1, 1), 12),
}
QUANTIZATION = [{}, {"x_scale": 2.0**-5}, {"x_scale": 2.0**-5, "x_zero_point": -31}, {"x_scale": 2.0**-5, "x_zero_point": 127}]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(autouse=True)
def _emulated(monkeypatch, request):
    if "plan" in request.node.name:
        return
    monkeypatch.setattr(extension, "module", emulated())
    monkeypatch.setattr(extension, "stream", lambda device: 0)
    monkeypatch.setattr(extension, "multiprocessors", lambda device: 4)


def make(case, dtype=torch.float32, seed=0):
    """An input whose dynamic scale is 2**-5 and scales that are powers of two: the epilogue is exact, so results show the integers."""
    n, c, h, w, o, kernel_size, stride, padding, dilation, groups = CASES[case]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        x = torch.randn(n, c, h, w).clamp_(-127 * 2.0**-5, 127 * 2.0**-5)
        x[:, 0, 0, 0] = 127 * 2.0**-5
        weight = torch.randint(-128, 128, (o, c // groups, *kernel_size), dtype=torch.int8)
        scale, bias = 2.0 ** torch.randint(-4, 3, (o,)), torch.randint(-50, 50, (o,)) * 0.5
    return x.to(dtype), weight, scale.float(), bias, {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}


def run(x, weight, scale, bias=None, *, config=None, splits=None, x_scale=None, x_zero_point=None, activation=None, residual=None,
        stride, padding, dilation, groups, **after):  # fmt: skip
    """The kernels, called as ops/int8_conv2d_dispatch.py calls them."""
    geometry = make_geometry("test", weight.shape, stride, padding, dilation, groups)
    out_dtype = torch.int8 if "out_scale" in after else after.pop("out_dtype", torch.float32 if x.dtype == torch.int8 else x.dtype)
    requantization = Requantization(out_dtype, **after)
    channels_last = suggests_channels_last(x)
    return conv2d(
        x, guarded(pack(weight, groups)), scale, bias, residual, geometry, x_scale, x_zero_point, *requantization[:-1],
        activation or "none", out_size=geometry.out_size(*x.shape[2:]), channels_last=channels_last,
        out_channels_last=out_dtype == torch.int8 or channels_last, config=config, splits=splits,
    )  # fmt: skip


def exact(x, weight, scale, bias=None, **options):
    return int8_conv2d_reference(x, weight, scale, bias, **options)


def configs_for(case):
    _, c, _, _, o, kernel_size, *_, groups = CASES[case]
    plan = layout(c, o, *kernel_size, groups)
    return [None] if plan.depthwise else [name for name, (_, _, unit) in CONFIGS.items() if plan.unit == unit]


@needs_compiler
@pytest.mark.parametrize(("case", "config"), [(case, config) for case in CASES for config in configs_for(case)])
def test_sums_are_exact(case, config):
    x, weight, scale, bias, options = make(case)
    for quantization, memory_format in zip(QUANTIZATION, LAYOUTS * 2, strict=True):
        value = x.to(memory_format=memory_format)
        got = run(value, weight, scale, bias, config=config, **quantization, **options)
        want = exact(value, weight, scale, bias, **quantization, **options)
        assert got.stride() == want.stride() and torch.equal(got, want), quantization


@needs_compiler
def test_every_configuration_has_a_case():
    assert {config for case in CASES for config in configs_for(case)} == {None, *CONFIGS}


@needs_compiler
@pytest.mark.parametrize("config", ["128x128", "64x64"])
@pytest.mark.parametrize("splits", [2, 3, 16])
def test_blocks_that_share_the_depth(config, splits):
    x, weight, scale, bias, options = make("deep")
    got = run(x, weight, scale, bias, config=config, splits=splits, x_scale=2.0**-5, x_zero_point=9, **options)
    assert torch.equal(got, exact(x, weight, scale, bias, x_scale=2.0**-5, x_zero_point=9, **options))
    x, weight, scale, bias, options = make("4 groups")  # more parts than stages: some have nothing to do
    assert torch.equal(run(x, weight, scale, config=config, splits=splits, **options), exact(x, weight, scale, **options))


@needs_compiler
@pytest.mark.parametrize("order", ["backward", "shuffled"])
@pytest.mark.parametrize(("case", "splits"), [("16 channels", 1), ("deep", 3), ("first layer", 1), ("depthwise", 1)])
def test_no_order_of_threads_matters(case, splits, order):
    x, weight, scale, bias, options = make(case)
    emulated().set_order(ORDERS[order])
    try:
        assert torch.equal(run(x, weight, scale, bias, splits=splits, **options), exact(x, weight, scale, bias, **options))
    finally:
        emulated().set_order(ORDERS["forward"])


@needs_compiler
@pytest.mark.parametrize(("weight_value", "x_value", "zero_point"), [(-128, 127, -128), (127, 127, -128), (-128, -128, 127)])
@pytest.mark.parametrize("case", ["3 channels", "24 channels", "deep", "small groups", "depthwise"])
def test_extremes_stay_exact(case, weight_value, x_value, zero_point):
    x, weight, scale, _, options = make(case)
    x, weight = torch.full_like(x, (x_value - zero_point) * 2.0**-4), torch.full_like(weight, weight_value)
    options |= {"x_scale": 2.0**-4, "x_zero_point": zero_point}
    assert torch.equal(run(x, weight, scale, **options), exact(x, weight, scale, **options))
    q = torch.full(x.shape, -128, dtype=torch.int8)
    assert torch.equal(run(q, weight, scale, **options), exact(q, weight, scale, **options))


@needs_compiler
@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", ["3 channels", "8 channels", "16 channels", "1x1", "24 channels", "odd groups", "depthwise odd"])
def test_int8_in_and_out(case, memory_format):
    """Int8 results are quantize(result), int8 inputs the result of dequantize(input): bit for bit."""
    x, weight, scale, bias, options = make(case)
    for x_zero_point, out_zero_point in ((None, None), (-7, 20), (127, -128)):
        quantization = {"x_scale": 2.0**-5, "x_zero_point": x_zero_point}
        q = quantize_affine(x, torch.tensor(2.0**-5), x_zero_point or 0, -127 if x_zero_point is None else -128).to(torch.int8)
        want = exact(x, weight, scale, bias, **quantization, **options)
        q, floats = q.to(memory_format=memory_format), x.to(memory_format=memory_format)
        assert torch.equal(run(q, weight, scale, bias, **quantization, **options), want)
        half = run(q, weight, scale, bias, out_dtype=torch.float16, **quantization, **options)
        assert torch.equal(half, want.half())
        step = 2.0 ** math.ceil(math.log2(want.abs().max().item() / 100))
        integers = quantize_affine(want, torch.tensor(step), out_zero_point or 0, -127 if out_zero_point is None else -128)
        for value in (q, floats):
            got = run(value, weight, scale, bias, out_scale=step, out_zero_point=out_zero_point, **quantization, **options)
            assert got.dtype == torch.int8 and got.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(got.int(), integers)


@needs_compiler
@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", ["16 channels", "first layer", "4 groups", "depthwise", "depthwise odd"])
def test_residual_and_activation(case, memory_format):
    x, weight, scale, _, options = make(case)
    x, scale = x.to(memory_format=memory_format), scale * 2.0**-6
    plain = exact(x, weight, scale, **options)
    r = torch.randint(-128, 128, plain.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(2))
    residuals = [(r * 0.25, {}), (r.bfloat16() * 0.25, {}), ((r * 0.25).half().to(memory_format=torch.channels_last), {}),
                 (r, {"residual_scale": 0.25}), (r, {"residual_scale": 0.5, "residual_zero_point": 28})]  # fmt: skip
    for (residual, extra), activation in zip(residuals, [None, "relu", "silu", "relu6", "hardswish"], strict=True):
        got = run(x, weight, scale, residual=residual, activation=activation, **extra, **options)
        want = exact(x, weight, scale, residual=residual, activation=activation, **extra, **options)
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6 if activation in ("silu", "hardswish") else 0)
        q = run(x, weight, scale, residual=residual, activation="relu", out_scale=4.0, **extra, **options)
        assert torch.equal(q, exact(x, weight, scale, residual=residual, activation="relu", out_scale=4.0, **extra, **options))
    got = run(x, weight, scale * 2.0**-6, activation="gelu", **options)
    torch.testing.assert_close(got, F.gelu(plain * 2.0**-6), rtol=4e-6, atol=4e-6)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["3 channels", "1x1", "wide", "4 groups", "depthwise"])
def test_half_precision(case, dtype):
    x, weight, scale, bias, options = make(case, dtype)
    for memory_format in LAYOUTS:
        for quantization in QUANTIZATION[:3]:
            value = x.to(memory_format=memory_format)
            got = run(value, weight, scale, bias, **quantization, **options)
            assert torch.equal(got, exact(value, weight, scale, bias, **quantization, **options))


@needs_compiler
@pytest.mark.parametrize("case", ["16 channels", "3 channels", "depthwise"])
def test_images_with_nan_or_inf_come_out_as_nan_and_no_other(case):
    x, weight, scale, bias, options = make(case)
    x = torch.cat([x, x])[:4] if len(x) > 1 else x.repeat(4, 1, 1, 1)
    x[0, -1, -1, -1], x[2, 0, 1, 1], x[3, 1, 0, 1] = math.nan, math.inf, -math.inf
    for memory_format in LAYOUTS:
        for quantization in QUANTIZATION[:3]:
            y = run(x.to(memory_format=memory_format), weight, scale, bias, activation="relu", **quantization, **options)
            assert y.isnan().flatten(1).all(1).tolist() == [True, False, True, True]
            assert torch.equal(y[1:2], exact(x[1:2], weight, scale, bias, activation="relu", **quantization, **options))
    q = run(x, weight, scale, x_scale=0.02, out_scale=1.0, out_zero_point=-9, **options)
    assert (q[0] == -9).all() and (q[2:] == -9).all() and not (q[1] == -9).all()


@needs_compiler
def test_zero_tiny_and_huge_images():
    x, weight, scale, bias, options = make("16 channels")
    x[0], x[1], x[2] = 0, 1e-40, 3e38
    y = run(x, weight, scale * 1e-6, bias, **options)
    assert torch.equal(y[:2], bias[:, None, None].expand_as(y[:2])) and y[2].isfinite().all()


@needs_compiler
def test_static_quantization_clamps_and_rounds_half_to_even():
    values = torch.tensor([1e30, -1e30, 1000.0, -1000.0, 127.4, -128.6, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -127.5, 3e38, -3e38, 0.0])
    plain = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    for c in (1, 4, 17):
        x = values.repeat(c).view(1, c, 1, -1)
        for groups, weight in ((1, torch.eye(c, dtype=torch.int8).view(c, c, 1, 1)), (c, torch.ones(c, 1, 1, 1, dtype=torch.int8))):
            for zero_point in (None, -3, 127):
                options = {"x_scale": 1.0, "x_zero_point": zero_point, "groups": groups, **plain}
                for memory_format in LAYOUTS:
                    got = run(x.to(memory_format=memory_format), weight, torch.ones(c), **options)
                    assert torch.equal(got, exact(x, weight, torch.ones(c), **options))


@needs_compiler
@pytest.mark.parametrize("case", ["3 channels", "16 channels", "24 channels", "4 groups", "depthwise", "depthwise odd"])
def test_views_that_are_not_aligned_or_dense(case):
    x, weight, scale, bias, options = make(case)
    n, c, h, w = x.shape
    want = exact(x, weight, scale, bias, **options)
    big = torch.full((n + 1, c + 3, h + 2, w + 5), math.nan)
    big[1:, 2:-1, 1:-1, 3:-2] = x
    wide = x.repeat_interleave(2, 3)
    for view in (big[1:, 2:-1, 1:-1, 3:-2], big.to(memory_format=torch.channels_last)[1:, 2:-1, 1:-1, 3:-2], wide[..., ::2],
                 x.transpose(2, 3).contiguous().transpose(2, 3)):  # fmt: skip
        got = run(view, weight, scale, bias, **options)
        assert torch.equal(got, want)
    # int8: a view of channels that can be read in place, and one that cannot
    q = quantize_affine(x, torch.tensor(2.0**-5)).to(torch.int8)
    whole = torch.full((n, h, w, c + 32), 77, dtype=torch.int8)
    for start in (16, 5):
        whole[..., start : start + c] = q.permute(0, 2, 3, 1)
        view = whole[..., start : start + c].permute(0, 3, 1, 2)
        assert torch.equal(run(view, weight, scale, bias, x_scale=2.0**-5, **options), want)


@needs_compiler
@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("case", ["3 channels", "8 channels", "16 channels", "1x1 padded", "4 groups", "odd groups", "depthwise odd"])
def test_stays_inside_its_buffers(case, memory_format, monkeypatch):
    x, weight, scale, bias, options = make(case)

    def memory(t):  # guarded() keeps the order in memory, not the strides
        order = t.permute(0, 2, 3, 1) if memory_format == torch.channels_last else t
        copy = guarded(order.contiguous())
        return copy.permute(0, 3, 1, 2) if memory_format == torch.channels_last else copy

    empty = torch.empty

    def guarded_empty(*shape, dtype, device, memory_format=torch.contiguous_format):
        shape = list(shape[0] if isinstance(shape[0], tuple) else shape)
        if memory_format == torch.channels_last:
            return guarded(empty([shape[i] for i in (0, 2, 3, 1)], dtype=dtype)).permute(0, 3, 1, 2)
        return guarded(empty(shape, dtype=dtype))

    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        value = (x * 8).to(dtype).to(memory_format=memory_format)
        static = {} if dtype == torch.float32 else {"x_scale": 0.25}
        for after in ({"out_dtype": torch.float32}, {"out_dtype": torch.float16}, {"out_scale": 1.0, "residual_scale": 1.0}):
            want = exact(value, weight, scale, bias, **static, **{k: v for k, v in after.items() if k != "residual_scale"}, **options)
            residual = torch.zeros_like(want) if "out_scale" in after else None
            with monkeypatch.context() as patch:
                patch.setattr(torch, "empty", guarded_empty)
                got = run(
                    memory(value), weight, guarded(scale), guarded(bias), residual=None if residual is None else memory(residual),
                    **static, **after, **options,
                )  # fmt: skip
            assert torch.equal(got, want)


@needs_compiler
def test_empty_batches_and_no_outputs():
    x, weight, scale, _, options = make("3 channels")
    assert run(x[:0], weight, scale, **options).shape == (0, 5, 9, 11)
    assert run(x, weight[:0], scale[:0], **options).shape == (2, 0, 9, 11)


@needs_compiler
def test_configurations_agree_with_the_header():
    assert emulated().int8_conv2d_configs() == CONFIGS
    x, weight, scale, _, options = make("3 channels")
    with pytest.raises(ValueError, match="copies more bytes than a tap has"):
        run(x, weight, scale, config="64x64", **options)
    with pytest.raises(ValueError, match="unknown configuration"):
        run(x, weight, scale, config="512x512", **options)


def test_plan_refuses_images_that_32_bits_do_not_count():
    geometry = make_geometry("test", (1, 1, 1, 1), 1, (2**28, 0), 1, 1)
    with pytest.raises(ValueError, match="sides below 268435456"):
        conv2d(
            torch.zeros(1, 1, 1, 1).expand(1, 1, 1, 1), torch.zeros(32, dtype=torch.int8), torch.ones(1), None, None, geometry, None, None,
            *Requantization(torch.float32)[:-1], "none", out_size=(1, 1), channels_last=False, out_channels_last=False,
        )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_plan_packs_weights_and_unpacks_them(case):
    _, c, _, _, o, kernel_size, *_, groups = CASES[case]
    _, weight, *_ = make(case)
    packed, plan = pack(weight, groups), layout(c, o, *kernel_size, groups)
    assert packed.dtype == torch.int8 and packed.numel() == packed_bytes(weight.shape, groups) and packed.numel() % 16 == 0
    assert torch.equal(unpack(packed, weight.shape, groups), weight)
    assert plan.padded % plan.unit == 0 and plan.padded >= plan.channels and plan.depth % 16 == 0


def test_plan_wastes_little():
    assert layout(64, 64, 3, 3, 1)[:-1] == (False, 1, 64, 64, 64, 16)
    assert layout(3, 64, 7, 7, 1).depth == 208  # 49 taps of 4 bytes, not of 16
    assert layout(24, 24, 1, 1, 1).padded == 24 and layout(60, 8, 1, 1, 1).padded == 64
    assert layout(128, 128, 3, 3, 32).sets == 2  # 32 x 4 channels: 16 groups fill 64 columns
    assert layout(256, 256, 3, 3, 256).depthwise and not layout(256, 512, 3, 3, 256).depthwise


def test_plan_takes_tiles_that_fill_the_gpu():
    for n in (1, 32):
        for size, channels in ((56, 64), (28, 128), (14, 256), (7, 512)):
            name, splits = choose(n * size**2, plan := layout(channels, channels, 3, 3, 1), 132)
            assert CONFIGS[name][2] == plan.unit and 1 <= splits <= 16
    assert choose(32 * 56 * 56, layout(256, 256, 3, 3, 1), 132) == ("128x128", 1)
    assert choose(49, layout(512, 512, 3, 3, 1), 132)[1] > 1
