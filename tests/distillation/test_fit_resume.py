"""fit: seeds, checkpoints and interruptions: a resumed run is the run that was not interrupted."""

from __future__ import annotations

import copy

import pytest
import torch
from support.fit import records, sgd
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pycompress.distillation import Distiller, FeatureLoss, KDLoss, load_state

# -- seeds and resume --------------------------------------------------------------------------------------------------


def test_same_seed_same_model_other_seed_other_model(mlp, loaders, teacher, is_same_state):
    models, histories = [], []
    for seed in (0, 0, 1):
        torch.manual_seed(len(models))  # the caller's own seed must not matter
        models.append(mlp(8))
        histories.append(Distiller(models[-1], teacher).fit(loaders()[0], epochs=2, val_loader=loaders()[1], seed=seed))
    assert is_same_state(models[0], models[1]) and records(histories[0]) == records(histories[1])
    assert not is_same_state(models[0], models[2])


class Stop(Exception):
    """Stands for a crash."""


def make_run(mlp, loaders, teacher, kind: str):
    """(distiller, train loader, validation loader, arguments of fit) with everything that has a state."""
    generator = torch.Generator().manual_seed(11)
    train, val = loaders(generator=generator)
    if kind == "adamw-onecycle-hint":
        loss = KDLoss() + FeatureLoss({"first": "first"})
        arguments = {
            "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2),
            "scheduler": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=1e-2, total_steps=5 * len(train)),
            "scheduler_interval": "step",
            "max_grad_norm": 1.0,
        }
    elif kind == "sgd-multistep":
        loss = KDLoss()
        arguments = {"optimizer": sgd, "scheduler": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4], 0.5)}
    else:
        loss = KDLoss()
        arguments = {
            "optimizer": sgd,
            "scheduler": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, "max", 0.5, 0),
            "metric": "accuracy",
        }
    return Distiller(mlp(12), teacher, loss), train, val, arguments


@pytest.mark.parametrize("kind", ["adamw-onecycle-hint", "sgd-multistep", "plateau"])
@pytest.mark.parametrize("break_at", ["first step", "third epoch", "between epochs"])
def test_resumed_run_is_bit_identical(tmp_path, mlp, loaders, teacher, is_same_state, kind, break_at):
    path = tmp_path / "run.safetensors"
    whole, train, val, arguments = make_run(mlp, loaders, teacher, kind)
    expected = whole.fit(train, epochs=5, val_loader=val, seed=3, **arguments)
    expected_adapters = [p.detach().clone() for p in whole.loss_module.parameters()]
    left = train.generator.get_state()

    first, train, val, arguments = make_run(mlp, loaders, teacher, kind)

    def crash_step(step):
        if (break_at, step) in (("first step", 1), ("third epoch", 2 * len(train) + 2)):
            raise Stop

    def crash_epoch(record):
        if (break_at, record.epoch) == ("between epochs", 2):
            raise Stop

    with pytest.raises(Stop):
        first.fit(train, epochs=5, val_loader=val, seed=3, checkpoint=path, on_step=crash_step, on_epoch=crash_epoch, **arguments)

    second, train, val, arguments = make_run(mlp, loaders, teacher, kind)
    nn.init.normal_(second.student.first.weight)  # a new process may start from anything: the checkpoint decides
    train.generator.manual_seed(12345)
    history = second.fit(train, epochs=5, val_loader=val, seed=3, checkpoint=path, resume=True, **arguments)
    assert records(history) == records(expected)
    assert is_same_state(second.student, whole.student)
    assert all(torch.equal(a, b) for a, b in zip(second.loss_module.parameters(), expected_adapters, strict=True))
    assert torch.equal(train.generator.get_state(), left)


def test_finished_run_resumes_to_itself_and_can_go_on(tmp_path, mlp, loaders, teacher, is_same_state):
    path = tmp_path / "run.safetensors"
    whole = mlp(8)
    expected = Distiller(whole, teacher).fit(loaders()[0], 4, val_loader=loaders()[1])
    student = mlp(8)
    distiller = Distiller(student, teacher)
    distiller.fit(loaders()[0], 2, val_loader=loaders()[1], checkpoint=path)
    done = copy.deepcopy(student)
    again = mlp(8, seed=99)
    history = Distiller(again, teacher).fit(loaders()[0], 2, val_loader=loaders()[1], checkpoint=path, resume=True)
    assert len(history) == 2 and is_same_state(again, done)
    history = distiller.fit(loaders()[0], 4, val_loader=loaders()[1], checkpoint=path, resume=True)
    assert records(history) == records(expected) and is_same_state(student, whole)


def test_a_run_that_was_ended_early_stays_finished(tmp_path, mlp, loaders, teacher, is_same_state):
    path, students, histories, asked = tmp_path / "run.safetensors", [], [], []

    def stop(record):
        asked.append(record.epoch)
        return record.epoch >= 2

    for epochs in (9, 9, 12):
        students.append(mlp(8))
        distiller = Distiller(students[-1], teacher)
        histories.append(distiller.fit(loaders()[0], epochs, val_loader=loaders()[1], on_epoch=stop, checkpoint=path, resume=True))
    assert asked == [1, 2] and all(history.stopped for history in histories)
    assert records(histories[0]) == records(histories[1]) == records(histories[2])
    assert is_same_state(students[0], students[1]) and is_same_state(students[0], students[2])


def test_resume_without_a_file_starts_and_without_resume_starts_over(tmp_path, mlp, loaders, teacher, is_same_state):
    path = tmp_path / "run.safetensors"
    a, b = mlp(8), mlp(8)
    Distiller(a, teacher).fit(loaders()[0], 1, checkpoint=path, resume=True)
    assert load_state(path)["step"] == 4
    Distiller(b, teacher).fit(loaders()[0], 1, checkpoint=path)
    assert is_same_state(a, b) and len(load_state(path)["history"]["epochs"]) == 1


def test_persistent_workers_and_workers_are_reproducible(mlp, digits, teacher, is_same_state):
    models = []
    for _ in range(2):
        train = DataLoader(TensorDataset(digits[0][:128], digits[1][:128]), 64, shuffle=True, num_workers=1, multiprocessing_context="fork")
        models.append(mlp(8))
        Distiller(models[-1], teacher).fit(train, 1)
    assert is_same_state(*models)


def test_making_adapters_does_not_move_the_loaders_generator(mlp, loaders, teacher):
    states = []
    for loss in (KDLoss(), KDLoss() + FeatureLoss({"first": "first"})):
        generator = torch.Generator().manual_seed(5)
        Distiller(mlp(8), teacher, loss).fit(loaders(128, generator)[0], 2)
        states.append(generator.get_state())
    assert torch.equal(*states)


class OwnIterator:
    """A loader that is its own iterator and starts again when it is asked for one, as those of some data pipelines."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        self.at = 0
        return self

    def __next__(self):
        self.at += 1
        if self.at > len(self.batches):
            raise StopIteration
        return self.batches[self.at - 1]

    def __len__(self):
        return len(self.batches)


def test_making_adapters_loses_no_batch_of_an_iterator(mlp, digits, teacher, is_same_state):
    batches = [(digits[0][i : i + 50], digits[1][i : i + 50]) for i in range(0, 200, 50)]
    students = []
    for loader, epochs in ((batches, 1), (iter(batches), 1), ((batch for batch in batches), 1), (batches, 2), (OwnIterator(batches), 2)):
        steps = []
        students.append(mlp(8))
        loss = KDLoss() + FeatureLoss({"first": "first"})
        Distiller(students[-1], teacher, loss).fit(loader, epochs, on_step=steps.append)
        assert len(steps) == 4 * epochs
    assert is_same_state(students[0], students[1]) and is_same_state(students[0], students[2])
    assert is_same_state(students[3], students[4])
    with pytest.raises(ValueError, match=r"got none in epoch 2 \(a generator is used up after one epoch"):
        Distiller(mlp(8), teacher, KDLoss() + FeatureLoss({"first": "first"})).fit(iter(batches), 2)


def test_step_numbers_go_on_after_a_resume(tmp_path, mlp, loaders, teacher):
    steps = []
    for epochs in (1, 2):
        Distiller(mlp(8), teacher).fit(loaders(128)[0], epochs, checkpoint=tmp_path / "c.safetensors", resume=True, on_step=steps.append)
    assert steps == [1, 2, 3, 4]


def test_samplers_are_told_the_epoch(mlp, digits, teacher):
    class Sampler(torch.utils.data.SequentialSampler):
        def set_epoch(self, epoch):
            epochs.append(epoch)

    for as_batch_sampler in (False, True):
        epochs = []
        data = TensorDataset(digits[0][:64], digits[1][:64])
        if as_batch_sampler:
            train = DataLoader(data, batch_sampler=torch.utils.data.BatchSampler(Sampler(data), 32, drop_last=False))
        else:
            train = DataLoader(data, 32, sampler=Sampler(data))
        Distiller(mlp(8), teacher).fit(train, 2)
        assert epochs == [1, 2]


# -- interruption ------------------------------------------------------------------------------------------------------


def test_ctrl_c_leaves_best_weights_and_a_checkpoint(tmp_path, mlp, loaders, teacher, is_same_state):
    path = tmp_path / "run.safetensors"
    reference = mlp(8)
    Distiller(reference, teacher).fit(loaders()[0], 2, val_loader=loaders()[1])
    student = mlp(8).eval()
    distiller = Distiller(student, teacher)
    teacher.train()

    def ctrl_c(step):
        if step == 2 * 4 + 3:
            raise KeyboardInterrupt

    try:
        with pytest.raises(KeyboardInterrupt):
            distiller.fit(loaders()[0], 5, val_loader=loaders()[1], checkpoint=path, on_step=ctrl_c)
        assert teacher.training
    finally:
        teacher.eval()
    assert is_same_state(student, reference) and not student.training and not student.norm.training
    assert len(distiller.history) == 2 and len(load_state(path)["history"]["epochs"]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]


def test_ctrl_c_while_writing_leaves_the_previous_checkpoint(tmp_path, monkeypatch, mlp, loaders, teacher):
    path = tmp_path / "run.safetensors"
    import pycompress.distillation.checkpoint as checkpoint

    real, calls = checkpoint.os.replace, []

    def replace(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(checkpoint.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        Distiller(mlp(8), teacher).fit(loaders()[0], 5, checkpoint=path)
    assert len(load_state(path)["history"]["epochs"]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["run.safetensors"]
