"""Bad arguments: one clear error each, and the model is as it was, bit for bit."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.prunable import IMAGE, Residual, mlp
from torch import nn
from torch.nn.utils import parametrize

from pycompress.pruning import Pruner, prune, recalibrate_batchnorm

X = torch.randn(IMAGE, generator=torch.Generator().manual_seed(0))


def fingerprint(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [(name, type(module).__name__, module.training, len(module._forward_pre_hooks)) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, len(p._backward_hooks or ())) for name, p in model.named_parameters()],
    )


def assert_unchanged(model, before):
    state, modules, parameters = before
    now = fingerprint(model)
    assert list(now[0]) == list(state) and all(torch.equal(now[0][name], value) for name, value in state.items())
    assert now[1:] == (modules, parameters)


CASES = [
    ({"ratio": 1.0}, ValueError, r"Pruner: ratio must be in \[0, 1\), got 1.0"),
    ({"ratio": -0.1}, ValueError, r"ratio must be in \[0, 1\), got -0.1"),
    ({"ratio": float("nan")}, ValueError, r"ratio must be in \[0, 1\), got nan"),
    ({"ratio": "half"}, ValueError, r"ratio must be in \[0, 1\), got 'half'"),
    ({"ratio": True}, ValueError, r"ratio must be in \[0, 1\), got True"),
    ({}, ValueError, "ratio must be given"),
    ({"ratio": {}}, ValueError, "ratio must name at least one layer"),
    ({"ratio": {"conv1": 1.5}}, ValueError, r"ratio must be in \[0, 1\), got 1.5"),
    ({"ratio": {"convolution": 0.5}}, ValueError, "ratio names 'convolution', which matches no prunable layer; there are 'stem', 'conv1'"),
    ({"ratio": {nn.Conv2d: 0.5}}, TypeError, "ratio must have layer names or patterns as keys"),
    ({"ratio": {"conv1": 0.5}, "scope": "global"}, ValueError, "ratio must be one number with scope='global'"),
    ({"pattern": "2:4", "ratio": 0.6}, ValueError, "ratio must be 0.5 or left out with pattern '2:4', got 0.6"),
    ({"pattern": "2:4", "ratio": {"conv1": 0.5}}, ValueError, "ratio must be 0.5 or left out with pattern '2:4'"),
    ({"pattern": "4:2"}, ValueError, "pattern 'N:M' must have 0 < N < M"),
    ({"pattern": "blocks", "ratio": 0.5}, ValueError, "unknown pruning pattern 'blocks', expected one of N:M, channel, unstructured"),
    ({"ratio": 0.5, "criterion": "hessian"}, ValueError, "unknown pruning criterion 'hessian', expected one of bn_scale"),
    (
        {"ratio": 0.5, "criterion": "bn_scale"},
        ValueError,
        "BatchNormScale ranks whole channels, so pattern must be 'channel', got 'unstructured'",
    ),
    ({"pattern": "2:4", "criterion": "geometric_median"}, ValueError, "ranks whole channels, so pattern must be 'channel', got '2:4'"),
    ({"ratio": 0.5, "schedule": "agp"}, ValueError, "unknown pruning schedule 'agp', expected one of cosine"),
    ({"ratio": 0.5, "schedule": lambda p: p / 2}, ValueError, "schedule must be 1 at progress 1, got 0.5"),
    ({"ratio": 0.5, "schedule": lambda p: [p]}, TypeError, "schedule must return a number, got list at progress 1"),
    (
        {"ratio": 0.5, "steps": 4, "schedule": lambda p: 1.0 if p == 1 else 1.9 * p, "pattern": "channel"},
        ValueError,
        r"Pruner: schedule must stay in \[0, 1\], the share of the ratio, got 1.42.* at progress 0.75",
    ),
    ({"ratio": 0.5, "steps": 2, "schedule": lambda p: 1.0 if p == 1 else -p}, ValueError, r"in \[0, 1\].* got -0.5 at progress 0.5"),
    ({"ratio": 0.5, "steps": 2, "schedule": lambda p: 1.0 if p == 1 else float("nan")}, ValueError, "got nan at progress 0.5"),
    ({"ratio": 0.5, "scope": "isomorphic"}, ValueError, "scope must be 'local' or 'global', got 'isomorphic'"),
    ({"ratio": 0.5, "steps": 0}, ValueError, "steps must be a positive integer, got 0"),
    ({"ratio": 0.5, "steps": 2.0}, ValueError, "steps must be a positive integer, got 2.0"),
    ({"ratio": 0.5, "frequency": -1}, ValueError, "frequency must be a positive integer, got -1"),
    ({"ratio": 0.5, "round_to": 8}, ValueError, "round_to must be left out with pattern 'unstructured'"),
    ({"pattern": "channel", "ratio": 0.5, "round_to": 0}, ValueError, "round_to must be a positive integer, got 0"),
    ({"ratio": 0.5, "ignore": ["haed"]}, ValueError, "ignore entry 'haed' matches no module"),
    ({"ratio": 0.5, "ignore": [nn.Linear(2, 2)]}, ValueError, "ignore entry a Linear matches no module"),
    ({"ratio": 0.5, "ignore": [3]}, TypeError, "ignore takes names, patterns, types or modules, got int"),
    ({"ratio": 0.5, "ignore": ["*"]}, ValueError, r"model must have a layer to prune that is not ignored \(ConvNd, Linear\), got none"),
    ({"pattern": "channel", "ratio": 0.5, "ignore": ["*"]}, ValueError, "model must have a layer to prune that is not ignored"),
    (
        {"pattern": "channel", "ratio": 0.5, "ignore": ["stem", "conv*"]},
        ValueError,
        "must have a layer whose channels can be removed, got none .*'head': its channels are an output of the model",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "text"), CASES, ids=[f"{i} {sorted(case[0])}" for i, case in enumerate(CASES)])
def test_bad_argument(arguments, error, text):
    model = Residual()
    before = fingerprint(model)
    with pytest.raises(error, match=text):
        Pruner(model, X, **arguments)
    assert_unchanged(model, before)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "channel"])
class TestModels:
    def ratio(self, pattern):
        return None if pattern == "2:4" else 0.5

    def check(self, model, inputs, pattern, error, text):
        before = fingerprint(model)
        with pytest.raises(error, match=text):
            Pruner(model, inputs, pattern=pattern, ratio=self.ratio(pattern))
        assert_unchanged(model, before)

    def test_no_supported_layer(self, pattern):
        self.check(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(4)), torch.randn(2, 4), pattern, ValueError, "model must have a layer to prune")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_finite(self, pattern, value):
        model = mlp(4, 8, 2)
        model[2].weight.data[0, 0] = value
        before = fingerprint(model)[1:]
        with pytest.raises(ValueError, match="weights must be finite, got NaN or infinite ones in layer '2'"):
            Pruner(model, torch.randn(2, 4), pattern=pattern, ratio=self.ratio(pattern))
        assert fingerprint(model)[1:] == before

    def test_inputs_the_model_rejects(self, pattern):
        self.check(mlp(4, 8, 2), torch.randn(2, 5), pattern, ValueError, "must accept example_inputs, got RuntimeError: mat1 and mat2")
        self.check(mlp(4, 8, 2), (torch.randn(2, 4),) * 2, pattern, ValueError, "must accept example_inputs, got TypeError")
        self.check(mlp(4, 8, 2), {"x": torch.randn(2, 4)}, pattern, ValueError, "must accept example_inputs, got TypeError")
        self.check(mlp(4, 8, 2), 3, pattern, TypeError, "example_inputs must be a tensor, a tuple or a dict, got int")

    def test_not_a_module(self, pattern):
        with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
            Pruner(F.relu, torch.randn(2, 4), pattern=pattern, ratio=self.ratio(pattern))

    def test_lazy_layers(self, pattern):
        model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 2))
        with pytest.raises(ValueError, match="layer '0' must have its shape: run the model once"):
            Pruner(model, torch.randn(2, 4), pattern=pattern, ratio=self.ratio(pattern))
        assert isinstance(model[0], nn.LazyLinear)


def test_tied_weights_cannot_be_masked():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 6))
    model[2].weight = model[0].weight
    before = fingerprint(model)
    with pytest.raises(ValueError, match="layer '2' must have a weight of its own, got one shared with another layer; put it in ignore"):
        Pruner(model, torch.tensor([[1, 2]]), ratio=0.5)
    assert_unchanged(model, before)
    prune(model, torch.tensor([[1, 2]]), ratio=0.5, ignore=["2"])
    assert model[2].weight is model[0].weight


def test_channels_need_plain_weights():
    model = mlp(4, 8, 2)
    Pruner(model, torch.randn(2, 4), ratio=0.5)
    before = fingerprint(model)
    with pytest.raises(ValueError, match=r"\(pattern 'channel'\) needs plain weights, got parametrized ones in layer '0'"):
        Pruner(model, torch.randn(2, 4), pattern="channel", ratio=0.5)
    assert_unchanged(model, before)


def test_a_model_that_cannot_be_traced():
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.b(self.a(x)).argmax(1)

    model = Detached()
    before = fingerprint(model)
    with pytest.raises(
        RuntimeError, match=r"must be able to trace the model, got RuntimeError: no tensor of the output .*; the model is unchanged"
    ):
        Pruner(model, torch.randn(2, 4), pattern="channel", ratio=0.5)
    assert_unchanged(model, before)


def test_an_output_whose_shape_would_change():
    class Sneaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x):
            hidden = self.a(x)
            return self.b(hidden), hidden.detach()

    model = Sneaky()
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match=r"output shapes change from .* the channels of 'a' have to stay: put them in ignore"):
        Pruner(model, torch.randn(2, 4), pattern="channel", ratio=0.5)
    assert_unchanged(model, before)


def test_a_one_liner_that_fails_on_its_way_takes_everything_back():
    model = Residual()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="prune: data must be given, the criterion 'wanda' learns from it"):
        prune(model, X, ratio=0.5, criterion="wanda")
    with pytest.raises(ValueError, match="data must yield at least one batch, got none"):
        prune(model, X, ratio=0.5, criterion="wanda", data=[])
    with pytest.raises(ValueError, match="loss_fn must be given, the criterion 'taylor' needs gradients"):
        prune(model, X, ratio=0.5, criterion="taylor", data=[X])
    with pytest.raises(RuntimeError):
        prune(model, X, ratio=0.5, criterion="wanda", data=[X, X[:, :1]])
    assert_unchanged(model, before)


@pytest.mark.parametrize("pattern", ["unstructured", "channel"])
def test_training_that_diverged_is_noticed_and_prunes_nothing(pattern):
    model = mlp(4, 8, 2)
    pruner = Pruner(model, torch.randn(2, 4), pattern=pattern, ratio=0.5, steps=2)
    pruner.step()
    width, sparsity = model[0].out_features, pruner.summary().sparsity
    (model[2] if pattern == "channel" else model[2].parametrizations.weight).get_parameter(
        "weight" if pattern == "channel" else "original"
    ).data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="the criterion must give finite scores, got NaN or infinite ones for"):
        pruner.step()
    assert (model[0].out_features, pruner.summary().sparsity, pruner.event) == (width, sparsity, 1)


def test_convert_too_early():
    model = mlp(4, 8, 2)
    pruner = Pruner(model, torch.randn(2, 4), pattern="2:4", steps=3, frequency=2)
    for _ in range(5):
        pruner.step()
    with pytest.raises(RuntimeError, match=r"only 2 of 3 pruning steps were made; call step\(\) more often, lower frequency \(now 2\)"):
        pruner.convert()
    assert parametrize.is_parametrized(model[0])
    pruner.convert(allow_partial=True)
    assert not parametrize.is_parametrized(model[0])


def test_a_finished_pruner_says_so():
    pruner = Pruner(mlp(4, 8, 2), torch.randn(2, 4), ratio=0.5)
    pruner.step()
    pruner.convert()
    for method, call in {
        "step": pruner.step,
        "convert": pruner.convert,
        "state_dict": pruner.state_dict,
        "undo": pruner.undo,
        "calibrate": lambda: pruner.calibrate([]),
        "load_state_dict": lambda: pruner.load_state_dict({}),
    }.items():
        with pytest.raises(RuntimeError, match=f"Pruner.{method}: the pruner has finished"):
            call()


def test_undo_gives_the_weights_back():
    model = Residual()
    before = copy.deepcopy(model.state_dict())
    pruner = Pruner(model, X, ratio=0.5, criterion="wanda")
    pruner.calibrate([X])
    pruner.step()
    pruner.undo()
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_recalibrate_batchnorm_errors():
    with pytest.raises(ValueError, match="model must have a BatchNorm layer with running averages, got none"):
        recalibrate_batchnorm(mlp(4, 2), [torch.randn(2, 4)])
    model = Residual()
    before = fingerprint(model)
    with pytest.raises(ValueError, match="data must yield at least one batch, got none"):
        recalibrate_batchnorm(model, [])
    with pytest.raises(RuntimeError):
        recalibrate_batchnorm(model, [X, X[:, :1]])
    with pytest.raises(TypeError, match="recalibrate_batchnorm: a batch must be a tensor, a tuple or a mapping, got int"):
        recalibrate_batchnorm(model, [3])
    assert_unchanged(model, before)
    assert [module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)] == [0.1] * 3
