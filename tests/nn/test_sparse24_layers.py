import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

import pycompress
from pycompress.nn import LAYERS, Int8Sparse24Linear, Sparse24Linear
from pycompress.ops import int8_sparse24_linear_reference, native, quantize_weight, sparse24_mask, sparse24_to_dense

CLASSES = [Sparse24Linear, Int8Sparse24Linear]


def sparse_linear(k=37, n=21, bias=True, pattern="2:4"):
    """An nn.Linear whose weight has the pattern."""
    linear = nn.Linear(k, n, bias)
    with torch.no_grad():
        linear.weight.mul_(sparse24_mask(linear.weight.abs(), pattern))
    return linear


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:8"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("m", [1, 40])
def test_float_layer_equals_the_linear_it_came_from(m, bias, pattern):
    linear = sparse_linear(bias=bias, pattern=pattern)
    layer, x = Sparse24Linear.from_float(linear, pattern=pattern), torch.randn(2, m, 37)
    torch.testing.assert_close(layer(x), linear(x))
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.to_dense().weight, linear.weight)
    assert layer.format == f"{pattern} float32"
    assert (layer.fallback_reason is None) == (layer.kernel != native.REFERENCE)


@pytest.mark.parametrize("x_scale", [None, 0.02])
def test_int8_layer_equals_the_reference(x_scale):
    linear, x = sparse_linear(), torch.randn(5, 37)
    layer = Int8Sparse24Linear.from_float(linear, x_scale=x_scale)
    state = layer.state_dict()
    expected = int8_sparse24_linear_reference(x, state["values"], state["indices"], state["scale"], state["bias"], x_scale=x_scale)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)
    q, scale = quantize_weight(linear.weight)
    assert torch.equal(layer.int_weight, q)
    assert torch.equal(layer.scale, scale)
    relative = (layer(x) - linear(x)).norm() / linear(x).norm()
    assert relative < (0.02 if x_scale is None else 0.1)


@pytest.mark.parametrize("cls", CLASSES)
def test_mask_decides_and_nothing_is_pruned_silently(cls):
    linear = nn.Linear(16, 8)
    with pytest.raises(ValueError, match="weight must keep at most 2 of every 4 along K"):
        cls.from_float(linear)
    with pytest.raises(ValueError, match="mask must keep at most 2 of every 4 along K"):
        cls.from_float(linear, torch.ones(8, 16, dtype=torch.bool))
    mask = sparse24_mask(torch.rand(8, 16))
    dense = cls.from_float(linear, mask).to_dense().weight
    assert not dense[~mask].any()
    torch.testing.assert_close(dense[mask], linear.weight[mask], rtol=0, atol=0.01)


def test_parametrized_weight_counts_as_it_acts():
    class Half(nn.Module):
        def forward(self, weight):
            return weight * sparse24_mask(weight.abs())

    linear = nn.Linear(12, 4)
    parametrize.register_parametrization(linear, "weight", Half())
    x = torch.randn(3, 12)
    torch.testing.assert_close(Sparse24Linear.from_float(linear)(x), linear(x))


def test_int8_on_top_of_sparse():
    linear = sparse_linear()
    sparse = Sparse24Linear.from_float(linear, activation="relu")
    layer = Int8Sparse24Linear.from_float(sparse)
    x = torch.randn(4, 37)
    assert torch.equal(layer(x), Int8Sparse24Linear.from_float(linear, activation="relu")(x))
    assert layer.activation == "relu"


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize("cls", CLASSES)
def test_state_dict_is_canonical_and_round_trips(cls, pattern):
    layer = cls.from_float(sparse_linear(pattern=pattern), pattern=pattern, activation="gelu")
    state = layer.state_dict()
    assert {"values", "indices", "bias"} <= set(state)
    assert "packed" not in state
    assert sparse24_to_dense(state["values"], state["indices"], 37, pattern=pattern).shape == (21, 37)
    twin = LAYERS[cls.__name__].from_config(layer.config())
    twin.load_state_dict(state)
    x = torch.randn(6, 37)
    assert torch.equal(twin(x), layer(x))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize("cls", CLASSES)
def test_a_corrupted_checkpoint_is_refused_and_changes_nothing(cls):
    layer, x = cls.from_float(sparse_linear()), torch.randn(2, 37)
    before, state = layer(x), layer.state_dict()
    state["indices"] = torch.full_like(state["indices"], 0xFF)
    with pytest.raises(RuntimeError, match=rf"{cls.__name__}: indices must rise strictly inside 0\.\.3 in every group, got \[3, 3\]"):
        layer.load_state_dict(state)
    assert torch.equal(layer(x), before)
    state["indices"] = state["indices"][:, :-1]
    with pytest.raises(RuntimeError, match=r"indices must be torch\.uint8"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("cls", CLASSES)
def test_casts_keep_the_weights_and_run_in_half(cls):
    layer, x = cls.from_float(sparse_linear()), torch.randn(3, 37)
    expected = layer(x)
    layer.half()
    assert torch.equal(layer(x), expected)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x.half()).float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("cls", CLASSES)
def test_gradient_reaches_the_input(cls):
    layer, x = cls.from_float(sparse_linear()), torch.randn(3, 37, requires_grad=True)
    grad = torch.randn(3, 21)
    layer(x).backward(grad)
    torch.testing.assert_close(x.grad, grad @ layer.to_dense().weight.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", CLASSES)
def test_compiles_and_exports_as_one_op(cls):
    layer, x = cls.from_float(sparse_linear()), torch.randn(3, 37)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_counts_and_sizes():
    linear = sparse_linear(1024, 64)
    layer = Sparse24Linear.from_float(linear)
    assert layer.num_params() == 64 * 512 + 64
    assert layer.num_bytes() <= 0.57 * 64 * 1024 * 4
    assert layer.packed.numel() <= (0.57 if layer.kernel != native.REFERENCE else 1) * 64 * 1024 * 4
    layer = Int8Sparse24Linear.from_float(linear)
    assert layer.num_bytes() <= 0.63 * 64 * 1024 + 2 * 64 * 4
    assert "2:4 int8 dynamic" in repr(layer)


@pytest.mark.parametrize(("cls", "share"), [(Sparse24Linear, 0.27), (Int8Sparse24Linear, 0.33)])
def test_a_quarter_of_the_weights_takes_half_the_bytes_of_2_4(cls, share):
    layer = cls.from_float(sparse_linear(1024, 64, False, "1:4"), pattern="1:4")
    item = layer.values_dtype.itemsize
    assert layer.num_params() == 64 * 256
    assert layer.num_bytes() - (64 * 4 if cls is Int8Sparse24Linear else 0) <= share * 64 * 1024 * item
    assert layer.packed.numel() <= share * 64 * 1024 * item
    assert pycompress.report(nn.Sequential(layer), torch.randn(2, 1024), measure=False).layers[0].bytes == layer.num_bytes()


@pytest.mark.parametrize("cls", CLASSES)
def test_bad_arguments(cls):
    with pytest.raises(ValueError, match="activation must be None, 'relu', 'gelu', 'silu', 'relu6' or 'hardswish', got 'tanh'"):
        cls(4, 4, activation="tanh")
    with pytest.raises(ValueError, match="pattern must be 'N:M'"):
        cls(4, 4, pattern="4:2")
    with pytest.raises(ValueError, match=rf"{cls.__name__}: weight must be \(N, 5\) to match x"):
        cls(4, 4)(torch.randn(2, 5))
    with pytest.raises(TypeError, match="x must be a float32, bfloat16 or float16 tensor"):
        cls(4, 4)(torch.zeros(2, 4, dtype=torch.int32))


def test_empty_layer_gives_its_bias():
    layer = Sparse24Linear(8, 3)
    assert torch.equal(layer(torch.randn(2, 8)), F.linear(torch.zeros(2, 8), torch.zeros(3, 8)))
