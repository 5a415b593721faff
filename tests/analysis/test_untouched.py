"""report, cost and the latency functions leave no trace in a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pycompress.analysis import cost, measure_latency, report
from pycompress.nn.untouched import untouched


class Counting(nn.Module):
    """Moves its buffers in every forward pass, evaluation mode or not, like an observer; draws random numbers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("low", torch.tensor(float("nan")), persistent=False)

    def forward(self, x):
        self.seen += 1
        self.low = torch.minimum(self.low, x.min())
        return x + torch.rand_like(x)


def model():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), Counting(), nn.Flatten(), nn.Linear(12, 2))
    net[1].eval()  # a frozen layer in a model that trains
    net[0].weight.requires_grad_(False)
    net[5].weight.grad = torch.ones_like(net[5].weight)
    return net


RUNS = {
    "report": lambda net, x: report(net, x, budget=0),
    "cost": cost,
    "measure_latency": lambda net, x: measure_latency(net, x, budget=0),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_changes(run, fails):
    net, x = model(), torch.randn(2, 1, 4, 4)
    if fails:
        x = torch.randn(2, 1, 5, 5)  # the last layer rejects it
    before = copy.deepcopy(net.state_dict())
    tensors = {name: id(t) for name, t in [*net.named_parameters(), *net.named_buffers()]}
    modes = [module.training for module in net.modules()]
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError):
            run(net, x)
    else:
        run(net, x)
    assert [module.training for module in net.modules()] == modes
    assert {name: id(t) for name, t in [*net.named_parameters(), *net.named_buffers()]} == tensors
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert net[3].low.isnan() and net[3].seen == 0
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert torch.equal(net[5].weight.grad, torch.ones_like(net[5].weight))
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True, True, True]
    assert torch.is_grad_enabled()


def test_a_backward_pass_that_is_under_way_still_works():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    loss = net(torch.randn(5, 3)).sum()
    report(net, torch.randn(5, 3), budget=0)
    loss.backward()


def test_models_made_in_inference_mode():
    with torch.inference_mode():
        net = nn.BatchNorm1d(3)
    with untouched(net):
        net(torch.randn(2, 3))
    assert net.training
