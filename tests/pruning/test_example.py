"""The example in the documentation runs and shows what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_example_runs():
    pytest.importorskip("sklearn")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "prune.py")], capture_output=True, text=True, env=environment, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = {
        m[1].strip(): (float(m[2]), int(m[3].replace(",", "")), float(m[4]))
        for m in re.finditer(r"^(.+?) +([\d.]+)% +([\d,]+) +([\d.]+)%$", done.stdout, re.M)
    }
    dense = rows["dense"]
    assert dense[0] > 95
    for name in ("90% unstructured, gradual", "2:4, wanda", "half the channels, fine-tuned"):
        assert rows[name][0] > dense[0] - 2, name
    assert rows["90% unstructured, gradual"][2] > 85
    assert rows["half the channels, fine-tuned"][1] < 0.3 * dense[1]
    assert rows["half the channels, BatchNorm repaired"][0] > rows["half the channels, not repaired"][0]
