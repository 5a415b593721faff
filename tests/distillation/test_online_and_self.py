"""Mutual learning and born-again networks share fit with the Distiller."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pycompress.distillation import Ensemble, FeatureLoss, KDLoss, MutualLearning, born_again, load_state


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def test_mutual_terms_are_the_papers(mlp):
    students = [mlp(8, seed=i).eval() for i in range(3)]
    x, y = torch.randn(5, 64), torch.arange(5)
    terms = MutualLearning(students, KDLoss(2.0, 0.6, 0.4)).terms((x, y))
    assert list(terms) == ["0/kd", "1/kd", "2/kd"]
    logits = [student(x) for student in students]
    for i in range(3):
        expected = sum(KDLoss(2.0, 0.6, 0.4)(logits[i], logits[j].detach(), y) for j in range(3) if j != i) / 2
        torch.testing.assert_close(terms[f"{i}/kd"], expected)
    # a student's gradient comes from its own term only
    parameters = list(students[0].parameters())
    own = torch.autograd.grad(terms["0/kd"], parameters, retain_graph=True)
    of_sum = torch.autograd.grad(sum(terms.values()), parameters)
    assert all(torch.equal(a, b) for a, b in zip(own, of_sum, strict=True))


def test_cohort_learns_and_agrees(mlp, loaders, digits):
    cohort = MutualLearning([mlp(12, seed=0), mlp(16, seed=1)])
    train, val = loaders(640)
    history = cohort.fit(train, epochs=12, val_loader=val, optimizer=sgd)
    assert history.metric_name == "accuracy" and history.best.metric > 0.9
    assert set(history.epochs[0].terms) == {"0/kd", "1/kd"}
    teacher = cohort.as_teacher()
    with torch.no_grad():
        accuracies = [(m.eval()(digits[2]).argmax(-1) == digits[3]).float().mean().item() for m in (*cohort.models, teacher)]
    assert accuracies[2] >= min(accuracies[:2])


@pytest.mark.parametrize("metric", ["agreement", "loss"])
def test_cohort_metrics(mlp, loaders, metric):
    train, val = loaders(128)
    cohort = MutualLearning([mlp(8, seed=0, dropout=0.0), mlp(8, seed=1, dropout=0.0)])
    history = cohort.fit(train, 1, val_loader=val, metric=metric)
    x, y = val.dataset.tensors
    models = [model.eval() for model in cohort.models]
    if metric == "agreement":
        expected = (models[0](x).argmax(-1) == models[1](x).argmax(-1)).float().mean().item()
    else:
        expected = cohort.loss((x, y)).item() / 2
    assert history.best.metric == pytest.approx(expected, rel=1e-5)


def test_cohort_resumes_bit_identically(tmp_path, mlp, loaders, is_same_state):
    def make():
        return MutualLearning([mlp(8, seed=0), mlp(8, seed=1)])

    train, val = loaders(128)
    whole, parts, again = make(), make(), make()
    whole.fit(train, 3, val_loader=val, optimizer=sgd)
    parts.fit(train, 1, val_loader=val, optimizer=sgd, checkpoint=tmp_path / "c.safetensors")
    again.fit(train, 3, val_loader=val, optimizer=sgd, checkpoint=tmp_path / "c.safetensors", resume=True)
    assert all(is_same_state(a, b) for a, b in zip(whole.models, again.models, strict=True))
    assert set(load_state(tmp_path / "c.safetensors")["students"]) == {"student0", "student1"}


def test_mutual_errors(mlp):
    a, b = mlp(4), mlp(4)
    for students, loss, error, message in [
        ([a], None, ValueError, "MutualLearning: students must be at least 2, got 1"),
        ([a, a], None, ValueError, "MutualLearning: students must be different models, got one twice"),
        (a, None, TypeError, "MutualLearning: students must be a list of torch modules, got MLP"),
        ([a, "b"], None, TypeError, "MutualLearning: students must be torch modules, got str"),
        ([a, b], FeatureLoss({"first": "first"}), ValueError, "MutualLearning: loss must compare logits with the peers'"),
        ([a, b], KDLoss(4.0, 0.0, 1.0), ValueError, "MutualLearning: loss must compare logits with the peers'"),
        ([a, b], "kd", TypeError, "MutualLearning: loss must be a distillation loss"),
    ]:
        with pytest.raises(error, match=message):
            MutualLearning(students, loss)
    with pytest.raises(ValueError, match=r"teacher_logits must have the 4 classes of student_logits"):
        MutualLearning([nn.Linear(3, 4), nn.Linear(3, 5)]).loss((torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)))
    assert "MLP (336 parameters)" in repr(MutualLearning([a, b])) or "parameters)" in repr(MutualLearning([a, b]))


def test_born_again_generations(tmp_path, mlp, loaders, digits, is_same_state):
    train, val = loaders(640)
    options = {"val_loader": val, "optimizer": sgd, "checkpoint": tmp_path / "ban.safetensors"}
    students, histories = born_again(lambda g: mlp(16, seed=g), train, 6, generations=3, **options)
    assert len(students) == len(histories) == 3 and all(history.best.metric > 0.88 for history in histories)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"ban.{g}.safetensors" for g in range(3)]
    with torch.no_grad():
        ensemble = (Ensemble(students).eval()(digits[2]).argmax(-1) == digits[3]).float().mean().item()
    assert ensemble > 0.9
    again, _ = born_again(lambda g: mlp(16, seed=50 + g), train, 6, generations=3, resume=True, **options)
    assert all(is_same_state(a, b) for a, b in zip(students, again, strict=True))


def test_born_again_generations_that_were_ended_early_stay_finished(tmp_path, mlp, loaders, is_same_state):
    train = loaders(128)[0]
    options = {"generations": 2, "checkpoint": tmp_path / "ban.safetensors", "resume": True, "on_epoch": lambda record: record.epoch >= 2}
    (first, histories), (again, same) = (born_again(lambda g: mlp(8, seed=g), train, 5, **options) for _ in range(2))
    assert [len(history) for history in (*histories, *same)] == [2, 2, 2, 2]
    assert all(is_same_state(a, b) for a, b in zip(first, again, strict=True))


def test_born_again_first_generation_learns_from_a_given_teacher(mlp, loaders, teacher, is_same_state):
    from pycompress.distillation import Distiller

    train = loaders(128)[0]
    (student,), _ = born_again(lambda g: mlp(8), train, 1, generations=1, teacher=teacher, loss=KDLoss())
    reference = mlp(8)
    Distiller(reference, teacher, KDLoss()).fit(train, 1)
    assert is_same_state(student, reference)


def test_born_again_errors(mlp, loaders):
    with pytest.raises(ValueError, match="born_again: generations must be a positive integer, got 0"):
        born_again(lambda g: mlp(4), loaders(64)[0], 1, generations=0)
    model = mlp(4)
    with pytest.raises(ValueError, match="born_again: make_student must return a new model for every generation"):
        born_again(lambda g: model, loaders(64)[0], 1, generations=2)
