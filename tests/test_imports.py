"""The house rules about imports: one direction, and cheap."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pycompress

ROOT = Path(pycompress.__file__).parent

# Part of the package -> the parts it may import (besides itself). docs/architecture.md draws it.
BASE = {"registry", "progress", "atomic"}
NN = BASE | {"ops", "nn"}
TECHNIQUE = NN | {"analysis"}
ALLOWED = {
    "registry": set(),
    "progress": set(),
    "atomic": set(),
    "ops": BASE | {"_C", "_C_cuda", "_build"},
    "nn": BASE | {"ops"},
    "analysis": NN,
    "io": NN,
    "quantization": TECHNIQUE,
    "pruning": TECHNIQUE,
    "distillation": TECHNIQUE,
    "nas": TECHNIQUE | {"quantization", "pruning", "distillation"},
    "pipeline": TECHNIQUE | {"quantization", "pruning", "distillation", "nas", "io"},
    "doctor": {"ops", "_build", ""},
    "cli": TECHNIQUE | {"quantization", "pruning", "distillation", "nas", "pipeline", "io", "doctor", ""},
    "__main__": {"cli"},
}
"""``""`` is the package itself, i.e. its lazy public face, which only the outermost parts go through."""


def part_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported_parts(path: Path) -> Iterator[tuple[int, str]]:
    """(line, part) of every import of this package in a file, those inside functions included."""
    package = ("pycompress", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            # `from .. import ops` names a part, `from .. import save` a public name of the package
            targets = [(*module, alias.name) for alias in node.names] if module == ("pycompress",) else [module]
        else:
            continue
        for target in targets:
            if target[0] == "pycompress":
                part = target[1] if len(target) > 1 else ""
                yield node.lineno, part if part in ALLOWED or part in ("_C", "_C_cuda", "_build") else ""


FILES = sorted(p for p in ROOT.rglob("*.py") if p not in (ROOT / "__init__.py", ROOT / "_build.py"))


def test_every_file_is_found() -> None:
    assert {part_of(f) for f in FILES} >= {"ops", "nn", "analysis", "io", "quantization", "pruning", "distillation", "cli"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in ALLOWED, f"{path}: say in ALLOWED what the new part {part!r} may import"
    wrong = [
        f"line {line}: {part} imports {other or 'the public face'}"
        for line, other in imported_parts(path)
        if other not in ALLOWED[part] | {part}
    ]
    assert not wrong, f"{path}: {wrong}"


def test_the_checker_sees_a_wrong_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    bad = tmp_path / "ops" / "bad.py"
    bad.parent.mkdir()
    bad.write_text(
        "from ..nn.base import LAYERS\ndef f():\n    from .. import pruning\n    from .. import save\n    import pycompress.io.save\n"
    )
    assert list(imported_parts(bad)) == [(1, "nn"), (3, "pruning"), (4, ""), (5, "io")]


def run_python(code: str) -> dict:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return json.loads(result.stdout)


HEAVY = (
    "matplotlib",
    "sklearn",
    "scipy",
    "rich",
    "typer",
    "pandas",
    "optuna",
    "onnx",
    "onnxruntime",
    "torch_pruning",
    "tqdm",
    "hypothesis",
)


def test_importing_the_package_loads_nothing() -> None:
    code = f"import sys, json, pycompress; print(json.dumps([m for m in sys.modules if m.split('.')[0] in {('torch', 'numpy', *HEAVY)!r}]))"
    assert run_python(code) == []


def test_the_public_names_load_no_heavy_library_of_their_own() -> None:
    """Everything public is touched; what torch brings along by itself does not count."""
    code = f"""
import sys, json, torch
before = set(sys.modules)
import pycompress
for name in pycompress.__all__: getattr(pycompress, name)
for name in pycompress._PACKAGES: getattr(pycompress, name)
print(json.dumps(sorted({{m.split('.')[0] for m in set(sys.modules) - before}} & set({HEAVY!r}))))
"""
    assert run_python(code) == []


def test_import_adds_less_than_half_a_second_to_torch() -> None:
    """CPU time of the process, not the clock; it takes a few milliseconds, so this holds on a busy machine too."""
    code = "import json, time, torch; t = time.process_time(); import pycompress; print(json.dumps(time.process_time() - t))"
    assert run_python(code) < 0.5


def test_the_public_face_says_the_same_three_times() -> None:
    """``__all__``, the table behind ``__getattr__``, and the imports that type checkers read."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    names = {name: module for name, module in typed.items() if module}
    packages = {name for name, module in typed.items() if not module}
    assert names == pycompress._PUBLIC
    assert packages == set(pycompress._PACKAGES)
    assert sorted(names) == sorted(pycompress.__all__)


@pytest.mark.parametrize("name", sorted([*pycompress._PUBLIC, *pycompress._PACKAGES]))
def test_public_name_exists_where_the_table_says(name: str) -> None:
    value = getattr(pycompress, name)
    assert name in dir(pycompress)
    if name in pycompress._PUBLIC:
        package = getattr(pycompress, pycompress._PUBLIC[name])
        assert getattr(package, name) is value
        assert name in package.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'pycompress' has no attribute 'quantise'"):
        pycompress.quantise  # noqa: B018
