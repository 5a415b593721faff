"""From the sources to an installation: sdist, wheel, editable, and pure Python where no extension can be built.

One wheel is built the way `pip install .` does it, in an isolated environment without torch; the others use the build
tools of this environment, to save time.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command with none of our switches in its environment but the given ones."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYCOMPRESS_") and name != "PYTHONPATH"}
    result = subprocess.run([str(c) for c in command], cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, check=False)
    if check:
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def unpacked(sdist: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    (folder,) = (p for p in sdist.parent.iterdir() if p.is_dir())
    return folder


@pytest.fixture(scope="module")
def native_wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Out of the sdist, isolated: the build environment holds what pyproject.toml asks for and nothing else, so no torch."""
    return build_wheel(unpacked, tmp_path_factory.mktemp("native"), isolated=True, PYCOMPRESS_NATIVE="1")


def build_wheel(source: Path, folder: Path, *, isolated: bool = False, **environment: str) -> Path:
    options = () if isolated else ("--no-build-isolation",)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", *options, "--wheel-dir", folder, source, cwd=folder, **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


class Environment:
    """A virtual environment that sees torch and the rest of this one's packages, but no pycompress of this one."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False)
        self.folder = folder
        self.python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        site = run(self.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
        # A path in a .pth file is not searched for .pth files in turn, so an editable pycompress there has no effect here.
        ours = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (Path(site) / "parent.pth").write_text("\n".join(ours))

    def install(self, *what: str | Path, **environment: str) -> None:
        pip = (sys.executable, "-m", "pip", "--python", self.python, "install", "--no-deps", "--no-build-isolation")
        run(*pip, *what, cwd=self.folder, **environment)

    def doctor(self) -> dict:
        return json.loads(run(self.python, "-m", "pycompress", "doctor", "--json", cwd=self.folder).stdout)

    def evaluate(self, expression: str) -> str:
        code = f"import torch, pycompress as pc; from pycompress import ops; print({expression})"
        return run(self.python, "-c", code, cwd=self.folder).stdout.strip()


ADDS_UP = "int(ops.int8_matmul(torch.full((3, 70), -128, dtype=torch.int8), torch.full((5, 70), -128, dtype=torch.int8)).sum())"
SUM = 3 * 5 * 70 * 128 * 128


def python_files(names: list[str]) -> set[str]:
    return {name for name in names if name.endswith(".py")}


def sources() -> set[str]:
    return {p.relative_to(ROOT).as_posix() for p in (ROOT / "pycompress").rglob("*.py")}


def test_sdist_has_all_sources_and_nothing_built(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames() if "/" in name]
    assert {"CMakeLists.txt", "pyproject.toml", "LICENSE", "README.md", "csrc/bindings/module.cpp", "tests/test_imports.py"} <= set(names)
    assert python_files([n for n in names if n.startswith("pycompress/")]) == sources()
    assert {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.[ch]*") if p.is_file()} <= set(names)
    unwanted = [n for n in names if re.search(r"\.(so|pyd|whl|pyc|o)$|^(\.ci|\.venv|build|dist|demo_out)/", n)]
    assert not unwanted


def test_native_wheel_holds_the_package_and_the_extension_only(native_wheel: Path) -> None:
    names = zipfile.ZipFile(native_wheel).namelist()
    compiled = [n for n in names if n.endswith((".so", ".pyd", ".dylib", ".a", ".lib"))]
    assert len(compiled) == 1 and re.fullmatch(r"pycompress/_C\.[^/]*\.(so|pyd)", compiled[0])
    assert python_files(names) == {*sources(), "pycompress/_build.py"}
    assert {n.split("/")[0] for n in names} == {"pycompress", next(n.split("/")[0] for n in names if ".dist-info/" in n)}
    assert "none-any" not in native_wheel.name


def test_native_wheel_runs(native_wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    environment.install(native_wheel)
    facts = environment.doctor()
    assert facts["native"]["loaded"]
    assert Path(facts["native"]["file"]).is_relative_to(environment.folder)
    assert facts["pycompress"]["build"] == {"native": True, "reason": None}
    assert facts["kernels"]["int8_matmul"]["kernels"][0] != "reference"
    assert environment.evaluate(ADDS_UP) == str(SUM)
    assert environment.evaluate("pc.__version__") == native_wheel.name.split("-")[1]


@pytest.mark.parametrize(
    ("switches", "reason"),
    [
        ({"PYCOMPRESS_NATIVE": "0"}, "PYCOMPRESS_NATIVE=0"),
        ({"CXX": "/nonexistent/c++"}, "the C++ build failed at install time"),
    ],
)
def test_without_the_extension_the_package_works_and_says_why(
    unpacked: Path, tmp_path: Path, switches: dict[str, str], reason: str
) -> None:
    wheel = build_wheel(unpacked, tmp_path, **switches)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert python_files(zipfile.ZipFile(wheel).namelist()) == {*sources(), "pycompress/_build.py"}
    environment = Environment(tmp_path / "venv")
    environment.install(wheel)
    facts = environment.doctor()
    assert facts["native"]["loaded"] is False
    assert reason in facts["native"]["reason"]
    assert facts["kernels"]["int8_matmul"]["kernels"] == ["reference"]
    assert environment.evaluate(ADDS_UP) == str(SUM)


def test_a_required_extension_that_does_not_build_is_an_error(unpacked: Path, tmp_path: Path) -> None:
    command = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, unpacked)
    result = run(*command, cwd=tmp_path, check=False, PYCOMPRESS_NATIVE="1", CXX="/nonexistent/c++")
    assert result.returncode != 0
    assert "/nonexistent/c++" in result.stdout + result.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_editable_install_sees_changes_and_new_files(unpacked: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    environment.install("--editable", unpacked, PYCOMPRESS_NATIVE="1")
    facts = environment.doctor()
    assert facts["native"]["loaded"]
    assert Path(facts["pycompress"]["path"]) == unpacked / "pycompress"
    new = unpacked / "pycompress" / "brand_new.py"
    try:
        new.write_text("ANSWER = 42\n")
        assert environment.evaluate("__import__('pycompress.brand_new').brand_new.ANSWER") == "42"
    finally:
        new.unlink()
