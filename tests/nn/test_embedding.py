"""Embedding tables in int8 and int4."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pycompress as pc
from pycompress.nn import LAYERS, Int4Embedding, Int8Embedding
from pycompress.ops import dequantize_int4, quantize_weight, quantize_weight_int4

VARIANTS = [(Int8Embedding, {}), (Int4Embedding, {}), (Int4Embedding, {"group_size": 32, "symmetric": False})]
IDS = torch.tensor([[0, 3, 49], [7, 7, 1]])


def make(kind, options, padding_idx=3):
    torch.manual_seed(0)
    embedding = nn.Embedding(50, 77, padding_idx)
    return embedding, kind.from_float(embedding, **options)


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_looks_up_dequantized_rows(kind, options):
    embedding, table = make(kind, options)
    if kind is Int8Embedding:
        weight, scale = quantize_weight(embedding.weight)
        dense = weight.float() * scale[:, None]
    else:
        group_size = options.get("group_size", 64)
        dense = dequantize_int4(*quantize_weight_int4(embedding.weight, group_size, options.get("symmetric", True)), 77, group_size)
    assert torch.equal(table(IDS), F.embedding(IDS, dense))
    assert torch.equal(table(IDS.int()), table(IDS))
    assert torch.equal(table.to_dense()(IDS), table(IDS))
    assert (table(IDS) - embedding(IDS)).norm() < (0.01 if kind is Int8Embedding else 0.15) * embedding(IDS).norm()
    assert (table(torch.tensor([3])) == 0).all()  # the padding row
    assert table(IDS[:0]).shape == (0, 3, 77)
    assert table.to_dense().padding_idx == 3


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_round_trips(kind, options):
    _, table = make(kind, options, padding_idx=-1)
    assert table.padding_idx == 49
    twin = LAYERS[kind.__name__].from_config(table.config())
    twin.load_state_dict(table.state_dict())
    for other in (twin, copy.deepcopy(table), pickle.loads(pickle.dumps(table))):
        assert torch.equal(other(IDS), table(IDS))
    y = table(IDS)
    assert torch.equal(table.half()(IDS), y.half()) and table.scale.dtype == torch.float32
    assert torch.equal(table.float()(IDS), y), "a cast rounds the rows that come out, not what is stored"


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_weight_is_the_float_table(kind, options):
    _, table = make(kind, options)
    assert table.weight.dtype == torch.float32 and table.weight.shape == (50, 77)
    assert torch.equal(table.weight[IDS], table(IDS)) and torch.equal(table.weight, table.to_dense().weight)
    assert table.state_dict()["weight"].dtype == table.int_weight.dtype in (torch.int8, torch.uint8)
    assert [name for name, _ in table.named_buffers()] == list(table.state_dict())
    assert table.to("meta").weight.is_meta


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_rows_have_the_dtype_of_the_original(kind, options, dtype, tmp_path):
    embedding, _ = make(kind, options)
    table = kind.from_float(embedding.to(dtype), **options)
    pc.save(table, tmp_path / "table.safetensors")
    for each in (table, copy.deepcopy(table), pickle.loads(pickle.dumps(table)), pc.load(tmp_path / "table.safetensors")):
        assert each(IDS).dtype == each.weight.dtype == each.to_dense().weight.dtype == dtype
        assert torch.equal(each(IDS), table(IDS)) and each.scale.dtype == torch.float32


class TokensAndPositions(nn.Module):
    """As many language models: the table of positions is sliced, not called."""

    def __init__(self):
        super().__init__()
        self.token, self.position, self.norm = nn.Embedding(50, 64), nn.Embedding(16, 64), nn.LayerNorm(64)

    def forward(self, ids):
        return self.norm(self.token(ids) + self.position.weight[: ids.shape[-1]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_model_that_slices_the_weight(bits, dtype, tmp_path):
    torch.manual_seed(0)
    model = TokensAndPositions().eval().to(dtype)
    small = pc.quantize(model, pc.EmbeddingWeightOnly(bits=bits))
    expected, got = model(IDS), small(IDS)
    assert type(small.position).__name__ == f"Int{bits}Embedding" and got.dtype == small.token(IDS).dtype == dtype
    assert (got - expected).norm() < (0.02 if bits == 8 else 0.2) * expected.norm()
    pc.save(small, tmp_path / "small.safetensors")
    assert torch.equal(pc.load(tmp_path / "small.safetensors", TokensAndPositions())(IDS), got)
    assert small.half().token(IDS).dtype == torch.float16


def test_a_state_of_before_weight_was_float_loads():
    """Its keys and integers are those of today."""
    _, table = make(Int8Embedding, {})
    weight, scale = torch.randint(-127, 128, (50, 77), dtype=torch.int8), torch.rand(50)
    table.load_state_dict({"weight": weight, "scale": scale})
    assert torch.equal(table.weight, weight * scale[:, None])
    table.load_state_dict({"weight": weight.flip(0), "scale": scale}, assign=True)
    assert torch.equal(table.int_weight, weight.flip(0))


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_compile_and_export(kind, options):
    _, table = make(kind, options)
    assert torch.equal(torch.compile(table, fullgraph=True, backend="aot_eager")(IDS), table(IDS))
    assert torch.equal(torch.export.export(table, (IDS,)).module()(IDS), table(IDS))


def test_bytes():
    assert make(Int8Embedding, {})[1].num_bytes() == 50 * (77 + 4)
    assert make(Int4Embedding, {})[1].num_bytes() == 50 * (39 + 2 * 4)
    assert make(Int4Embedding, {})[1].num_params() == 50 * 77
    assert "format=int4 embedding, groups of 64" in repr(make(Int4Embedding, {})[1])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weight": torch.zeros(50, 77)}, "weight must be torch.int8, got torch.float32"),
        ({"weight": torch.zeros(50, 76, dtype=torch.int8)}, "size mismatch for weight"),
        ({"scale": torch.full((50,), float("inf"))}, "scale must be finite"),
    ],
)
def test_wrong_state(change, text):
    _, table = make(Int8Embedding, {})
    with pytest.raises(RuntimeError, match=text):
        table.load_state_dict({**table.state_dict(), **change})


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: Int8Embedding.from_float(nn.Linear(2, 2)), TypeError, "embedding must be an nn.Embedding, got Linear"),
        (lambda: Int8Embedding.from_float(nn.Embedding(4, 4, max_norm=1.0)), ValueError, "must have max_norm=None, got 1.0"),
        (lambda: Int4Embedding.from_float(nn.Embedding(4, 4), group_size=5), ValueError, "group_size must be 32, 64 or 128, got 5"),
        (lambda: Int8Embedding(4, 4, 4), ValueError, "padding_idx must be within num_embeddings 4, got 4"),
        (lambda: Int8Embedding(4, 4)(torch.zeros(2)), TypeError, "ids must be an int64 or int32 tensor, got torch.float32"),
        (lambda: Int4Embedding(4, 4)(torch.tensor([4])), IndexError, "out of range"),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()
