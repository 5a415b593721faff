"""Distiller: batches, teachers, features by hooks, losses in a loop of one's own."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pycompress.distillation import CombinedLoss, Distiller, Ensemble, FeatureLoss, HintLoss, KDLoss, RKDLoss
from pycompress.distillation.batch import logits_of, split_batch, to_device
from pycompress.distillation.unwrap import unwrap


class ConvNet(nn.Module):
    def __init__(self, width: int, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU())
        self.act = nn.ReLU()
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x):
        return self.head(self.act(self.block(self.act(self.stem(x)))).mean((2, 3)))


class Wordy(nn.Module):
    """Takes keywords and returns an object with logits, as Hugging Face models do; refuses labels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.head = nn.Linear(width, 11)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embedding(input_ids)
        if attention_mask is not None:
            hidden = hidden * attention_mask.unsqueeze(-1)
        return SimpleNamespace(logits=self.head(hidden), loss=None)


def images(n: int = 6):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(10, (n,), generator=generator)


# -- batches -----------------------------------------------------------------------------------------------------------


def test_loss_of_a_tuple_batch_is_kd_loss(mlp):
    student, teacher = mlp(8).eval(), mlp(16, seed=1).eval()
    x, y = torch.randn(5, 64), torch.arange(5)
    loss = Distiller(student, teacher, KDLoss(2.0, 0.3, 0.7)).loss((x, y))
    torch.testing.assert_close(loss, KDLoss(2.0, 0.3, 0.7)(student(x), teacher(x), y))
    loss.backward()
    assert all(p.grad is not None for p in student.parameters()) and all(p.grad is None for p in teacher.parameters())


def test_batches_without_labels(mlp):
    student, teacher, x = mlp(8).eval(), mlp(16).eval(), torch.randn(5, 64)
    distiller = Distiller(student, teacher, KDLoss(hard_weight=0.0, soft_weight=1.0))
    expected = KDLoss(4.0, 1.0, 0.0)(student(x), teacher(x))
    for batch in (x, (x,), [x], {"inputs": x}):
        torch.testing.assert_close(distiller.loss(batch), expected)
    with pytest.raises(ValueError, match="kd_loss: labels must be given for hard_weight above 0"):
        Distiller(student, teacher).loss(x)


def test_hugging_face_style_batches():
    student, teacher = Wordy(4), Wordy(8)
    ids = torch.randint(11, (3, 7))
    mask, labels = torch.ones(3, 7), ids.clone()
    labels[:, 5:] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    distiller = Distiller(student, teacher, KDLoss(shift_labels=True))
    s, t = student(ids, mask).logits, teacher(ids, mask).logits
    torch.testing.assert_close(distiller.loss(batch), KDLoss()(s[:, :-1], t[:, :-1], labels[:, 1:]))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}


def test_split_batch():
    x, z, y = torch.zeros(2, 3), torch.ones(2, 4), torch.tensor([0, 1])
    both = split_batch((x, z, y))
    assert both.args == (x, z) and both.labels is y and both.size == 2
    keyed = split_batch({"label": y, "pixel_values": x, "teacher_logits": z})
    assert keyed.kwargs == {"pixel_values": x} and keyed.labels is y and keyed.teacher_logits is z
    for bad, error, message in [
        (3, TypeError, "batch must be a tensor, .* got int"),
        ((), TypeError, "got tuple"),
        ({"labels": y}, ValueError, "batch must hold inputs beside the labels, got the keys labels"),
    ]:
        with pytest.raises(error, match=message):
            split_batch(bad)


def test_to_device_keeps_structure():
    class Pair(NamedTuple):
        a: torch.Tensor
        b: list

    moved = to_device({"p": Pair(torch.zeros(1), [torch.ones(1), "text"]), "n": 3}, torch.device("meta"))
    assert moved["p"].a.is_meta and moved["p"].b[0].is_meta and moved["p"].b[1] == "text" and moved["n"] == 3


def test_logits_of():
    x = torch.zeros(2, 3)
    for output in (x, (x, "more"), {"logits": x}, SimpleNamespace(logits=x)):
        assert logits_of("student", output) is x
    with pytest.raises(TypeError, match=r"student must return logits as a tensor, a tuple that starts with it, or \.logits, got dict"):
        logits_of("student", {"scores": x})


# -- teachers ----------------------------------------------------------------------------------------------------------


def test_teacher_is_left_as_it_was(mlp):
    student, teacher = mlp(8), mlp(16)
    teacher.train()
    teacher.norm.eval()
    teacher.first.weight.requires_grad_(False)
    flags = [module.training for module in teacher.modules()]
    grads = [parameter.requires_grad for parameter in teacher.parameters()]
    before = copy.deepcopy(teacher.state_dict())
    distiller = Distiller(student, teacher)
    batch = (torch.randn(5, 64), torch.arange(5))
    first = distiller.loss(batch)
    first.backward()
    distiller.fit([batch], epochs=2)
    assert [module.training for module in teacher.modules()] == flags
    assert [parameter.requires_grad for parameter in teacher.parameters()] == grads
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())  # batch norm statistics too


def test_teacher_is_restored_after_an_error(mlp):
    student, teacher = mlp(8), mlp(16).train()
    with pytest.raises(RuntimeError):
        Distiller(student, teacher).loss((torch.randn(5, 63), torch.arange(5)))
    with pytest.raises(RuntimeError):
        Distiller(student, teacher).fit([(torch.randn(5, 63), torch.arange(5))], epochs=1)
    assert teacher.training and all(module.training for module in teacher.modules())


def test_training_flags_go_through_the_models_own_train():
    class Merging(nn.Linear):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.calls = []

        def train(self, mode: bool = True):
            self.calls.append(mode)
            return super().train(mode)

    teacher = Merging(4, 3)
    Distiller(nn.Linear(4, 3), teacher, KDLoss(hard_weight=0.0)).loss(torch.randn(2, 4))
    assert teacher.calls == [False, True]


def test_student_mode_is_not_touched_by_loss(mlp):
    student = mlp(8).train()
    Distiller(student, mlp(16)).loss((torch.randn(5, 64), torch.arange(5)))
    assert student.training
    student.eval()
    Distiller(student, mlp(16)).loss((torch.randn(5, 64), torch.arange(5)))
    assert not student.training


def test_global_random_state_is_not_touched(mlp):
    distiller = Distiller(mlp(8), mlp(16), KDLoss() + FeatureLoss({"first": "first"}))
    batch = (torch.randn(5, 64), torch.arange(5))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    distiller.prepare(batch)
    distiller.fit([batch], epochs=2, seed=3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and np.random.get_state()[1].tolist() == states[2]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_ensemble_of_probabilities_is_the_mean_of_softened_probabilities(mlp, temperature):
    members = [mlp(16, seed=i).eval() for i in range(3)]
    student, x = mlp(8).eval(), torch.randn(5, 64)
    distiller = Distiller(student, members, KDLoss(temperature, 1.0, 0.0))
    assert isinstance(distiller.teacher, Ensemble) and distiller.teacher.temperature == temperature
    mean = torch.stack([(m(x) / temperature).softmax(-1) for m in members]).mean(0)
    torch.testing.assert_close((distiller.teacher(x) / temperature).softmax(-1), mean)
    log_q = F.log_softmax(student(x) / temperature, -1)
    torch.testing.assert_close(distiller.loss(x), temperature**2 * F.kl_div(log_q, mean, reduction="batchmean"))
    # the same gradient as the average of the KLs to each member
    average = sum(KDLoss(temperature, 1.0, 0.0)(student(x), m(x)) for m in members) / 3
    parameters = list(student.parameters())
    for a, b in zip(torch.autograd.grad(distiller.loss(x), parameters), torch.autograd.grad(average, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_ensemble_of_logits(mlp):
    members = [mlp(16, seed=i).eval() for i in range(3)]
    student, x = mlp(8).eval(), torch.randn(5, 64)
    distiller = Distiller(student, members, KDLoss(2.0, 1.0, 0.0), ensemble="logits")
    mean = (members[0](x) + members[1](x) + members[2](x)) / 3
    torch.testing.assert_close(distiller.loss(x), KDLoss(2.0, 1.0, 0.0)(student(x), mean))


def test_ensemble_of_one_and_masked_classes():
    class Constant(nn.Module):
        def forward(self, x):
            return torch.tensor([[0.0, 1.0, -torch.inf]]).expand(len(x), 3)

    x = torch.zeros(2, 1)
    one = Ensemble([Constant()])(x)
    torch.testing.assert_close(one.softmax(-1), Constant()(x).softmax(-1))
    assert (Ensemble([Constant(), Constant()])(x)[:, 2] == -torch.inf).all()


def test_ensemble_class_dim_follows_the_loss():
    members = [nn.Conv2d(1, 4, 1) for _ in range(2)]
    distiller = Distiller(nn.Conv2d(1, 4, 1), members, KDLoss(2.0, class_dim=1))
    x = torch.randn(2, 1, 3, 3)
    mean = torch.stack([(m(x) / 2).softmax(1) for m in members]).mean(0)
    torch.testing.assert_close((distiller.teacher(x) / 2).softmax(1), mean)
    assert distiller.loss((x, torch.zeros(2, 3, 3, dtype=torch.long))).isfinite()


def test_ensemble_errors(mlp):
    with pytest.raises(ValueError, match="Ensemble: models must hold at least one model, got none"):
        Distiller(mlp(4), [])
    with pytest.raises(ValueError, match="Ensemble: mean must be 'probabilities' or 'logits', got 'vote'"):
        Ensemble([mlp(4)], mean="vote")
    with pytest.raises(TypeError, match="Ensemble: models must be torch modules, got str"):
        Ensemble(["model"])
    with pytest.raises(ValueError, match=r"Ensemble: member 1 must return logits of shape \(2, 3\), got \(2, 4\)"):
        Ensemble([nn.Linear(5, 3), nn.Linear(5, 4)])(torch.zeros(2, 5))


def test_plain_training_needs_no_teacher(mlp):
    student = mlp(8).eval()
    x, y = torch.randn(5, 64), torch.arange(5)
    torch.testing.assert_close(Distiller(student, None, KDLoss(4.0, 0.0, 1.0)).loss((x, y)), F.cross_entropy(student(x), y))
    with pytest.raises(ValueError, match="Distiller: batch must hold teacher_logits because there is no teacher, got none"):
        Distiller(student, None).loss((x, y))


def test_teacher_logits_in_the_batch_replace_the_teacher(mlp):
    student, x, y, t = mlp(8).eval(), torch.randn(5, 64), torch.arange(5), torch.randn(5, 10)
    batch = {"inputs": x, "labels": y, "teacher_logits": t}
    torch.testing.assert_close(Distiller(student, None).loss(batch), KDLoss()(student(x), t, y))


# -- features ----------------------------------------------------------------------------------------------------------


def test_features_come_from_named_modules():
    student, teacher = ConvNet(4), ConvNet(4)
    x, y = images()
    distiller = Distiller(
        student, teacher, KDLoss() + FeatureLoss({"block.0": "block.0", "stem": "stem"}, loss="attention_transfer", weight=2.0)
    )
    terms = distiller.terms((x, y))
    at = type(distiller.loss_module.losses["attention_transfer"].losses[0])()
    expected = at(student.stem(x), teacher.stem(x)) + at(
        student.block[0](torch.relu(student.stem(x))), teacher.block[0](torch.relu(teacher.stem(x)))
    )
    torch.testing.assert_close(terms["attention_transfer"], 2.0 * expected)
    torch.testing.assert_close(distiller.loss((x, y)), terms["kd"] + terms["attention_transfer"])
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())


def test_hooks_are_gone_after_an_error():
    student, teacher = ConvNet(4), ConvNet(4)
    with pytest.raises(RuntimeError):
        Distiller(student, teacher, FeatureLoss({"stem": "stem"})).loss((torch.randn(2, 3, 8, 8), torch.arange(2)))
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())


def test_hint_adapters_are_made_by_prepare_and_listed():
    student, teacher = ConvNet(2), ConvNet(8)
    batch = images()
    distiller = Distiller(student, teacher, KDLoss() + FeatureLoss({"stem": "stem", "block": "block"}, loss="hint"))
    with pytest.raises(RuntimeError, match=r"need an adapter; pass student_width and teacher_width, or call Distiller\.prepare"):
        distiller.loss(batch)
    before = len(list(distiller.parameters()))
    distiller.prepare(batch, seed=5)
    adapters = list(distiller.loss_module.parameters())
    assert [tuple(p.shape) for p in adapters] == [(8, 2), (16, 4)]
    assert len(list(distiller.parameters())) == before + 2
    distiller.loss(batch).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters)
    twin = Distiller(student, teacher, KDLoss() + FeatureLoss({"stem": "stem", "block": "block"}))
    twin.prepare(batch, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(adapters, twin.loss_module.parameters(), strict=True))
    assert set(student.state_dict()) == set(ConvNet(2).state_dict())  # the student stays clean


def test_fsp_reads_two_modules_of_each_model():
    student, teacher = ConvNet(4), ConvNet(4)
    batch = images()
    loss = Distiller(student, teacher, FeatureLoss({("stem", "block"): ("stem", "block")}, loss="fsp")).loss(batch)
    assert loss.item() > 0
    with pytest.raises(ValueError, match=r"FeatureLoss: this loss reads 2 module\(s\) on each side of a pair, got 'stem'"):
        FeatureLoss({"stem": "stem"}, loss="fsp")
    with pytest.raises(ValueError, match=r"FeatureLoss: this loss reads 1 module\(s\)"):
        FeatureLoss({("stem", "block"): "stem"}, loss="hint")


def test_features_of_an_ensemble_member():
    student, teachers = ConvNet(4), [ConvNet(8), ConvNet(8)]
    distiller = Distiller(student, teachers, FeatureLoss({"block": "models.1.block"}, loss=RKDLoss(25.0, 50.0)))
    x, y = images()
    torch.testing.assert_close(
        distiller.loss((x, y)),
        RKDLoss(25.0, 50.0)(student.block(torch.relu(student.stem(x))), teachers[1].block(torch.relu(teachers[1].stem(x)))),
    )


def test_tuple_outputs_and_the_model_itself_as_feature():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(3, 4, batch_first=True)
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.rnn(x)[0])

    student, teacher, x = Encoder(), Encoder(), torch.randn(2, 5, 3)
    loss = Distiller(student, teacher, FeatureLoss({"rnn": "rnn", "": ""}, loss=HintLoss())).loss(x)
    expected = F.mse_loss(student.rnn(x)[0], teacher.rnn(x)[0]) + F.mse_loss(student(x), teacher(x))
    torch.testing.assert_close(loss, expected)


def test_paths_must_exist_and_run_once():
    student, teacher = ConvNet(4), ConvNet(4)
    with pytest.raises(ValueError, match=r"Distiller: student has no module 'blocks'; did you mean 'block'"):
        Distiller(student, teacher, FeatureLoss({"blocks": "block"}))
    with pytest.raises(ValueError, match=r"Distiller: teacher has no module 'layer9'; did you mean"):
        Distiller(student, teacher, FeatureLoss({"block": "layer9"}))
    with pytest.raises(ValueError, match=r"student module 'act' must run once per forward to be read, got 2 runs"):
        Distiller(student, teacher, FeatureLoss({"act": "stem"})).loss(images())


def test_feature_loss_errors():
    for arguments, error, message in [
        (({},), ValueError, "FeatureLoss: pairs must name at least one pair of modules, got none"),
        (("stem",), TypeError, "FeatureLoss: pairs must be a dict of student path to teacher path, got str"),
        (({"a": 3},), TypeError, "FeatureLoss: pairs must hold module paths or tuples of them, got 3"),
        (({"a": "b"}, "kd"), ValueError, "FeatureLoss: loss must be a feature or relation loss, got 'kd', which works on logits"),
        (({"a": "b"}, "nope"), ValueError, "unknown distillation loss 'nope', expected one of"),
        (({"a": "b"}, 3), TypeError, "FeatureLoss: loss must be a name or a feature or relation loss, got int"),
        (({"a": "b"}, "hint", -1.0), ValueError, "FeatureLoss: weight must be a finite number not below 0, got -1.0"),
        (({"a": "b"}, "hint", 0.0), ValueError, "FeatureLoss: weight must be positive, got 0"),
    ]:
        with pytest.raises(error, match=message):
            FeatureLoss(*arguments)


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_losses_as_list_dict_and_default(mlp):
    student, teacher = mlp(8), mlp(16)
    assert isinstance(Distiller(student, teacher).loss_module, KDLoss)
    assert isinstance(Distiller(student, teacher, [KDLoss(), FeatureLoss({"first": "first"}, "pkt")]).loss_module, CombinedLoss)
    assert set(Distiller(student, teacher, {"a": KDLoss(), "b": KDLoss(2.0)}).terms((torch.randn(3, 64), torch.arange(3)))) == {"a", "b"}


def test_constructor_errors(mlp):
    student = mlp(8)
    with pytest.raises(TypeError, match="Distiller: student must be a torch module, got str"):
        Distiller("student", student)
    with pytest.raises(TypeError, match="Distiller: teacher must be a torch module, a list of them or None, got str"):
        Distiller(student, "teacher")
    with pytest.raises(TypeError, match="Distiller: loss must be a distillation loss such as KDLoss"):
        Distiller(student, mlp(8), F.mse_loss)
    with pytest.raises(ValueError, match="Distiller: teacher must not be or contain the student itself"):
        Distiller(student, student)
    with pytest.raises(ValueError, match="Distiller: teacher must not be or contain the student itself"):
        Distiller(student, [mlp(8), student])
    with pytest.raises(ValueError, match="Distiller: ensemble must be 'probabilities' or 'logits', got 'median'"):
        Distiller(student, mlp(8), ensemble="median")
    with pytest.raises(ValueError, match="Distiller: teacher must be given for a loss on its features, got None"):
        Distiller(student, None, FeatureLoss({"first": "first"}))


def test_mismatched_outputs_and_reduction_none(mlp):
    batch = (torch.randn(3, 64), torch.arange(3))
    with pytest.raises(ValueError, match=r"kd_loss: teacher_logits must have the 10 classes of student_logits, got 12"):
        Distiller(mlp(8), nn.Linear(64, 12)).loss(batch)
    with pytest.raises(ValueError, match=r"loss: term 'kd' must be a scalar, got shape \(3,\); use reduction='mean'"):
        Distiller(mlp(8), mlp(8), KDLoss(reduction="none")).loss(batch)


def test_repr_names_models_sizes_and_loss(mlp):
    text = repr(Distiller(mlp(8), [mlp(16), mlp(16)]))
    assert "student: MLP (626 parameters)" in text and "teacher: Ensemble (2,484 parameters)" in text and "KDLoss(temperature=4.0" in text


def test_unwrap(mlp):
    model = mlp(8)
    assert unwrap(nn.DataParallel(model)) is model and unwrap(torch.compile(model, backend="eager")) is model and unwrap(model) is model


def test_compiled_student(mlp):
    student, teacher = mlp(8).eval(), mlp(16).eval()
    compiled = torch.compile(student, backend="eager")
    batch = (torch.randn(5, 64), torch.arange(5))
    torch.testing.assert_close(Distiller(compiled, teacher).loss(batch), Distiller(student, teacher).loss(batch))


def test_kd_loss_compiles_without_graph_breaks():
    loss = torch.compile(KDLoss(2.0, standardize=True), backend="eager", fullgraph=True)
    s, t, y = torch.randn(4, 7), torch.randn(4, 7), torch.arange(4)
    torch.testing.assert_close(loss(s, t, y), KDLoss(2.0, standardize=True)(s, t, y))


def test_features_are_read_before_an_in_place_operation_behind_them():
    def model(inplace: bool, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(inplace=inplace), nn.Linear(width, 2)).eval()

    batch = (torch.randn(32, 8), torch.zeros(32, dtype=torch.long))
    student, teacher = model(True, 16), model(True, 16)
    loss = Distiller(student, teacher, FeatureLoss({"1": "1"})).loss(batch)
    torch.testing.assert_close(loss, F.mse_loss(student[:2](batch[0]), teacher[:2](batch[0])))
    loss.backward()
    assert student[0].weight.grad.norm() > 0
