"""Every Python block of docs/kd_loss.md runs, and the page names every option."""

import inspect
import re
from pathlib import Path

import torch

from pycompress.ops import kd_loss, linear_kd_loss
from pycompress.ops.kd_loss_options import DIVERGENCES, REDUCTIONS

DOCS = Path(__file__).resolve().parents[2] / "docs" / "kd_loss.md"
TEXT = DOCS.read_text(encoding="utf-8")


def test_python_blocks_run_in_order():
    names = {
        "torch": torch,
        "student_logits": torch.randn(6, 10, requires_grad=True),
        "teacher_logits": torch.randn(6, 10),
        "labels": torch.randint(10, (6,)),
        "hidden": torch.randn(6, 4, requires_grad=True),
        "head": torch.randn(10, 4, requires_grad=True),
        "teacher_hidden": torch.randn(6, 5),
        "teacher_head": torch.randn(10, 5),
    }
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 7
    for block in blocks:
        exec(compile(block, str(DOCS), "exec"), names)
    assert names["head"].grad is not None and names["student_logits"].grad is not None


def test_every_option_is_explained():
    options = {*inspect.signature(kd_loss).parameters, *inspect.signature(linear_kd_loss).parameters}
    for name in {*options, *DIVERGENCES} - {"student_bias", "teacher_bias", "label_smoothing", "student_head", "student_hidden"}:
        assert name in TEXT, name
    for name in set(REDUCTIONS) - {"none", "sum"}:
        assert f"| `{name}` |" in TEXT
