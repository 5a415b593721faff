"""Pruner with masks: exact budgets, training under the mask, convert."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.prunable import IMAGE, Concat, Mobile, Residual, mlp
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import pycompress as pc
from pycompress.nn.surgery import select
from pycompress.pruning import LAYER_FACTORIES, SCHEDULES, Mask, Pruner, nm_mask, prune

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))


def zeros(layer):
    return int((layer.weight == 0).sum())


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1 / 3, 0.999])
def test_local_budget_is_exact_in_every_layer(ratio):
    model = prune(Residual(), X, ratio=ratio)
    for layer in select(model, (nn.Linear, nn.Conv2d)).values():
        assert zeros(layer) == round(ratio * layer.weight.numel())


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.77])
def test_global_budget_is_exact_in_total_and_takes_the_smallest_weights(ratio):
    model = Residual()
    weights = torch.cat([layer.weight.detach().abs().flatten() for layer in select(model, (nn.Linear, nn.Conv2d)).values()])
    pruned = prune(model, X, ratio=ratio, scope="global")
    layers = select(pruned, (nn.Linear, nn.Conv2d)).values()
    count = round(ratio * weights.numel())
    assert sum(map(zeros, layers)) == count
    threshold = weights.sort().values[count]
    for layer in layers:
        assert (layer.weight[layer.weight != 0].abs() >= threshold).all()


def test_equal_weights_do_not_change_the_count():
    model = mlp(8, 8, 4)
    for layer in (model[0], model[2]):
        nn.init.ones_(layer.weight)
    prune(model, torch.randn(2, 8), ratio=0.3)
    assert [zeros(model[0]), zeros(model[2])] == [round(0.3 * 64), round(0.3 * 32)]


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8", "3:5"])
@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("model", [Residual, Mobile, Concat])
def test_nm_in_every_layer(pattern, scope, model):
    n, m = map(int, pattern.split(":"))
    model = model()
    before = {name: layer.weight.detach().clone() for name, layer in select(model, (nn.Linear, nn.Conv2d)).items()}
    model = prune(model, X, pattern=pattern, scope=scope)
    for name, layer in select(model, (nn.Linear, nn.Conv2d)).items():
        assert torch.equal(layer.weight, before[name] * nm_mask(before[name].abs(), n, m))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_gradual_pruning_is_monotone_and_follows_the_schedule(schedule, pattern):
    model = mlp(16, 12, 8)
    ratio = 0.5
    pruner = Pruner(model, torch.randn(2, 16), pattern=pattern, ratio=ratio, schedule=schedule, steps=5)
    before = [torch.ones_like(model[i].weight, dtype=torch.bool) for i in (0, 2)]
    for event in range(1, 6):
        for i in (0, 2):
            model[i].parametrizations.weight.original.data.normal_()  # scores change completely between events
        step = pruner.step()
        assert (step.event, step.pruned, step.structure_changed, step.done) == (event, True, False, event == 5)
        now = [model[i].parametrizations.weight[0].mask for i in (0, 2)]
        for mask, old in zip(now, before, strict=True):
            assert not (mask & ~old).any()
            assert int((~mask).sum()) == round(SCHEDULES[schedule](event / 5) * round(ratio * mask.numel()))
        before = [mask.clone() for mask in now]
    assert not pruner.step().pruned
    assert step.sparsity == pruner.summary().sparsity == 0.5


def test_a_weight_that_is_zero_stays_zero_even_if_it_would_now_score_high():
    model = mlp(4, 4)
    pruner = Pruner(model, torch.randn(2, 4), ratio=0.5, steps=2, schedule="linear")
    pruner.step()
    gone = ~model[0].parametrizations.weight[0].mask
    model[0].parametrizations.weight.original.data[gone] = 1e6
    pruner.step()
    assert (~model[0].parametrizations.weight[0].mask)[gone].all()


def test_frequency_counts_calls():
    pruner = Pruner(mlp(8, 8), torch.randn(2, 8), ratio=0.5, steps=2, frequency=3)
    assert [pruner.step().pruned for _ in range(8)] == [False, False, True, False, False, True, False, False]


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
        lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, momentum=0.9),
        lambda parameters: torch.optim.Adagrad(parameters, lr=0.1),
    ],
)
def test_no_optimizer_can_bring_a_weight_back(optimizer):
    model = mlp(10, 12, 4)
    update = optimizer(model.parameters())  # made before the pruner: Parameters stay the same objects
    x, y = torch.randn(16, 10), torch.randint(4, (16,))

    def train():
        update.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        update.step()
        return loss.item()

    first = train()
    train()  # fill momentum
    pruner = Pruner(model, x, ratio=0.6)
    pruner.step()
    masks = [model[i].parametrizations.weight[0].mask.clone() for i in (0, 2)]
    for _ in range(5):
        last = train()
        for i, mask in zip((0, 2), masks, strict=True):
            assert torch.equal(model[i].weight == 0, ~mask)
            assert (model[i].parametrizations.weight.original.grad[~mask] == 0).all()
    assert last < first
    model = pruner.convert()
    for i, mask in zip((0, 2), masks, strict=True):
        assert torch.equal(model[i].weight == 0, ~mask)


def test_infinite_and_nan_values_do_not_leak_from_under_the_mask():
    mask = Mask(torch.zeros(3))
    mask.mask[1:] = False
    weight = torch.tensor([1.0, float("nan"), float("inf")], requires_grad=True)
    y = mask(weight)
    assert y.tolist() == [1, 0, 0]
    y.backward(torch.tensor([2.0, float("nan"), float("inf")]))
    assert weight.grad.tolist() == [2, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = nn.Sequential(nn.Linear(8, 6)).to(dtype)
    model = prune(model, torch.randn(2, 8, dtype=dtype), pattern="2:4")
    assert model[0].weight.dtype == dtype and zeros(model[0]) == 24


def test_convert_gives_the_same_outputs_plain_layers_and_the_same_parameters():
    model = Residual().eval()
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    pruner = Pruner(model, X, ratio=0.5)
    pruner.step()
    expected = model(X)
    converted = pruner.convert()
    assert converted is model
    assert torch.equal(converted(X), expected)
    assert list(model.state_dict()) == keys
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert type(model.conv1) is nn.Conv2d
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())


def test_root_module_can_be_pruned():
    layer = prune(nn.Linear(8, 4), torch.randn(2, 8), ratio=0.5)
    assert type(layer) is nn.Linear and zeros(layer) == 16


def test_layer_factory_is_one_line(monkeypatch):
    class Packed(nn.Linear): ...

    def pack(layer):
        if not isinstance(layer, nn.Linear):
            return None
        packed = Packed(layer.in_features, layer.out_features)
        packed.load_state_dict(layer.state_dict())
        return packed

    monkeypatch.setitem(LAYER_FACTORIES, "2:4", pack)
    model = prune(Residual(), X, pattern="2:4")
    assert type(model.head) is Packed and type(model.conv1) is nn.Conv2d
    other = prune(Residual(), X, pattern="2:4", ignore=["head"])
    assert type(other.head) is nn.Linear
    assert type(prune(Residual(), X, pattern="1:4").head) is nn.Linear


class Halve(nn.Module):
    """Stands for fake quantization: another parametrization that maps zero to zero."""

    def forward(self, weight):
        return (weight * 2).round() / 2


@pytest.mark.parametrize("mask_first", [True, False])
def test_composes_with_other_parametrizations_in_any_order(mask_first):
    model = mlp(16, 8)
    nn.init.normal_(model[0].weight)
    if not mask_first:
        parametrize.register_parametrization(model[0], "weight", Halve())
    pruner = Pruner(model, torch.randn(2, 16), pattern="2:4")
    if mask_first:
        parametrize.register_parametrization(model[0], "weight", Halve())
    pruner.step()
    effective = model[0].weight.detach().clone()
    assert (effective.view(8, 4, 4) != 0).sum(-1).max() <= 2
    pruner.convert()
    assert [type(entry) for entry in model[0].parametrizations.weight] == [Halve]
    assert torch.equal(model[0].weight, effective)
    parametrize.remove_parametrizations(model[0], "weight")
    assert torch.equal(model[0].weight, effective)


def test_weight_norm_becomes_a_plain_weight_at_convert():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 4)))
    pruner = Pruner(model, torch.randn(2, 8), ratio=0.5)
    pruner.step()
    effective = model[0].weight.detach().clone()
    pruner.convert()
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, effective) and zeros(model[0]) == 16


def test_pruning_again_starts_from_the_zeros():
    model = prune(mlp(8, 8), torch.randn(2, 8), ratio=0.5)
    gone = model[0].weight == 0
    prune(model, torch.randn(2, 8), ratio=0.75)
    assert zeros(model[0]) == 48 and (model[0].weight[gone] == 0).all()


def test_two_pruners_on_one_model():
    model = mlp(16, 8)
    x = torch.randn(2, 16)
    first, second = Pruner(model, x, pattern="2:4"), Pruner(model, x, ratio=0.75)
    first.step(), second.step()
    effective = model[0].weight.detach().clone()
    assert int((effective == 0).sum()) == 96
    first.convert()
    second.convert()
    assert type(model[0]) is nn.Linear and torch.equal(model[0].weight, effective)


def test_ignore_and_ratios_by_name():
    model = Residual()
    prune(model, X, ratio=0.5, ignore=["conv?", nn.Linear])
    assert zeros(model.stem) == 108
    assert not zeros(model.conv1) and not zeros(model.head)
    model = prune(Residual(), X, ratio={"conv*": 0.25, "conv2": 0.75})
    assert zeros(model.conv1) == round(0.25 * 720) and zeros(model.conv2) == round(0.75 * 720) and not zeros(model.stem)


def test_shared_module_is_pruned_once():
    shared = nn.Linear(8, 8)
    model = prune(nn.Sequential(shared, nn.ReLU(), shared), torch.randn(2, 8), ratio=0.5)
    assert model[0] is model[2] and zeros(shared) == 32


def test_random_criterion_is_seeded_and_leaves_the_global_generator_alone():
    model = mlp(16, 16)
    x = torch.randn(2, 16)
    state = torch.random.get_rng_state()
    one, two, three = (prune(copy.deepcopy(model), x, ratio=0.5, criterion="random", seed=seed)[0].weight for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, three)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_state_dict_of_a_masked_model_round_trips():
    model, twin = mlp(8, 4), mlp(8, 4)
    x = torch.randn(2, 8)
    pruner, other = Pruner(model, x, ratio=0.5), Pruner(twin, x, ratio=0.5)
    pruner.step()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))
    assert other.summary() == pruner.summary()


def test_masked_model_can_be_copied_and_compiled_through_export():
    model = mlp(8, 4)
    x = torch.randn(2, 8)
    Pruner(model, x, ratio=0.5).step()
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.allclose(torch.export.export(model, (x,)).module()(x), model(x))


def test_summary_table():
    pruner = Pruner(mlp(8, 8, 4), torch.randn(2, 8), ratio=0.5)
    pruner.step()
    summary = pruner.summary()
    assert (summary.weights, summary.kept, summary.sparsity) == (96, 48, 0.5)
    assert [(layer.name, layer.type, layer.weights, layer.kept) for layer in summary.layers] == [
        ("0", "Linear", 64, 32),
        ("2", "Linear", 32, 16),
    ]
    assert str(summary).splitlines()[-1].split() == ["total", "unstructured", "96", "48", "50.0%"]
    pruner.convert()
    assert pruner.summary() == summary


def test_public_names():
    assert pc.prune is prune and pc.Pruner is Pruner
