"""``pycompress doctor`` and what it must still do when the installation is partial or the environment contradictory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pycompress
from pycompress import doctor
from pycompress.cli import main
from pycompress.ops import native

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings the same under its old name
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYCOMPRESS_")}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env={**clean, **environment}, cwd=ROOT, check=False)


def test_facts_are_those_of_this_process() -> None:
    facts = doctor.facts()
    assert facts["torch"]["version"] == torch.__version__
    assert facts["threads"]["torch"] == torch.get_num_threads()
    assert facts["native"]["loaded"] is (native.module is not None)
    assert facts["kernels"]["int8_matmul"]["kernels"] == native.kernels("int8_matmul")
    if native.module is not None:
        assert facts["native"]["isa_available"][0] == "scalar"
        assert facts["native"]["isa_forced"] == (os.environ.get("PYCOMPRESS_ISA") or None)


def test_every_op_with_a_reference_is_listed() -> None:
    from pycompress import ops

    assert set(doctor.facts()["kernels"]) == {name.removesuffix("_reference") for name in ops.__all__ if name.endswith("_reference")}


def test_text_names_the_first_kernel_and_the_reason_of_a_fallback() -> None:
    text = doctor.render()
    assert re.search(rf"^  int8_matmul +{', '.join(native.kernels('int8_matmul'))}", text, re.MULTILINE)
    if native.module is None:
        assert f"NOT LOADED: {native.missing_reason}" in text
    else:
        assert native.module.__file__ in text


def test_kernels_that_no_cpu_has_run_are_named() -> None:
    facts = doctor.facts()
    facts["kernels"] = {"int8_matmul": {"kernels": ["neon_i8mm", "neon", "scalar"], "fallback_reason": None}}
    assert "  neon, neon_i8mm: tested under an emulator, not yet run on an ARM CPU\n" in doctor.as_text(facts)
    facts["kernels"]["int8_matmul"]["kernels"] = ["avx2", "scalar"]
    assert "not yet run on an ARM CPU" not in doctor.as_text(facts)


def test_cuda_kernels_are_listed_with_what_they_have_been_through(monkeypatch):
    from pycompress.ops.cuda import extension

    monkeypatch.setattr(extension, "module", None)
    monkeypatch.setattr(extension, "missing_reason", "no such module")
    assert "CUDA kernels" in doctor.render() and "not loaded: no such module" in doctor.render()
    monkeypatch.setattr(extension, "module", object())
    monkeypatch.setattr(doctor, "_gpus", lambda: ["H9000"])
    monkeypatch.setattr(extension, "unsupported", lambda index: None)
    assert "int8_linear" in doctor.render() and "not yet run on a GPU); H9000: runs" in doctor.render()
    monkeypatch.setattr(extension, "unsupported", lambda index: "compute capability 7.5")
    assert "H9000: compute capability 7.5" in doctor.render()


def test_extras_are_those_of_the_package_metadata() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> tuple[str, ...]:
        plain = [r for r in requirements if not r.startswith("pycompress[")]
        return tuple(r.split(">")[0].split("=")[0].strip() for r in plain)

    extras = {k: names(v) for k, v in pyproject["optional-dependencies"].items() if k not in ("test", "lint", "dev")}
    assert extras == doctor.EXTRAS
    assert set(names(pyproject["dependencies"])) == {"torch", *doctor.CORE}


def test_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--json"])
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out)["pycompress"]["path"] == str(Path(doctor.__file__).parent)


def test_python_dash_m_is_the_doctor_and_says_that_native_is_off() -> None:
    result = run("-m", "pycompress", PYCOMPRESS_DISABLE_NATIVE="1")
    assert result.returncode == 0, result.stderr
    assert "NOT LOADED: switched off by PYCOMPRESS_DISABLE_NATIVE=1" in result.stdout


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PYCOMPRESS_DISABLE_NATIVE": "1", "PYCOMPRESS_REQUIRE_NATIVE": "1"}, "contradicts"),
        ({"PYCOMPRESS_ISA": "mmx"}, "mmx"),
    ],
)
def test_switches_that_stop_the_library_do_not_stop_the_doctor(environment: dict[str, str], reason: str) -> None:
    result = run("-m", "pycompress", "doctor", **environment)
    assert result.returncode == 0, result.stderr
    assert "NOT LOADED: pycompress.ops does not import" in result.stdout
    assert reason in result.stdout


WITHOUT_TYPER = "import sys; sys.modules['typer'] = None; from pycompress.cli import main; main(sys.argv[1:])"


def test_doctor_works_without_typer() -> None:
    result = run("-c", WITHOUT_TYPER, "doctor", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["torch"]["version"] == torch.__version__


@pytest.mark.parametrize("start", [("-m", "pycompress"), ("-c", WITHOUT_TYPER)])
def test_version_with_and_without_typer(start: tuple[str, ...]) -> None:
    result = run(*start, "--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"pycompress {pycompress.__version__}\n", "")


@pytest.mark.parametrize("arguments", [("demo",), (), ("doctor", "--what")])
def test_other_commands_name_the_missing_extra(arguments: tuple[str, ...]) -> None:
    result = run("-c", WITHOUT_TYPER, *arguments)
    assert result.returncode == 1
    assert "pip install 'pycompress[cli]'" in result.stderr
