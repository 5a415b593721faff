"""``pycompress demo`` in a few seconds: fewer epochs, the same steps. `.ci/run` runs the full one with its bars."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import pycompress as pc
from pycompress.cli.app import app
from pycompress.cli.demo import data, models, steps, table
from pycompress.nn import Int8Conv2d, Int8Linear

QUICK = steps.Settings(seed=3, teachers=2, teacher_epochs=3, student_epochs=6, finetune_epochs=4, seconds_per_timing=0.02)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[steps.Results, Path, list[str]]:
    out, said = tmp_path_factory.mktemp("demo") / "new" / "folder", []
    found = steps.run(QUICK, out, said.append)
    table.write(found, out)
    return found, out, said


def test_split_is_disjoint_fixed_by_seed_and_balanced() -> None:
    digits, again, other = data.load_digits(0), data.load_digits(0), data.load_digits(1)
    parts = (digits.train, digits.validation, digits.held_out)
    assert [len(part.labels) for part in parts] == [1000, data.VALIDATION, data.HELD_OUT]
    images = [tuple(image.flatten().tolist()) for part in parts for image in part.images]
    assert len(set(images)) == len(images) == 1797  # no image is in two parts
    assert torch.equal(digits.held_out.images, again.held_out.images)
    assert not torch.equal(digits.held_out.images, other.held_out.images)
    assert all(abs(part.labels.bincount(minlength=10) / len(part.labels) - 0.1).max() < 0.02 for part in parts)
    assert digits.train.images.min() >= 0 and digits.train.images.max() == 1


def test_shifted_batches_move_each_image_by_at_most_one_pixel() -> None:
    image = torch.zeros(5, 1, 8, 8)
    image[:, 0, 3, 4] = 1
    split = data.Split(image, torch.arange(5))
    batches = list(data.Shifted(split, 2, seed=0))
    assert [len(labels) for _, labels in batches] == [2, 2]  # the odd one out is dropped
    places = {tuple(x.nonzero()[0].tolist()[1:]) for _ in range(30) for batch, _ in data.Shifted(split, 5, seed=_) for x in batch}
    assert places == {(row, column) for row in (2, 3, 4) for column in (3, 4, 5)}


def test_student_is_twenty_times_smaller_than_three_teachers() -> None:
    def params(model: torch.nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    assert 3 * params(models.teacher()) >= 20 * params(models.student())


def test_every_row_is_measured(results: tuple[steps.Results, Path, list[str]]) -> None:
    rows = results[0].rows
    assert list(rows) == ["ensemble", "alone", "distilled", "pruned", "int8"]
    for row in rows.values():
        assert 0.5 < row.accuracy <= 1 and row.wrong == round((1 - row.accuracy) * data.HELD_OUT)
        assert set(row.latency) == {1, 256} and all(ms > 0 for ms in row.latency.values())
    assert rows["pruned"].params < 0.4 * rows["distilled"].params
    assert rows["pruned"].macs < 0.4 * rows["distilled"].macs
    assert rows["int8"].file_bytes < rows["pruned"].file_bytes < rows["distilled"].file_bytes < rows["ensemble"].file_bytes


def test_the_int8_file_holds_int8_layers(results: tuple[steps.Results, Path, list[str]]) -> None:
    _, out, _ = results
    model = pc.load(out / "int8.safetensors", models.student())
    kinds = [type(layer) for layer in model.modules() if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear, Int8Conv2d, Int8Linear))]
    assert kinds == [Int8Conv2d] * 5 + [Int8Linear]


def test_same_seed_same_table(results: tuple[steps.Results, Path, list[str]], tmp_path: Path) -> None:
    again = steps.run(QUICK, tmp_path, lambda line: None)
    for key, row in results[0].rows.items():
        twin = again.rows[key]
        assert (twin.accuracy, twin.params, twin.file_bytes, twin.macs) == (row.accuracy, row.params, row.file_bytes, row.macs)
        assert (tmp_path / f"{key}.safetensors").read_bytes() == (results[1] / f"{key}.safetensors").read_bytes()


def test_files(results: tuple[steps.Results, Path, list[str]]) -> None:
    found, out, _ = results
    written = json.loads((out / "table.json").read_text())
    assert [row["parameters"] for row in written["rows"]] == [row.params for row in found.rows.values()]
    page = (out / "report.html").read_text()
    assert "student, distilled" in page and "<svg" in page


def test_a_changed_weight_is_noticed() -> None:
    digits = data.load_digits(0)
    model = steps.seeded(models.student, 0)
    twin = steps.seeded(models.student, 0)
    steps.check_identical(model, twin, digits.held_out)
    with torch.no_grad():
        twin[-1].bias[3] += 1e-6
    with pytest.raises(RuntimeError, match="must give the outputs of the saved one"):
        steps.check_identical(model, twin, digits.held_out)


def test_missed_bars_and_slower_steps_are_said(results: tuple[steps.Results, Path, list[str]]) -> None:
    found, _, _ = results
    rows = dict(found.rows)
    rows["int8"] = dataclasses.replace(rows["int8"], accuracy=rows["pruned"].accuracy - 0.006, latency={1: 1e3, 256: 1e3})
    bad = dataclasses.replace(found, rows=rows)
    assert [bar.met for bar in bad.bars()][-1] is False
    notes = "\n".join(table.notes(bad))
    assert "MISSED  int8 model is 0.60 points below its float model" in notes
    assert notes.count("Not faster: '+ int8' takes 1e+03 ms at batch") == 2
    good = dataclasses.replace(found, rows={**rows, "int8": dataclasses.replace(rows["int8"], latency={1: 1e-9, 256: 1e-9})})
    assert "Not faster: '+ int8'" not in "\n".join(table.notes(good))


@pytest.mark.parametrize(("arguments", "code"), [((), 0), (("--check",), 1)])
def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, results, arguments: tuple[str, ...], code: int) -> None:
    found, _, _ = results
    rows = {**found.rows, "distilled": dataclasses.replace(found.rows["distilled"], accuracy=0.1)}
    monkeypatch.setattr(steps, "run", lambda settings, out, say: out.mkdir() or dataclasses.replace(found, rows=rows))
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == code, result.output
    assert "student, distilled" in result.output and "MISSED" in result.output
    assert (tmp_path / "out" / "report.html").exists()
