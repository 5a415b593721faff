"""Weights that pruning cannot reach: notes, summaries and errors name them and say why."""

import pytest
import torch
from support.prunable import mlp
from torch import nn

from pycompress.nn.base import get_note
from pycompress.pruning import Pruner, prune

X = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1)


def test_query_key_and_value_of_multihead_attention_stay_dense_and_say_so():
    model = encoder()
    pruner = Pruner(model, X, pattern="2:4")
    pruner.step()
    last = str(pruner.summary()).splitlines()[-1]
    assert last.startswith(
        "not counted: 'layers.0.self_attn': the query, key and value weights of nn.MultiheadAttention belong to no layer"
    )
    model = pruner.convert()
    assert "stay dense, only out_proj can be pruned" in get_note(model.layers[0].self_attn)
    assert not (model.layers[0].self_attn.in_proj_weight == 0).any()


def test_no_note_where_the_layer_is_ignored_or_not_asked_for_or_given_up():
    for arguments in ({"pattern": "2:4", "ignore": ["*.self_attn"]}, {"ratio": {"*.linear1": 0.5}}):
        model = encoder()
        pruner = Pruner(model, X, **arguments)
        assert get_note(model.layers[0].self_attn) is None and pruner.summary().unseen == ()
    pruner = Pruner(model, X, pattern="2:4", ignore=["*.linear1"])
    assert get_note(model.layers[0].self_attn) is not None
    pruner.undo()
    assert get_note(model.layers[0].self_attn) is None


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_inputs_of_a_layer_that_is_never_called_cannot_be_seen(pattern):
    text = r"must see the inputs of every layer, got 'layers.0.self_attn.out_proj', whose weight nn.MultiheadAttention uses without calling"
    arguments = {"pattern": pattern, "criterion": "wanda", "data": [X], "ratio": 0.5}
    with pytest.raises(ValueError, match=text):
        prune(encoder(), X, **arguments)
    model = prune(encoder().eval(), X, ignore=["*.out_proj"], **arguments)
    assert model(X).shape == X.shape


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 12), kind(12, 16, batch_first=True), mlp(16, 10, 3)

    def forward(self, x):
        return self.last(self.inner(self.first(x).relu())[0][:, -1])


@pytest.mark.parametrize("ignore", [(), ("first", "inner")])
def test_channels_and_a_gru(ignore):
    with pytest.raises(RuntimeError, match="channels cannot be followed through 'inner': a GRU: take a mask pattern, or prune the parts"):
        Pruner(Recurrent(nn.GRU), torch.randn(2, 5, 6), pattern="channel", ratio=0.5, ignore=ignore)


def test_channels_around_an_lstm_and_a_simple_recurrent_layer():
    x = torch.randn(2, 5, 6)
    assert prune(Recurrent(nn.LSTM), x, pattern="channel", ratio=0.5).first.out_features == 6
    with pytest.raises(RuntimeError, match="the channels of 'first' have to stay: put them in ignore"):
        Pruner(Recurrent(nn.RNN), x, pattern="channel", ratio=0.5)
    assert prune(Recurrent(nn.RNN), x, pattern="channel", ratio=0.5, ignore=["first", "inner"]).last[0].out_features == 5


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_masks_leave_recurrent_weights(kind):
    model = Recurrent(kind)
    pruner = Pruner(model, torch.randn(2, 5, 6), ratio=0.5)
    assert get_note(model.inner) == f"the weights of nn.{kind.__name__} are not pruned" == pruner.summary().unseen[0][9:]
    with pytest.raises(ValueError, match=rf"got none; 'inner': the weights of nn.{kind.__name__} are not pruned"):
        Pruner(Recurrent(kind), torch.randn(2, 5, 6), ratio=0.5, ignore=["first", "last"])


def test_conv1d_of_gpt2():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 100, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(**sizes, tie_word_embeddings=False)
    tokens = {"input_ids": torch.randint(1, 90, (2, 12))}
    text = "'transformer.h.0.attn.c_attn', 'transformer.h.0.attn.c_proj' and 6 more: transformers' Conv1D"
    with pytest.raises(ValueError, match=f"got none; {text}"):
        Pruner(transformers.GPT2LMHeadModel(config), tokens, pattern="2:4", ignore=["lm_head"])
    pruner = Pruner(transformers.GPT2LMHeadModel(config), tokens, pattern="2:4")
    assert f"not counted: {text}" in str(pruner.summary())
    with pytest.raises(RuntimeError, match=r"channels cannot be followed through 'transformer.h.0.attn.c_attn', .* and 6 more: a Conv1D"):
        Pruner(transformers.GPT2LMHeadModel(config).eval(), tokens, pattern="channel", ratio=0.5)
