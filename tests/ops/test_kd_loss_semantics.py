"""The traps: what is divided by what, ends of ranges, infinities, rows that do not count."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.kd_loss import assert_close, double_reference, loss_and_gradient
from support.kernels import all_kernels, native_kernels

from pycompress.ops import kd_loss

DIVERGENCES = ["forward_kl", "reverse_kl", "jsd", "dkd"]
BOTH = pytest.mark.parametrize("classes", [10, 1100])  # rows across lanes, classes across lanes
EVERY = pytest.mark.parametrize("kernel", all_kernels("kd_loss"))
NATIVE = pytest.mark.parametrize("kernel", native_kernels("kd_loss"))


def data(rows, classes, spread=2.0):
    return spread * torch.randn(rows, classes), spread * torch.randn(rows, classes), torch.randint(classes, (rows,))


@EVERY
def test_which_weight_is_where_and_t_squared(kernel):
    student, teacher, labels = data(6, 20)
    options = {"temperature": 3.0, "kernel": kernel}
    soft = kd_loss(student, teacher, labels, soft_weight=1.0, hard_weight=0.0, **options)
    hard = kd_loss(student, teacher, labels, soft_weight=0.0, hard_weight=1.0, **options)
    both = kd_loss(student, teacher, labels, soft_weight=0.2, hard_weight=0.9, **options)
    kl = F.kl_div(F.log_softmax(student / 3, 1), F.softmax(teacher / 3, 1), reduction="batchmean")
    torch.testing.assert_close(soft, 9 * kl, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(hard, F.cross_entropy(student, labels), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both, 0.2 * soft + 0.9 * hard, rtol=1e-5, atol=1e-6)


@EVERY
def test_reductions(kernel):
    student, teacher, labels = (x.reshape(2, 3, *x.shape[1:]) for x in data(6, 20))
    labels[0, 1] = -100
    options = {"temperature": 2.0, "soft_weight": 0.5, "hard_weight": 0.5, "kernel": kernel}
    rows = kd_loss(student, teacher, labels, reduction="none", **options)
    assert rows.shape == (2, 3) and rows[0, 1] == 0 and (rows != 0).sum() == 5
    for reduction, divisor in (("sum", 1), ("mean", 5), ("batchmean", 2)):
        torch.testing.assert_close(kd_loss(student, teacher, labels, reduction=reduction, **options), rows.sum() / divisor)
    weights = torch.tensor([[2.0, 5.0, 0.0], [1.0, 1.0, 0.5]])
    mean = kd_loss(student, teacher, labels, row_weights=weights, **options)
    torch.testing.assert_close(mean, (rows * weights).sum() / 4.5)  # 5.0 belongs to the ignored row


@EVERY
def test_ends_of_beta(kernel):
    student, teacher, labels = data(4, 30)
    options = {"temperature": 2.0, "soft_weight": 1.0, "hard_weight": 0.0, "kernel": kernel}
    for beta, name in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        a = loss_and_gradient(student, teacher, labels, divergence="jsd", beta=beta, **options)
        b = loss_and_gradient(student, teacher, labels, divergence=name, **options)
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    # the formula itself goes to 0 there, and is symmetric at 0.5
    assert kd_loss(student, teacher, divergence="jsd", beta=1e-4, **options) < 0.01
    forth, back = (kd_loss(a, b, divergence="jsd", **options) for a, b in ((student, teacher), (teacher, student)))
    torch.testing.assert_close(forth, back, rtol=1e-5, atol=1e-6)


@EVERY
@BOTH
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0, 100.0])
def test_identical_models(kernel, classes, divergence, temperature):
    student, _, labels = data(3, classes)
    options = {"temperature": temperature, "soft_weight": 1.0, "hard_weight": 0.0, "divergence": divergence, "kernel": kernel}
    loss, gradient = loss_and_gradient(student, student.clone(), labels, **options)
    if kernel == "reference":
        assert abs(float(loss)) < 1e-6 * temperature**2 and float(gradient.norm()) < 1e-5 * temperature
    elif divergence == "dkd":
        # the label's own share of the target part is rounded apart from the rest's
        assert abs(float(loss)) < 1e-6 * temperature**2 and float(gradient.norm()) < 1e-6 * temperature
    else:
        assert float(loss) == 0.0 and not gradient.any()


@EVERY
@BOTH
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_no_row_counts(kernel, classes, divergence):
    student, teacher, labels = data(3, classes)
    student[0], teacher[1] = math.nan, math.nan
    options = {"temperature": 2.0, "soft_weight": 0.5, "hard_weight": 0.5, "divergence": divergence, "kernel": kernel}
    for reduction in ("none", "sum", "mean", "batchmean"):
        ignored = loss_and_gradient(student, teacher, torch.full_like(labels, -100), reduction=reduction, **options)
        weightless = loss_and_gradient(student, teacher, labels, row_weights=torch.zeros(3), reduction=reduction, **options)
        for loss, gradient in (ignored, weightless):
            assert not loss.any() and not gradient.any()


@EVERY
@BOTH
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_nan_stays_in_its_row(kernel, classes, divergence):
    options = {"temperature": 2.0, "soft_weight": 0.5, "hard_weight": 0.5, "divergence": divergence, "kernel": kernel, "reduction": "none"}
    for model in range(2):
        logits, labels = list(data(4, classes)[:2]), torch.tensor([0, 1, 2, -100])
        logits[model][1, 5] = math.nan
        logits[model][3, 5] = math.nan  # in an ignored row
        loss, gradient = loss_and_gradient(*logits, labels, **options)
        assert loss.isnan().tolist() == [False, True, False, False]
        assert gradient[[0, 2]].isfinite().all() and gradient[1].isnan().any() and not gradient[3].any()


@NATIVE
@pytest.mark.parametrize("classes", [1, 10, 1100])
def test_nan_and_infinity_in_the_cross_entropy_alone(kernel, classes):
    student, teacher, labels = data(2, classes)
    options = {"temperature": 1.0, "soft_weight": 0.0, "hard_weight": 1.0, "kernel": kernel, "reduction": "none"}
    for bad in (math.nan, math.inf):
        student[0, classes // 2] = bad
        loss, gradient = loss_and_gradient(student, teacher, labels, **options)
        assert not loss[0].isfinite() or (classes == 1 and bad == math.inf)
        assert loss[1].isfinite() and gradient[1].isfinite().all()


@NATIVE
@BOTH
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 3.0, 5.0])
def test_masked_classes(kernel, classes, divergence, temperature):
    """The same classes at minus infinity in both models, as in a padded vocabulary: as if they did not exist."""
    student, teacher, _ = data(3, classes)
    masked = torch.arange(classes) % 3 == 1
    labels = torch.tensor([0, 2, 3])
    student[:, masked], teacher[:, masked] = -math.inf, -math.inf
    options = {"temperature": temperature, "soft_weight": 0.5, "hard_weight": 0.5, "divergence": divergence}
    got = loss_and_gradient(student, teacher, labels, kernel=kernel, **options)
    short = double_reference(student[:, ~masked], teacher[:, ~masked], labels - labels // 3 - (labels % 3 == 2).long(), **options)
    assert not got[1][:, masked].any()
    assert_close((got[0], got[1][:, ~masked]), short, temperature=temperature)


@EVERY
@BOTH
def test_minus_infinity_in_one_model(kernel, classes):
    student, teacher, labels = data(2, classes)
    labels[:] = 0
    hidden_teacher, hidden_student = teacher.clone(), student.clone()
    hidden_teacher[0, 3], hidden_student[0, 3] = -math.inf, -math.inf
    options = {"temperature": 2.0, "soft_weight": 1.0, "hard_weight": 0.0, "kernel": kernel, "reduction": "none"}

    def rows(s, t, divergence):
        return loss_and_gradient(s, t, labels, divergence=divergence, **options)

    assert rows(student, hidden_teacher, "forward_kl")[0].isfinite().all()
    assert rows(student, hidden_teacher, "reverse_kl")[0].tolist()[0] == math.inf
    assert rows(hidden_student, teacher, "forward_kl")[0].tolist()[0] == math.inf
    assert rows(hidden_student, teacher, "reverse_kl")[0].isfinite().all()
    for s, t in ((student, hidden_teacher), (hidden_student, teacher)):
        loss, gradient = rows(s, t, "jsd")
        assert loss.isfinite().all() and gradient.isfinite().all()
        assert_close(
            (loss, gradient), double_reference(s, t, labels, divergence="jsd", **{**options, "kernel": "reference"}), temperature=2.0
        )
    # infinite loss, but the gradient T (q - p) is an ordinary number
    assert rows(hidden_student, teacher, "forward_kl")[1].isfinite().all()
    assert rows(student, hidden_teacher, "reverse_kl")[0][1].isfinite()


@NATIVE
def test_leading_and_whole_blocks_masked(kernel):
    student, teacher, _ = data(2, 4100)
    labels = torch.tensor([4099, 3000])
    for piece in (slice(0, 1500), slice(0, 2048), slice(2048, 3000), slice(1, 2), slice(0, 1)):
        s, t = student.clone(), teacher.clone()
        s[:, piece], t[:, piece] = -math.inf, -math.inf
        for divergence in DIVERGENCES:
            options = {"temperature": 4.0, "soft_weight": 1.0, "hard_weight": 1.0, "divergence": divergence}
            got = loss_and_gradient(s, t, labels, kernel=kernel, **options)
            assert_close(got, double_reference(s, t, labels, **options), temperature=4.0)


@NATIVE
@BOTH
@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0, 100.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_huge_logits(kernel, classes, temperature, divergence):
    student, teacher, labels = data(4, classes)
    options = {"temperature": temperature, "soft_weight": 1.0, "hard_weight": 1.0, "divergence": divergence}
    # all logits high or low: the same loss as around 0, up to the rounding of the logits themselves
    for shift in (1e4, -1e4):
        s, t = (student + shift), (teacher - shift)
        got = loss_and_gradient(s, t, labels, kernel=kernel, **options)
        assert_close(got, double_reference(s, t, labels, **options), temperature=temperature)
    # some at +-1e4, and values that rise from block to block, so that every reference point turns out too low
    s, t = student.clone(), teacher.clone()
    s[:, ::3] += 1e4
    t[:, 1::4] -= 1e4
    ramp = torch.linspace(-1e4, 1e4, classes)
    for a, b in ((s, t), (student + ramp, teacher + ramp), (student - ramp, teacher + 0.1 * ramp)):
        loss, gradient = loss_and_gradient(a, b, labels, kernel=kernel, **options)
        want_loss, want_gradient = double_reference(a, b, labels, **options)
        torch.testing.assert_close(loss.double(), want_loss, rtol=1e-5, atol=1e-5 * (1 + temperature**2))
        assert gradient.isfinite().all()
        # a logit of 1e4 is known to 2^-11, so its exponent in units of 1 / T is too
        size = max(float(want_gradient.norm()), temperature * 4**-0.5)
        assert (gradient - want_gradient).norm() <= (1e-5 + 2.0**-24 * 4e4 / temperature) * size * 10


@NATIVE
@BOTH
def test_confident_rows_in_dkd(kernel, classes):
    """The label's probability differs from 1 by less than float32 shows; the rest must not be lost."""
    student, teacher, labels = data(3, classes)
    student[torch.arange(3), labels] = 40.0
    teacher[torch.arange(3), labels] = 30.0
    options = {"temperature": 1.0, "soft_weight": 1.0, "hard_weight": 0.0, "divergence": "dkd"}
    got = loss_and_gradient(student, teacher, labels, kernel=kernel, **options)
    want = double_reference(student, teacher, labels, **options)
    assert want[0] > 1
    assert_close(got, want, temperature=1.0)


@EVERY
def test_dkd_parts_sum_to_kl(kernel):
    """KL = target part + (1 - p_label) * nontarget part (Zhao et al. 2022, equation 6), for one row at a time."""
    student, teacher, labels = data(5, 30)
    options = {"temperature": 2.0, "soft_weight": 1.0, "hard_weight": 0.0, "reduction": "none", "kernel": kernel}
    kl = kd_loss(student, teacher, labels, **options)
    target = kd_loss(student, teacher, labels, divergence="dkd", part_weights=(1.0, 0.0), **options)
    rest = kd_loss(student, teacher, labels, divergence="dkd", part_weights=(0.0, 1.0), **options)
    p = F.softmax(teacher / 2, 1).gather(1, labels[:, None]).squeeze(1)
    torch.testing.assert_close(target + (1 - p) * rest, kl, rtol=1e-4, atol=1e-5)


def test_dist_is_blind_to_scale_and_shift_of_probabilities():
    _, teacher, labels = data(8, 12)
    p = teacher.softmax(1)
    student = (0.5 * p + 0.5 / 12).log()
    options = {"temperature": 1.0, "soft_weight": 1.0, "hard_weight": 0.0, "divergence": "dist"}
    assert abs(float(kd_loss(student, teacher, labels, **options))) < 1e-5
    assert kd_loss(-student, teacher, labels, **options) > 0.5


@NATIVE
def test_probabilities_need_not_sum_to_one(kernel):
    student, teacher, labels = data(3, 1100)
    p = teacher.softmax(1)
    p[:, 7] = 0.0
    options = {"temperature": 2.0, "soft_weight": 1.0, "hard_weight": 0.0, "teacher_form": "probabilities", "kernel": kernel}
    a, b = (loss_and_gradient(student, x, labels, **options) for x in (p / p.sum(1, keepdim=True), 3 * p))
    torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-5)
    assert (a[1] - b[1]).norm() < 1e-5 * a[1].norm()


@NATIVE
@BOTH
@pytest.mark.parametrize("temperature", [0.25, 0.5, 1.0, 2.0, 10.0, 30.0, 100.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_temperatures(kernel, classes, temperature, divergence):
    student, teacher, labels = data(6, classes)
    options = {"temperature": temperature, "soft_weight": 1.0, "hard_weight": 0.5, "divergence": divergence}
    got = loss_and_gradient(student, teacher, labels, kernel=kernel, **options)
    assert_close(got, double_reference(student, teacher, labels, **options), temperature=temperature)
