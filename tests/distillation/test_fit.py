"""fit: it learns, the best epoch wins, seeds and checkpoints reproduce, nothing of the caller's is disturbed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pycompress.distillation import Distiller, FeatureLoss, History, KDLoss, load_state, save_state


def records(history: History) -> list[dict]:
    """Everything in a history that must be reproducible."""
    return [{key: value for key, value in record.items() if key != "seconds"} for record in history.to_dict()["epochs"]]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def test_distillation_teaches_digits(mlp, digits, teacher):
    train = DataLoader(TensorDataset(digits[0], digits[1]), batch_size=64, shuffle=True)
    val = DataLoader(TensorDataset(digits[2], digits[3]), batch_size=250)
    with torch.no_grad():
        teacher_accuracy = (teacher(digits[2]).argmax(-1) == digits[3]).float().mean().item()
    student = mlp(16, dropout=0.0)
    history = Distiller(student, teacher, KDLoss(4.0, 0.9, 0.1)).fit(
        train, epochs=15, val_loader=val, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)
    )
    student.eval()
    with torch.no_grad():
        accuracy = (student(digits[2]).argmax(-1) == digits[3]).float().mean().item()
    assert teacher_accuracy > 0.96 and accuracy > teacher_accuracy - 0.025
    assert history.best.metric == pytest.approx(accuracy)  # the best epoch's weights are in the student
    assert history.metric_name == "accuracy" and history.epochs[-1].train_loss < 0.2 * history.epochs[0].train_loss
    assert [record.epoch for record in history.epochs] == list(range(1, 16))


def test_unlabelled_data_suffices(mlp, digits, teacher):
    student = mlp(16, dropout=0.0)
    history = Distiller(student, teacher, KDLoss(4.0, 1.0, 0.0)).fit(
        list(digits[0].split(64)), epochs=10, val_loader=list(digits[2].split(100)), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2)
    )
    assert history.metric_name == "agreement" and history.best.metric > 0.93


def test_hints_learn_with_their_adapter(mlp, loaders, teacher):
    student = mlp(16)
    distiller = Distiller(student, teacher, KDLoss() + FeatureLoss({"norm": "norm"}, "hint", weight=0.5))
    train, val = loaders()
    history = distiller.fit(train, epochs=12, val_loader=val, optimizer=lambda p: torch.optim.AdamW(p, lr=2e-2))
    hint = [record.terms["hint"] for record in history.epochs]
    assert hint[-1] < 0.8 * hint[0]
    assert [record.train_loss for record in history.epochs] == pytest.approx([sum(r.terms.values()) for r in history.epochs])
    assert student.state_dict().keys() == mlp(16).state_dict().keys()


def test_own_loop_equals_fit(mlp, teacher, digits, is_same_state):
    batches = [(digits[0][i : i + 50], digits[1][i : i + 50]) for i in range(0, 200, 50)]
    fitted, looped = mlp(8, dropout=0.0), mlp(8, dropout=0.0)
    Distiller(fitted, teacher).fit(batches, epochs=2, optimizer=sgd)
    distiller = Distiller(looped, teacher)
    optimizer = sgd(distiller.parameters())
    for _ in range(2):
        for batch in batches:
            optimizer.zero_grad()
            distiller.loss(batch).backward()
            optimizer.step()
    assert is_same_state(fitted, looped)


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


# -- choices -----------------------------------------------------------------------------------------------------------


def test_best_epoch_by_metric_and_mode(mlp, loaders, teacher):
    def scripted(logits, labels):
        return value

    for mode, expected in (("max", 2), ("min", 4)):
        student, states = mlp(8), []
        scores = [0.3, 0.7, 0.7, 0.1]
        value = scores[0]

        def remember(record, student=student, states=states, scores=scores):
            nonlocal value
            assert record.metric == pytest.approx(scores[record.epoch - 1])
            states.append(copy.deepcopy(student.state_dict()))
            value = scores[min(record.epoch, 3)]

        history = Distiller(student, teacher).fit(
            loaders()[0], 4, val_loader=loaders()[1], metric=scripted, metric_mode=mode, on_epoch=remember
        )
        assert history.best.epoch == expected and history.metric_name == "scripted"
        assert all(torch.equal(v, states[expected - 1][k]) for k, v in student.state_dict().items())


def test_metric_loss_is_the_mean_loss_and_lower_is_better(mlp, digits, teacher):
    student = mlp(8, dropout=0.0)
    val = [(digits[2][:90], digits[3][:90]), (digits[2][90:100], digits[3][90:100])]
    train = [(digits[0][:64], digits[1][:64])]
    distiller = Distiller(student, teacher)
    history = distiller.fit(train, 1, val_loader=val, metric="loss")
    student.eval()
    whole = distiller.loss((digits[2][:100], digits[3][:100])).item()
    assert not history.higher_is_better and history.best.metric == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_metric_loss_does_not_depend_on_the_batches(mlp, digits, teacher, reduction):
    x, y = digits[2][:90], digits[3][:90].clone()
    y[:43] = -100  # whole batches of rows that do not count
    found = []
    for size in (90, 30, 7):
        val = list(zip(x.split(size), y.split(size), strict=True))
        distiller = Distiller(mlp(8, dropout=0.0), teacher, KDLoss(reduction=reduction))
        train = [(digits[0][:8], digits[1][:8])]
        found.append(distiller.fit(train, 1, val_loader=val, metric="loss", optimizer=lambda p: torch.optim.SGD(p, lr=0.0)).best.metric)
    distiller.student.eval()
    whole = distiller.loss((x, y)).item() / (90 if reduction == "sum" else 1)
    assert found == pytest.approx([whole] * 3, rel=1e-5)


def test_metric_counts_rows_not_batches_and_ignores_ignored_rows(mlp, digits, teacher):
    student = mlp(8, dropout=0.0)
    x, y = digits[2][:100], digits[3][:100].clone()
    y[::5] = -100
    history = Distiller(student, teacher).fit([(digits[0][:64], digits[1][:64])], 1, val_loader=[(x[:97], y[:97]), (x[97:], y[97:])])
    student.eval()
    keep = y != -100
    assert history.best.metric == pytest.approx((student(x[keep]).argmax(-1) == y[keep]).float().mean().item())


def test_per_sample_metric_function(mlp, digits, teacher):
    student = mlp(8, dropout=0.0)
    val = [(digits[2][:90], digits[3][:90]), (digits[2][90:100], digits[3][90:100])]

    def top2(logits, labels):
        return (logits.topk(2).indices == labels.unsqueeze(1)).any(1)

    history = Distiller(student, teacher).fit([(digits[0][:64], digits[1][:64])], 1, val_loader=val, metric=top2)
    student.eval()
    assert history.best.metric == pytest.approx(top2(student(digits[2][:100]), digits[3][:100]).float().mean().item())


def test_without_validation_the_last_weights_stay(mlp, loaders, teacher):
    student, last = mlp(8), {}
    history = Distiller(student, teacher).fit(loaders()[0], 2, on_epoch=lambda _: last.update(copy.deepcopy(student.state_dict())))
    assert history.best is None and all(torch.equal(v, last[k]) for k, v in student.state_dict().items())


def test_early_stop_steps_and_learning_rates(mlp, loaders, teacher):
    steps = []
    history = Distiller(mlp(8), teacher).fit(
        loaders()[0], 9, optimizer=sgd, scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5), on_step=steps.append,
        on_epoch=lambda record: record.epoch == 3,
    )  # fmt: skip
    assert len(history) == 3 and steps == list(range(1, 13))
    assert [record.learning_rate for record in history.epochs] == pytest.approx([0.1, 0.05, 0.025])


def test_training_flags_and_gradients_afterwards(mlp, loaders, teacher):
    student = mlp(8)
    student.eval()
    student.drop.train()
    flags = [module.training for module in student.modules()]
    seen = []
    Distiller(student, teacher).fit(loaders()[0], 1, val_loader=loaders()[1], on_step=lambda _: seen.append(student.training))
    assert seen == [True] * 4
    assert [module.training for module in student.modules()] == flags
    assert all(parameter.grad is None for parameter in student.parameters())


def test_frozen_parameters_stay(mlp, loaders, teacher):
    student = mlp(8)
    student.first.requires_grad_(False)
    before = student.first.weight.clone()
    Distiller(student, teacher).fit(loaders()[0], 1)
    assert torch.equal(student.first.weight, before) and not student.first.weight.requires_grad


def test_parametrized_student_trains_and_keeps_its_mask(tmp_path, mlp, loaders, teacher):
    """A pruning mask is a parametrization; distillation after pruning must not revive weights."""
    from torch.nn.utils import parametrize

    class Mask(nn.Module):
        def __init__(self, mask):
            super().__init__()
            self.register_buffer("mask", mask)

        def forward(self, weight):
            return weight * self.mask

    student = mlp(8)
    mask = (torch.arange(8 * 64).view(8, 64) % 2).float()
    parametrize.register_parametrization(student.first, "weight", Mask(mask))
    Distiller(student, teacher).fit(loaders()[0], 2, val_loader=loaders()[1], checkpoint=tmp_path / "c.safetensors")
    assert ((student.first.weight == 0) == (mask == 0)).all()


def test_optimizer_and_scheduler_objects(mlp, loaders, teacher):
    student = mlp(8)
    optimizer = sgd(student.parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)
    Distiller(student, teacher).fit(loaders()[0], 2, optimizer=optimizer, scheduler=scheduler)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)


def test_device_moves_everything(mlp, digits, teacher):
    distiller = Distiller(mlp(8), copy.deepcopy(teacher))
    history = distiller.fit([(digits[0][:64], digits[1][:64])], 1, device="cpu")
    assert len(history) == 1


# -- bad input ---------------------------------------------------------------------------------------------------------


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


# -- the file format ---------------------------------------------------------------------------------------------------


def test_state_round_trip(tmp_path):
    from collections import Counter

    shared = torch.arange(6.0)
    state = {
        "tensors": [shared, shared[::2], shared.view(2, 3).T, torch.tensor(3), torch.zeros(0, 2)],
        "types": {k: torch.ones(3).to(k_type) for k, k_type in (("b", torch.bool), ("h", torch.bfloat16), ("i", torch.int8))},
        3: (1, 2.5, True, None, "text", float("inf")),
        "milestones": Counter([2, 2, 4]),
        "nested": [[], {}, ()],
    }
    save_state(state, tmp_path / "s.safetensors")
    loaded = load_state(tmp_path / "s.safetensors")
    assert loaded[3] == state[3] and loaded["milestones"] == state["milestones"] and isinstance(loaded["milestones"], Counter)
    assert loaded["nested"] == [[], {}, ()]
    for a, b in zip(loaded["tensors"], state["tensors"], strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype
    assert all(torch.equal(loaded["types"][k], v) and loaded["types"][k].dtype == v.dtype for k, v in state["types"].items())


def test_unstorable_values_are_named_and_leave_the_file(tmp_path):
    path = tmp_path / "s.safetensors"
    save_state({"a": 1}, path)
    with pytest.raises(TypeError, match=r"save_state: state\['b'\]\[0\] must be a tensor, number, string, list or dict, got function"):
        save_state({"b": [lambda: 0]}, path)
    with pytest.raises(TypeError, match=r"save_state: state\['s'\] must be a plain dense tensor, got Tensor"):
        save_state({"s": torch.zeros(2, 2).to_sparse()}, path)
    assert load_state(path) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]


def test_missing_file():
    with pytest.raises(FileNotFoundError):
        load_state("no_such_file.safetensors")
