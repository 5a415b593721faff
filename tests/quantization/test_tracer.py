"""Traces leave the model and other threads alone."""

from __future__ import annotations

import threading

import torch
from support.quantizable import normal, seeded
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

import pycompress as pc
from pycompress.quantization import fold_batch_norm
from pycompress.quantization.tracer import stored, trace


class Counting(nn.Module):
    """Its forward leaves something behind in attributes and in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)
        self.register_buffer("runs", torch.zeros(()))
        self.number, self.feature = 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.number += 1
        self.runs += 1
        self.feature = self.first(x)
        return self.last(self.act(self.feature))


def test_nothing_stays_in_the_model():
    model = seeded(Counting())
    results = [fold_batch_norm(model), pc.quantize(model, pc.Int8Dynamic()), pc.quantize(model, pc.Int8Dynamic(), inplace=True), model]
    assert all((one.number, one.feature, int(one.runs)) == (0, None, 0) for one in results)


def test_what_is_stored_anywhere_has_a_reader():
    outside = []

    class Appending(Counting):
        def forward(self, x):
            y = self.first(x)
            outside.append(y)
            return self.last(self.act(y))

    for model, count in ((Counting(), 1), (Appending(), 1), (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), 0)):
        graph = trace(model)
        assert [node.target for node in graph.nodes if node.op == "call_function"] == [stored] * count
        outside.clear()


def test_a_model_in_training_mode_keeps_its_buffers():
    """The weight under spectral_norm moves its vectors whenever it is read in training mode."""
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 6)), nn.BatchNorm1d(6), nn.Linear(6, 2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pc.quantize(model, pc.Int8Dynamic())
    pc.Quantizer(pc.Int8Dynamic()).prepare(model, normal(3, 6), qat=True)
    fold_batch_norm(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and model.training


def test_a_single_layer_in_place_is_a_float_layer_again():
    layer, x = seeded(nn.Linear(6, 4)), normal(3, 6)
    before, weight = layer(x), layer.weight
    small = pc.quantize(layer, pc.Int8Static(), data=[x], inplace=True)
    assert small is not layer and type(layer) is nn.Linear and layer.weight is weight and torch.equal(layer(x), before)
    assert not layer._forward_pre_hooks and not list(layer.children())


def test_other_threads_may_run_models_meanwhile():
    net = nn.Sequential(*[nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(20)]).eval()
    other, x, errors, stop = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(2, 8), [], threading.Event()

    def serve() -> None:
        while not stop.is_set():
            try:
                assert isinstance(other(x), Tensor)
            except Exception as error:
                errors.append(error)

    def shrink() -> None:
        try:
            for _ in range(5):
                assert type(pc.quantize(net, pc.Int8Dynamic())[3][2]) is nn.Identity
        except Exception as error:
            errors.append(error)

    call, getattribute = nn.Module.__call__, nn.Module.__getattr__
    server, shrinkers = threading.Thread(target=serve), [threading.Thread(target=shrink) for _ in range(3)]
    for thread in (server, *shrinkers):
        thread.start()
    for thread in shrinkers:
        thread.join()
    stop.set()
    server.join()
    assert not errors
    assert nn.Module.__call__ is call and nn.Module.__getattr__ is getattribute


def test_traces_look_around_what_is_closed():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.ReLU())
    graph = trace(model, closed={model[0]})
    assert isinstance(graph, fx.Graph) and [node.target for node in graph.nodes if node.op == "call_module"] == ["0", "1"]
