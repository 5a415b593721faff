"""The history says what happened, and what computed it."""

from __future__ import annotations

import pytest

from pycompress.distillation import Distiller, DKDLoss, FeatureLoss, History, KDLoss, MutualLearning
from pycompress.distillation.history import EpochRecord
from pycompress.ops import native


def best_kernel() -> str:
    reason = native.fallback_reason("kd_loss")
    return f"kd_loss, {native.kernels('kd_loss')[0]}" if reason is None else f"kd_loss, reference ({reason})"


def test_fused_losses_name_their_kernel_and_others_are_torch(mlp, loaders, teacher):
    loss = {"soft": KDLoss(), "decoupled": DKDLoss(), "hint": FeatureLoss({"norm": "norm"}, "hint")}
    history = Distiller(mlp(16), teacher, loss).fit(loaders()[0], epochs=1, progress=False)
    assert history.epochs[0].kernels == {"soft": best_kernel(), "decoupled": best_kernel(), "hint": "torch"}
    assert history.epochs[0].kernels.keys() == history.epochs[0].terms.keys()


@pytest.mark.parametrize("disable", [False, True])
def test_the_reference_comes_with_its_reason(mlp, digits, teacher, disable, monkeypatch):
    if disable:
        monkeypatch.setattr(native, "_KERNELS", {})
        monkeypatch.setattr(native, "missing_reason", "no extension in this test")
    student = mlp(16) if disable else mlp(16).double()
    batch = (digits[0][:8], digits[1][:8]) if disable else (digits[0][:8].double(), digits[1][:8])
    teacher = teacher if disable else mlp(32).double()
    distiller = Distiller(student, teacher)
    distiller.loss(batch)
    if disable:
        expected = "kd_loss, reference (no extension in this test)"
    elif native.fallback_reason("kd_loss"):
        expected = best_kernel()
    else:
        expected = "kd_loss, reference (no kernel for torch.float64 and torch.float64, only float32, bfloat16 and float16)"
    assert distiller.term_kernels == {"kd": expected}


def test_a_loss_without_teacher_still_names_its_kernel(mlp, loaders):
    distiller = Distiller(mlp(16), None, KDLoss(soft_weight=0.0, hard_weight=1.0))
    assert distiller.fit(loaders()[0], epochs=1, progress=False).epochs[0].kernels == {"kd": best_kernel()}


def test_every_student_of_a_cohort_has_its_terms(mlp, loaders):
    cohort = MutualLearning([mlp(8), mlp(8, seed=1)])
    record = cohort.fit(loaders()[0], epochs=1, progress=False).epochs[0]
    assert record.kernels == {"0/kd": best_kernel(), "1/kd": best_kernel()}


def test_kernels_survive_a_checkpoint_and_old_ones_load(mlp, loaders, teacher, tmp_path):
    train, val = loaders()
    path = tmp_path / "run.safetensors"
    first = Distiller(mlp(16), teacher).fit(train, epochs=1, val_loader=val, checkpoint=path, progress=False)
    resumed = Distiller(mlp(16), teacher).fit(train, epochs=1, val_loader=val, checkpoint=path, resume=True, progress=False)
    assert resumed.epochs == first.epochs
    old = first.to_dict()
    del old["epochs"][0]["kernels"]
    assert History.from_dict(old).epochs[0].kernels == {}


def test_summary():
    assert History().summary() == "0 epochs"
    history = History(
        [
            EpochRecord(1, 2.0, {"kd": 1.5, "hint": 0.5}, 0.1, 0.5, 1.25, {"kd": "kd_loss, avx2", "hint": "torch"}),
            EpochRecord(2, 1.0, {"kd": 0.75, "hint": 0.25}, 0.1, 0.75, 1.25, {"kd": "kd_loss, avx2", "hint": "torch"}),
        ],
        "accuracy",
    )
    assert history.summary().splitlines() == [
        "2 epochs, 2.5 s; training loss 2 -> 1; best accuracy 0.75 in epoch 2",
        "  kd    0.75  kd_loss, avx2",
        "  hint  0.25  torch",
    ]
    alone = History([EpochRecord(1, 2.0, {"kd": 2.0}, 0.1, None, 1.0)])
    assert alone.summary().splitlines() == ["1 epoch, 1.0 s; training loss 2 -> 2", "  kd  2"]
