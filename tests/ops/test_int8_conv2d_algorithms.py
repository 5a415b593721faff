"""The algorithms of ``int8_conv2d`` agree, say where they do not apply, and pack reversibly."""

import pytest
import torch
from support.int8_conv2d import CASES, DEPTHWISE, GROUPED, LAYOUTS, NATIVE, PLAIN, PLANES, WINOGRAD, make, name, run

from pycompress.ops import int8_conv2d_packing as packing
from pycompress.ops import int8_conv2d_reference, native
from pycompress.ops.int8_conv2d_arguments import make_geometry


@pytest.mark.parametrize("kernel", NATIVE)
@pytest.mark.parametrize("case", PLAIN + WINOGRAD + GROUPED + PLANES, ids=name)
def test_algorithms_agree(case, kernel):
    x, weight, scale, options = make(case)
    bias = torch.randint(-50, 50, scale.shape) * 0.5
    expected = run(x, weight, scale, bias, kernel=kernel, algorithm="direct", **options)
    for algorithm, applies, layouts in (
        ("winograd", case in WINOGRAD and kernel != "scalar", LAYOUTS),
        ("planes", has_planes(case, kernel), LAYOUTS[:1]),
        ("grouped", has_grouped(case, kernel), LAYOUTS),
    ):
        if not applies:
            with pytest.raises(ValueError, match=f"algorithm '{algorithm}' does not apply"):
                run(x, weight, scale, bias, kernel=kernel, algorithm=algorithm, **options)
            continue
        for layout in layouts:
            y = run(x.to(memory_format=layout), weight, scale, bias, kernel=kernel, algorithm=algorithm, **options)
            assert torch.equal(y, expected)


def has_planes(case, kernel):
    """Dwords of four channels up to stride 2, of four taps while a window of them fits 16 bytes."""
    _, c, _, _, _, (_, kw), (_, stride), _, (_, dilation), groups = case
    channels = (c // groups % 4 == 0 or (groups == 1 and (kw == 1 or dilation > 1))) and stride <= 2
    return kernel == "avx512_vnni" and (channels or stride + dilation <= 5)


def has_grouped(case, kernel):
    """As many groups as fill 16 output channels, with all their inputs in 64 bytes (AVX2: 32 bytes of int16)."""
    _, c, _, _, o, _, _, _, _, groups = case
    merged = max(m for m in range(1, groups + 1) if groups % m == 0 and (m == 1 or o // groups * m <= 16))
    if kernel not in ("avx512_vnni", "avx2") or groups == 1 or o == groups == c:
        return False
    step, most = (4, 64) if kernel == "avx512_vnni" else (2, 16)
    return c // groups % step == 0 and o // groups * merged <= 16 and c // groups * merged <= most


@pytest.mark.parametrize("kernel", NATIVE)
def test_an_algorithm_that_does_not_apply_raises(kernel):
    x, weight, scale, options = make(DEPTHWISE[0])
    for algorithm in ("direct", "winograd", "planes", "grouped"):
        with pytest.raises(ValueError, match=f"algorithm '{algorithm}' does not apply"):
            run(x, weight, scale, kernel=kernel, algorithm=algorithm, **options)
    x, weight, scale, options = make(WINOGRAD[1])
    with pytest.raises(ValueError, match="algorithm must be 'direct', 'planes', 'grouped', 'winograd' or 'depthwise', got 'fft'"):
        run(x, weight, scale, kernel=kernel, algorithm="fft", **options)


@pytest.mark.parametrize("kernel", [k for k in NATIVE if k != "scalar"])
def test_winograd_is_exact_up_to_its_limit_and_not_used_beyond(kernel):
    """|sum| < 2**25: 127 * 255 * 9 * 115 = 33.5 M is just below, one more channel of full weights is not."""

    def chosen(weight, zero_point):
        geometry = make_geometry("test", weight.shape, 1, 1, 1, 1)
        packed = packing.pack_weight(weight, list(geometry), kernel)
        sizes = (8, weight.shape[1], 64, 64, *geometry)
        return native.module.int8_conv2d_algorithm(kernel, sizes, packed.data_ptr(), False, zero_point, -128)

    weight = torch.full((64, 116, 3, 3), 127, dtype=torch.int8)
    weight[:, 115:] = 0
    assert 127 * 255 * 9 * 115 < 2**25 < 127 * 255 * 9 * 116
    assert chosen(weight, -128) == "winograd"
    x = torch.full((1, 116, 12, 12), 255 * 2.0**-3)
    options = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "x_scale": 2.0**-3, "x_zero_point": -128}
    expected = int8_conv2d_reference(x, weight, torch.ones(64), **options)
    assert expected.max() == 127 * 255 * 9 * 115 * 2.0**-3
    assert torch.equal(run(x, weight, torch.ones(64), kernel=kernel, algorithm="winograd", **options), expected)
    assert torch.equal(run(x, -weight, torch.ones(64), kernel=kernel, algorithm="winograd", **options), -expected)
    weight[3, 115:] = 127
    assert chosen(weight, -128) in ("direct", "planes")
    assert chosen(weight, 0) == "winograd"
    weight[3, 60:] *= -1  # both signs never meet the same end of the range
    assert chosen(weight, -128) == "winograd"
    with pytest.raises(ValueError, match="'winograd' does not apply"):
        run(x, torch.full_like(weight, 127), torch.ones(64), kernel=kernel, algorithm="winograd", **options)


@pytest.mark.parametrize("kernel", NATIVE)
@pytest.mark.parametrize("case", CASES, ids=name)
def test_packing_is_reversible(case, kernel):
    _, weight, _, options = make(case)
    geometry = make_geometry("test", weight.shape, *options.values())
    packed = packing.pack_weight(weight, list(geometry), kernel)
    assert torch.equal(packing.unpack_weight(packed, weight.shape[1] * options["groups"], list(geometry), kernel), weight)
