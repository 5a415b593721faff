"""The README's Python blocks run, one after the other, as a reader would paste them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).flatten(1))


def test_readme_examples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    loader = [(torch.randn(8, 1, 8, 8), torch.randint(10, (8,))) for _ in range(4)]
    names = {
        "torch": torch,
        "model": Net(16).eval(),
        "teacher": Net(24),
        "teacher2": Net(20),
        "student": Net(8),
        "train_loader": loader,
        "val_loader": loader[:1],
        "x": loader[0][0],
        "make_model": lambda: Net(16),
    }
    assert len(BLOCKS) == 6
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert "int8" in capsys.readouterr().out
    assert {"report.html", "small.safetensors", "student.ckpt.safetensors"} <= {p.name for p in tmp_path.iterdir()}
    assert names["model"].body[0].weight.shape[0] == 8  # half of the channels are gone


def test_readme_links_exist() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    for link in links:
        assert (Path(__file__).parents[1] / link).exists(), link
