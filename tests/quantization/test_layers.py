"""Which layers are taken, and what the others are told."""

from __future__ import annotations

import pytest
import torch
from support.quantizable import encoder, normal, seeded
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from pycompress.nn import CompressedModule, Int8Linear
from pycompress.nn.base import get_note
from pycompress.quantization import Codebook, FakeQuant, Int8Dynamic, Int8Static, Int8WeightOnly, quantize


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, output: output + 1)
    return layer


CASES = {
    "own forward": (lambda: Doubled(4, 4), Int8Dynamic(), "Doubled has a forward of its own"),
    "hook": (lambda: hooked(nn.Linear(4, 4)), Int8Dynamic(), "it has hooks, which a new layer would lose"),
    "lazy": (lambda: nn.LazyLinear(4), Int8Dynamic(), "its weight is not initialized, run the model once first"),
    "empty": (lambda: nn.Linear(0, 4), Int8Dynamic(), "its weight is empty"),
    "float64": (lambda: nn.Linear(4, 4).double(), Int8Dynamic(), "the int8 layers take float32, bfloat16 and float16"),
    "conv with a zero point per image": (lambda: nn.Conv2d(4, 4, 1), Int8Dynamic(symmetric=False), "have no zero point per image"),
    "conv1d": (lambda: nn.Conv1d(4, 4, 1), Int8WeightOnly(), "Int8WeightOnly has no layer for Conv1d"),
    "conv3d": (lambda: nn.Conv3d(4, 4, 1), Int8Dynamic(), "Int8Dynamic has no layer for Conv3d"),
    "circular conv1d": (lambda: nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), Int8Static(), "padding_mode='circular'"),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 1), FakeQuant(), "FakeQuant has no layer for ConvTranspose2d"),
    "embedding": (lambda: nn.Embedding(4, 4), Codebook(), "Codebook has no layer for Embedding"),
    "lstm": (lambda: nn.LSTM(4, 4), Int8Dynamic(), "Int8Dynamic has no layer for LSTM"),
    "circular": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), Int8Dynamic(), "padding_mode='circular'"),
    "circular, weight-only": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), Int8WeightOnly(), "padding_mode='reflect'"),
    "even same": (lambda: nn.Conv2d(4, 4, 2, padding="same"), Int8Dynamic(), "padding='same' needs"),
    "deep": (lambda: nn.Linear(70_000, 1), Int8Static(), "K must be at most 66311 for an exact int32 sum, got 70000"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "config", "reason"), CASES.values(), ids=CASES.keys())
def test_left_alone_with_a_reason(make, config, reason):
    model = nn.Sequential(make(), nn.Linear(4, 4))
    quantized = quantize(model, config, data=[torch.ones(1, 4)], forward=lambda model, batch: model[1](batch))
    note = get_note(quantized[0])
    assert note.startswith("left as it is: ") and reason in note
    assert type(quantized[0]) is type(model[0])
    assert get_note(model[0]) is None


@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_old_style_weight_norm_is_left_alone():
    """Its weight is a plain tensor that a hook recomputes."""
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    quantized = quantize(model, Int8Dynamic(), inplace=True)
    assert "its weight is not a parameter" in get_note(quantized[0])
    assert isinstance(quantized[1], Int8Linear)


def test_deep_layer_is_taken_when_symmetric():
    model = nn.Linear(70_000, 1)
    assert isinstance(quantize(model, Int8Static(symmetric=True), data=[torch.ones(1, 70_000)]), Int8Linear)


@pytest.mark.parametrize("config", [Int8Dynamic(), Int8Static(), Int8WeightOnly()], ids=repr)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(config, dtype):
    model = seeded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5))).to(dtype)
    x = normal(2, 3, 5, 5).to(dtype)
    y = quantize(model, config, data=[x])(x)
    assert y.dtype == dtype
    assert (y.float() - model(x).float()).norm() < 0.05 * model(x).float().norm()


def test_parametrized_layers_are_taken():
    """New-style weight norm and spectral norm are parametrizations; their effective weight is what counts."""
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)), parametrizations.spectral_norm(nn.Linear(5, 4))).eval()
    x = normal(3, 6)
    quantized = quantize(model, Int8Dynamic())
    assert all(isinstance(layer, Int8Linear) for layer in quantized)
    assert (quantized(x) - model(x)).norm() < 0.05 * model(x).norm()


def test_simulation_takes_every_convolution():
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Unflatten(2, (2, 4)), nn.Conv2d(3, 2, 1), nn.Unflatten(2, (1, 2)), nn.Conv3d(2, 2, 1))
    x = normal(2, 2, 10)
    simulated = quantize(model, FakeQuant(bits=8, activation_bits=8), example_inputs=x)
    assert all("simulated" in get_note(simulated[i]) for i in (0, 2, 4))
    assert (simulated(x) - model(x)).norm() < 0.05 * model(x).norm()


class TestTransformer:
    def test_output_projection_of_attention_is_left_alone(self):
        model, x = encoder(), normal(2, 5, 8)
        quantized = quantize(model, Int8Static(), data=[x])
        attention = quantized.layers[0].self_attn
        assert "nn.MultiheadAttention uses this weight directly" in get_note(attention.out_proj)
        assert "no layer for MultiheadAttention" in get_note(attention)
        assert all(isinstance(layer.linear1, Int8Linear) and isinstance(layer.linear2, Int8Linear) for layer in quantized.layers)

    @pytest.mark.parametrize("config", [Int8Dynamic(), Int8Static(), Int8WeightOnly()], ids=repr)
    @pytest.mark.parametrize("masked", [False, True])
    def test_fast_path_does_not_bypass_the_new_layers(self, config, masked):
        """In evaluation mode without gradients torch would read linear1.weight as a float tensor and never call the layer."""
        model, x = encoder(), normal(3, 5, 8)
        mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]]) if masked else None
        quantized = quantize(model, config, data=[x])
        called = []
        quantized.layers[0].linear1.register_forward_hook(lambda *_: called.append(1))
        with torch.no_grad():
            y, expected = quantized(x, src_key_padding_mask=mask), model(x, src_key_padding_mask=mask)
        assert called
        keep = slice(None) if mask is None else ~mask
        assert (y[keep] - expected[keep]).norm() < 0.05 * expected[keep].norm()

    def test_calibration_sees_layers_behind_the_fast_path(self):
        model, x = encoder(), normal(2, 5, 8)
        fast = torch.backends.mha.get_fastpath_enabled()
        quantized = quantize(model, Int8Static(), data=[x], example_inputs=x)
        assert sum(isinstance(module, CompressedModule) for module in quantized.modules()) == 4
        assert torch.backends.mha.get_fastpath_enabled() == fast

    def test_fast_path_of_the_given_model_stays(self):
        model = encoder()
        quantize(model, Int8Dynamic())
        assert model.layers[0].activation_relu_or_gelu == 1 and model.use_nested_tensor
