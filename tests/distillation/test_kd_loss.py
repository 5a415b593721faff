"""KDLoss and its functional form against float64 compositions of F.kl_div and F.cross_entropy; the field's traps pinned."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pycompress.distillation import JSDLoss, KDLoss, ReverseKLLoss
from pycompress.distillation.losses.kd import DIVERGENCES
from pycompress.distillation.losses.standardize import standardize
from pycompress.ops import kd_loss as fused_kd_loss

IGNORE = -100


def kd_loss(*tensors, beta=None, divergence="forward_kl", **options):
    """The op behind KDLoss, which takes beta for "jsd" only; the tables below give it to every divergence."""
    return fused_kd_loss(*tensors, divergence=divergence, beta=beta if divergence == "jsd" else None, **options)


def make(rows: int, classes: int, seed: int = 0, dtype: torch.dtype = torch.float64, spread: float = 3.0):
    generator = torch.Generator().manual_seed(seed)
    student = (torch.randn(rows, classes, generator=generator, dtype=torch.float64) * spread).to(dtype).requires_grad_()
    teacher = (torch.randn(rows, classes, generator=generator, dtype=torch.float64) * spread).to(dtype)
    labels = torch.randint(classes, (rows,), generator=generator)
    return student, teacher, labels


def oracle_divergence(s: torch.Tensor, t: torch.Tensor, temperature: float, divergence: str, beta: float) -> torch.Tensor:
    """Per row, by torch's own kl_div: F.kl_div(input, target) is KL(target || input)."""
    log_q, log_p = F.log_softmax(s / temperature, -1), F.log_softmax(t / temperature, -1)
    if divergence == "jsd" and beta in (0.0, 1.0):
        divergence = "forward_kl" if beta == 0.0 else "reverse_kl"
    if divergence == "forward_kl":
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    if divergence == "reverse_kl":
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    to_m = [F.kl_div(log_m, log, reduction="none", log_target=True).sum(-1) for log in (log_p, log_q)]
    return beta * to_m[0] + (1 - beta) * to_m[1]


def oracle(s, t, y, *, temperature, soft_weight, hard_weight, divergence, beta, label_smoothing, reduction):
    rows = soft_weight * temperature**2 * oracle_divergence(s, t, temperature, divergence, beta)
    rows = rows + hard_weight * F.cross_entropy(s, y, reduction="none", ignore_index=IGNORE, label_smoothing=label_smoothing)
    rows = torch.where(y == IGNORE, 0.0, rows)
    if reduction == "none":
        return rows
    return rows.sum() / {"sum": 1, "mean": max(int((y != IGNORE).sum()), 1), "batchmean": len(y)}[reduction]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
@pytest.mark.parametrize(
    "divergence, beta", [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.0), ("jsd", 1.0)]
)
@pytest.mark.parametrize("shape", [(1, 2), (7, 1), (13, 10), (5, 1031)])
def test_value_and_gradient_equal_torch(shape, divergence, beta, reduction):
    s, t, y = make(*shape)
    y[::3] = IGNORE
    options = {
        "temperature": 2.5,
        "soft_weight": 0.7,
        "hard_weight": 0.2,
        "divergence": divergence,
        "beta": beta,
        "label_smoothing": 0.1,
        "reduction": reduction,
    }
    ours, theirs = kd_loss(s, t, y, **options), oracle(s, t, y, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    upstream = torch.rand(ours.shape, dtype=ours.dtype, generator=torch.Generator().manual_seed(1)) + 0.5
    (mine,) = torch.autograd.grad(ours, s, upstream)
    (other,) = torch.autograd.grad(theirs, s, upstream)
    torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradcheck(divergence, reduction):
    s, t, y = make(4, 5)
    y[1] = IGNORE
    weights = torch.tensor([0.5, 1.0, 2.0, 0.0], dtype=torch.float64)

    def loss(x):
        return kd_loss(
            x, t, y, temperature=3.0, soft_weight=0.4, hard_weight=0.6, divergence=divergence, beta=0.3, label_smoothing=0.2,
            row_weights=weights, reduction=reduction,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (s,))
    assert torch.autograd.gradgradcheck(loss, (s,))


# -- the traps ---------------------------------------------------------------------------------------------------------


def test_soft_weight_is_on_the_teacher_and_hard_weight_on_the_labels():
    s, t, y = make(6, 10)
    soft_only = KDLoss(temperature=2.0, soft_weight=1.0, hard_weight=0.0)
    hard_only = KDLoss(temperature=2.0, soft_weight=0.0, hard_weight=1.0)
    kl = F.kl_div(F.log_softmax(s / 2, -1), F.log_softmax(t / 2, -1), reduction="batchmean", log_target=True)
    torch.testing.assert_close(soft_only(s, t), 4 * kl)
    torch.testing.assert_close(hard_only(s, t, y), F.cross_entropy(s, y))
    torch.testing.assert_close(KDLoss(2.0, 0.3, 0.9)(s, t, y), 0.3 * 4 * kl + 0.9 * F.cross_entropy(s, y))


def test_defaults_are_the_documented_ones():
    loss = KDLoss()
    assert (loss.temperature, loss.soft_weight, loss.hard_weight, loss.reduction) == (4.0, 0.5, 0.5, "mean")


@pytest.mark.parametrize("hard_weight", [0.0, 0.5])
def test_temperature_squared_is_always_applied(hard_weight):
    s, t, y = make(8, 10)
    for temperature in (0.5, 4.0):
        with_hard = KDLoss(temperature, 1.0, hard_weight)(s, t, y)
        kl = F.kl_div(F.log_softmax(s / temperature, -1), F.log_softmax(t / temperature, -1), reduction="batchmean", log_target=True)
        torch.testing.assert_close(with_hard, temperature**2 * kl + hard_weight * F.cross_entropy(s, y))


def test_soft_gradient_tends_to_logit_matching_at_high_temperature():
    """Hinton section 2.1: with T^2 the gradient tends to (s - t) / classes for zero-mean logits, whatever T."""
    s, t, _ = make(3, 10, spread=1.0)
    with torch.no_grad():
        s -= s.mean(-1, keepdim=True)
        t -= t.mean(-1, keepdim=True)
    (gradient,) = torch.autograd.grad(KDLoss(1e5, 1.0, 0.0, reduction="sum")(s, t), s)
    bound = max(s.abs().max(), t.abs().max()).item() ** 2 / 1e5  # the next term of the expansion in 1 / T
    torch.testing.assert_close(gradient, (s - t).detach() / 10, rtol=0, atol=bound)


def test_mean_is_over_rows_and_batchmean_over_the_batch():
    s, t, y = make(12, 7)
    y[:4] = IGNORE
    row = KDLoss(reduction="none")(s, t, y)
    assert row.shape == (12,) and (row[:4] == 0).all() and (row[4:] > 0).all()
    torch.testing.assert_close(KDLoss(reduction="sum")(s, t, y), row.sum())
    torch.testing.assert_close(KDLoss(reduction="mean")(s, t, y), row.sum() / 8)
    torch.testing.assert_close(KDLoss(reduction="batchmean")(s, t, y), row.sum() / 12)
    elementwise = F.kl_div(F.log_softmax(s / 4, -1), F.log_softmax(t / 4, -1), reduction="none", log_target=True).mean()
    torch.testing.assert_close(KDLoss(4.0, 1.0, 0.0)(s, t), 16 * elementwise * 7)  # what torch's kl_div "mean" divides by as well


def test_batchmean_of_sequences_divides_by_sequences():
    s, t, y = make(12, 7)
    s3, t3, y3 = s.view(3, 4, 7), t.view(3, 4, 7), y.view(3, 4)
    torch.testing.assert_close(KDLoss(reduction="batchmean")(s3, t3, y3), KDLoss(reduction="sum")(s, t, y) / 3)
    torch.testing.assert_close(KDLoss(reduction="mean")(s3, t3, y3), KDLoss(reduction="mean")(s, t, y))
    assert KDLoss(reduction="none")(s3, t3, y3).shape == (3, 4)


def test_jsd_ends_are_forward_and_reverse_kl_and_the_middle_is_symmetric():
    s, t, y = make(6, 9)
    torch.testing.assert_close(JSDLoss(beta=0.0)(s, t, y), KDLoss()(s, t, y))
    torch.testing.assert_close(JSDLoss(beta=1.0)(s, t, y), ReverseKLLoss()(s, t, y))
    soft = JSDLoss(2.0, 1.0, 0.0, beta=0.5)
    torch.testing.assert_close(soft(s, t), soft(t, s))
    tilted = JSDLoss(2.0, 1.0, 0.0, beta=0.3)
    torch.testing.assert_close(tilted(s, t), JSDLoss(2.0, 1.0, 0.0, beta=0.7)(t, s))
    # near the ends the formula, divided by beta(1 - beta), tends to the KLs, which is why they are the convention
    near = JSDLoss(2.0, 1.0, 0.0, beta=1e-6)(s, t) / 1e-6
    torch.testing.assert_close(near, KDLoss(2.0, 1.0, 0.0)(s, t), rtol=1e-3, atol=0)


def test_jsd_is_bounded():
    s, t, _ = make(6, 9, spread=100.0)
    rows = JSDLoss(1.0, 1.0, 0.0, reduction="none")(s, t)
    assert (rows <= math.log(2) + 1e-9).all()


# -- extremes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_identical_models_give_zero_loss_and_gradient(divergence):
    s, _, _ = make(5, 100, dtype=torch.float32)
    loss = KDLoss(3.0, 1.0, 0.0, divergence=divergence)(s, s.detach().clone())
    loss.backward()
    # each gradient entry is T (q * sum(p) - p) / rows: the rounding of a 100-term sum
    bound = 3.0 * 100 * torch.finfo(torch.float32).eps
    assert abs(loss.item()) <= 9 * bound and s.grad.abs().max() <= bound


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["sum", "mean", "batchmean"])
def test_all_rows_ignored_gives_exact_zero(divergence, reduction):
    s, t, y = make(5, 10, dtype=torch.float32)
    y[:] = IGNORE
    with torch.no_grad():
        s[2], t[3] = float("nan"), float("inf")
    loss = KDLoss(divergence=divergence, reduction=reduction)(s, t, y)
    loss.backward()
    assert loss.item() == 0.0 and (s.grad == 0).all()


def test_nan_in_an_ignored_row_reaches_nothing():
    s, t, y = make(5, 10)
    y[2] = IGNORE
    clean = KDLoss()(s, t, y)
    (clean_gradient,) = torch.autograd.grad(clean, s)
    with torch.no_grad():
        s[2], t[2] = float("nan"), float("nan")
    dirty = KDLoss()(s, t, y)
    (gradient,) = torch.autograd.grad(dirty, s)
    assert torch.equal(clean, dirty) and torch.equal(clean_gradient, gradient)


def test_nan_in_a_counted_teacher_row_propagates():
    s, t, y = make(5, 10)
    t[0, 0] = float("nan")
    assert KDLoss()(s, t, y).isnan()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_classes_masked_in_both_models_do_not_exist(divergence):
    s, t, y = make(6, 10)
    y.clamp_(max=6)
    small = KDLoss(2.0, 0.5, 0.5, divergence=divergence, beta=0.3)(s[:, :7], t[:, :7], y)
    (small_gradient,) = torch.autograd.grad(small, s)
    with torch.no_grad():
        s[:, 7:], t[:, 7:] = -math.inf, -math.inf
    masked = KDLoss(2.0, 0.5, 0.5, divergence=divergence, beta=0.3)(s, t, y)
    (gradient,) = torch.autograd.grad(masked, s)
    torch.testing.assert_close(masked, small)
    torch.testing.assert_close(gradient, small_gradient)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_class_masked_in_the_teacher_only(divergence):
    s, t, _ = make(6, 10)
    t[:, 3] = -math.inf
    loss = KDLoss(2.0, 1.0, 0.0, divergence=divergence)(s, t)
    (gradient,) = torch.autograd.grad(loss, s)
    t[:, 3] = -1e6  # a probability that underflows to 0
    torch.testing.assert_close(loss, KDLoss(2.0, 1.0, 0.0, divergence=divergence)(s, t))
    assert gradient.isfinite().all() and (gradient[:, 3] > 0).all()  # descent lowers the student's logit there


def test_class_masked_in_the_student_only():
    s, t, _ = make(6, 10)
    with torch.no_grad():
        s[:, 3] = -math.inf
    assert KDLoss(2.0, 1.0, 0.0)(s, t) == math.inf  # by definition: the teacher gives it mass
    for loss in (ReverseKLLoss(2.0, 1.0, 0.0), JSDLoss(2.0, 1.0, 0.0)):
        value = loss(s, t)
        (gradient,) = torch.autograd.grad(value, s)
        assert value.isfinite() and gradient.isfinite().all()


def test_reverse_kl_is_infinite_where_only_the_teacher_masks():
    s, t, _ = make(6, 10)
    t[:, 3] = -math.inf
    assert ReverseKLLoss(2.0, 1.0, 0.0)(s, t) == math.inf


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0, 100.0])
def test_huge_logits_and_every_temperature(divergence, temperature):
    s32, t32, y = make(6, 50, spread=1e4, dtype=torch.float32)
    s64 = s32.detach().double().requires_grad_()
    options = {"temperature": temperature, "soft_weight": 0.5, "hard_weight": 0.5, "divergence": divergence, "beta": 0.5}
    exact = oracle(s64, t32.double(), y, **options, label_smoothing=0.0, reduction="mean")
    (exact_gradient,) = torch.autograd.grad(exact, s64)
    loss = kd_loss(s32, t32, y, **options)
    loss.backward()
    # log-probabilities reach largest / T and carry that times eps; the loss scales them by T^2, the gradient by T
    largest = max(s32.abs().max(), t32.abs().max()).item()
    bound = 4 * largest * torch.finfo(torch.float32).eps
    assert abs(loss.item() - exact.item()) <= bound * max(temperature, 1.0)
    assert (s32.grad - exact_gradient).abs().max() <= bound and s32.grad.isfinite().all()


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9), classes=st.integers(1, 40), temperature=st.floats(0.25, 100.0), seed=st.integers(0, 10**6),
    divergence=st.sampled_from(DIVERGENCES), spread=st.floats(0.0, 30.0),
)  # fmt: skip
def test_divergence_is_never_negative_and_blind_to_shifts(rows, classes, temperature, seed, divergence, spread):
    s, t, _ = make(rows, classes, seed, spread=spread)
    options = {"temperature": temperature, "soft_weight": 1.0, "hard_weight": 0.0, "divergence": divergence, "reduction": "none"}
    loss = kd_loss(s, t, **options)
    assert (loss >= -1e-9 * temperature**2).all()
    torch.testing.assert_close(kd_loss(s + 5.0, t - 3.0, **options), loss, rtol=1e-6, atol=1e-9 * temperature**2)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_lower_precision_is_summed_in_float32(dtype, bound):
    s, t, y = make(7, 1000, dtype=dtype)
    loss = KDLoss()(s, t, y)
    loss.backward()
    s64 = s.detach().double().requires_grad_()
    exact = KDLoss()(s64, t.double(), y)
    exact.backward()
    assert loss.dtype == torch.float32 and s.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    assert (s.grad.double() - s64.grad).norm() <= bound * s64.grad.norm()


def test_strided_inputs():
    s, t, y = make(6, 20)
    wide_s, wide_t = torch.randn(12, 43, dtype=torch.float64), torch.randn(43, 6, dtype=torch.float64)
    wide_s[::2, 1:41:2], wide_t[:20] = s.detach(), t.T
    torch.testing.assert_close(KDLoss()(wide_s[::2, 1:41:2], wide_t[:20].T, y), KDLoss()(s, t, y))


def test_teacher_gets_no_gradient():
    s, t, y = make(4, 5)
    t.requires_grad_()
    KDLoss()(s, t, y).backward()
    assert t.grad is None and s.grad is not None


# -- rows --------------------------------------------------------------------------------------------------------------


def test_row_weights_scale_rows_and_mean_divides_by_their_sum():
    s, t, y = make(6, 5)
    y[5] = IGNORE
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 9.0])
    rows = KDLoss(reduction="none")(s, t, y)
    assert rows[5] == 0
    torch.testing.assert_close(KDLoss(reduction="none")(s, t, y, weights), rows * weights)
    torch.testing.assert_close(KDLoss(reduction="mean")(s, t, y, weights), (rows * weights).sum() / 4.5)
    torch.testing.assert_close(KDLoss(reduction="batchmean")(s, t, y, weights), (rows * weights).sum() / 6)
    unlabelled = KDLoss(4.0, 1.0, 0.0, reduction="none")(s, t)
    torch.testing.assert_close(KDLoss(4.0, 1.0, 0.0)(s, t, None, weights), (unlabelled * weights).sum() / 13.5)
    zero = KDLoss(reduction="mean")(s, t, y, torch.zeros(6))
    zero.backward()
    assert zero == 0 and (s.grad == 0).all()


def test_class_dim_and_labels_of_segmentation():
    s, t, y = make(2 * 3 * 5, 4)
    maps = [x.view(2, 3, 5, 4).movedim(-1, 1) for x in (s, t)]
    assert maps[0].shape == (2, 4, 3, 5)
    torch.testing.assert_close(KDLoss(class_dim=1)(*maps, y.view(2, 3, 5)), KDLoss()(s, t, y))


def test_shift_labels_compares_position_i_with_label_i_plus_1():
    s, t, _ = make(2 * 6, 11)
    s, t = s.view(2, 6, 11), t.view(2, 6, 11)
    tokens = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))
    expected = KDLoss()(s[:, :-1], t[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(KDLoss(shift_labels=True)(s, t, tokens), expected)


def test_labels_of_any_integer_type():
    s, t, y = make(6, 5)
    torch.testing.assert_close(KDLoss()(s, t, y.int()), KDLoss()(s, t, y))
    torch.testing.assert_close(KDLoss()(s, t, y.to(torch.uint8)), KDLoss()(s, t, y))


# -- standardisation ---------------------------------------------------------------------------------------------------


def test_standardize_is_the_z_score():
    x, _, _ = make(5, 11)
    torch.testing.assert_close(standardize(x), (x - x.mean(-1, True)) / (x.std(-1, unbiased=False, keepdim=True) + 1e-7))
    assert torch.autograd.gradcheck(standardize, (x,))


def test_standardized_loss_is_blind_to_scale_and_shift_of_either_model_but_not_the_hard_term():
    s, t, y = make(5, 11)
    soft = KDLoss(2.0, 1.0, 0.0, standardize=True)
    torch.testing.assert_close(soft(3 * s + 1, t), soft(s, 0.2 * t - 4), rtol=1e-6, atol=1e-9)
    both = KDLoss(2.0, 1.0, 0.5, standardize=True)
    torch.testing.assert_close(both(s, t, y), soft(s, t) + 0.5 * F.cross_entropy(s, y))


def test_standardize_of_constant_and_masked_rows():
    x = torch.tensor([[2.0, 2.0, 2.0], [1.0, 3.0, -math.inf]], requires_grad=True)
    z = standardize(x)
    torch.testing.assert_close(z, torch.tensor([[0.0, 0.0, 0.0], [-1.0, 1.0, -math.inf]]))
    z[z > -math.inf].sum().backward()
    assert x.grad.isfinite().all()


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [0, 0.0, -1.0, math.inf, math.nan, "4", True, None])
def test_bad_temperature(bad):
    with pytest.raises(ValueError, match=r"KDLoss: temperature must be a finite number above 0, got"):
        KDLoss(temperature=bad)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"soft_weight": -0.1}, r"KDLoss: soft_weight must be a finite number not below 0, got -0.1"),
        ({"hard_weight": math.nan}, r"KDLoss: hard_weight must be a finite number not below 0, got nan"),
        ({"soft_weight": 0, "hard_weight": 0}, r"KDLoss: at least one of soft_weight, hard_weight must be positive, got 0 for all"),
        ({"label_smoothing": 1.0}, r"KDLoss: label_smoothing must lie in \[0.0, 1.0\), got 1.0"),
        ({"reduction": "average"}, r"KDLoss: reduction must be one of none, sum, mean, batchmean, got 'average'"),
        ({"divergence": "tvd"}, r"KDLoss: divergence must be one of forward_kl, reverse_kl, jsd, got 'tvd'"),
        ({"divergence": "jsd", "beta": 1.5}, r"KDLoss: beta must lie in \[0.0, 1.0\], got 1.5"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        KDLoss(**arguments)


def test_bad_tensors():
    s, t, y = make(6, 5)
    loss = KDLoss()
    with pytest.raises(ValueError, match=r"kd_loss: teacher_logits must have the 5 classes of student_logits, got 4"):
        loss(s, t[:, :4], y)
    with pytest.raises(ValueError, match=r"kd_loss: labels must have shape \(6,\), got \(5,\)"):
        loss(s, t, y[:5])
    with pytest.raises(ValueError, match=r"kd_loss: labels must lie in 0..4 or be ignore_index \(-100\), got 5"):
        loss(s, t, torch.tensor([0, 1, 5, 2, 3, -100]))
    with pytest.raises(ValueError, match=r"got -1"):
        loss(s, t, torch.tensor([0, 1, -1, 2, 3, 4]))
    with pytest.raises(TypeError, match=r"kd_loss: student_logits must be floating point, got torch.int64"):
        loss(torch.zeros(6, 5, dtype=torch.int64), t, y)
    with pytest.raises(TypeError, match=r"kd_loss: teacher_logits must be floating point, got torch.int8"):
        loss(s, torch.zeros(6, 5, dtype=torch.int8), y)
    with pytest.raises(TypeError, match=r"kd_loss: labels must be integers \(class numbers\), got torch.float32"):
        loss(s, t, y.float())
    with pytest.raises(TypeError, match=r"kd_loss: teacher_logits must be a tensor, got list"):
        loss(s, [1.0], y)
    with pytest.raises(ValueError, match=r"kd_loss: labels must be given for hard_weight above 0"):
        loss(s, t)
    for empty in (torch.zeros(0, 5), torch.zeros(5, 0), torch.zeros(5)):
        with pytest.raises(ValueError, match=r"student_logits must be \(..., classes\) with at least one row and one class"):
            loss(empty, empty, None)
    with pytest.raises(ValueError, match=r"kd_loss: row_weights must have shape \(6,\), got \(5,\)"):
        loss(s, t, y, torch.ones(5))
    with pytest.raises(ValueError, match=r"kd_loss: row_weights must not be negative or NaN, got -1.0"):
        loss(s, t, y, torch.tensor([1.0, 1, 1, 1, 1, -1]))
    with pytest.raises(TypeError, match=r"kd_loss: row_weights must be a floating-point tensor, got torch.int64"):
        loss(s, t, y, torch.ones(6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"KDLoss: shift_labels needs logits of \(batch, at least 2 positions, classes\), got \(6, 5\)"):
        KDLoss(shift_labels=True)(s, t, y)
    with pytest.raises(ValueError, match=r"KDLoss: logits must have a dimension 4 \(class_dim\), got \(6, 5\)"):
        KDLoss(class_dim=4)(s, t, y)


def test_functional_form_checks_its_options_too():
    s, t, y = make(6, 5)
    with pytest.raises(ValueError, match=r"kd_loss: temperature must be"):
        kd_loss(s, t, y, temperature=0, soft_weight=1, hard_weight=1)
    with pytest.raises(ValueError, match=r"kd_loss: divergence must be one of"):
        kd_loss(s, t, y, temperature=1, soft_weight=1, hard_weight=1, divergence="kl")
