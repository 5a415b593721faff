"""Tables and plots of benchmark rows; the harness's own arithmetic."""

import csv
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def row(harness, case, rival, speedup, cpu="Zen 4", date="2026-01-02", threads=1):
    values = dict.fromkeys(harness.FIELDS, "")
    values |= {"case": case, "rival": rival, "threads": str(threads), "ms": "1.5", "speedup": f"{speedup:.3f}", "cpu": cpu, "date": date}
    return values | {
        "speedup_q1": f"{speedup - (speedup != 1) * 0.1:.3f}",
        "speedup_q3": f"{speedup + (speedup != 1) * 0.1:.3f}",
        "versions": "torch 2",
    }


@pytest.fixture
def show(tmp_path, monkeypatch):
    module, harness = load("show"), load("harness")
    rows = [
        row(harness, "small", "torch", 1.0),
        row(harness, "small", "ours", 2.0),
        row(harness, "large", "torch", 1.0),
        row(harness, "large", "ours", 3.5),
        row(harness, "small", "ours", 9.0, cpu="older", date="2025-01-01"),
        row(harness, "small", "ours", 1.7, threads=2),
    ]
    with (tmp_path / "op.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, harness.FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def test_table(show, capsys):
    show.main(["table", "op"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "op, 1 thread, Zen 4",
        "",
        "| case | torch | ours |",
        "|---|---|---|",
        "| small | 1.00x | 2.00x |",
        "| large | 1.00x | 3.50x |",
        "",
    ]
    show.main(["table", "op", "--cpu", "older", "--column", "ms"])
    assert "| small | 1.5 |" in capsys.readouterr().out
    show.main(["table", "op", "--threads", "4"])
    assert capsys.readouterr().out == "op: no rows with 4 threads\n"


def test_plot_is_the_same_for_the_same_rows(show, tmp_path):
    pytest.importorskip("matplotlib")
    show.main(["plot", "op"])
    first = (tmp_path / "op.svg").read_bytes()
    assert b"times as fast as torch" in first or b"<svg" in first
    show.main(["plot", "op"])
    assert (tmp_path / "op.svg").read_bytes() == first


def test_every_row_in_the_repository_is_complete():
    harness = load("harness")
    for path in (FOLDER / "results").glob("*.csv"):
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                more = {"floor_fraction", "mode"} if path.name.startswith("gpu_") else set()  # benchmarks/gpu/timing.py
                assert set(line) == set(harness.FIELDS) | more, path.name
                assert float(line["ms"]) > 0 and float(line["speedup_q1"]) <= float(line["speedup"]) <= float(line["speedup_q3"])


def test_relative_error_and_peak_memory():
    harness = load("harness")
    assert harness.relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    with pytest.raises(ValueError, match=r"result has shape \(1,\), the float result \(2,\)"):
        harness.relative_error(torch.zeros(1), torch.zeros(2))
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from Linux's /proc")
    kept = []
    peak = harness._measure_peak(lambda: kept.append(torch.ones(16 << 20)))
    assert 60 < peak < 120
