"""Contract of every criterion over the registry, and the formula of each."""

import pytest
import torch
from torch import nn

from pycompress.pruning import CRITERIA
from pycompress.pruning.criteria import Evidence
from pycompress.pruning.criteria.base import sum_over_channel

LAYERS = {
    "linear": nn.Linear(7, 5),
    "conv": nn.Conv2d(4, 6, 3),
    "grouped": nn.Conv2d(4, 6, 3, groups=2),
    "depthwise": nn.Conv1d(5, 5, 3, groups=5),
    "transposed": nn.ConvTranspose2d(4, 6, 2),
    "one": nn.Linear(1, 1),
}
ELEMENTWISE = [name for name in CRITERIA if not CRITERIA[name].channels_only]


def evidence_for(layer: nn.Module) -> Evidence:
    inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    gradients = torch.randn(3, *layer.weight.shape)
    return Evidence(
        "layer",
        layer,
        layer.weight.detach(),
        torch.Generator().manual_seed(1),
        gradient=gradients.mean(0),
        squared_gradient=gradients.square().mean(0),
        input_norm=torch.rand(inputs),
    )


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_scores_are_finite_and_have_the_weights_shape(name, layer):
    evidence = evidence_for(LAYERS[layer])
    weight = evidence.weight.clone()
    scores = CRITERIA[name]().scores(evidence)
    assert scores.shape == weight.shape
    assert torch.isfinite(scores).all() and (scores >= 0).all()
    assert torch.equal(evidence.weight, weight)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_layer_of_zeros_is_scored(name):
    layer = nn.Linear(4, 4)
    nn.init.zeros_(layer.weight)
    assert torch.isfinite(CRITERIA[name]().scores(evidence_for(layer))).all()


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", CRITERIA)
def test_channel_scores_have_one_number_per_channel(name, layer):
    layer = LAYERS[layer]
    criterion = CRITERIA[name]()
    inputs, outputs = (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else (layer.in_channels, layer.out_channels)
    for side, channels in (("out", outputs), ("in", inputs)):
        scores = criterion.channel_scores(layer, side, evidence_for(layer))
        if scores is None:
            assert criterion.channels_only
        else:
            assert scores.shape == (channels,) and torch.isfinite(scores).all()


@pytest.mark.parametrize("layer", LAYERS)
def test_channel_sum_counts_every_weight_once(layer):
    layer = LAYERS[layer]
    weight = layer.weight.detach().abs()
    for side in ("out", "in"):
        assert sum_over_channel(weight, layer, side).sum() == pytest.approx(weight.sum().item(), rel=1e-5)


@pytest.mark.parametrize("layer", ["conv", "grouped", "depthwise", "transposed"])
@pytest.mark.parametrize("side", ["out", "in"])
def test_channel_sum_touches_the_weights_that_go_with_the_channel(layer, side):
    layer = LAYERS[layer]
    weight = torch.rand_like(layer.weight)
    sums = sum_over_channel(weight, layer, side)
    # A weight belongs to output channel o (input channel i) if o depends on it (if it multiplies i).
    spatial = (layer.kernel_size[0] + 1,) * len(layer.kernel_size)
    x = torch.ones(1, layer.in_channels, *spatial, requires_grad=True)
    probe = weight.clone().requires_grad_()
    for channel in range(len(sums)):
        restricted = x if side == "out" else x * torch.eye(layer.in_channels)[channel].view(1, -1, *(1,) * len(spatial))
        arguments = (layer.stride, layer.padding, layer.output_padding) if layer.transposed else (layer.stride, layer.padding)
        function = {"Conv1d": torch.conv1d, "Conv2d": torch.conv2d, "ConvTranspose2d": torch.conv_transpose2d}[type(layer).__name__]
        if layer.transposed:
            y = function(restricted, probe, None, *arguments, layer.groups, layer.dilation)
        else:
            y = function(restricted, probe, None, *arguments, layer.dilation, layer.groups)
        picked = y[0, channel] if side == "out" else y
        belongs = torch.autograd.grad(picked.sum(), probe)[0] != 0
        assert sums[channel] == pytest.approx(weight[belongs].sum().item(), rel=1e-5)


@pytest.mark.parametrize("layer", ["linear", "conv", "grouped", "depthwise", "transposed"])
def test_wanda_multiplies_each_weight_with_the_norm_of_its_input(layer):
    layer = LAYERS[layer]
    evidence = evidence_for(layer)
    scores = CRITERIA["wanda"]().scores(evidence)
    norm = evidence.input_norm
    inputs_per_group = len(norm) // getattr(layer, "groups", 1)
    for index in torch.cartesian_prod(*[torch.arange(size) for size in scores.shape]).tolist():
        if isinstance(layer, nn.ConvTranspose2d):
            i = index[0]
        else:
            group = index[0] // (layer.weight.shape[0] // getattr(layer, "groups", 1))
            i = group * inputs_per_group + index[1]
        assert scores[tuple(index)] == evidence.weight[tuple(index)].abs() * norm[i]


def test_formulas():
    evidence = evidence_for(LAYERS["linear"])
    w, g, h = evidence.weight, evidence.gradient, evidence.squared_gradient
    assert torch.equal(CRITERIA["magnitude"]().scores(evidence), w.abs())
    assert torch.equal(CRITERIA["magnitude_l1"]().scores(evidence), w.abs())
    assert torch.equal(CRITERIA["magnitude_l2"]().scores(evidence), w**2)
    assert torch.equal(CRITERIA["taylor"]().scores(evidence), (w * g).abs())
    assert torch.allclose(CRITERIA["obd"]().scores(evidence), h * w**2 / 2)


def test_lamp_divides_by_all_weights_at_least_as_large():
    layer = nn.Linear(4, 1)
    layer.weight.data = torch.tensor([[1.0, -3.0, 2.0, 0.0]])
    assert CRITERIA["lamp"]().scores(evidence_for(layer)).tolist() == [[pytest.approx(1 / 14), 1.0, pytest.approx(4 / 13), 0.0]]


def test_geometric_median_finds_the_redundant_filter():
    layer = nn.Linear(2, 4)
    layer.weight.data = torch.tensor([[0.0, 0.0], [10.0, 0.0], [-10.0, 0.0], [0.0, 9.0]])
    scores = CRITERIA["geometric_median"]().channel_scores(layer, "out", evidence_for(layer))
    assert scores.argmin() == 0
    assert scores[0] == pytest.approx(29.0)


def test_bn_scale_listens_to_batchnorm_only():
    norm = nn.BatchNorm2d(3)
    norm.weight.data = torch.tensor([1.0, -2.0, 0.5])
    criterion = CRITERIA["bn_scale"]()
    assert criterion.channel_scores(norm, "out", None).tolist() == [1.0, 2.0, 0.5]
    assert criterion.channel_scores(nn.BatchNorm2d(3, affine=False), "out", None) is None
    assert criterion.channel_scores(LAYERS["conv"], "out", evidence_for(LAYERS["conv"])) is None


def test_random_depends_on_the_generator_alone():
    layer = LAYERS["linear"]
    state = torch.random.get_rng_state()
    first, second = (CRITERIA["random"]().scores(evidence_for(layer)) for _ in range(2))
    assert torch.equal(first, second)
    evidence = evidence_for(layer)  # draws from the global generator itself, so look at the criterion alone
    state = torch.random.get_rng_state()
    CRITERIA["random"]().scores(evidence)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", [name for name in CRITERIA if CRITERIA[name].channels_only])
def test_channel_criteria_refuse_single_weights(name):
    with pytest.raises(TypeError, match="scores whole channels, not weights"):
        CRITERIA[name]().scores(evidence_for(LAYERS["conv"]))


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown pruning criterion 'hessian', expected one of bn_scale, geometric_median"):
        CRITERIA["hessian"]
