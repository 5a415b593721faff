"""fit: it learns, the best epoch wins, metrics and choices mean what they say, nothing of the caller's is disturbed."""

from __future__ import annotations

import copy

import pytest
import torch
from support.fit import sgd
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pycompress.distillation import Distiller, FeatureLoss, KDLoss


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
