"""BatchNorm folding: exact where it is done, explained where it is not."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

from pycompress.nn.base import get_note
from pycompress.quantization import fold_batch_norm


def settled(model: nn.Module) -> nn.Module:
    """float64, with statistics and affine parameters as after training."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.1)
            if module.affine:
                nn.init.normal_(module.weight, generator=generator)
                nn.init.normal_(module.bias, generator=generator)
    return model.double().eval()


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def check_same(model: nn.Module, x: Tensor, left: int, **options) -> nn.Module:
    before = copy.deepcopy(model.state_dict())
    folded = fold_batch_norm(model, **options)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
    assert len(norms(folded)) == left
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(get_note(norm) for norm in norms(folded))
    return folded


class Shape(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda bias, affine: (nn.Linear(7, 5, bias=bias), nn.BatchNorm1d(5, affine=affine)), (3, 7)),
        (lambda bias, affine: (nn.Conv1d(4, 6, 3, groups=2, bias=bias), nn.BatchNorm1d(6, affine=affine)), (2, 4, 9)),
        (lambda bias, affine: (nn.Conv2d(3, 5, 3, padding=1, stride=2, bias=bias), nn.BatchNorm2d(5, affine=affine)), (2, 3, 7, 5)),
        (lambda bias, affine: (nn.Conv3d(2, 3, 2, bias=bias), nn.BatchNorm3d(3, eps=0.1, affine=affine)), (2, 2, 3, 4, 3)),
    ],
)
def test_every_pair_exactly(make, shape, bias, affine):
    model = settled(Shape(*make(bias, affine), nn.ReLU()))
    check_same(model, torch.randn(shape, dtype=torch.float64), left=0)


class Residual(nn.Module):
    """A BatchNorm that may be folded beside one whose convolution is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        z = self.conv2(y)
        return self.bn2(z) + z


def test_output_read_twice_is_kept():
    folded = check_same(settled(Residual()), torch.randn(2, 4, 6, 6, dtype=torch.float64), left=1)
    assert isinstance(folded.bn1, nn.Identity)
    assert "whose output it alone reads" in get_note(folded.bn2)


class Branching(nn.Module):
    """Data-dependent control flow: cannot be traced as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        if y.sum() > 1e9:
            return y
        return self.bn(self.conv(y))


def test_untraceable_model_is_folded_where_a_run_shows_what_happens():
    model, x = settled(Branching()), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    folded = check_same(model, x, left=1, example_inputs=x)
    assert isinstance(folded.stem[1], nn.Identity) and "as it ran on the example" in get_note(folded.bn)
    kept = check_same(model, x, left=2)
    assert "only a run on example_inputs tells" in get_note(kept.stem[1])


def test_untraceable_grandchild_does_not_matter():
    model, x = settled(nn.Sequential(Branching(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5))), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert isinstance(check_same(model, x, left=2)[2], nn.Identity)
    assert isinstance(check_same(model, x, left=1, example_inputs=x)[0].bn, nn.BatchNorm2d)


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(5, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.bn(self.linear(x)))


def test_layer_called_twice_is_kept():
    check_same(settled(Reused()), torch.randn(4, 5, dtype=torch.float64), left=1)


def test_shared_layer_between_untraceable_parts_is_kept():
    conv = nn.Conv2d(4, 4, 1)
    model = settled(nn.Sequential(Branching(), nn.Sequential(conv, nn.BatchNorm2d(4)), nn.Sequential(conv, nn.ReLU())))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    check_same(model, x, left=3)
    check_same(model, x, left=2, example_inputs=x)


def test_tied_weights_are_kept():
    model = Shape(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 5))
    model.layers[2].weight = model.layers[0].weight
    folded = check_same(settled(model), torch.randn(4, 5, dtype=torch.float64), left=1)
    assert "shares a parameter" in get_note(norms(folded)[0])


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(5, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.linear(x)) + self.linear.weight.sum()


def test_weight_read_elsewhere_is_kept():
    check_same(settled(ReadsWeight()), torch.randn(4, 5, dtype=torch.float64), left=1)


def test_no_running_statistics_is_kept():
    model = settled(Shape(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False)))
    folded = check_same(model, torch.randn(4, 5, dtype=torch.float64), left=1)
    assert get_note(norms(folded)[0]) == "kept: it has no running statistics"


def test_channel_mismatch_is_kept():
    """BatchNorm1d over (N, L, F) normalizes L, not the features that Linear makes."""
    model = settled(Shape(nn.Linear(5, 4), nn.BatchNorm1d(3)))
    check_same(model, torch.randn(2, 3, 5, dtype=torch.float64), left=1)


def test_ignore():
    model = settled(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.BatchNorm1d(3)))
    for ignore in (["0"], ["1"], [model[1]]):
        folded = fold_batch_norm(model, ignore=ignore)
        assert get_note(folded[1]) == "kept: named in ignore"
        assert isinstance(folded[3], nn.Identity)
    assert len(norms(fold_batch_norm(model, ignore=[nn.BatchNorm1d]))) == 2
    with pytest.raises(ValueError, match="fold_batch_norm: ignore entry 'nothing' matches no module"):
        fold_batch_norm(model, ignore=["nothing"])


class Keep(nn.Module):
    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


def test_mask_stays_and_the_result_is_exact():
    layer = nn.Linear(5, 4)
    parametrize.register_parametrization(layer, "weight", Keep(torch.rand(4, 5) > 0.5))
    folded = check_same(settled(nn.Sequential(layer, nn.BatchNorm1d(4))), torch.randn(3, 5, dtype=torch.float64), left=0)
    assert (folded[0].weight == 0).any() and parametrize.is_parametrized(folded[0])


def test_weight_norm_does_not_scale_and_is_kept():
    model = settled(nn.Sequential(weight_norm(nn.Linear(5, 4)), nn.BatchNorm1d(4)))
    folded = check_same(model, torch.randn(3, 5, dtype=torch.float64), left=1)
    assert "parametrization that does not scale" in get_note(folded[1])


def test_inplace_and_errors():
    model = settled(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)))
    assert fold_batch_norm(model, inplace=True) is model
    assert isinstance(model[1], nn.Identity)
    with pytest.raises(TypeError, match=r"fold_batch_norm: model must be a torch.nn.Module, got str"):
        fold_batch_norm("model")


def test_model_without_batch_norm_is_left_alone():
    model = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    assert torch.equal(fold_batch_norm(model)(x), model(x))
