"""Criteria that learn from data: what is collected, from where, and that nothing else changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.prunable import IMAGE, Residual, mlp
from torch import nn

from pycompress.pruning import CRITERIA, Pruner, prune
from pycompress.pruning.criteria import Criterion

DATA_CRITERIA = [name for name in CRITERIA if CRITERIA[name].needs]
X, Y = torch.randn(24, 6), torch.randint(3, (24,))
BATCHES = [(X[i : i + 8], Y[i : i + 8]) for i in (0, 8, 16)]


class Spy(Criterion):
    """Prunes by magnitude and keeps what it was shown."""

    def __init__(self, *needs):
        self.needs = frozenset(needs)
        self.seen = {}

    def scores(self, evidence):
        self.seen[evidence.name] = evidence
        return evidence.weight.abs()


def test_input_norm_is_the_root_mean_square_of_each_feature():
    model, spy = mlp(6, 10, 3), Spy("activations")
    pruner = Pruner(model, X, ratio=0.5, criterion=spy)
    pruner.calibrate(BATCHES)
    pruner.step()
    torch.testing.assert_close(spy.seen["0"].input_norm, X.square().mean(0).sqrt())
    hidden = F.linear(X, model[0].parametrizations.weight.original, model[0].bias).relu()
    torch.testing.assert_close(spy.seen["2"].input_norm, hidden.square().mean(0).sqrt())


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    "layer", [nn.Conv2d(4, 6, 3), nn.Conv1d(4, 6, 3, groups=2), nn.Conv3d(4, 2, 2), nn.ConvTranspose2d(4, 6, 2), nn.Linear(4, 2)]
)
def test_input_norm_of_every_kind_of_layer(layer, batched):
    positions = (5,) * len(layer.kernel_size) if hasattr(layer, "kernel_size") else ()
    x = torch.randn(*((3,) if batched else ()), 4, *positions)
    spy = Spy("activations")
    pruner = Pruner(nn.Sequential(layer), x, ratio=0.5, criterion=spy)
    pruner.calibrate([x])
    pruner.step()
    axes = [axis for axis in range(x.dim()) if axis != (1 if batched and positions else x.dim() - 1 if not positions else 0)]
    expected = x.square().mean(axes).sqrt() if axes else x.abs()
    torch.testing.assert_close(spy.seen["0"].input_norm, expected)


@pytest.mark.parametrize("needs", ["activations", "gradients"])
@pytest.mark.parametrize("pattern", ["unstructured", "channel"])
def test_a_copy_of_the_model_does_not_feed_the_pruner(needs, pattern):
    model = mlp(6, 10, 3).train()
    pruner = Pruner(model, X, ratio=0.5, pattern=pattern, criterion=Spy(needs))
    F.cross_entropy(model(X), Y).backward()
    before = pruner._statistics.state_dict()
    assert any(before.values())
    average = copy.deepcopy(model)
    F.cross_entropy(average(X * 30), Y).backward()
    after = pruner._statistics.state_dict()
    assert all(torch.equal(value, after[kind][name]) for kind, table in before.items() for name, value in table.items())


def test_gradients_are_means_over_batches():
    model, spy = mlp(6, 10, 3), Spy("gradients")
    twin = copy.deepcopy(model)
    pruner = Pruner(model, X, ratio=0.5, criterion=spy)
    pruner.calibrate(BATCHES, F.cross_entropy)
    pruner.step()
    gradients = [torch.autograd.grad(F.cross_entropy(twin(x), y), twin[0].weight)[0] for x, y in BATCHES]
    torch.testing.assert_close(spy.seen["0"].gradient, torch.stack(gradients).mean(0))
    torch.testing.assert_close(spy.seen["0"].squared_gradient, torch.stack(gradients).square().mean(0))


def test_the_training_loop_gives_the_same_statistics_as_calibration():
    model, seen = mlp(6, 10, 3), []
    for collect in ("calibrate", "loop"):
        twin, spy = copy.deepcopy(model), Spy("gradients", "activations")
        pruner = Pruner(twin, X, ratio=0.5, criterion=spy)
        if collect == "calibrate":
            pruner.calibrate(BATCHES, F.cross_entropy)
        else:
            for x, y in BATCHES:
                twin.zero_grad()
                F.cross_entropy(twin(x), y).backward()
        pruner.step()
        seen.append(spy.seen)
    for name in ("0", "2"):
        for what in ("gradient", "squared_gradient", "input_norm"):
            torch.testing.assert_close(getattr(seen[0][name], what), getattr(seen[1][name], what))


def test_calibration_and_training_batches_count_alike():
    model, spy = mlp(6, 3), Spy("gradients")
    pruner = Pruner(model, X, ratio=0.5, criterion=spy)
    pruner.calibrate(BATCHES[:2], F.cross_entropy)
    F.cross_entropy(model(BATCHES[2][0]), BATCHES[2][1]).backward()
    pruner.step()
    pruner.undo()
    gradients = [torch.autograd.grad(F.cross_entropy(model(x), y), model[0].weight)[0] for x, y in BATCHES]
    torch.testing.assert_close(spy.seen["0"].gradient, torch.stack(gradients).mean(0))


def test_accumulated_gradients_count_per_backward():
    model, spy = mlp(6, 3), Spy("gradients")
    pruner = Pruner(model, X, ratio=0.5, criterion=spy)
    for x, y in BATCHES:  # no zero_grad: .grad adds up, the statistics must not
        F.cross_entropy(model(x), y).backward()
    pruner.step()
    torch.testing.assert_close(spy.seen["0"].gradient, model[0].parametrizations.weight.original.grad / 3)


def test_evaluation_passes_are_not_collected():
    model = mlp(6, 3)
    pruner = Pruner(model, X, ratio=0.5, criterion="wanda")
    model.eval()(X)
    with pytest.raises(RuntimeError, match="the criterion needs activations and layer '0' has seen none"):
        pruner.step()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_batches_with_overflowed_gradients_are_left_out(bad):
    model, spy = mlp(6, 3), Spy("gradients")
    pruner = Pruner(model, X, ratio=0.5, criterion=spy)
    F.cross_entropy(model(X), Y).backward()
    expected = model[0].parametrizations.weight.original.grad.clone()
    (F.cross_entropy(model(X), Y) * bad).backward()
    pruner.step()
    torch.testing.assert_close(spy.seen["0"].gradient, expected)


def test_older_batches_count_half_after_an_event():
    model, spy = nn.Sequential(nn.Linear(1, 4)), Spy("activations")
    pruner = Pruner(model, torch.ones(1, 1), ratio=0.5, criterion=spy, steps=2)
    model(torch.full((1, 1), 2.0))
    pruner.step()
    model(torch.full((1, 1), 1.0))
    pruner.step()
    assert spy.seen["0"].input_norm.item() == pytest.approx(((0.5 * 4 + 1) / 1.5) ** 0.5)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "channel"])
@pytest.mark.parametrize("criterion", DATA_CRITERIA)
def test_every_data_criterion_with_every_pattern(criterion, pattern):
    model = Residual()
    x = torch.randn(IMAGE)
    ratio = None if pattern == "2:4" else 0.5
    prune(model, x, pattern=pattern, ratio=ratio, criterion=criterion, data=[(x, torch.tensor([0, 1]))], loss_fn=F.cross_entropy)
    assert model(x).shape == (2, 5)


@pytest.mark.parametrize("criterion", DATA_CRITERIA)
def test_no_data_is_a_clear_error_and_prunes_nothing(criterion):
    what = "gradients" if "gradients" in CRITERIA[criterion].needs else "activations"
    for pattern in ("unstructured", "channel"):
        model = mlp(6, 10, 3)
        pruner = Pruner(model, X, pattern=pattern, ratio=0.5, criterion=criterion)
        with pytest.raises(RuntimeError, match=rf"the criterion needs {what} and layer '\d' has seen none. Call pruner.calibrate\(data"):
            pruner.step()
        assert pruner.summary().sparsity == 0 and pruner.event == 0


def test_a_layer_that_is_never_called_is_named():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            return self.used(x)

    for criterion in ("wanda", "taylor"):
        pruner = Pruner(Unused(), X, ratio=0.5, criterion=criterion)
        pruner.calibrate(BATCHES, F.cross_entropy)
        with pytest.raises(RuntimeError, match=r"layer 'unused' has seen none.* belongs in ignore"):
            pruner.step()
    prune(Unused(), X, ratio=0.5, criterion="wanda", data=BATCHES, ignore=["unused"])


@pytest.mark.parametrize("criterion", DATA_CRITERIA)
def test_calibration_changes_nothing_else(criterion):
    model = Residual()
    x, y = torch.randn(IMAGE), torch.tensor([0, 1])
    model.conv1.weight.requires_grad_(False)
    pruner = Pruner(model, x, ratio=0.5, criterion=criterion)
    F.cross_entropy(model(x), y).backward()
    before = copy.deepcopy(model.state_dict())
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    rng = torch.random.get_rng_state()
    pruner.calibrate([(x, y)], F.cross_entropy)
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    for name, p in model.named_parameters():
        assert (p.grad is None) == (gradients[name] is None) and (p.grad is None or torch.equal(p.grad, gradients[name]))
    assert pruner.step().pruned  # frozen layers were scored too


def test_calibrate_replaces_what_was_seen_and_a_failure_keeps_it():
    model, spy = mlp(6, 3), Spy("activations")
    pruner = Pruner(model, X, ratio=0.5, criterion=spy, steps=2)
    pruner.calibrate([X * 100])
    pruner.calibrate([X])
    with pytest.raises(RuntimeError):
        pruner.calibrate([X * 100, X[:, :2]])
    pruner.step()
    torch.testing.assert_close(spy.seen["0"].input_norm, X.square().mean(0).sqrt())


@pytest.mark.parametrize(
    ("batch", "inputs"),
    [
        (X, X),
        ((X, Y), X),
        ([X, Y], X),
        ({"input": X, "labels": Y}, {"input": X}),
        ({"input": X, "labels": Y, "extra": 0}, {"input": X}),
        ({"input": X, "label": Y}, X),
    ],
)
def test_forms_of_a_batch(batch, inputs):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, input):
            return self.layer(input)

    prune(Net(), inputs, ratio=0.5, criterion="wanda", data=[batch])
    if batch is not X:
        prune(Net(), inputs, ratio=0.5, criterion="taylor", data=[batch], loss_fn=F.cross_entropy)


def test_bad_batches_and_losses():
    pruner = Pruner(mlp(6, 3), X, ratio=0.5, criterion="taylor")
    for batch, loss, error, text in [
        (3, F.cross_entropy, TypeError, "a batch must be a tensor, a tuple or a mapping, got int"),
        ((), F.cross_entropy, ValueError, "a batch must hold the model's 1 inputs, got 0 entries"),
        ((X, Y), lambda out, y: out, ValueError, r"loss_fn must return a scalar tensor, got shape \(24, 3\)"),
        ((X, Y), lambda out, y: 1.0, ValueError, "loss_fn must return a scalar tensor, got float"),
    ]:
        with pytest.raises(error, match=text):
            pruner.calibrate([batch], loss)
    by_name = Pruner(mlp(6, 3), {"input": X}, ratio=0.5, criterion="wanda")
    with pytest.raises(ValueError, match="a batch must hold 'input' as example_inputs does, got the keys x"):
        by_name.calibrate([{"x": X}])


def test_criteria_without_data_ignore_calibration():
    pruner = Pruner(mlp(6, 3), X, ratio=0.5)
    pruner.calibrate(iter([]))
    assert pruner.step().pruned


def test_shrinking_with_data_needs_new_data_after_every_event():
    model = mlp(6, 12, 3)
    pruner = Pruner(model, X, pattern="channel", ratio=0.5, criterion="taylor", schedule="linear", steps=3)
    for width in (10, 8, 6):
        with pytest.raises(RuntimeError, match="needs gradients"):
            pruner.step()
        F.cross_entropy(model(X), Y).backward()  # the hooks moved to the new Parameters
        assert pruner.step().structure_changed and model[0].out_features == width


def test_wanda_prunes_what_meets_small_inputs():
    model = nn.Sequential(nn.Linear(4, 2))
    nn.init.ones_(model[0].weight)
    x = torch.randn(50, 4) * torch.tensor([1.0, 0.1, 5.0, 0.2])
    prune(model, x, pattern="2:4", criterion="wanda", data=[x])
    assert model[0].weight.tolist() == [[1, 0, 1, 0]] * 2


def test_hooks_are_gone_after_convert():
    model = mlp(6, 10, 3)
    pruner = Pruner(model, X, ratio=0.5, criterion=Spy("activations", "gradients"))
    F.cross_entropy(model(X), Y).backward()
    pruner.step()
    model = pruner.convert()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())
