"""EmbeddingWeightOnly: tables become integers, simulated and executed rows agree, and what cannot be done says why."""

import pytest
import torch
from torch import nn

import pycompress as pc
from pycompress.nn.base import get_note
from pycompress.quantization import EmbeddingWeightOnly, Int8Dynamic, Quantizer, gptq
from pycompress.quantization.foreign import is_transposed_linear

IDS = torch.tensor([[0, 3, 49], [7, 7, 11]])
CONFIGS = [EmbeddingWeightOnly(), EmbeddingWeightOnly(4), EmbeddingWeightOnly(4, group_size=32, symmetric=False)]


def net(dim=70, **options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, dim, **options), nn.Linear(dim, 8)).eval()


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_simulated_rows_are_the_executed_ones(config, tmp_path):
    model = net(padding_idx=3)
    quantizer = Quantizer(config)
    prepared = quantizer.prepare(model, IDS)
    small = quantizer.convert(prepared)
    assert type(small[0]).__name__ == f"Int{config.bits}Embedding" and small[0].padding_idx == 3 and type(small[1]) is nn.Linear
    assert torch.equal(small[0](IDS), prepared[0](IDS))
    assert torch.equal(small[0](IDS), pc.quantize(model, config)[0](IDS))
    assert small[0].num_bytes() < (0.35 if config.bits == 8 else 0.22) * model[0].weight.numel() * 4
    pc.save(small, tmp_path / "small.safetensors")
    assert torch.equal(pc.load(tmp_path / "small.safetensors", net(padding_idx=3))(IDS), small(IDS))


def test_training_moves_the_table_and_converts():
    model = net()
    quantizer = Quantizer({nn.Embedding: EmbeddingWeightOnly(), nn.Linear: Int8Dynamic()})
    prepared = quantizer.prepare(model, IDS, qat=True).train()
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    prepared(IDS).square().mean().backward()
    optimizer.step()
    simulated = prepared.eval()(IDS)
    small = quantizer.convert(prepared)
    assert type(small[1]).__name__ == "Int8Linear"
    torch.testing.assert_close(small(IDS), simulated, rtol=1e-4, atol=1e-5)
    assert not torch.equal(small[0](IDS), pc.quantize(model, EmbeddingWeightOnly())[0](IDS))


def test_rounding_algorithms_leave_tables_alone():
    model = net()
    quantizer = Quantizer({nn.Embedding: EmbeddingWeightOnly(), nn.Linear: Int8Dynamic()})
    prepared = quantizer.prepare(model, IDS)
    gptq(prepared, [IDS])
    small = quantizer.convert(prepared)
    assert torch.equal(small[0](IDS), pc.quantize(model, EmbeddingWeightOnly())[0](IDS))


def test_types_in_a_mapping_and_the_last_match_wins():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(9, 8))
    small = pc.quantize(model, {nn.Module: Int8Dynamic(), "1": pc.Int8WeightOnly()})
    assert [type(m).__name__ for m in small] == ["Int8Linear", "Int8WeightOnlyLinear", "Embedding"]
    assert get_note(small[2]) == "left as it is: Int8Dynamic has no layer for Embedding"
    with pytest.raises(TypeError, match="config must map names or layer types to configs such as Int8Dynamic"):
        pc.quantize(model, {int: Int8Dynamic()})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "EmbeddingWeightOnly: bits must be 8 or 4, got 5"),
        ({"bits": True}, "bits must be 8 or 4, got True"),
        ({"group_size": 32}, "group_size and symmetric=False belong to bits=4, got 32"),
        ({"symmetric": False}, "group_size and symmetric=False belong to bits=4"),
        ({"bits": 4, "group_size": 48}, "group_size"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        EmbeddingWeightOnly(**options)


def test_tables_that_stay():
    with pytest.raises(ValueError, match=r"max_norm=1\.0 would rewrite rows on look-up"):
        pc.quantize(net(max_norm=1.0), EmbeddingWeightOnly())
    model = net()
    model[1] = nn.Linear(70, 50, bias=False)
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="tied to another layer's"):
        pc.quantize(model, EmbeddingWeightOnly())
    model = net()
    model[0].weight.data[2, 1] = float("nan")
    with pytest.raises(ValueError, match="weight of layer '0' must be finite"):
        pc.quantize(model, EmbeddingWeightOnly())


def test_only_the_layer_of_transformers_counts_as_transposed():
    class Conv1D(nn.Module):
        pass

    assert not is_transposed_linear(Conv1D()) and not is_transposed_linear(nn.Linear(2, 2))
