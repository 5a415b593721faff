"""``pycompress bench``: rows for the asked shapes and kernels, every one verified."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from typer.testing import CliRunner, Result

from pycompress.cli.app import app
from pycompress.ops import native


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "--seconds", "0.01", *arguments])


def test_rows_of_the_best_kernel() -> None:
    result = invoke("--shape", "3,17,5", "--shape", "1,64,33", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.output)
    assert [(r["m"], r["k"], r["n"]) for r in rows] == [(3, 17, 5), (1, 64, 33)]
    assert {r["kernel"] for r in rows} == {native.kernels("int8_matmul")[0]}
    assert all(0 < r["error"] < 0.05 and r["ms"] > 0 and r["ratio"] > 0 for r in rows)


def test_every_kernel_by_name() -> None:
    names = native.kernels("int8_matmul")
    result = invoke("--shape", "4,32,8", "--json", *(part for name in names for part in ("--kernel", name)))
    assert [r["kernel"] for r in json.loads(result.output)] == names


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    assert invoke("--shape", "2,8,8", "--threads", "1").exit_code == 0
    assert torch.get_num_threads() == before


def test_a_kernel_with_wrong_results_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("pycompress.ops.int8_linear")
    right = module.int8_linear_packed
    monkeypatch.setattr(module, "int8_linear_packed", lambda *a, **options: right(*a, **options) + 1)
    result = invoke("--shape", "2,8,8")
    assert isinstance(result.exception, AssertionError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "1,2"], "expected M,K,N"),
        (["--shape", "1,2,0"], "expected M,K,N"),
        (["--kernel", "mmx"], "kernel must be one of"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_errors(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
