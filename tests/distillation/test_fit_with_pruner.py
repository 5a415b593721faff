"""A pruner at work inside fit: its masks are never undone, and its smaller layers never train unnoticed by the optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from pycompress import Pruner
from pycompress.distillation import Distiller


def falling(epochs: list[int]):
    """A metric that is best in the first epoch, as a dense student usually is. Appends to ``epochs`` when it is asked."""

    def metric(logits, labels):
        epochs.append(1)
        return 1.0 / len(epochs)

    return metric


def batches_of(digits, rows: int = 192):
    return list(zip(digits[0][:rows].split(64), digits[1][:rows].split(64), strict=True))


def zeros(student: nn.Module) -> float:
    weights = torch.cat([student.first.weight.flatten(), student.head.weight.flatten()])
    return (weights == 0).float().mean().item()


def fit(student, teacher, digits, epochs, **options):
    validation = [(digits[2][:100], digits[3][:100])]
    return Distiller(student, teacher).fit(batches_of(digits), epochs, val_loader=validation, progress=False, metric=falling([]), **options)


@pytest.mark.parametrize("training", ["masked", "sr-ste"])
def test_the_best_epoch_is_one_of_the_final_sparsity(tmp_path, mlp, digits, teacher, training):
    student = mlp(16)
    pruner = Pruner(student, digits[0][:2], ratio=0.9, steps=3, frequency=3, training=training, ignore=["norm"])
    states = []
    history = fit(
        student, teacher, digits, 5, on_step=lambda _: pruner.step(), on_epoch=lambda _: states.append(copy.deepcopy(student.state_dict())),
        checkpoint=tmp_path / "run.safetensors",
    )  # fmt: skip
    masked = [record.masked for record in history.epochs]
    assert masked[0] < masked[1] < masked[2] == masked[3] == masked[4] == history.masked
    assert history.best.epoch == 3
    assert all(torch.equal(value, states[2][key]) for key, value in student.state_dict().items())
    assert zeros(pruner.convert()) == pytest.approx(0.9, abs=1e-3)

    again = mlp(16)
    resumed = Pruner(again, digits[0][:2], ratio=0.9, steps=3, frequency=3, training=training, ignore=["norm"])
    history = fit(again, teacher, digits, 5, checkpoint=tmp_path / "run.safetensors", resume=True)
    assert history.best.epoch == 3 and resumed.summary().sparsity == pytest.approx(0.9, abs=1e-3)


def test_masks_made_after_the_last_validation_stay(mlp, digits, teacher):
    """The weights that fit them are the last ones, and no epoch is called the best."""
    student = mlp(16)
    pruner = Pruner(student, digits[0][:2], ratio=0.9, steps=2)
    history = fit(student, teacher, digits, 2, on_epoch=lambda _: pruner.step())
    assert history.best is None and [record.masked for record in history.epochs] == sorted({record.masked for record in history.epochs})
    assert zeros(pruner.convert()) == pytest.approx(0.9, abs=1e-3)


def test_masks_made_before_ctrl_c_stay(mlp, digits, teacher):
    student = mlp(16)
    pruner = Pruner(student, digits[0][:2], ratio=0.9, steps=1, frequency=4)

    def step(number):
        pruner.step()
        if number == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(student, teacher, digits, 3, on_step=step)
    assert pruner.summary().sparsity == pytest.approx(0.9, abs=1e-3)


def test_masks_of_torch_count_too(mlp, digits, teacher):
    student = mlp(16)

    def step(number):
        if number == 4:
            torch_prune.l1_unstructured(student.first, "weight", 0.5)

    history = fit(student, teacher, digits, 3, on_step=step)
    assert history.best.epoch == 2 and (student.first.weight_mask == 0).float().mean() == 0.5


REPLACED = (
    r"fit: {} must leave the student's Parameters in place, got a new one, first.weight \({}\), that the optimizer does not hold .*"
    r"remove channels and add layers between calls of fit"
)


def test_channels_removed_in_a_callback_are_refused(mlp, digits, teacher):
    for callback, epochs in (("on_step", 2), ("on_epoch", 1)):
        student = mlp(16)
        pruner = Pruner(student, digits[0][:2], pattern="channel", ratio=0.5, frequency=5 if callback == "on_step" else 1)
        with pytest.raises(RuntimeError, match=REPLACED.format(callback, "8, 64")):
            fit(student, teacher, digits, epochs, **{callback: lambda _, pruner=pruner: pruner.step()})


def test_converting_in_the_last_callback_stays(mlp, digits, teacher):
    """Zeros are in the same Parameters then, and no longer under a mask."""
    student = mlp(16)
    pruner = Pruner(student, digits[0][:2], ratio=0.5)
    pruner.step()

    def convert_and_stop(record):
        pruner.convert()
        return True

    history = fit(student, teacher, digits, 2, on_epoch=convert_and_stop)
    assert history.best is None and zeros(student) == pytest.approx(0.5, abs=1e-3)


def test_ctrl_c_right_after_channels_were_removed(mlp, digits, teacher):
    student = mlp(16)
    pruner = Pruner(student, digits[0][:2], pattern="channel", ratio=0.5, frequency=4)

    def step(number):
        if pruner.step().pruned:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(student, teacher, digits, 2, on_step=step)
    assert student.first.out_features == 8


def test_channels_removed_between_calls_train(mlp, digits, teacher):
    student = mlp(16)
    pruner = Pruner(student, digits[0][:2], pattern="channel", ratio=0.5, steps=2)
    while not pruner.done:
        pruner.step()
        before = student.first.weight.detach().clone()
        fit(student, teacher, digits, 1)
        assert not torch.equal(before, student.first.weight)
    assert student.first.out_features == 8


def test_callbacks_may_freeze_and_add_what_the_optimizer_is_given(mlp, digits, teacher):
    student = mlp(16)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)

    def step(number):
        student.first.requires_grad_(number % 2 == 0)
        if number == 3:
            student.head.register_parameter("extra", nn.Parameter(torch.zeros(1)))
            optimizer.add_param_group({"params": [student.head.extra]})

    history = Distiller(student, teacher).fit(batches_of(digits), 2, optimizer=optimizer, on_step=step, progress=False)
    assert len(history.epochs) == 2
    assert any(parameter is student.head.extra for group in optimizer.param_groups for parameter in group["params"])
