"""Contract of every observer in the registry, and what each promises for itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pycompress.ops.affine import SMALLEST_AMAX, dequantize_affine, fake_quantize_affine, quantize_affine, symmetric_scale
from pycompress.quantization import OBSERVERS
from pycompress.quantization.observers import MinMaxObserver, range_to_qparams

PER_CHANNEL = [name for name in OBSERVERS if OBSERVERS[name].per_channel]


def make(name: str, symmetric: bool, axis: int | None = None, **options):
    return OBSERVERS[name](-127 if symmetric else -128, 127, symmetric, axis, **options)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(observer, x: Tensor) -> float:
    scale, zero_point = observer.calculate_qparams()
    y = fake_quantize_affine(x, scale, zero_point, observer.quant_min, observer.quant_max)
    return float((y - x).norm() / x.norm())


def test_registry_is_complete():
    assert set(OBSERVERS) == {"minmax", "moving_average", "percentile", "mse", "entropy"}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", OBSERVERS)
class TestContract:
    def test_scalars_per_tensor(self, name, symmetric):
        observer = make(name, symmetric)
        observer.observe(normal(3, 5))
        scale, zero_point = observer.calculate_qparams()
        assert scale.shape == zero_point.shape == ()
        assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32
        assert scale > 0 and -128 <= zero_point <= 127
        assert not symmetric or zero_point == 0

    def test_small_error_on_normal_data(self, name, symmetric):
        x = normal(4, 5000)
        observer = make(name, symmetric)
        for batch in x:
            observer.observe(batch)
        assert relative_error(observer, x) < 0.02

    def test_no_data_raises(self, name, symmetric):
        observer = make(name, symmetric)
        observer.observe(torch.empty(0, 3))
        with pytest.raises(RuntimeError, match=r"calculate_qparams needs data, call observe first"):
            observer.calculate_qparams()

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
    def test_not_finite_raises_and_changes_nothing(self, name, symmetric, bad):
        observer = make(name, symmetric)
        observer.observe(normal(100))
        before = observer.calculate_qparams()
        with pytest.raises(ValueError, match="data must be finite, got NaN or Inf"):
            observer.observe(torch.tensor([1.0, bad, 1e6]))
        assert all(torch.equal(a, b) for a, b in zip(before, observer.calculate_qparams(), strict=True))

    @pytest.mark.parametrize("value", [3.7, -0.25, 1e-20, 1e30])
    def test_constant_data(self, name, symmetric, value):
        observer = make(name, symmetric)
        observer.observe(torch.full((7,), value))
        scale, zero_point = observer.calculate_qparams()
        back = fake_quantize_affine(torch.tensor(value), scale, zero_point, observer.quant_min, observer.quant_max)
        assert abs(float(back) - value) <= 0.01 * abs(value)

    def test_zeros(self, name, symmetric):
        observer = make(name, symmetric)
        observer.observe(torch.zeros(9))
        scale, zero_point = observer.calculate_qparams()
        assert fake_quantize_affine(torch.zeros(3), scale, zero_point, observer.quant_min, observer.quant_max).abs().max() == 0

    def test_zeros_first_then_data(self, name, symmetric):
        observer = make(name, symmetric)
        observer.observe(torch.zeros(9))
        observer.observe(normal(2000))
        assert observer.calculate_qparams()[0] > 0

    def test_zero_is_exact(self, name, symmetric):
        observer = make(name, symmetric)
        observer.observe(normal(500).abs() + 2)
        scale, zero_point = observer.calculate_qparams()
        q = quantize_affine(torch.zeros(1), scale, zero_point, observer.quant_min, observer.quant_max)
        assert dequantize_affine(q, scale, zero_point) == 0

    def test_reset_forgets(self, name, symmetric):
        fresh, used = make(name, symmetric), make(name, symmetric)
        used.observe(1000 * normal(300))
        used.reset()
        for observer in (fresh, used):
            observer.observe(normal(300, seed=1))
        assert torch.equal(fresh.calculate_qparams()[0], used.calculate_qparams()[0])

    def test_state_dict_carries_the_statistics(self, name, symmetric):
        observer, twin = make(name, symmetric), make(name, symmetric)
        observer.observe(normal(300))
        twin.load_state_dict(observer.state_dict())
        assert torch.equal(observer.calculate_qparams()[0], twin.calculate_qparams()[0])

    def test_half_precision_and_strided_input(self, name, symmetric):
        x = normal(64, 64).to(torch.bfloat16)
        a, b = make(name, symmetric), make(name, symmetric)
        a.observe(x.t()[::3])
        b.observe(x.t()[::3].float().contiguous())
        assert torch.equal(a.calculate_qparams()[0], b.calculate_qparams()[0])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", PER_CHANNEL)
def test_per_channel_equals_one_observer_per_channel(name, axis, symmetric):
    x = normal(5, 3, 7) * torch.tensor([1.0, 10.0, 0.0])[:, None] if axis == 1 else normal(3, 5, 7)
    options = {} if name in ("minmax", "moving_average") else {"bins": 2048}
    together = make(name, symmetric, axis, **options)
    batches = [x, 3 * x]
    for batch in batches:
        together.observe(batch)
    scale, zero_point = together.calculate_qparams()
    assert scale.shape == (3,)
    for channel in range(3):
        alone = make(name, symmetric, **options)
        for batch in batches:
            alone.observe(batch.select(axis, channel))
        a, b = alone.calculate_qparams()
        torch.testing.assert_close(a, scale[channel], rtol=1e-6, atol=0)
        assert b == zero_point[channel]


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
)
def test_minmax_covers_the_data(values, bits, symmetric):
    """Every observed value comes back within half a step: nothing is clipped."""
    quant_max = 2 ** (bits - 1) - 1
    quant_min = -quant_max if symmetric else -quant_max - 1
    x = torch.tensor(values)
    observer = MinMaxObserver(quant_min, quant_max, symmetric)
    observer.observe(x)
    scale, zero_point = observer.calculate_qparams()
    y = fake_quantize_affine(x, scale, zero_point, quant_min, quant_max)
    # A tie at the end of an asymmetric range may round out of it; that costs no more than the half step it would have cost inside.
    rounding = 4 * 2.0**-24 * float(x.abs().max()) + SMALLEST_AMAX
    assert float((y - x).abs().max()) <= float(scale) / 2 * (1 + 1e-4) + rounding


def test_minmax_of_a_weight_is_quantize_weight():
    """The executed layers take their weight scales from ops.quantize_weight; simulation must find the same bits."""
    weight = normal(17, 9)
    observer = make("minmax", True, 0)
    observer.observe(weight)
    assert torch.equal(observer.calculate_qparams()[0], symmetric_scale(weight.abs().amax(dim=1)))


def test_extreme_range_does_not_overflow():
    scale, zero_point = range_to_qparams(torch.tensor([-3.4e38]), torch.tensor([3.4e38]), -128, 127, False)
    assert torch.isfinite(scale).all() and -128 <= zero_point <= 127


def test_asymmetric_uses_the_whole_range_behind_relu():
    observer = make("minmax", False)
    observer.observe(torch.tensor([0.0, 5.1]))
    scale, zero_point = observer.calculate_qparams()
    assert zero_point == -128 and abs(float(scale) - 5.1 / 255) < 1e-7


def test_moving_average_formula():
    observer = make("moving_average", False, momentum=0.25)
    observer.observe(torch.tensor([-1.0, 1.0]))
    observer.observe(torch.tensor([-5.0, 3.0]))
    assert observer.low.tolist() == [-2.0] and observer.high.tolist() == [1.5]


def test_percentile_100_is_minmax():
    x = normal(999)
    for symmetric in (True, False):
        a, b = make("percentile", symmetric, percentile=100), make("minmax", symmetric)
        for observer in (a, b):
            observer.observe(x)
            observer.observe(5 * x)
        for left, right in zip(a.calculate_qparams(), b.calculate_qparams(), strict=True):
            assert torch.equal(left, right)


def test_percentile_matches_quantile():
    x = normal(100_000)
    observer = make("percentile", False, percentile=99.0)
    observer.observe(x)
    low, high = observer.clipping_range()
    width = 2 * float(observer.limit) / observer.bins
    assert abs(float(high) - float(x.quantile(0.99))) <= 2 * width
    assert abs(float(low) - float(x.quantile(0.01))) <= 2 * width


@pytest.mark.parametrize("name", ["percentile", "entropy"])
def test_searching_observers_beat_minmax_on_outliers(name):
    x = normal(20_000)
    x[0] = 60.0
    errors = {}
    for one in ("minmax", name):
        options = {"percentile": 99.9} if one == "percentile" else {}
        observer = make(one, True, **options)
        observer.observe(x)
        errors[one] = relative_error(observer, x[1:])
    assert errors[name] < errors["minmax"] / 2


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_is_never_worse_than_minmax(symmetric):
    for seed, power in ((0, 1), (1, 3), (2, 5)):
        x = normal(5000, seed=seed) ** power
        errors = []
        for name in ("mse", "minmax"):
            observer = make(name, symmetric)
            observer.observe(x)
            errors.append(relative_error(observer, x))
        assert errors[0] <= 1.01 * errors[1]


def test_mse_is_near_the_best_range():
    """4-bit normal data: the best clip is well known to lie near 2.7 sigma for 15 levels (Banner et al.: 2.55 for 16)."""
    x = normal(50_000)
    observer = OBSERVERS["mse"](-7, 7, True)
    observer.observe(x)
    scale, _ = observer.calculate_qparams()
    grid = torch.linspace(0.5, 1.0, 200) * x.abs().max() / 7
    errors = torch.stack([(fake_quantize_affine(x, s, 0, -7, 7) - x).square().mean() for s in grid])
    error = (fake_quantize_affine(x, scale, 0, -7, 7) - x).square().mean()
    assert error <= 1.01 * errors.min()


def test_histogram_growth_keeps_every_count():
    observer = make("mse", True, bins=64)
    for factor in (1e-3, 1.0, 1e4):
        observer.observe(factor * normal(100))
    assert observer.counts.sum() == 300
    # Growing by doubling moves counts to bins that contain them: the small batches sit in the two bins around 0.
    assert observer.counts[0, 31:33].sum() >= 200


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("moving_average", {"momentum": 0}, r"momentum must be in \(0, 1\], got 0"),
        ("percentile", {"percentile": 50}, r"percentile must be in \(50, 100\], got 50"),
        ("percentile", {"bins": 6}, "bins must be a positive multiple of 4, got 6"),
        ("mse", {"candidates": 0}, "candidates must be a positive int, got 0"),
        ("mse", {"smallest": 0}, r"smallest must be in \(0, 1\], got 0"),
    ],
)
def test_bad_options(name, options, text):
    with pytest.raises(ValueError, match=text):
        make(name, True, **options)


def test_bad_construction():
    with pytest.raises(ValueError, match="quant_min and quant_max must enclose 0, got 0 and 255"):
        MinMaxObserver(0, 255, False)
    with pytest.raises(ValueError, match="axis must be None, this observer works per tensor only, got 0"):
        make("entropy", True, 0)
