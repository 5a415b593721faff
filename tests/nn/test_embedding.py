"""Embedding tables in int8 and int4."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

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
    assert torch.equal(table.half()(IDS), y) and table.scale.dtype == torch.float32


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
