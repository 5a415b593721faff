"""Post-training algorithms: each must lower the output error of a model made for it, and keep what it promises to keep."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.quantizable import convnet, encoder, mlp, normal, seeded
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pycompress.quantization import (
    ALGORITHMS,
    Codebook,
    FakeQuant,
    Int8Dynamic,
    Int8Static,
    Quantizer,
    adaround,
    cross_layer_equalization,
    fold_batch_norm,
    gptq,
    hqq,
    quantize,
    smoothquant,
)
from pycompress.quantization.algorithms.inputs import InputMoments, float_weight, to_columns
from pycompress.quantization.fake_quantize import quantized_weight

ROUNDING = {"gptq": gptq, "adaround": adaround}


def correlated(n: int, features: int, seed: int = 0) -> Tensor:
    """Inputs of which neighbours resemble each other, as activations do: here rounding to nearest is far from the best."""
    generator = torch.Generator().manual_seed(100)
    mixing = torch.randn(features, features, generator=generator) * torch.linspace(2, 0.05, features)[:, None]
    return normal(n, features, seed=seed) @ mixing + 0.5


def output_error(quantized: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((quantized(x) - model(x)).norm() / model(x).norm())


def test_registry():
    assert set(ALGORITHMS) == {"adaround", "bias_correction", "cross_layer_equalization", "gptq", "hqq", "smoothquant"}


@pytest.mark.parametrize(
    "config", [FakeQuant(bits=3), FakeQuant(bits=3, granularity="group", group_size=7, symmetric=False)], ids=["channel", "group"]
)
@pytest.mark.parametrize("name", ["gptq", "adaround"])
def test_rounding_beats_nearest_on_linear(name, config):
    model = seeded(nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 5)))
    data, x = [correlated(100, 24, seed=s) for s in range(3)], correlated(200, 24, seed=9)
    plain = output_error(quantize(model, config), model, x)
    better = output_error(quantize(model, config, data=data, algorithms=[name]), model, x)
    assert better < 0.75 * plain


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", ["gptq", "adaround"])
def test_rounding_beats_nearest_on_convolutions(name, groups):
    model = seeded(
        nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=groups), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2, dilation=2, padding=2))
    )
    smooth = F.interpolate(normal(8, 4, 4, 4), size=(12, 12), mode="bilinear") + 0.3
    x = F.interpolate(normal(8, 4, 4, 4, seed=5), size=(12, 12), mode="bilinear") + 0.3
    config = FakeQuant(bits=3)
    plain = output_error(quantize(model, config), model, x)
    better = output_error(quantize(model, config, data=[smooth], algorithms=[name]), model, x)
    assert better < 0.75 * plain


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("power", [1, 3])
def test_hqq_beats_min_max(bits, power):
    model = seeded(nn.Linear(256, 32))
    with torch.no_grad():
        model.weight.copy_(normal(32, 256) ** power)
    x = normal(400, 256, seed=1)
    config = FakeQuant(bits=bits, granularity="group", group_size=64, symmetric=False)
    plain, better = quantize(model, config), quantize(model, config, algorithms=["hqq"])
    # With heavy tails an integer zero point is near the best already: nothing to win, nothing lost.
    assert power == 3 or output_error(better, model, x) < 0.985 * output_error(plain, model, x)
    errors = [(quantized.weight - model.weight).abs().pow(0.7).view(-1, 64).sum(dim=1) for quantized in (better, plain)]
    assert (errors[0] <= (1 + 1e-6) * errors[1]).all()
    assert power == 3 or errors[0].sum() < 0.99 * errors[1].sum()
    for group in better.weight.view(-1, 64):
        assert len(group.unique()) <= 2**bits


@pytest.mark.parametrize("name", ROUNDING)
def test_executed_layers_get_the_chosen_integers(name):
    model, data = mlp(), [correlated(50, 7)]
    quantizer = Quantizer(Int8Static())
    prepared = quantizer.prepare(model, data[0])
    quantizer.calibrate(prepared, data)
    nearest = quantized_weight(prepared[2])[0]
    assert ROUNDING[name](prepared, *([data] if ALGORITHMS[name].needs_data else [])) is prepared
    q, scale, _ = quantized_weight(prepared[2])
    converted = quantizer.convert(prepared)
    assert torch.equal(converted[2].int_weight.int(), q) and torch.equal(converted[2].scale, scale)
    assert not torch.equal(q, nearest)
    assert output_error(converted, prepared, data[0]) < 1e-5
    by_one = quantize(model, Int8Static(), data=data, algorithms=[name])
    assert torch.equal(by_one(data[0]), converted(data[0]))


class Keep(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(("name", "symmetric"), [("gptq", True), ("gptq", False), ("adaround", True), ("adaround", False), ("hqq", False)])
def test_zeros_stay_zero(name, symmetric, masked):
    """Whether a mask hangs on the layer or pruning was made permanent before."""
    layer = seeded(nn.Linear(24, 8))
    mask = (normal(8, 24, seed=3) > 0).float()
    if masked:
        parametrize.register_parametrization(layer, "weight", Keep(mask))
    else:
        layer.weight.data.mul_(mask)
    quantized = quantize(nn.Sequential(layer), FakeQuant(bits=3, symmetric=symmetric), data=[correlated(50, 24)], algorithms=[name])
    assert (quantized[0].weight[mask == 0] == 0).all()


def test_adaround_is_never_worse_than_nearest_on_its_data():
    model, data = mlp(), [correlated(64, 7)]
    for steps in (1, 50):
        for config in (FakeQuant(bits=2), FakeQuant(bits=4)):
            first = nn.Sequential(model[0])
            plain = output_error(quantize(first, config), first, data[0])
            assert output_error(
                quantize(first, config, data=data, algorithms=[("adaround", {"steps": steps})]), first, data[0]
            ) <= plain * (1 + 1e-5)


def test_adaround_only_rounds_up_or_down():
    prepared = Quantizer(FakeQuant(bits=4)).prepare(mlp())
    weight = float_weight(prepared[0])[0]
    adaround(prepared, [correlated(64, 7)])
    q, scale, _ = quantized_weight(prepared[0])
    assert ((q - weight / scale[:, None]).abs() < 1 + 1e-5).all()


def test_gptq_on_uncorrelated_inputs_is_rounding_to_nearest():
    prepared = Quantizer(FakeQuant(bits=4)).prepare(nn.Sequential(seeded(nn.Linear(6, 5))))
    before = quantized_weight(prepared[0])[0]
    gptq(prepared, [torch.eye(6)])
    assert torch.equal(quantized_weight(prepared[0])[0], before)


def test_gptq_blocks_do_not_change_the_result():
    """More columns than one block of 128: the update beyond the block equals the one inside (algorithm 1 against its plain form)."""
    layer, x = seeded(nn.Linear(150, 3)), correlated(400, 150)
    prepared = Quantizer(FakeQuant(bits=4)).prepare(layer)
    gptq(prepared, [x], act_order=False)
    _, scale, _ = quantized_weight(prepared)
    hessian = (x.double().t() @ x.double()) / len(x)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(150)
    inverse, weight = torch.linalg.inv(hessian), layer.weight.detach().double().clone()
    for j in range(150):
        rounded = (weight[:, j] / scale).round().clamp(-7, 7) * scale
        error = (weight[:, j] - rounded) / inverse[j, j]
        weight[:, j:] -= error[:, None] * inverse[j, j:]
        weight[:, j] = rounded
        inverse -= inverse[:, [j]] @ inverse[[j]] / inverse[j, j]
    torch.testing.assert_close(prepared.weight.double(), weight, rtol=1e-5, atol=1e-6)


def test_bias_correction_restores_the_mean():
    model = seeded(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, groups=3, bias=False)))
    data = [normal(8, 3, 6, 6) + 1.5]
    config = FakeQuant(bits=3)
    plain = quantize(model, config)
    corrected = quantize(model, config, data=data, algorithms=["bias_correction"])

    def shift(quantized: nn.Module) -> Tensor:
        return (quantized(data[0]) - model(data[0])).mean(dim=(0, 2, 3)).detach()

    assert shift(plain).abs().max() > 0.01
    assert shift(corrected).abs().max() < 1e-5
    assert output_error(corrected, model, data[0]) < output_error(plain, model, data[0])
    assert model[0].bias is None


def test_bias_correction_knows_the_float_weight_after_rounding():
    model, data = nn.Sequential(seeded(nn.Linear(24, 16))), [correlated(100, 24)]
    for first in ("gptq", "adaround", "hqq"):
        corrected = quantize(model, FakeQuant(bits=3, symmetric=False), data=data, algorithms=["bias_correction", first])
        assert (corrected(data[0]) - model(data[0])).mean(dim=0).abs().max() < 1e-5


def spread_channels(model: nn.Module) -> nn.Module:
    """Channels of very different size, as depthwise networks have them; the function stays."""
    factors = 10.0 ** torch.linspace(-2, 1, 8)
    with torch.no_grad():
        model[0].weight.mul_(factors[:, None, None, None])
        model[0].bias.mul_(factors)
        model[2].weight.div_(factors[None, :, None, None] if model[2].groups == 1 else factors[:, None, None, None])
    return model


@pytest.mark.parametrize("groups", [1, 8])
def test_equalization(groups):
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=groups), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Dropout(), nn.Linear(72, 12), nn.ReLU(), nn.Linear(12, 5)),
    )
    model, x = spread_channels(seeded(model)), normal(4, 3, 6, 6)
    before = copy.deepcopy(model.state_dict())
    equal = cross_layer_equalization(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(equal(x), model(x), rtol=1e-4, atol=1e-5)
    for first, second in ((equal[0], equal[2]), (equal[2], equal[6]), (equal[6], equal[8])):
        r1 = first.weight.abs().flatten(1).amax(1)
        outer = second.weight.abs().view(
            getattr(second, "groups", 1),
            -1,
            len(r1) // getattr(second, "groups", 1),
            second.weight.numel() // (second.weight.shape[0] * len(r1) // getattr(second, "groups", 1)),
        )
        torch.testing.assert_close(r1, outer.amax(dim=(1, 3)).flatten(), rtol=0.01, atol=0)
    config = FakeQuant(bits=6, granularity="tensor")
    plain = output_error(quantize(model, config), model, x)
    better = output_error(quantize(model, config, algorithms=["cross_layer_equalization"]), model, x)
    assert better < plain / 3


class Forks(nn.Module):
    """Nothing here may be equalized: read twice, sigmoid between, called twice, flatten that is none, linear over another axis."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.conv, self.over_length = nn.Conv1d(4, 4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = torch.sigmoid(self.b(y)) + y
        y = self.d(self.c(self.c(y)))
        return self.over_length(torch.relu(self.conv(y.unsqueeze(1).expand(-1, 4, -1))))


def test_equalization_leaves_what_it_may_not_touch():
    model, x = seeded(Forks()), normal(3, 4)
    equal = cross_layer_equalization(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in equal.state_dict().items())
    chain = seeded(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    ignored = cross_layer_equalization(chain, ignore=["2"])
    assert torch.equal(ignored[0].weight, chain[0].weight)
    assert cross_layer_equalization(chain, inplace=True) is chain
    assert torch.isfinite(model(x)).all()


def test_equalization_keeps_dead_channels():
    model = seeded(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[2].weight[:, 2] = 0
    equal = cross_layer_equalization(model)
    x = normal(5, 4)
    torch.testing.assert_close(equal(x), model(x))


class PreNorm(nn.Module):
    """Transformer-like block: the first norm feeds two Linear layers, the second one, the third also the residual."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (norm(8) for _ in range(3))
        self.q, self.k, self.up, self.last = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        x = x + torch.sigmoid(self.q(h)) * self.k(h)
        if x.shape[0] > 10**6:  # data-dependent: torch.fx cannot trace it
            return x
        x = x + self.up(self.norm2(x))
        h = self.norm3(x)
        return h + self.last(h)


def with_outliers(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, module in model.named_modules():
            if "norm" in name:
                module.weight[2] *= 60
    return model


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_smoothquant(norm):
    model = with_outliers(seeded(PreNorm(norm)))
    data, x = [normal(4, 5, 8, seed=s) for s in range(3)], normal(4, 5, 8, seed=7)
    before = copy.deepcopy(model.state_dict())
    smooth = smoothquant(model, data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(smooth(x), model(x), rtol=1e-4, atol=1e-3)
    changed = {name.partition(".")[0] for name, value in smooth.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"norm1", "q", "k", "norm2", "up"}
    h, amax = smooth.norm1(x), model.norm1(x).abs().flatten(0, 1).amax(0)
    assert h.abs().amax() < amax.max() / 3
    # Behind norm1, where the outlier is: what q computes from quantized activations.
    config = {"q": FakeQuant(bits=8, activation_bits=6, activation_granularity="tensor")}
    plain, better = (quantize(m, config, data=data) for m in (model, smooth))
    exact = model.q(model.norm1(x))
    assert (better.q(better.norm1(x)) - exact).norm() < 0.8 * (plain.q(plain.norm1(x)) - exact).norm()
    assert torch.equal(quantize(model, config, data=data, algorithms=["smoothquant"])(x), better(x))


def test_smoothquant_formula():
    model, data = with_outliers(seeded(PreNorm())), [normal(4, 5, 8)]
    for alpha in (0.3, 1.0):
        smooth = smoothquant(model, data, alpha=alpha)
        amax = model.norm1(data[0]).abs().flatten(0, 1).amax(0)
        wmax = torch.maximum(model.q.weight.abs().amax(0), model.k.weight.abs().amax(0))
        torch.testing.assert_close(model.norm1.weight / smooth.norm1.weight, amax**alpha / wmax ** (1 - alpha), rtol=1e-4, atol=0)


class GemmaRMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape) * (1 + self.weight)


def test_smoothquant_leaves_norms_that_do_not_scale():
    model = with_outliers(seeded(PreNorm(GemmaRMSNorm)))
    smooth = smoothquant(model, [normal(4, 5, 8)])
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in smooth.state_dict().items())


class NormLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.norm(x)
        return {"logits": self.head(h), "hidden": h}


def test_smoothquant_leaves_outputs_of_the_model_and_attention_and_ignored():
    model = seeded(NormLast())
    smooth = smoothquant(model, [normal(4, 8)])
    assert torch.equal(smooth.norm.weight, model.norm.weight)
    transformer, x = encoder(), normal(2, 5, 8)
    for layer in transformer.layers:
        layer.norm_first = True
    smooth = smoothquant(transformer, [x])
    assert torch.equal(smooth.layers[0].norm1.weight, transformer.layers[0].norm1.weight)
    assert not torch.equal(smooth.layers[0].norm2.weight, transformer.layers[0].norm2.weight)
    torch.testing.assert_close(smooth(x), transformer(x), rtol=1e-4, atol=1e-5)
    kept = smoothquant(transformer, [x], ignore=["*.norm2"])
    assert torch.equal(kept.layers[0].norm2.weight, transformer.layers[0].norm2.weight)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 3), (2, 4, 5)),
        (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
        (nn.Conv2d(4, 6, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(2, 1), groups=2), (2, 4, 7, 8)),
        (nn.Conv2d(2, 3, (2, 3), padding="same"), (2, 2, 5, 6)),
        (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 2, 5, 6)),
        (nn.Conv2d(2, 3, 3), (2, 5, 6)),
        (nn.Conv3d(2, 2, 2, groups=2), (1, 2, 3, 4, 3)),
    ],
)
def test_columns_times_weight_is_the_layer(layer, shape):
    x = normal(*shape)
    columns = to_columns(layer, x)
    weight = layer.weight.view(columns.shape[0], -1, columns.shape[1])
    y = (weight @ columns).flatten(0, 1) + layer.bias[:, None]
    expected = layer(x)
    if isinstance(layer, nn.Linear):
        expected = expected.reshape(-1, expected.shape[-1]).t()
    else:
        expected = (expected if expected.dim() == len(layer.kernel_size) + 2 else expected[None]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_moments_are_means_over_all_batches():
    x = normal(2, 4, 30)
    moments = InputMoments(torch.zeros(2, 4, 4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64))
    for columns in x.split([1, 20, 0, 9], dim=2):
        moments.add(columns)
    torch.testing.assert_close(moments.gram.float(), x @ x.transpose(1, 2) / 30)
    torch.testing.assert_close(moments.mean.float(), x.mean(dim=2))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: gptq(m, [normal(2, 7)]), ValueError, "gptq: model must be prepared with an affine config"),
        (lambda m: adaround(Quantizer(Codebook()).prepare(m), []), ValueError, "adaround: model must be prepared with an affine config"),
        (lambda m: hqq(Quantizer(Int8Dynamic()).prepare(m, qat="lsq")), ValueError, "hqq: model must be prepared without qat='lsq'"),
        (lambda m: gptq(Quantizer(Int8Dynamic()).prepare(m), []), ValueError, "gptq: data must hold at least one batch, got none"),
        (lambda m: gptq(Quantizer(Int8Dynamic()).prepare(m), [normal(2, 7)], damping=0), ValueError, r"damping must be in \(0, 1\), got 0"),
        (lambda m: adaround(Quantizer(Int8Dynamic()).prepare(m), [normal(2, 7)], steps=0), ValueError, "steps must be an int from 1"),
        (lambda m: adaround(Quantizer(Int8Dynamic()).prepare(m), [normal(2, 7)], lr=-1), ValueError, "lr must be positive"),
        (lambda m: hqq(Quantizer(Int8Dynamic()).prepare(m), p=2), ValueError, r"hqq: p must be in \(0, 1\]"),
        (lambda m: hqq(Quantizer(Int8Dynamic()).prepare(m)), ValueError, r"hqq: weights must be asymmetric, FakeQuant\(symmetric=False\)"),
        (lambda m: smoothquant(m, [normal(2, 7)], alpha=2), ValueError, r"alpha must be in \[0, 1\], got 2"),
        (lambda m: smoothquant(m, []), ValueError, "smoothquant: data must hold at least one batch"),
        (lambda m: cross_layer_equalization(m, iterations=0), ValueError, "iterations must be an int from 1"),
        (lambda m: cross_layer_equalization(m, ignore=["x"]), ValueError, "ignore entry 'x' matches no module"),
        (
            lambda m: gptq(Quantizer(Int8Dynamic()).prepare(m), [torch.full((2, 7), float("nan"))]),
            ValueError,
            "input of layer '0' must be finite",
        ),
        (
            lambda m: quantize(m, Int8Dynamic(), algorithms=["gptq"]),
            ValueError,
            "data must be calibration batches, as algorithm 'gptq' need",
        ),
        (lambda m: quantize(m, Int8Dynamic(), algorithms=["gptq", "hqq"]), ValueError, "one rounding algorithm at most, got gptq, hqq"),
        (lambda m: quantize(m, Int8Dynamic(), algorithms=[("hqq", {"q": 1})]), ValueError, "'hqq' has no option 'q', it takes p, beta"),
    ],
)
def test_errors(call, error, text):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=text):
        call(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_all_together_on_a_convolutional_model():
    model = convnet()
    data, x = [normal(8, 3, 9, 7, seed=s) for s in range(3)], normal(8, 3, 9, 7, seed=9)
    config = FakeQuant(bits=4, granularity="tensor", activation_bits=8, activation_granularity="tensor")
    generator = (batch for batch in data)
    quantized = quantize(
        model, config, data=generator, algorithms=["bias_correction", "adaround", "cross_layer_equalization"], progress=False
    )
    assert output_error(quantized, model, x) < output_error(quantize(model, config, data=data), model, x)
    assert torch.equal(fold_batch_norm(model)(x), fold_batch_norm(model)(x))
