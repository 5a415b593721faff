"""prepare, calibrate, convert and the one-line quantize: results, copies, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from support.quantizable import Tied, convnet, mlp, normal, seeded
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pycompress.nn import CompressedModule, Int8Conv2d, Int8Linear
from pycompress.nn.base import get_note
from pycompress.quantization import OBSERVERS, Codebook, FakeQuant, Int8Dynamic, Int8Static, Int8WeightOnly, Quantizer, quantize

CONFIGS = {
    "dynamic": Int8Dynamic(),
    "static": Int8Static(),
    "static symmetric": Int8Static(symmetric=True),
    "weight-only": Int8WeightOnly(),
    "fake": FakeQuant(bits=8, activation_bits=8),
    "fake static": FakeQuant(bits=8, granularity="group", group_size=5, activation_bits=8, activation_granularity="tensor"),
    "fake asymmetric": FakeQuant(bits=8, symmetric=False, observer="mse"),
    "codebook": Codebook(bits=8),
}


def batches(n: int = 3) -> list[Tensor]:
    return [normal(8, 3, 9, 7, seed=seed) for seed in range(n)]


def relative_error(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything an unwanted change would show in: tensors, structure, modes, hooks, notes."""
    return {
        "state": {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()},
        "modules": [(name, module, type(module), module.training, get_note(module)) for name, module in model.named_modules()],
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()],
    }


def assert_untouched(model: nn.Module, before: dict[str, object]) -> None:
    after = snapshot(model)
    assert after["modules"] == before["modules"] and after["hooks"] == before["hooks"]
    assert after["state"].keys() == before["state"].keys()
    for name, (identity, tensor) in before["state"].items():
        assert after["state"][name][0] == identity and torch.equal(after["state"][name][1], tensor), name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_one_line(config):
    model, x = convnet(), normal(4, 3, 9, 7, seed=9)
    before = snapshot(model)
    quantized = quantize(model, config, data=batches())
    assert_untouched(model, before)
    assert relative_error(quantized(x), model(x)) < 0.05
    assert not torch.equal(quantized(x), model(x))
    assert not quantized.training
    assert not any(parametrize.is_parametrized(module) for module in quantized.modules())
    if not isinstance(config, (FakeQuant, Codebook)):
        assert sum(isinstance(module, CompressedModule) for module in quantized.modules()) == 3
        assert not any(isinstance(module, (nn.Conv2d, nn.Linear, nn.BatchNorm2d)) for module in quantized.modules())
    else:
        assert all("simulated in float" in get_note(quantized[i]) for i in (0, 3, 7))


@pytest.mark.parametrize("observer", OBSERVERS)
def test_every_observer_calibrates(observer):
    model, x = convnet(), normal(4, 3, 9, 7, seed=9)
    quantized = quantize(model, Int8Static(observer=observer), data=batches())
    assert isinstance(quantized[0], Int8Conv2d) and isinstance(quantized[7], Int8Linear)
    # moving_average gives later batches 1 % weight, the others see all; entropy and percentile clip.
    assert relative_error(quantized(x), model(x)) < 0.1


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_three_steps_equal_one_line(config):
    model, data = convnet(), batches()
    quantizer = Quantizer(config)
    prepared = quantizer.prepare(model, data[0])
    assert quantizer.calibrate(prepared, data) is prepared
    by_steps, by_one = quantizer.convert(prepared), quantize(model, config, data=data)
    assert torch.equal(by_steps(data[0]), by_one(data[0]))


def test_prepared_model_is_float_until_calibrated():
    model, data = convnet(), batches()
    quantizer = Quantizer(Int8Static(), fold_bn=False)
    prepared = quantizer.prepare(model, data[0])
    assert torch.equal(prepared(data[0]), model(data[0]))
    quantizer.calibrate(prepared, data)
    assert not torch.equal(prepared(data[0]), model(data[0]))


def test_calibration_starts_afresh():
    model, data = convnet(), batches()
    quantizer = Quantizer(Int8Static())
    once, twice = (quantizer.prepare(model, data[0]) for _ in range(2))
    quantizer.calibrate(once, data)
    quantizer.calibrate(twice, [1000 * data[0]])
    quantizer.calibrate(twice, data)
    assert torch.equal(once(data[0]), twice(data[0]))


def test_converting_leaves_the_prepared_model_unless_inplace():
    quantizer = Quantizer(Int8Static())
    prepared = quantizer.prepare(convnet(), batches()[0])
    quantizer.calibrate(prepared, batches())
    before = snapshot(prepared)
    quantizer.convert(prepared)
    assert_untouched(prepared, before)
    assert quantizer.convert(prepared, inplace=True) is prepared
    assert isinstance(prepared[0], Int8Conv2d)


def test_inplace():
    model = convnet()
    assert quantize(model, Int8Dynamic(), inplace=True) is model
    assert isinstance(model[0], Int8Conv2d)


def test_a_single_layer_is_a_model():
    layer = seeded(nn.Linear(7, 3))
    x = normal(4, 7)
    assert isinstance(quantize(layer, Int8Dynamic()), Int8Linear)
    assert isinstance(quantize(layer, Int8Static(), data=[x]), Int8Linear)
    assert relative_error(quantize(layer, Int8Static(), data=[x])(x), layer(x)) < 0.05


def test_training_mode_is_kept():
    model = convnet().train()
    model[3].eval()
    quantized = quantize(model, Int8Static(), data=batches())
    assert quantized.training and quantized[0].training and not quantized[3].training


def test_random_state_is_not_touched():
    model = seeded(nn.Sequential(nn.Linear(7, 3), nn.Dropout())).train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    quantizer = Quantizer(Int8Static())
    prepared = quantizer.prepare(model, normal(2, 7))
    quantizer.calibrate(prepared, [normal(4, 7)])
    quantizer.convert(prepared)
    assert torch.equal(torch.rand(2), expected)


def test_ignored_layers_stay_bit_for_bit():
    model = convnet()
    for ignore in (["7"], "7", [model[7]], [nn.Linear], ["[5-9]"]):
        quantized = quantize(model, Int8Dynamic(), ignore=ignore)
        assert type(quantized[7]) is nn.Linear and torch.equal(quantized[7].weight, model[7].weight)
        assert get_note(quantized[7]) == "left as it is: named in ignore"
        assert isinstance(quantized[0], Int8Conv2d)


def test_config_per_layer():
    model = convnet()
    mixed = {"*": Int8Dynamic(), "3": Int8Static(), "7": FakeQuant(bits=4)}
    quantized = quantize(model, mixed, data=batches())
    assert quantized[0].format == "int8 dynamic" and quantized[3].format == "int8 static asymmetric"
    assert type(quantized[7]) is nn.Linear and "4 bit" in get_note(quantized[7])
    only = quantize(model, {"7": Int8Dynamic()})
    assert type(only[0]) is nn.Conv2d and get_note(only[0]) == "left as it is: no config is given for it"


def test_shared_layer_is_converted_once_and_tied_weights_stay():
    model = seeded(Tied())
    x = torch.arange(10).reshape(2, 5)
    quantized = quantize(model, Int8Static(), data=[x], example_inputs=x)
    assert isinstance(quantized.block, Int8Linear) and quantized.block is quantized.again
    assert type(quantized.head) is nn.Linear and quantized.head.weight is quantized.embed.weight
    assert get_note(quantized.head) == "left as it is: its weight is tied to another layer's"
    assert relative_error(quantized(x), model(x)) < 0.05


class Partly(nn.Module):
    """One layer that no data reaches, one that never runs at all."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.rarely, self.never = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.always(x)
        return self.rarely(y) if x.shape[0] == 1 else y


def test_layers_without_data_stay_float():
    model = seeded(Partly())
    quantizer = Quantizer(Int8Static())
    prepared = quantizer.prepare(model, normal(1, 4))
    assert get_note(prepared.never) == "left as it is: the model did not call it on example_inputs"
    quantizer.calibrate(prepared, [normal(8, 4)])
    quantized = quantizer.convert(prepared)
    assert isinstance(quantized.always, Int8Linear)
    assert type(quantized.rarely) is nn.Linear and not quantized.rarely._forward_pre_hooks
    assert get_note(quantized.rarely) == "left as it is: calibration data never reached it"
    assert torch.equal(quantized.rarely.weight, model.rarely.weight)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        return self.linear(input=a if b is None else a + b)


def test_batches_of_every_kind():
    model = seeded(TwoInputs())
    a, b, labels = normal(8, 4), normal(8, 4, seed=1), torch.zeros(8)
    scales = {}
    for name, example_inputs, data, forward in [
        ("tensor", None, a + b, None),
        ("labelled", None, [(a + b, labels)], None),
        ("two", (a, b), [(a, b, labels)], None),
        ("two, guessed", None, [[a, b, labels]], None),
        ("keywords", {"a": a, "b": b}, [{"a": a, "b": b, "ids": labels}], None),
        ("keywords, guessed", None, [{"a": a, "b": b, "labels": labels}], None),
        ("generator", None, (batch for batch in [(a + b, labels)]), None),
        ("forward", None, [{"anything": (a, b)}], lambda model, batch: model(*batch["anything"])),
    ]:
        quantized = quantize(model, Int8Static(), data=data, example_inputs=example_inputs, forward=forward)
        scales[name] = float(quantized.linear.x_scale)
    assert len(set(scales.values())) == 1, scales


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m: quantize("m", Int8Dynamic()), TypeError, "quantize: model must be a torch.nn.Module, got str"),
        (lambda m: quantize(m, "int8"), TypeError, r"quantize: config must be a config such as Int8Dynamic\(\), got 'int8'"),
        (lambda m: quantize(m, Int8Dynamic), TypeError, r"write Int8Dynamic\(\)"),
        (lambda m: quantize(m, {}), ValueError, "config must name at least one layer, got an empty mapping"),
        (lambda m: quantize(m, {0: Int8Dynamic()}), TypeError, "config must map names or layer types to configs"),
        (lambda m: quantize(m, Int8Static()), ValueError, "data must be calibration batches, as static activations need them, got None"),
        (lambda m: quantize(m, Int8Static(), data=[]), ValueError, "calibrate: data must hold at least one batch, got none"),
        (lambda m: quantize(m, Int8Static(), data=5), TypeError, "calibrate: data must be an iterable of batches, got int"),
        (lambda m: quantize(m, Int8Static(), data=[5]), TypeError, "batch must be a tensor, a tuple or a mapping, got int"),
        (lambda m: quantize(m, Int8Static(), data=[torch.full((1, 3, 9, 7), float("nan"))]), ValueError, "input of layer '0': .*finite"),
        (lambda m: quantize(m, Int8Static(), data=[torch.empty(0, 3, 9, 7)]), ValueError, "data must reach a prepared layer"),
        (lambda m: quantize(m, Int8Static(), data=[normal(1, 4, 9, 7)]), RuntimeError, "channels"),
        (lambda m: quantize(m, Int8Dynamic(), ignore=["nope"]), ValueError, "ignore entry 'nope' matches no module"),
        (lambda m: quantize(m, Int8Dynamic(), ignore=["*"]), ValueError, r"must have a layer that can be quantized.*named in ignore"),
        (lambda m: quantize(m, Int8Dynamic(), algorithms=["magic"]), ValueError, "unknown quantization algorithm 'magic'"),
        (lambda m: quantize(m, Int8Dynamic(), example_inputs=normal(1, 2, 9, 7)), RuntimeError, "channels"),
        (lambda m: Quantizer(Int8Static()).calibrate(m, batches()), ValueError, "calibrate: model must be prepared"),
        (lambda m: Quantizer(Int8Static()).convert(m), ValueError, "convert: model must be prepared"),
        (lambda m: Quantizer(Int8Static()).prepare(m, qat="yes"), ValueError, "qat must be True, False, 'ste' or 'lsq', got 'yes'"),
        (lambda m: Quantizer(Codebook()).prepare(m, qat=True), ValueError, "qat must be False for Codebook"),
        (lambda m: Quantizer(Int8Static()).prepare(m, 5), TypeError, "example_inputs must be a tensor, a tuple or a dict, got int"),
    ],
)
def test_errors_leave_the_model(call, error, text):
    model = convnet()
    before = snapshot(model)
    with pytest.raises(error, match=text):
        call(model)
    assert_untouched(model, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_weights_that_are_not_finite(part, bad):
    model = mlp()
    with torch.no_grad():
        getattr(model[2], part)[0] = bad
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"prepare: {part} of layer '2' must be finite, got NaN or Inf"):
        Quantizer(Int8Dynamic()).prepare(model)
    with pytest.raises(ValueError, match="must be finite"):
        quantize(model, Int8Dynamic(), inplace=True)
    assert [entry[:4] for entry in before["modules"]] == [entry[:4] for entry in snapshot(model)["modules"]]


def test_error_in_place_leaves_a_float_model():
    model = mlp()
    before = snapshot(model)
    with pytest.raises(ValueError, match="at least one batch"):
        quantize(model, Int8Static(), data=[], inplace=True)
    assert_untouched(model, before)


def test_failed_calibration_keeps_the_old_ranges():
    quantizer = Quantizer(Int8Static(observer="percentile"))
    prepared = quantizer.prepare(convnet(), batches()[0])
    quantizer.calibrate(prepared, batches())
    state, before = copy.deepcopy(prepared.state_dict()), prepared(batches()[0])
    with pytest.raises(ValueError, match="input of layer '0'"):
        quantizer.calibrate(prepared, [100 * batches()[0], torch.full((1, 3, 9, 7), float("inf"))])
    assert torch.equal(prepared(batches()[0]), before)
    assert all(torch.equal(value, state[name]) for name, value in prepared.state_dict().items())


def test_uncalibrated_and_twice_prepared():
    quantizer = Quantizer(Int8Static())
    prepared = quantizer.prepare(convnet(), batches()[0])
    with pytest.raises(RuntimeError, match=r"convert: model must be calibrated first"):
        quantizer.convert(prepared)
    with pytest.raises(ValueError, match="prepare: model must not be prepared already, call convert first"):
        quantizer.prepare(prepared)


def test_no_supported_layer_and_quantized_already():
    with pytest.raises(ValueError, match=r"quantize: model must have a layer that can be quantized, got none$"):
        quantize(nn.Sequential(nn.ReLU(), nn.LayerNorm(4)), Int8Dynamic())
    with pytest.raises(ValueError, match=r"got none \(it is quantized already\)"):
        quantize(quantize(convnet(), Int8Dynamic()), Int8Dynamic())


def test_quantized_model_can_be_quantized_further():
    """Layers left out the first time are taken the second time, the others stay."""
    first = quantize(convnet(), Int8Dynamic(), ignore=["7"])
    second = quantize(first, Int8WeightOnly())
    assert second[0].format == "int8 dynamic" and second[7].format == "int8 weight-only"


def test_state_dict_of_a_prepared_model_resumes():
    quantizer, data = Quantizer(Int8Static(observer="moving_average")), batches()
    prepared = quantizer.prepare(convnet(), data[0])
    quantizer.calibrate(prepared, data)
    fresh = quantizer.prepare(seeded(convnet(), seed=5), data[0])
    fresh.load_state_dict(prepared.state_dict())
    assert torch.equal(quantizer.convert(fresh)(data[0]), quantizer.convert(prepared)(data[0]))


def test_all_zero_calibration_data_does_not_silence_a_layer():
    model = mlp()
    quantized = quantize(model, Int8Static(), data=[torch.zeros(4, 7)])
    assert (quantized[0](normal(4, 7)) != quantized[0](torch.zeros(4, 7))).any()


def test_progress_bar_can_be_shown(capsys):
    quantize(convnet(), Int8Static(), data=batches(), progress=True)
    assert "calibrate" in capsys.readouterr().err


@pytest.mark.parametrize("config", [Int8Static(), FakeQuant(bits=2, activation_bits=2, activation_granularity="tensor")])
def test_a_calibrated_model_resumes_from_its_state_dict(config):
    model, data = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval(), torch.randn(7, 6)
    quantizer = Quantizer(config)
    calibrated = quantizer.calibrate(quantizer.prepare(model), [data], progress=False)
    again = Quantizer(config)
    resumed = again.prepare(model)
    assert torch.equal(resumed(data), model(data))  # in float until it has scales
    resumed.load_state_dict(calibrated.state_dict())
    assert torch.equal(resumed(data), calibrated(data)) and not torch.equal(resumed(data), model(data))
    assert torch.equal(again.convert(resumed)(data), quantizer.convert(calibrated)(data))
    assert config.simulated or not any(layer._load_state_dict_post_hooks for layer in again.convert(resumed).modules())
