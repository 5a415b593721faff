"""The rows that GPU benchmarks write, and the benchmarks themselves as far as no GPU is needed."""

from __future__ import annotations

import ast
import csv
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def timing(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    for name in ("timing", "harness"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import timing

    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(timing, "peak_megabytes", lambda step: 12.5)
    monkeypatch.setattr(timing, "event_times", lambda step, repeats=30: (step(), "graph"))
    yield timing
    for name in ("timing", "harness"):
        sys.modules.pop(name, None)


def test_a_row(timing, tmp_path):
    slow, fast = [2.0, 2.2, 1.8, 2.0], [0.5, 0.55, 0.45, 0.5]
    timing.row("linear", "16x64x64", "torch bf16", lambda: slow, 0.25, 0.0, True)
    timing.row("linear", "16x64x64", "pycompress", lambda: fast, 0.25, 0.01, True)
    timing.row("linear", "1x64x64", "torch bf16", lambda: fast, 0.1, float("nan"), True)
    timing.row("linear", "16x64x64", "unwritten", lambda: fast, 0.1, 0.0, False)
    with (tmp_path / "gpu_linear.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["case"], r["rival"], r["speedup"]) for r in rows] == [
        ("16x64x64", "torch bf16", "1.000"), ("16x64x64", "pycompress", "4.000"), ("1x64x64", "torch bf16", "1.000"),
    ]  # fmt: skip
    assert all(set(r) == set(timing.FIELDS) and r["cpu"] == "NVIDIA H200" and r["isa"] == "sm_90" for r in rows)
    assert rows[0]["speedup_q1"] == rows[0]["speedup_q3"] == "1.000" and rows[1]["floor_fraction"] == "0.500"
    assert float(rows[1]["speedup_q1"]) < 4 < float(rows[1]["speedup_q3"]) and rows[1]["mode"] == "graph" and rows[1]["peak_mb"] == "12.5"
    assert rows[2]["error"] == "" and f"torch {torch.__version__}" in rows[2]["versions"]


def test_a_second_run_replaces_its_rows_only(timing, tmp_path):
    for ms in (3.0, 2.0):
        timing._baseline.clear()
        timing.row("linear", "a", "torch bf16", lambda: [ms] * 4, 1.0, 0.0, True)  # noqa: B023
    timing.row("linear", "b", "torch bf16", lambda: [1.0] * 4, 1.0, 0.0, True)
    with (tmp_path / "gpu_linear.csv").open(newline="") as file:
        assert [(r["case"], r["ms"]) for r in csv.DictReader(file)] == [("a", "2"), ("b", "1")]


def test_show_makes_a_table_of_them(timing, tmp_path, monkeypatch, capsys):
    timing.row("linear", "a", "torch bf16", lambda: [3.0] * 4, 1.0, 0.0, True)
    timing.row("linear", "a", "pycompress", lambda: [1.0] * 4, 1.0, 0.0, True)
    import show

    monkeypatch.setattr(show, "RESULTS", tmp_path)
    show.main(["table", "gpu_linear"])
    assert "| a | 1.00x | 3.00x |" in capsys.readouterr().out


def test_rivals_that_cannot_run_say_why(timing, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def missing():
        raise ImportError("No module named 'torchao'\nmore")

    assert timing.try_rival("torchao", missing) is None
    assert capsys.readouterr().out == "torchao: not run: No module named 'torchao'\n"
    step = timing.try_rival("works", lambda: lambda: 3)
    assert step is not None and step() == 3


@pytest.mark.parametrize("path", sorted(FOLDER.glob("bench_*.py")), ids=lambda p: p.stem)
def test_scripts_have_a_baseline_first_and_need_a_gpu(path):
    """They parse, print what they need instead of failing, and write through ``timing.row``."""
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    text = path.read_text()
    assert "needs a CUDA device" in text and "row(" in text and '"--write"' in text


WORK = {
    "bench_int8_linear": ("torch bf16", "torch._int_mm", "torchao int8", "pycompress int8"),
    "bench_weight_only": ("torch bf16", "torchao {kind}", "pycompress {name}", "int4, int8 activations"),
    "bench_sparse24": ("torch bf16", "cuSPARSELt", "CUTLASS", "pycompress 2:4 bf16", "pycompress 2:4 int8", "pycompress int8"),
    "bench_sparse24_conv2d": ("torch bf16", "pycompress 2:4 bf16", "pycompress 2:4 int8"),
    "bench_kd_loss": ("torch eager", "torch.compile", "Liger-Kernel", "pycompress", "linear_kd_loss", "Liger fused linear JSD"),
}
"""Script -> names of rows that the work list for GPUs asks for: each op against its rivals."""


@pytest.mark.parametrize("script", list(WORK))
def test_every_asked_for_row_has_a_script(script):
    text = (FOLDER / f"{script}.py").read_text()
    assert all(name in text for name in WORK[script])
