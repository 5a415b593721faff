"""The Python blocks of docs/checkpoints.md and docs/int4.md run as a reader would paste them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from pycompress.nn import Int4Linear

DOCS = Path(__file__).parents[2] / "docs"


class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(200, 64), nn.ReLU(), nn.Linear(64, 10))


def run(page, names):
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names


def test_int4():
    model = Net().eval()
    names = run("int4.md", {"model": model})
    assert isinstance(names["small"][0], Int4Linear) and names["model"] is model


def test_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    model, x = Net().eval(), torch.randn(2, 200)
    names = run("checkpoints.md", {"model": model, "Net": Net})
    assert names["model"] is not model and torch.equal(names["model"](x), model(x))
