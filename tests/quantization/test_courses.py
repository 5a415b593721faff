"""Folding and fusion in models that a trace sees in part: taps, children called past their parent, several courses of one forward."""

from __future__ import annotations

import pytest
import torch
from support.quantizable import normal, seeded
from torch import Tensor, nn

import pycompress as pc
from pycompress.nn.base import get_note
from pycompress.quantization import cross_layer_equalization, fold_batch_norm
from pycompress.quantization.calls import recording

CONFIGS = [pc.Int8Dynamic(), pc.Int8Static()]
IMAGES = normal(2, 3, 9, 9)


def features(*, norm: bool = True) -> nn.Sequential:
    first = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()] if norm else [nn.Conv2d(3, 8, 3), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(8, 8, 3), nn.ReLU())


class Base(nn.Module):
    """Its forward looks at values, so it cannot be traced."""

    def __init__(self, *, norm: bool = True) -> None:
        super().__init__()
        self.features = features(norm=norm)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if x.amax() > 1e9:
            raise ValueError("too large")
        return self.course(x)


class Taps(Base):
    def course(self, x):
        taps = []
        for layer in self.features:
            x = layer(x)
            taps.append(x)
        return taps[0], x


class Slices(Base):
    def course(self, x):
        first = self.features[:1](x)
        return first, self.features[1:](first)


class PastTheParent(Base):
    def course(self, x):
        return self.features(x), self.features[0](x)


class Straight(Base):
    def course(self, x):
        return (self.features(x),)


def check_same(model: nn.Module, config, x: Tensor, *inputs, **options) -> nn.Module:
    """The model with what is fused, which computes what it does without; inputs beyond ``x`` are tried as well."""
    static = isinstance(config, pc.Int8Static)
    plain, fused = (pc.quantize(model, config, data=[x] if static else None, fuse=fuse, fold_bn=fuse, **options) for fuse in (False, True))
    for args in ((x,), *inputs):
        with torch.no_grad():
            expected, got, wanted = plain(*args), fused(*args), model(*args)
        for a, b, c in zip(*(y if isinstance(y, tuple) else (y,) for y in (expected, got, wanted)), strict=True):
            assert b.dtype == c.dtype and (b - c).norm() < 0.05 * c.norm() and (a - c).norm() < 0.05 * c.norm()
    return fused


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("kind", [Taps, Slices, PastTheParent])
def test_what_is_read_in_between_stays(kind, config, example):
    for norm in (True, False):
        model = seeded(kind(norm=norm))
        check_same(model, config, IMAGES, example_inputs=IMAGES if example else None)
    folded = fold_batch_norm(seeded(kind()), example_inputs=IMAGES if example else None)
    assert type(folded.features[1]) is nn.BatchNorm2d and get_note(folded.features[1]).startswith("kept: ")


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_run_shows_that_a_part_is_called_as_it_is_traced(config):
    fused = check_same(seeded(Straight()), config, IMAGES, example_inputs=IMAGES)
    assert [type(module) for module in fused.features] == [
        type(fused.features[0]),
        nn.Identity,
        nn.Identity,
        type(fused.features[3]),
        nn.Identity,
    ]
    assert getattr(fused.features[0], "int8_output", False) == isinstance(config, pc.Int8Static)


def test_calibration_data_are_a_run_too():
    model = seeded(Straight())
    fused = pc.quantize(model, pc.Int8Static(), data=[IMAGES])
    assert type(fused.features[1]) is nn.Identity and fused.features[0].int8_output
    quantizer = pc.Quantizer(pc.Int8Static())
    prepared = quantizer.prepare(seeded(Straight(norm=False)))
    quantizer.calibrate(prepared, iter([IMAGES]))
    assert quantizer.convert(prepared).features[0].int8_output


def test_without_a_run_nothing_is_done_in_what_cannot_be_traced():
    fused = pc.quantize(seeded(Straight()), pc.Int8Dynamic())
    assert type(fused.features[2]) is nn.ReLU and "only a run on example_inputs tells" in get_note(fused.features[1])


def test_a_second_model_is_not_judged_by_the_run_of_the_first():
    quantizer = pc.Quantizer(pc.Int8Dynamic())
    quantizer.prepare(seeded(Straight()), IMAGES)
    assert type(quantizer.convert(quantizer.prepare(seeded(Taps(norm=False)))).features[1]) is nn.ReLU


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.last = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        if scale is None:
            return self.last(self.act(y)) + y
        return self.last(self.act(y)) * scale


@pytest.mark.parametrize("example", [None, (IMAGES,), (IMAGES, torch.ones(1))])
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_optional_arguments(config, example):
    """Both courses call the same modules, and only one of them reads what is in between."""
    check_same(seeded(Optional()), config, IMAGES, (IMAGES, torch.ones(1)), example_inputs=example)


@pytest.mark.parametrize("example", [None, IMAGES])
def test_a_forward_called_by_hand(example):
    """It is no call of the module for a hook, but a trace sees it read the weight."""

    class ByHand(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.last = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.last(self.act(self.conv(x))), self.conv.forward(x)

    check_same(seeded(ByHand()), pc.Int8Dynamic(), IMAGES, example_inputs=example)


class Skipping(Optional):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.conv(x)
        return y if scale is None else self.last(self.act(y)) * scale


@pytest.mark.parametrize("example", [None, (IMAGES,), (IMAGES, torch.ones(1))])
def test_an_optional_argument_that_calls_for_more(example):
    check_same(seeded(Skipping()), pc.Int8Dynamic(), IMAGES, (IMAGES, torch.ones(1)), example_inputs=example, ignore=["last"])


class Storing(Optional):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = {"conv": [self.conv(x)]}
        return self.last(self.act(self.seen["conv"][0]))


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_what_a_forward_stores_is_read(config):
    model = seeded(Storing())
    fused = check_same(model, config, IMAGES)
    stored, wanted = fused.seen["conv"][0], model.seen["conv"][0]
    assert stored.dtype == torch.float32 and (stored - wanted).norm() < 0.05 * wanted.norm()


class Training(Optional):
    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.conv(x)
        z = self.last(self.act(y))
        return (z, y) if self.training else z


@pytest.mark.parametrize("training", [False, True])
def test_training_mode_is_another_course(training):
    model = seeded(Training()).train(training)
    fused = pc.quantize(model, pc.Int8Static(), data=[IMAGES])
    with torch.no_grad():
        got, wanted = fused.train()(IMAGES)[1], model.train()(IMAGES)[1]
    assert (got - wanted).norm() < 0.05 * wanted.norm()


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_hook_in_between_sees_what_it_saw(config):
    model, seen = seeded(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Identity(), nn.ReLU(), nn.Conv2d(8, 8, 3))), []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    check_same(model, config, IMAGES)
    assert len(seen) >= 3 and all(isinstance(value, Tensor) and value.dtype == torch.float32 for value in seen)
    assert (seen[-2] - seen[-1]).norm() < 0.05 * seen[-1].norm()


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_a_hook_on_a_container_sees_floats(config):
    model, seen = seeded(nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Conv2d(8, 8, 3))), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    check_same(model, config, IMAGES)
    assert all(isinstance(value, Tensor) and value.dtype == torch.float32 for value in seen)


def test_a_forward_put_onto_the_model_is_the_one_that_counts():
    model = seeded(features(norm=False))
    model.forward = lambda x: (model[0](x), nn.Sequential.forward(model, x))
    fused = pc.quantize(model, pc.Int8Dynamic(), inplace=True)
    assert type(fused[1]) is nn.ReLU and torch.equal(nn.ReLU()(fused(IMAGES)[0]), fused[1](fused[0](IMAGES)))


@torch.no_grad()
def test_cross_layer_equalization_looks_at_all_courses():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act, self.b = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)

        def forward(self, x, more=None):
            y = self.a(x)
            return self.b(self.act(y)) if more is not None else (self.b(self.act(y)), y)

    model, x = seeded(Model()), normal(5, 6)
    model.a.weight[0] *= 100
    equalized = cross_layer_equalization(model)
    assert torch.equal(equalized(x)[1], model(x)[1]) and torch.equal(equalized(x, 1), model(x, 1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_modules_of_torchscript_may_lie_between(config):
    """They take no hooks that would record their calls, and no proxies."""
    model = seeded(nn.Sequential(torch.jit.script(seeded(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))), *features()))
    fused = check_same(model, config, IMAGES, example_inputs=IMAGES)
    assert type(fused[2]) is nn.Identity and type(fused[3]) is nn.Identity


def test_activations_of_transformers_are_no_modules_to_look_into():
    activations = pytest.importorskip("transformers.activations")
    model, x = seeded(nn.Sequential(nn.Linear(6, 8), activations.GELUActivation(), nn.Linear(8, 4))), normal(5, 6)
    assert pc.quantize(model, pc.Int8Dynamic())[0].activation == "gelu"
    assert pc.quantize(model, pc.Int8Dynamic(), example_inputs=x)[0].activation == "gelu"


def test_recording():
    model = seeded(PastTheParent(norm=False))
    with recording(model) as calls:
        model(IMAGES)
        model(IMAGES)
    (call,) = calls
    assert [inner.path for inner in call.inner] == ["features", "features.0"]
    assert [inner.path for inner in call.inner[0].inner] == ["features.0", "features.1", "features.2", "features.3"]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Ambiguous(nn.Module):
    """Cannot be traced, as transformers cannot be, and brings inputs that it runs on, or does not."""

    def __init__(self, dummy_inputs):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        self.dummy_inputs = dummy_inputs

    def forward(self, x):
        return self.block(x) if x.abs().sum() > 0 else x


@pytest.mark.parametrize(
    ("dummy_inputs", "activation"),
    [({"x": torch.ones(2, 8)}, "gelu"), ({"x": torch.ones(2, 9)}, "none"), ({"input_ids": torch.ones(1)}, "none"), (None, "none")],
)
def test_a_run_on_the_inputs_that_a_model_brings(dummy_inputs, activation):
    small = pc.quantize(Ambiguous(dummy_inputs).eval(), pc.Int8Dynamic())
    assert small.block[0].activation == activation
