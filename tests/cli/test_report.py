"""``pycompress report``: models by name and from files, and errors that a shell user can act on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import pycompress as pc
from pycompress.cli.app import app
from pycompress.cli.model import make_inputs


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working folder, as a user has one."""
    name = f"net_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        "from torch import nn\n"
        "def make():\n    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))\n"
        "number = 3\n"
        "def broken():\n    return number\n"
        "def raises():\n    raise RuntimeError('no weights here\\nand a second line')\n"
        "def needs(width):\n    return nn.Linear(width, 2)\n"
        "def tokens():\n    return nn.Embedding(10, 4)\n"
    )
    (tmp_path / f"{name}_broken.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["report", *arguments])


def test_a_factory(net: str) -> None:
    result = invoke(f"{net}:make", "-i", "2,6", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.output)
    assert facts["params"] == 6 * 5 + 5 + 5 * 3 + 3
    assert facts["macs"] == 2 * (6 * 5 + 5 * 3)
    assert facts["latency"] is not None


def test_without_measuring(net: str) -> None:
    result = invoke(f"{net}:make", "-i", "2,6", "--no-measure", "--json")
    assert json.loads(result.output)["latency"] is None


def test_a_saved_model_and_its_page(net: str, tmp_path: Path) -> None:
    model = pc.quantize(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), pc.Int8Dynamic())
    pc.save(model, tmp_path / "small.safetensors")
    result = invoke("small.safetensors", "--skeleton", f"{net}:make", "-i", "2,6", "--html", "page.html")
    assert result.exit_code == 0, result.output
    assert "int8" in result.output
    assert "int8" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{net}:nothing", "-i", "2,6"], "has no attribute 'nothing'"),
        (["no_such_module_here:f", "-i", "2,6"], "No module named"),
        (["{net}:broken", "-i", "2,6"], "torch.nn.Module, got int"),
        (["nothing.safetensors", "-i", "2,6"], "expected an existing file or module:factory"),
        (["{net}:raises", "-i", "2,6"], "calling '{net}:raises' raised RuntimeError: no weights here"),
        (["{net}:needs", "-i", "2,6"], "raised TypeError: needs() missing 1 required positional argument: 'width'"),
        (["{net}_broken:make", "-i", "2,6"], "importing '{net}_broken:make' raised ZeroDivisionError: division by zero"),
        (["{net}:make", "-i", "2,7"], "the model does not run on --input 2,7: RuntimeError: mat1 and mat2 shapes"),
        (["{net}:make", "-i", "2,6", "-i", "3"], "the model does not run on --input 2,6 3: TypeError"),
        (["{net}:tokens", "-i", "ids:2,3:100"], "the model does not run on --input ids:2,3:100: IndexError: index out of range"),
        (["{net}:make", "-i", "2,6", "--html", "missing/x.html"], "--html missing/x.html: there is no folder missing"),
        (["{net}:make", "-i", "2,6", "--html", "."], "--html must be a file, . is a folder"),
        (["{net}:make", "-i", "2,x"], "expected a shape"),
        (["{net}:make", "-i", "0,6"], "expected a shape"),
        (["{net}:make", "--skeleton", "{net}:make", "-i", "2,6"], "--skeleton goes with a saved file"),
        (["{net}.py", "-i", "2,6"], "give the architecture with --skeleton"),
        (["{net}.py", "--skeleton", "{net}:make", "-i", "2,6"], "{net}.py"),
    ],
)
def test_errors_say_what_to_change(net: str, arguments: list[str], message: str) -> None:
    result = invoke(*(a.format(net=net) for a in arguments))
    assert result.exit_code == 2
    plain = " ".join(result.output.replace("│", " ").split())
    assert message.format(net=net) in plain


def test_a_page_that_cannot_be_written_is_refused_before_the_model_is_made(net: str) -> None:
    result = invoke(f"{net}:raises", "-i", "2,6", "--html", "missing/x.html")
    assert result.exit_code == 2 and "there is no folder missing" in " ".join(result.output.split())


def test_inputs() -> None:
    image, ids = make_inputs(["2,3,5", "ids:2,7:11"], seed=4)
    assert image.shape == (2, 3, 5) and image.dtype == torch.float32
    assert ids.shape == (2, 7) and ids.dtype == torch.int64 and 0 <= int(ids.min()) <= int(ids.max()) < 11
    assert torch.equal(image, make_inputs(["2,3,5"], seed=4)[0])
    assert not torch.equal(image, make_inputs(["2,3,5"], seed=5)[0])
