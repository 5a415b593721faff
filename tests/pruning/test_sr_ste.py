"""SR-STE: the gradient formula, masks that are chosen anew, weights that come back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.prunable import IMAGE, Residual, mlp
from torch import nn

from pycompress.nn.surgery import select
from pycompress.pruning import Pruner, nm_mask
from pycompress.pruning.mask import stored_weight
from pycompress.pruning.straight_through import sparse_refined

X = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
Y = torch.randint(4, (64,), generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(IMAGE, generator=torch.Generator().manual_seed(2))

OPTIMIZERS = [
    lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, weight_decay=1e-3),
    lambda p: torch.optim.AdamW(p, lr=1e-2),
    lambda p: torch.optim.RMSprop(p, lr=1e-3),
]


def small(seed=3):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return mlp(16, 24, 4)


def masks(pruner):
    return {name: mask.mask.clone() for name, mask in pruner._engine.masks.items()}


def train(model, pruner, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
        pruner.step()


@pytest.mark.parametrize("decay", [0.0, 2e-4, 0.3])
def test_gradient_formula(decay):
    """Equation 9: the gradient of the masked weight everywhere, plus decay * weight where the mask is zero."""
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(6, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    mask, upstream = nm_mask(weight.detach().abs(), 2, 4), torch.randn(6, 8, generator=generator, dtype=torch.float64)
    y = sparse_refined(weight, mask, decay)
    assert torch.equal(y, torch.where(mask, weight, 0.0))
    y.backward(upstream)
    torch.testing.assert_close(weight.grad, upstream + decay * torch.where(mask, 0.0, weight.detach()), rtol=1e-12, atol=1e-12)


def test_gradient_in_a_network_is_that_of_the_masked_weight_plus_the_decay():
    model = small()
    pruner = Pruner(model, X, pattern="2:4", training="sr-ste", sparse_decay=0.1)
    pruner.step()
    F.cross_entropy(model(X), Y).backward()
    plain = small()
    with torch.no_grad():
        for name, mask in masks(pruner).items():
            plain.get_submodule(name).weight.mul_(mask)
    F.cross_entropy(plain(X), Y).backward()
    for name, mask in masks(pruner).items():
        stored = stored_weight(model.get_submodule(name))
        expected = plain.get_submodule(name).weight.grad + 0.1 * ~mask * stored.detach()
        torch.testing.assert_close(stored.grad, expected)
        assert (stored.grad[~mask] != 0).any()


def test_one_sgd_step_is_equation_9():
    model = small()
    pruner = Pruner(model, X, pattern="2:4", training="sr-ste", sparse_decay=0.05)
    pruner.step()
    stored = stored_weight(model[0])
    before, mask = stored.detach().clone(), pruner._engine.masks["0"].mask.clone()
    F.cross_entropy(model(X), Y).backward()
    twin = copy.deepcopy(before).requires_grad_()
    hidden = F.linear(X, torch.where(mask, twin, 0.0), model[0].bias).relu()
    upstream = torch.where(mask, twin, 0.0).detach().requires_grad_()
    hidden = F.linear(X, upstream, model[0].bias).relu()
    g = torch.autograd.grad(F.cross_entropy(model[2](hidden), Y), upstream)[0]
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    torch.testing.assert_close(stored.detach(), before - 0.1 * (g + 0.05 * ~mask * before))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_masks_follow_the_weights_and_dead_weights_come_back(pattern, optimizer):
    model = small()
    pruner = Pruner(model, X, pattern=pattern, training="sr-ste", sparse_decay=0.0)
    n, m = map(int, pattern.split(":"))
    optimizer = optimizer(model.parameters())
    pruner.step()
    first = masks(pruner)
    loss = F.cross_entropy(model(X), Y).item()
    for _ in range(40):
        train(model, pruner, optimizer, 1)
        for name, mask in masks(pruner).items():
            assert torch.equal(mask, nm_mask(stored_weight(model.get_submodule(name)).detach().abs(), n, m))
    assert pruner.done
    assert any((mask & ~first[name]).any() for name, mask in masks(pruner).items())
    assert F.cross_entropy(model(X), Y).item() < loss
    masked = model(X)
    model = pruner.convert()
    torch.testing.assert_close(model(X), masked)
    for layer in (model[0], model[2]):
        assert ((layer.weight != 0).view(-1, m).sum(1) <= n).all()


def test_the_decay_shrinks_pruned_weights_and_calms_the_masks():
    shares, flips = {}, {}
    for decay in (0.0, 0.05):
        model = small()
        pruner = Pruner(model, X, pattern="2:4", training="sr-ste", sparse_decay=decay)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        pruner.step()
        flips[decay] = 0
        for _ in range(60):
            before = masks(pruner)
            train(model, pruner, optimizer, 1)
            flips[decay] += sum(int((mask != before[name]).sum()) for name, mask in masks(pruner).items())
        stored = stored_weight(model[0]).detach()
        shares[decay] = float(stored[~pruner._engine.masks["0"].mask].square().sum() / stored.square().sum())
    assert shares[0.05] < 0.7 * shares[0.0]
    assert flips[0.05] < flips[0.0]


def test_ordinary_masks_bring_nothing_back():
    model = small()
    pruner = Pruner(model, X, pattern="2:4")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    pruner.step()
    first = masks(pruner)
    train(model, pruner, optimizer, 20)
    assert all(torch.equal(mask, first[name]) for name, mask in masks(pruner).items())


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "taylor"])
def test_schedule_scope_and_criteria(criterion, scope):
    model = small()
    pruner = Pruner(model, X, ratio=0.6, criterion=criterion, scope=scope, training="sr-ste", steps=5, schedule="linear", frequency=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    total = sum(mask.numel() for mask in masks(pruner).values())
    for event in range(1, 8):  # two events after the last step keep the ratio
        train(model, pruner, optimizer, 2)
        gone = sum(int((~mask).sum()) for mask in masks(pruner).values())
        assert gone == pytest.approx(min(1.0, event / 5) * 0.6 * total, abs=2)
        assert pruner.done == (event >= 5)
    assert pruner.event == 7


def test_convolutions_and_shared_use():
    model = Residual().eval()
    pruner = Pruner(model, IMAGES, pattern="2:4", training="sr-ste")
    pruner.step()
    for layer in select(model, (nn.Linear, nn.Conv2d)).values():
        flat = F.pad(layer.weight.flatten(1) != 0, (0, -layer.weight[0].numel() % 4))
        assert (flat.unflatten(1, (-1, 4)).sum(-1) <= 2).all()
    model(IMAGES).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    masked = model(IMAGES)
    torch.testing.assert_close(copy.deepcopy(model)(IMAGES), masked)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(IMAGES), masked)


@pytest.mark.parametrize("cut", [0, 3, 8])
def test_resume(cut):
    def start():
        model = small()
        return model, Pruner(model, X, pattern="2:4", training="sr-ste", criterion="taylor", steps=3), None

    def optimizer_for(model):
        return torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, pruner, _ = start()
    train(model, pruner, optimizer_for(model), 10)
    expected = model.state_dict()

    model, pruner, _ = start()
    optimizer = optimizer_for(model)
    train(model, pruner, optimizer, cut)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pruner.state_dict()))
    model, pruner, _ = start()
    pruner.load_state_dict(saved[2])
    model.load_state_dict(saved[0])
    optimizer = optimizer_for(model)
    optimizer.load_state_dict(saved[1])
    train(model, pruner, optimizer, 10 - cut)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.items())


def test_other_training_is_refused_on_resume():
    state = Pruner(small(), X, pattern="2:4", training="sr-ste").state_dict()
    with pytest.raises(ValueError, match="training must be as in the saved pruner, 'sr-ste', got 'masked'"):
        Pruner(small(), X, pattern="2:4").load_state_dict(state)
    with pytest.raises(ValueError, match=r"sparse_decay must be as in the saved pruner, 0.0002, got 0.1"):
        Pruner(small(), X, pattern="2:4", training="sr-ste", sparse_decay=0.1).load_state_dict(state)


def test_a_failing_criterion_leaves_the_masks_alone():
    model = small()
    pruner = Pruner(model, X, pattern="2:4", training="sr-ste", criterion="taylor", steps=4)
    train(model, pruner, torch.optim.SGD(model.parameters(), lr=0.1), 2)
    before = masks(pruner)
    pruner._statistics.clear()
    with pytest.raises(RuntimeError, match="needs gradients"):
        pruner.step()
    assert all(torch.equal(mask, before[name]) for name, mask in masks(pruner).items())


def test_undo_gives_the_dense_weights_back():
    model = small()
    before = model[0].weight.detach().clone()
    pruner = Pruner(model, X, pattern="2:4", training="sr-ste")
    pruner.step()
    pruner.undo()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"training": "dense"}, "Pruner: training must be 'masked' or 'sr-ste', got 'dense'"),
        ({"sparse_decay": 0.1}, "sparse_decay must be left out with training='masked'"),
        ({"training": "sr-ste", "sparse_decay": -1.0}, "sparse_decay must be a finite number >= 0, got -1.0"),
        ({"training": "sr-ste", "sparse_decay": float("inf")}, "sparse_decay must be a finite number >= 0, got inf"),
        ({"training": "sr-ste", "sparse_decay": True}, "sparse_decay must be a finite number >= 0, got True"),
        ({"training": "sr-ste", "pattern": "channel", "ratio": 0.5}, "training must be 'masked' with pattern 'channel'"),
    ],
)
def test_bad_arguments(arguments, text):
    model = small()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=text):
        Pruner(model, X, **{"pattern": "2:4", **arguments})
    assert list(model.state_dict()) == before
