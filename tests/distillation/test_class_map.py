"""KDLoss between vocabularies of different size, by itself and in fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pycompress as pc
from pycompress.ops import kd_loss

MAP = torch.tensor([3, -1, 0, 7, 2, -1, 9, 1, 4, 5])


@pytest.mark.parametrize("loss_class", [pc.KDLoss, pc.distillation.ReverseKLLoss, pc.distillation.JSDLoss])
@pytest.mark.parametrize("class_map", ["prefix", MAP], ids=["prefix", "tensor"])
def test_class_map_is_that_of_kd_loss(loss_class, class_map):
    student, teacher, labels = torch.randn(4, 10), torch.randn(4, 12), torch.randint(10, (4,))
    loss = loss_class(2.0, 0.4, 0.6, class_map=class_map)
    options = {"temperature": 2.0, "soft_weight": 0.4, "hard_weight": 0.6, "class_map": class_map}
    if loss_class is not pc.KDLoss:
        options["divergence"] = loss.divergence
    assert torch.equal(loss(student, teacher, labels), kd_loss(student, teacher, labels, **options))
    assert not loss.state_dict() and not list(loss.parameters())
    assert ("class_map='prefix'" if class_map is not MAP else "class_map='<10 classes>'") in repr(loss)
    if class_map is MAP:
        assert loss.to("meta").class_map.device.type == "meta"


def test_the_advice_for_other_vocabularies_works():
    student, teacher, batch = nn.Linear(8, 10), nn.Linear(8, 12), (torch.randn(4, 8), torch.randint(10, (4,)))
    with pytest.raises(ValueError, match="for vocabularies of different size pass class_map='prefix'"):
        pc.Distiller(student, teacher).loss(batch)
    assert pc.Distiller(student, teacher, pc.KDLoss(class_map="prefix")).loss(batch).isfinite()


@pytest.mark.parametrize("class_map", ["prefix", MAP], ids=["prefix", "tensor"])
def test_agreement_compares_the_same_classes(class_map):
    teacher = nn.Linear(8, 12)
    student = nn.Linear(8, 10)
    with torch.no_grad():  # the student says what the teacher says about the classes that both have
        known = torch.arange(10) if class_map == "prefix" else MAP.clamp_min(0)
        student.weight.copy_(teacher.weight[known])
        student.bias.copy_(teacher.bias[known])
        if class_map is MAP:
            student.bias[MAP < 0] = -1e4
        teacher.bias[10:] = 1e4 if class_map == "prefix" else teacher.bias[10:]
    distiller = pc.Distiller(student, teacher, pc.KDLoss(1.0, 1.0, 0.0, class_map=class_map))
    history = distiller.fit([torch.randn(6, 8)], 1, val_loader=[torch.randn(50, 8)], optimizer=lambda p: torch.optim.SGD(p, lr=1e-9))
    assert history.metric_name == "agreement" and history.best.metric == 1.0


def test_plain_training_reads_no_map():
    loss = pc.KDLoss(soft_weight=0.0, hard_weight=1.0, class_map=MAP + 20)
    student, labels = torch.randn(4, 10), torch.randint(10, (4,))
    assert torch.equal(loss(student, student, labels), pc.KDLoss(soft_weight=0.0, hard_weight=1.0)(student, student, labels))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"class_map": "suffix"}, ValueError, "KDLoss: class_map must be None, 'prefix' or a tensor of teacher classes, got 'suffix'"),
        ({"class_map": torch.ones(3)}, TypeError, r"KDLoss: class_map must be integers \(classes,\), got torch.float32 of shape \(3,\)"),
        ({"class_map": "prefix", "standardize": True}, ValueError, "KDLoss: standardize must be False with class_map"),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        pc.KDLoss(**options)
