"""The CUDA kernels of kd_loss on the host, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from support.cuda_emulation import needs_compiler
from support.cuda_kd_loss import emulated, emulated_loss_and_gradient
from support.guard import guarded
from support.kd_loss import assert_close, double_reference, teacher_values

from pycompress.ops.cuda.kd_loss import Plan, plan, scale_in_place, shared_bytes

pytestmark = needs_compiler

DIVERGENCES = ["forward_kl", "reverse_kl", "jsd", "dkd"]
FORMS = ["logits", "probabilities", "log_probabilities"]
VOCABULARIES = [2, 31, 33, 1000, 4097]


def logits(rows: int, classes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed))).to(dtype)


def labels_for(rows: int, classes: int, ignored: tuple[int, ...] = ()) -> torch.Tensor:
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(7))
    labels[list(ignored)] = -100
    return labels


def compare(student, teacher, labels=None, *, temperature, soft_weight=0.7, hard_weight=0.3, rows=1, **options):
    device = {name: options.pop(name) for name in ("arch", "how", "inplace", "order") if name in options}
    options |= {"temperature": temperature, "soft_weight": soft_weight, "hard_weight": hard_weight}
    got = emulated_loss_and_gradient(student, teacher, labels, **options, **device)
    want = double_reference(student, teacher, labels, **options)
    assert_close(got, want, temperature=temperature, soft_weight=soft_weight, rows=rows)
    return got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", VOCABULARIES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_vocabularies_dtypes(divergence, classes, dtype):
    student, teacher, labels = logits(3, classes, 1, dtype), logits(3, classes, 2, dtype), labels_for(3, classes)
    for temperature in (1.0, 2.0, 2.5):
        compare(student, teacher, labels, temperature=temperature, divergence=divergence, rows=3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_reductions_and_masks(divergence, reduction, weighted, masked):
    rows, classes = 5, 77
    student, teacher, labels = logits(rows, classes, 1), logits(rows, classes, 2), labels_for(rows, classes, (1, 4) if masked else ())
    student[1 if masked else 3, 5] = float("nan") if masked else 0.0  # a NaN in a row that does not count
    weights = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0]) if weighted else None
    _, gradient = compare(
        student, teacher, labels, temperature=2.0, divergence=divergence, reduction=reduction, row_weights=weights, label_smoothing=0.1
    )  # fmt: skip
    ignored = [1, 4] if masked else []
    assert not gradient[ignored + ([3] if weighted else [])].any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_teacher_forms_and_mixed_dtypes(divergence, form, dtypes):
    student, teacher = (
        logits(3, 133, 1, dtypes[0]),
        teacher_values(logits(3, 133, 2) / 3, form).to(dtypes[1]),
    )  # no probability below float16
    compare(student, teacher, labels_for(3, 133), temperature=3.0, divergence=divergence, teacher_form=form)


@pytest.mark.parametrize("hard_weight", [0.0, 0.5])
@pytest.mark.parametrize(
    ("form", "tail"), [("logits", False), ("probabilities", True), ("probabilities", False), ("log_probabilities", True)]
)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_top_k_teacher(divergence, form, tail, hard_weight):
    if divergence == "reverse_kl" and not tail:
        pytest.skip("infinite, and refused")
    student, full = logits(4, 203, 1), logits(4, 203, 2)
    for k in (1, 7, 40, 203):
        values, ids = teacher_values(full, form).topk(k)
        labels = labels_for(4, 203)
        labels[0] = ids[0, 0]  # a label among the named classes
        for how in (None, Plan(32, 2, True), Plan(64, 1, False)):
            if k == 203 and tail:
                continue  # what is left to 1 is rounding
            compare(
                student, values, labels, temperature=2.0, hard_weight=hard_weight, divergence=divergence, teacher_form=form, tail=tail,
                teacher_ids=ids, how=how, label_smoothing=0.1,
            )  # fmt: skip


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("on_chip", [True, False])
def test_vocabularies_of_different_size(divergence, on_chip):
    how = Plan(32, 1, on_chip)
    for temperature in (1.0, 2.0):
        student, teacher, labels = logits(3, 100, 1), logits(3, 77, 2), labels_for(3, 100)
        compare(student, teacher, labels, temperature=temperature, divergence=divergence, class_map="prefix", how=how)
        compare(teacher, student, labels % 77, temperature=temperature, divergence=divergence, class_map="prefix", how=how)
        mapping = torch.randperm(77, generator=torch.Generator().manual_seed(3))
        mapping = torch.cat([mapping[:50], torch.full((50,), -1)])[torch.randperm(100, generator=torch.Generator().manual_seed(4))]
        compare(student, teacher, labels, temperature=temperature, divergence=divergence, class_map=mapping, how=how)


@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
@pytest.mark.parametrize("how", [Plan(32, 1, True), Plan(96, 2, True), Plan(64, 8, True), Plan(256, 4, True), Plan(128, 1, False)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_plans_and_orders(divergence, how, order):
    student, teacher, labels = logits(3, 1003, 1, torch.bfloat16), logits(3, 1003, 2, torch.bfloat16), labels_for(3, 1003, (1,))
    compare(student, teacher, labels, temperature=2.0, divergence=divergence, how=how, order=order)
    if how.cluster == 1:
        compare(student, teacher, labels, temperature=2.0, divergence=divergence, how=how, order=order, arch=80)


def test_clusters_wider_than_the_row():
    compare(logits(2, 17, 1), logits(2, 17, 2), labels_for(2, 17), temperature=2.0, how=Plan(32, 8, True))


@pytest.mark.parametrize("how", [Plan(32, 1, True), Plan(32, 2, True), Plan(32, 1, False)])
@pytest.mark.parametrize("classes", [64, 203])
def test_gradient_in_place(how, classes):
    student, teacher, labels = logits(4, classes, 1), logits(4, classes, 2), labels_for(4, classes, (2,))
    values, ids = teacher.softmax(-1).topk(5)
    for order in ("forward", "backward", "shuffled"):
        for divergence in DIVERGENCES:
            compare(student, teacher, labels, temperature=2.0, divergence=divergence, how=how, inplace=True, order=order)
        compare(
            student, values, labels, temperature=2.0, teacher_form="probabilities", tail=True, teacher_ids=ids, how=how, inplace=True,
            order=order,
        )  # fmt: skip


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.25, 2.0, 100.0])
def test_extreme_logits(divergence, temperature):
    student, teacher, labels = logits(4, 333, 1), logits(4, 333, 2), labels_for(4, 333)
    student[0] += 1e4
    teacher[1] -= 1e4
    student[2, 3], teacher[2, 3] = 1e4, 1e4
    student[3, 9], teacher[3, 9] = -1e4, -1e4
    compare(student, teacher, labels, temperature=temperature, divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_identical_models_and_rows_that_do_not_count(divergence):
    student = logits(3, 77, 1)
    loss, gradient = emulated_loss_and_gradient(
        student, student.clone(), labels_for(3, 77), temperature=2.0, soft_weight=1.0, hard_weight=0.0, divergence=divergence
    )
    assert abs(float(loss)) <= 1e-6 and float(gradient.abs().max()) <= (0.0 if divergence == "forward_kl" else 2e-7)
    loss, gradient = emulated_loss_and_gradient(
        student, student.clone(), torch.full((3,), -100), temperature=2.0, soft_weight=1.0, hard_weight=1.0, divergence=divergence
    )
    assert float(loss) == 0.0 and not gradient.any()


def test_minus_infinity_masks_a_class():
    student, teacher = logits(3, 50, 1), logits(3, 50, 2)
    student[0, 7] = teacher[0, 7] = -float("inf")
    teacher[1, 9] = -float("inf")
    labels = torch.tensor([1, 2, 3])
    compare(student, teacher, labels, temperature=2.0, divergence="forward_kl")
    compare(student[[0, 2]], teacher[[0, 2]], labels[[0, 2]], temperature=2.0, divergence="reverse_kl")
    compare(student, teacher, labels, temperature=2.0, divergence="jsd")
    only_student = logits(1, 50, 3)
    only_student[0, 4] = -float("inf")
    loss, _ = emulated_loss_and_gradient(only_student, logits(1, 50, 4), temperature=2.0, soft_weight=1.0, hard_weight=0.0)
    assert float(loss) == float("inf")


@pytest.mark.parametrize("cluster", [1, 2])
def test_what_cannot_be_refused_makes_its_row_nan(cluster):
    """On the CPU these raise; looking at values would stall a stream."""
    student, teacher, how = logits(3, 40, 1), logits(3, 40, 2), Plan(32, cluster, True)
    options = {"temperature": 2.0, "soft_weight": 1.0, "hard_weight": 1.0, "reduction": "none", "how": how}
    good = torch.tensor([1, 2, 3])
    values, ids = teacher.topk(4)
    twice, beyond = ids.clone(), ids.clone()
    twice[1, 3], beyond[1, 0] = twice[1, 0], 40
    cases = [
        emulated_loss_and_gradient(student, teacher, torch.tensor([1, 40, 3]), **options),
        emulated_loss_and_gradient(student, teacher, torch.tensor([1, -1, 3]), **options),
        emulated_loss_and_gradient(student, teacher, good, row_weights=torch.tensor([1.0, -1.0, 1.0]), **options),
        emulated_loss_and_gradient(student, values, good, teacher_ids=twice, **options),
        emulated_loss_and_gradient(student, values, good, teacher_ids=beyond, **options),
    ]
    nan_student = student.clone()
    nan_student[1, 39] = float("nan")
    cases.append(emulated_loss_and_gradient(nan_student, teacher, good, **options))
    for loss, gradient in cases:
        assert loss.isnan().tolist() == [False, True, False]
        assert bool(gradient[1].isnan().all()) and not gradient[[0, 2]].isnan().any()


def test_row_strides_and_one_scale_for_many_calls():
    wide, teacher, labels = logits(4, 100, 1), logits(4, 90, 2), labels_for(4, 90)
    options = {"temperature": 2.0, "soft_weight": 1.0, "hard_weight": 0.5}
    want = double_reference(wide[:, :90], teacher, labels, **options, reduction="sum")
    got = emulated_loss_and_gradient(wide[:, :90], teacher, labels, **options, reduction="sum", scale=torch.tensor(0.25))
    assert_close(got, (want[0] / 4, want[1] / 4), temperature=2.0)


def test_soft_or_hard_alone():
    student, teacher, labels = logits(3, 1000, 1), logits(3, 1000, 2), labels_for(3, 1000)
    compare(student, teacher, labels, temperature=2.0, soft_weight=0.0, hard_weight=1.0, label_smoothing=0.2)
    compare(student, teacher, None, temperature=2.0, soft_weight=1.0, hard_weight=0.0)


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_plans(capability):
    for classes in (1, 2, 31, 1000, 32000, 50257, 128256, 151936, 262144, 1_000_000):
        for size in (2, 4):
            how = plan(classes, size, size, 0, capability)
            assert how is not None and how.threads % 32 == 0 and 32 <= how.threads <= 256
            assert how.cluster == 1 or capability[0] >= 9
            assert emulated().kd_loss_shared_bytes(classes, size == 2, size == 2, True, 0, how.cluster, how.on_chip) <= 227 * 1024
            assert shared_bytes(classes, size, size, 0, how.cluster, how.on_chip) == emulated().kd_loss_shared_bytes(
                classes, size == 2, size == 2, True, 0, how.cluster, how.on_chip
            )
            assert shared_bytes(classes, size, 0, 50, how.cluster, how.on_chip) == emulated().kd_loss_shared_bytes(
                classes, size == 2, size == 2, True, 50, how.cluster, how.on_chip
            )
    assert plan(10_000, 2, 0, 30_000, capability) is None  # the marks of so many classes


def test_plans_keep_large_vocabularies_on_chip_where_clusters_exist():
    assert plan(128256, 2, 2, 0, (9, 0)) == Plan(256, 8, True)
    assert plan(32000, 2, 2, 0, (9, 0)) == Plan(256, 2, True)
    assert plan(1000, 2, 2, 0, (9, 0)) == Plan(128, 1, True)
    assert plan(32000, 2, 2, 0, (8, 0)) == Plan(256, 1, True)
    assert plan(128256, 2, 2, 0, (8, 0)) == Plan(256, 1, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 64), (5, 2049), (1, 7)])
@pytest.mark.parametrize("per_row", [False, True])
def test_gradients_are_scaled_in_place(shape, dtype, per_row):
    gradient = guarded(logits(*shape, 1, dtype))
    upstream = torch.linspace(0.5, 1.0, shape[0]) if per_row else torch.tensor(0.75)
    want = (gradient.float() * (upstream[:, None] if per_row else upstream)).to(dtype)
    scale_in_place(emulated(), 0, gradient, upstream)
    assert torch.equal(gradient, want)
    scale_in_place(emulated(), 0, gradient, torch.ones(shape[0]) if per_row else torch.ones(()))
    assert torch.equal(gradient, want)
