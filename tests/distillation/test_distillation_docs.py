"""The example and every Python block of the documentation run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pycompress.distillation import LOSSES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "distillation.md"


def make_model(width: int) -> nn.Module:
    model = nn.Sequential()
    model.add_module("body", nn.Sequential(nn.Linear(64, width), nn.ReLU()))
    model.add_module("head", nn.Linear(width, 10))
    return model


def test_python_blocks_of_the_docs_run_in_order(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = TensorDataset(digits[0][:100], digits[1][:100])
    names = {
        "student": make_model(8),
        "other_student": make_model(8),
        "teacher": make_model(16),
        "other_teacher": make_model(16),
        "make_student": lambda generation: make_model(8),
        "dataset": dataset,
        "train_loader": DataLoader(dataset, batch_size=50, shuffle=True),
        "val_loader": DataLoader(dataset, batch_size=50),
        "student_logits": torch.randn(4, 10, requires_grad=True),
        "teacher_logits": torch.randn(4, 10),
    }
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 8
    for block in blocks:
        exec(compile(block, str(DOCS), "exec"), names)
    assert (tmp_path / "student.safetensors").exists()


def test_docs_list_every_loss():
    text = DOCS.read_text(encoding="utf-8")
    for name in LOSSES:
        assert f"| `{name}` | `{LOSSES[name].__name__}" in text


def test_example_runs_and_distillation_pays():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "distill.py"], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    rows = re.findall(r"^(.+?)\s+([\d,]+)\s+([\d.]+)%$", run.stdout, re.MULTILINE)
    accuracy = {name: float(percent) for name, _, percent in rows}
    parameters = {name: int(count.replace(",", "")) for name, count, _ in rows}
    teachers = [name for name in accuracy if name.startswith("teacher")]
    assert len(rows) == 5 and min(accuracy[name] for name in teachers) > 97
    assert accuracy["student, taught"] > accuracy["student, 100 labels"] + 4
    assert accuracy["student, taught"] > min(accuracy[name] for name in teachers) - 2.5
    assert sum(parameters[name] for name in teachers) >= 20 * parameters["student, taught"]
