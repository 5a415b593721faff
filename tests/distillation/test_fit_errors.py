"""fit: bad arguments, checkpoints that do not fit, and losses that diverge are told and change nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from support.fit import sgd
from torch import nn

from pycompress.distillation import Distiller, FeatureLoss, KDLoss, load_state, save_state


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"train_loader": []}, ValueError, "fit: train_loader must yield at least one batch, got none"),
        ({"train_loader": 3}, TypeError, "fit: train_loader must be iterable, got int"),
        ({"val_loader": []}, ValueError, "fit: val_loader must yield at least one batch, got none"),
        ({"val_loader": iter([])}, ValueError, "fit: val_loader must yield at least one batch, got none in epoch 1"),
        ({"train_loader": iter([])}, ValueError, "fit: train_loader must yield at least one batch, got none in epoch 1"),
        ({"epochs": 0}, ValueError, "fit: epochs must be a positive integer, got 0"),
        ({"epochs": 1.5}, ValueError, "fit: epochs must be a positive integer, got 1.5"),
        ({"seed": -1}, ValueError, "fit: seed must be an integer not below 0, got -1"),
        ({"max_grad_norm": 0}, ValueError, "fit: max_grad_norm must be a number above 0, got 0"),
        ({"scheduler_interval": "batch"}, ValueError, "fit: scheduler_interval must be 'epoch' or 'step', got 'batch'"),
        ({"metric": "f1"}, ValueError, "fit: metric must be a function or one of accuracy, agreement, loss, got 'f1'"),
        ({"metric": 3}, TypeError, "fit: metric must be a function or one of accuracy, agreement, loss, got int"),
        ({"metric": lambda a, b: 0, "metric_mode": "up"}, ValueError, "fit: metric_mode must be 'max' or 'min', got 'up'"),
        ({"metric": "accuracy"}, ValueError, "fit: metric 'accuracy' needs val_loader, the batches to score, got None"),
        ({"metric": nn.functional.mse_loss}, ValueError, "fit: metric 'mse_loss' needs val_loader, the batches to score, got None"),
        ({"metric_mode": "up"}, ValueError, "fit: metric_mode must be 'max' or 'min', got 'up'"),
        ({"metric_mode": "min"}, ValueError, "fit: metric_mode must be 'max' for metric 'accuracy', got 'min'; pass a function"),
        ({"metric": "agreement", "metric_mode": "min"}, ValueError, "fit: metric_mode must be 'max' for metric 'agreement', got 'min'"),
        ({"resume": True}, ValueError, "fit: resume=True needs checkpoint, the file to continue from"),
        (
            {"checkpoint": "no/such/folder/x.safetensors"},
            ValueError,
            "fit: the folder of checkpoint must exist, got 'no/such/folder/x.safeten",
        ),
        ({"optimizer": "adam"}, TypeError, "fit: optimizer must be a torch optimizer or a function that makes one, got str"),
        ({"optimizer": lambda p: p}, TypeError, "fit: optimizer must be a torch optimizer or a function that makes one, got function"),
        (
            {"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)},
            ValueError,
            "fit: optimizer must hold parameters of the student",
        ),
        ({"scheduler": "cosine"}, TypeError, "fit: scheduler must be a torch scheduler or a function that makes one, got str"),
        (
            {"scheduler": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o), "scheduler_interval": "step"},
            ValueError,
            "fit: scheduler_interval must be 'epoch' for ReduceLROnPlateau",
        ),
        (
            {"scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1), 1)},
            ValueError,
            "fit: scheduler must belong to the optimizer that is used",
        ),
    ],
)
def test_bad_arguments_leave_everything_alone(mlp, digits, teacher, arguments, error, message):
    student = mlp(8)
    before = copy.deepcopy(student.state_dict())
    batch = (digits[0][:20], digits[1][:20])
    call = {"train_loader": [batch], "epochs": 1} | arguments
    trained = isinstance(arguments.get("val_loader"), type(iter([])))
    with pytest.raises(error, match=message):
        Distiller(student, teacher).fit(**call)
    if not trained:
        assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())


def test_used_up_generator(mlp, digits, teacher):
    batches = ((digits[0][i : i + 10], digits[1][i : i + 10]) for i in range(0, 20, 10))
    with pytest.raises(ValueError, match=r"got none in epoch 2 \(a generator is used up after one epoch; pass a list or a DataLoader\)"):
        Distiller(mlp(8), teacher).fit(batches, 2)


def test_frozen_student(mlp, loaders, teacher):
    with pytest.raises(ValueError, match="fit: the student must have parameters that require a gradient, got none"):
        Distiller(mlp(8).requires_grad_(False), teacher).fit(loaders()[0], 1)


def test_optimizer_without_the_adapters(mlp, loaders, teacher):
    student = mlp(8)
    distiller = Distiller(student, teacher, FeatureLoss({"first": "first"}))
    with pytest.raises(
        ValueError, match=r"fit: optimizer must hold the loss's adapters \(losses.0.adapter.weight\) too; call distiller.prepare"
    ):
        distiller.fit(loaders()[0], 1, optimizer=sgd(student.parameters()))


def test_diverging_loss_is_reported_and_best_kept(mlp, loaders, teacher):
    student = mlp(8)

    def poison(record):
        if record.epoch == 1:
            with torch.no_grad():
                student.head.weight.fill_(float("nan"))

    with pytest.raises(RuntimeError, match=r"fit: the loss of epoch 2 must be finite, got nan; lower the learning rate"):
        Distiller(student, teacher).fit(loaders()[0], 3, val_loader=loaders()[1], on_epoch=poison)
    assert student.head.weight.isfinite().all()


def test_accuracy_without_labels(mlp, digits, teacher):
    with pytest.raises(ValueError, match="fit: metric 'accuracy' needs validation batches with labels"):
        Distiller(mlp(8), teacher, KDLoss(4.0, 1.0, 0.0)).fit([digits[0][:20]], 1, val_loader=[digits[2][:20]], metric="accuracy")


def test_checkpoint_that_does_not_fit(tmp_path, mlp, loaders, teacher):
    path = tmp_path / "run.safetensors"
    train, val = loaders()
    Distiller(mlp(8), teacher).fit(train, 1, val_loader=val, checkpoint=path, optimizer=sgd)

    def resume(student, message, loss=None, **changes):
        before = copy.deepcopy(student.state_dict())
        call = {"optimizer": sgd, "val_loader": val, "seed": 0} | changes
        with pytest.raises(ValueError, match=message):
            Distiller(student, teacher, loss).fit(call.pop("train", train), 2, checkpoint=path, resume=True, **call)
        assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())

    resume(mlp(9), r"\(student\) must have first.weight of \(9, 64\) torch.float32, got \(8, 64\) torch.float32")
    resume(mlp(8).double().float().requires_grad_(), "must have been written with seed 1, got seed 0", seed=1)
    resume(mlp(8), r"must come from optimizer and scheduler \('AdamW', None\), got \('SGD', None\)", optimizer=None)
    resume(nn.Sequential(nn.Linear(64, 10)), r"must have optimizer groups of \[2\] parameters, got \[6\]")
    resume(nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 10)), r"must have the model's state, got differing keys")
    resume(mlp(8), r"hold the state of 1 DataLoader generator\(s\), got 0", train=loaders(generator=torch.Generator())[0])
    resume(mlp(8), "must have the model's state|must have optimizer groups", loss=KDLoss() + FeatureLoss({"first": "first"}))
    resume(mlp(8), r"fit: metric must be 'accuracy' \(max\) as in the epochs before the checkpoint, got 'loss' \(min\)", metric="loss")
    resume(mlp(8), r"fit: metric must be 'accuracy' \(max\) .* got 'agreement' \(max\)", metric="agreement")


def test_a_metric_may_not_change_its_direction_at_a_resume(tmp_path, mlp, loaders, teacher):
    path = tmp_path / "run.safetensors"
    train, val = loaders()
    call = {"val_loader": val, "checkpoint": path, "resume": True}
    Distiller(mlp(8), teacher).fit(train, 1, metric=lambda logits, labels: logits.argmax(-1) == labels, **call)
    student = mlp(8)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(ValueError, match=r"metric must be '<lambda>' \(max\) .* got 'cross_entropy' \(min\); leave resume out"):
        Distiller(student, teacher).fit(train, 2, metric=nn.functional.cross_entropy, metric_mode="min", **call)
    with pytest.raises(ValueError, match=r"fit: metric must be '<lambda>' \(max\) .* got '<lambda>' \(min\)"):
        Distiller(student, teacher).fit(train, 2, metric=lambda *both: nn.functional.cross_entropy(*both), metric_mode="min", **call)
    assert all(torch.equal(before[key], value) for key, value in student.state_dict().items())
    with pytest.raises(ValueError, match=r"fit: metric must be '<lambda>' \(max\) .* got 'accuracy' \(max\)"):
        Distiller(student, teacher).fit(train, 2, **call)  # known with the first validation batch
    history = Distiller(mlp(8), teacher).fit(train, 2, metric=lambda logits, labels: logits.argmax(-1) == labels, **call)
    assert len(history) == 2 and history.higher_is_better


def test_damaged_checkpoints(tmp_path, mlp, loaders, teacher):
    path = tmp_path / "run.safetensors"
    train = loaders()[0]
    Distiller(mlp(8), teacher).fit(train, 1, checkpoint=path)
    good, state = path.read_bytes(), load_state(path)

    def refuse(message):
        with pytest.raises(ValueError, match=message):
            Distiller(mlp(8), teacher).fit(train, 2, checkpoint=path, resume=True)

    for broken in (good[: len(good) // 2], b"", b"\x80\x04pickle", good[:8] + b"x" * (len(good) - 8)):
        path.write_bytes(broken)
        refuse("load_state: .* is not a usable training checkpoint")
    path.write_bytes(good.replace(b"counter", b"counted").replace(b'[\\"tensor\\", \\"t0\\"]', b'[\\"eval!!\\", \\"t0\\"]'))
    refuse("unknown entry 'eval!!' in its manifest")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path)
    refuse("its format is None, expected 'pycompress-checkpoint-1'")
    for key in state:
        save_state({k: v for k, v in state.items() if k != key}, path)
        refuse("does not hold a training state: KeyError")
    save_state(state | {"students": {"student": 3}}, path)
    refuse(r"\(student\) must have the model's state")
