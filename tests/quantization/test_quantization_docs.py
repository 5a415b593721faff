"""The example and every Python block of the documentation run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.quantizable import normal, seeded
from torch import nn

from pycompress.quantization import ALGORITHMS, CODEBOOKS, OBSERVERS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs" / "quantization.md"


def test_python_blocks_of_the_docs_run_in_order():
    convolutions = (nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
    images = normal(40, 1, 8, 8)
    names = {
        "torch": torch,
        "F": F,
        "model": seeded(nn.Sequential(*convolutions, nn.Flatten(), nn.Dropout(), nn.Linear(36, 10))),
        "images": images,
        "loader": list(zip(images.split(20), (torch.arange(40) % 10).split(20), strict=True)),
    }
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 7
    for block in blocks:
        exec(compile(block, str(DOCS), "exec"), names)
    assert names["small"](images).shape == (40, 10)


def test_docs_list_everything_that_is_registered():
    text = DOCS.read_text(encoding="utf-8")
    for name in (*OBSERVERS, *ALGORITHMS):
        assert f"| `{name}` |" in text, name
    assert len(CODEBOOKS) == 4


def test_example_runs_and_keeps_its_promises():
    pytest.importorskip("sklearn")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quantize.py")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    accuracy = {name: float(percent) for name, percent in re.findall(r"^(.+?) +([\d.]+)%$", run.stdout, re.MULTILINE)}
    exact = accuracy["float32"]
    assert exact > 97
    for name in ("int8, dynamic", "int8, static", "int8, static, percentile"):
        assert accuracy[name] >= exact - 0.5, name
    assert accuracy["2 bits, GPTQ + bias correction"] > accuracy["2 bits, rounded to nearest"] + 10
    assert accuracy["2 bits, trained"] > exact - 4
    assert accuracy["3 bits on average, mixed"] > exact - 6
    assert "most sensitive to 2 bits" in run.stdout
