"""recalibrate_batchnorm: plain averages over the data, nothing else moves."""

import copy

import pytest
import torch
from support.prunable import Residual
from torch import nn

from pycompress.pruning import prune, recalibrate_batchnorm


def test_averages_are_those_of_the_data():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    model[0].running_mean.fill_(100)
    x = torch.randn(40, 3) * 4 + 2
    recalibrate_batchnorm(model, x.split(10))
    torch.testing.assert_close(model[0].running_mean, x.mean(0))
    torch.testing.assert_close(model[0].running_var, torch.stack([part.var(0) for part in x.split(10)]).mean(0))
    assert model[0].momentum == 0.1 and model.training
    assert model[0].num_batches_tracked == 4


def test_weights_modes_and_random_state_stay():
    model = prune(Residual(), torch.randn(2, 3, 8, 8), pattern="channel", ratio=0.5).eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    old = copy.deepcopy(model.state_dict())
    rng = torch.random.get_rng_state()
    data = [(torch.ones(4, 3, 8, 8) * k, torch.zeros(4)) for k in range(3)]
    assert recalibrate_batchnorm(model, data) is model
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not torch.equal(model.bn1.running_mean, old["bn1.running_mean"])


def test_repairs_a_pruned_network():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 4)
    )
    x = torch.randn(512, 8)
    recalibrate_batchnorm(model, [x])
    model.eval()
    target = model(x)
    pruned = prune(copy.deepcopy(model), x, ratio=0.6)
    broken = (pruned(x) - target).square().mean()
    repaired = (recalibrate_batchnorm(pruned, [x])(x) - target).square().mean()
    assert repaired < broken


@pytest.mark.parametrize("batch", [{"x": torch.randn(4, 3), "labels": torch.zeros(4)}, (torch.randn(4, 3), 0), torch.randn(4, 3)])
def test_forms_of_a_batch(batch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.norm(x)

    assert recalibrate_batchnorm(Net(), [batch]).norm.num_batches_tracked == 1
