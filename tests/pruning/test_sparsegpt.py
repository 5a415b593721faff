"""SparseGPT: the closed-form step, exact patterns, smaller errors than masks alone, and a model that survives errors."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pycompress as pc
from pycompress.pruning import nm_mask, sparsegpt
from pycompress.pruning.patterns import parse_pattern
from pycompress.pruning.sparsegpt import _prune


def correlated(rows: int, features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=generator) @ torch.randn(features, features, generator=generator)


def mlp() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 24), nn.ReLU(), nn.Linear(24, 10))


def convnet() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(128, 5))


def images(count: int = 16) -> Tensor:
    return torch.randn(count, 4, 6, 6, generator=torch.Generator().manual_seed(3))


def error(weight: Tensor, pruned: Tensor, x: Tensor) -> float:
    return float((x.double() @ (weight - pruned).double().t()).square().sum())


def test_one_weight_of_two_is_the_optimal_brain_surgeon():
    """Hassibi and Stork 1992, eq. 5: the first of two weights goes, the second moves by -w1 [H^-1]_12 / [H^-1]_11."""
    hessian = torch.tensor([[1.0, 0.6], [0.6, 2.0]], dtype=torch.float64)
    weight = torch.tensor([[0.1, 2.0], [-0.2, -1.5]], dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    expected = torch.stack([torch.zeros(2, dtype=torch.float64), weight[:, 1] - weight[:, 0] * inverse[0, 1] / inverse[0, 0]], dim=1)
    torch.testing.assert_close(_prune(weight, hessian, parse_pattern("test", "1:2"), 0.5, 1e-9), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("columns", [256, 301])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:3", "unstructured"])
def test_pattern_is_exact_and_errors_shrink(pattern, columns):
    x = correlated(400, columns)
    weight = torch.randn(20, columns, generator=torch.Generator().manual_seed(1)).double()
    hessian = (x.double().t() @ x.double()) / len(x)
    kind = parse_pattern("test", pattern)
    pruned = _prune(weight, hessian, kind, 0.5, 0.01)
    assert int((pruned == 0).sum()) == kind.removable(weight.shape, 0.5)
    norm = x.square().mean(0).sqrt()
    for scores in (weight.abs(), weight.abs() * norm):  # magnitude and Wanda
        everything = torch.ones_like(scores, dtype=torch.bool)
        if pattern == "unstructured":
            mask = scores > scores.flatten().sort().values[kind.removable(weight.shape, 0.5) - 1]
        else:
            mask = ~kind.candidates(scores, everything)
            assert torch.equal(pruned != 0, nm_mask(pruned.abs(), kind.n, kind.m))
        assert error(weight, pruned, x) < 0.75 * error(weight, weight * mask, x)


@pytest.mark.parametrize(("make", "x"), [(mlp, correlated(64, 32)), (convnet, images())])
@torch.no_grad()
def test_model_is_closer_than_with_masks_and_packs(make, x):
    model = make().eval()
    expected = model(x)
    before = copy.deepcopy(model.state_dict())
    masked = pc.prune(copy.deepcopy(model), x, pattern="2:4", criterion="wanda", data=[x])
    pruned = sparsegpt(copy.deepcopy(model), [x[:40], x[40:]] if len(x) > 40 else [x], x, pattern="2:4")
    assert (pruned(x) - expected).norm() < 0.9 * (masked(x) - expected).norm()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    weights = {name: value.clone() for name, value in pruned.state_dict().items()}
    packed = pc.prune(pruned, x, pattern="2:4")
    for name, module in packed.named_modules():
        if isinstance(getattr(module, "weight", None), Tensor):
            assert torch.equal(module.weight, weights[f"{name}.weight"]) and torch.equal(module.bias, before[f"{name}.bias"])
    again = sparsegpt(copy.deepcopy(model), [x[:40], x[40:]] if len(x) > 40 else [x], x, pattern="2:4")
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())


class Attention(nn.Module):
    """Three layers on one tensor, one called twice, one in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out, self.drop = nn.Linear(16, 16), nn.Linear(16, 12), nn.Linear(28, 16), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(self.drop(torch.cat([self.q(x), self.k(x)], -1)))
        return self.out(torch.cat([self.q(y), self.k(y)], -1))


def test_layers_called_twice_and_modes():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Attention()
    model.q.eval()
    modes = [module.training for module in model.modules()]
    x = correlated(30, 16)
    seen = []
    model.out.register_forward_hook(lambda *_: seen.append(1))
    sparsegpt(model, [x, x], x, pattern="2:4", progress=False)
    assert [module.training for module in model.modules()] == modes and seen
    for layer in (model.q, model.k, model.out):
        assert int((layer.weight == 0).sum()) == layer.weight.numel() // 2
        assert len(layer._forward_pre_hooks) == 0


def test_groups_of_a_convolution_share_one_budget():
    model = nn.Sequential(nn.Conv2d(2, 2, 3, groups=2))  # twice 9 weights
    x = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    sparsegpt(model, [x], x, pattern="unstructured", ratio=0.5)
    assert int((model[0].weight == 0).sum()) == 9
    kept = model[0].weight.detach().clone()
    assert torch.equal(pc.prune(model, x, pattern="unstructured", ratio=0.5)[0].weight, kept)


def test_ratios_and_ignore():
    model, x = mlp(), correlated(64, 32)
    before = model[4].weight.detach().clone()
    sparsegpt(model, [x], x, pattern="unstructured", ratio={"0": 0.25, "2": 0.75}, ignore=["4"])
    assert [round(float((model[i].weight == 0).float().mean()), 3) for i in (0, 2, 4)] == [0.25, 0.75, 0.0]
    assert torch.equal(model[4].weight, before)


def test_dead_inputs_and_half_precision():
    model, x = mlp().bfloat16(), correlated(64, 32).bfloat16()
    x[:, :9] = 0
    sparsegpt(model, [x], x)
    assert model[0].weight.dtype == torch.bfloat16 and torch.isfinite(model(x)).all()
    silent = mlp()
    sparsegpt(silent, [torch.zeros(4, 32)], torch.zeros(4, 32))
    assert torch.equal(silent[0].weight != 0, nm_mask(mlp()[0].weight.abs(), 2, 4))  # no inputs, no second order: magnitude


class Unreached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.shape[0] > 1 else self.b(x)


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    model[1].weight = model[0].weight
    return model


GOOD = correlated(8, 32)
BAD = torch.full((8, 32), float("nan"))


@pytest.mark.parametrize(
    ("make", "data", "options", "kind", "text"),
    [
        (mlp, [], {}, ValueError, "data must yield at least one batch, got none"),
        (mlp, [GOOD], {"pattern": "channel"}, ValueError, "pattern must be 'N:M' with numbers or 'unstructured', got 'channel'"),
        (mlp, [GOOD], {"damping": 0}, ValueError, r"damping must be in \(0, 1\), got 0"),
        (mlp, [GOOD], {"pattern": "unstructured"}, ValueError, "ratio must be given"),
        (mlp, [GOOD], {"ignore": nn.Linear}, ValueError, "must have a layer to prune that is not ignored"),
        (mlp, [GOOD, BAD], {}, ValueError, "input of layer '0' must be finite"),
        (Unreached, [GOOD], {}, ValueError, "data must reach every layer, it never reached 'b'"),
        (tied, [GOOD], {}, ValueError, "must have a weight of its own"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(32, 4)), [GOOD], {}, ValueError, "needs plain weights"),
        (mlp, [GOOD, torch.zeros(2, 31)], {}, RuntimeError, "mat1 and mat2"),
    ],
)
def test_errors_leave_the_model(make, data, options, kind, text):
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=text):
        sparsegpt(model, data, GOOD, **options)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_interruption_restores_the_weights(monkeypatch):
    model, calls = mlp(), []
    before = copy.deepcopy(model.state_dict())
    original = F.linear

    def interrupted(*args):
        calls.append(1)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(F, "linear", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sparsegpt(model, [GOOD, GOOD], GOOD)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
