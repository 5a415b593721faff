"""The file format of checkpoints: what goes in comes out, what cannot is named."""

from __future__ import annotations

import pytest
import torch

from pycompress.distillation import load_state, save_state


def test_state_round_trip(tmp_path):
    from collections import Counter

    shared = torch.arange(6.0)
    state = {
        "tensors": [shared, shared[::2], shared.view(2, 3).T, torch.tensor(3), torch.zeros(0, 2)],
        "types": {k: torch.ones(3).to(k_type) for k, k_type in (("b", torch.bool), ("h", torch.bfloat16), ("i", torch.int8))},
        3: (1, 2.5, True, None, "text", float("inf")),
        "milestones": Counter([2, 2, 4]),
        "nested": [[], {}, ()],
    }
    save_state(state, tmp_path / "s.safetensors")
    loaded = load_state(tmp_path / "s.safetensors")
    assert loaded[3] == state[3] and loaded["milestones"] == state["milestones"] and isinstance(loaded["milestones"], Counter)
    assert loaded["nested"] == [[], {}, ()]
    for a, b in zip(loaded["tensors"], state["tensors"], strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    assert all(torch.equal(loaded["types"][k], v) and loaded["types"][k].dtype == v.dtype for k, v in state["types"].items())


def test_unstorable_values_are_named_and_leave_the_file(tmp_path):
    path = tmp_path / "s.safetensors"
    save_state({"a": 1}, path)
    with pytest.raises(TypeError, match=r"save_state: state\['b'\]\[0\] must be a tensor, number, string, list or dict, got function"):
        save_state({"b": [lambda: 0]}, path)
    with pytest.raises(TypeError, match=r"save_state: state\['s'\] must be a plain dense tensor, got Tensor"):
        save_state({"s": torch.zeros(2, 2).to_sparse()}, path)
    assert load_state(path) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_missing_file():
    with pytest.raises(FileNotFoundError):
        load_state("no_such_file.safetensors")
