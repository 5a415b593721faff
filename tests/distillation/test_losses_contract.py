"""Every loss in LOSSES keeps the same promises, and each agrees with a plain transcription of its paper."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from pycompress.distillation import (
    LOSSES,
    AttentionTransferLoss,
    CombinedLoss,
    CorrelationCongruenceLoss,
    DistillationLoss,
    DISTLoss,
    DKDLoss,
    FSPLoss,
    HintLoss,
    KDLoss,
    PairLoss,
    PKTLoss,
    ReverseKLLoss,
    RKDLoss,
    SimilarityPreservingLoss,
)
from pycompress.ops.kd_loss_reference import pearson_distance

NAMES = list(LOSSES)
RESPONSE = [name for name in NAMES if getattr(LOSSES[name], "kind", "") == "response"]
PAIR = [name for name in NAMES if issubclass(LOSSES[name], PairLoss)]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sample(name: str, seed: int, dtype: torch.dtype = torch.float64, batch: int = 5):
    """Arguments for one side: logits, maps, or a pair of maps."""
    if name in RESPONSE:
        return (randn(batch, 7, seed=seed, dtype=dtype),)
    if LOSSES[name].arity == 2:
        return (randn(batch, 3, 6, 5, seed=seed, dtype=dtype), randn(batch, 4, 3, 5, seed=seed + 100, dtype=dtype))
    return (randn(batch, 4, 3, 5, seed=seed, dtype=dtype),)


def call(name: str, loss, student, teacher):
    if name in RESPONSE:
        labels = torch.arange(student[0].shape[0]) % 7
        return loss(student[0], teacher[0], labels)
    if LOSSES[name].arity == 2:
        return loss(student, teacher)
    return loss(student[0], teacher[0])


def soft_only(name: str):
    return LOSSES[name](hard_weight=0.0) if name in RESPONSE else LOSSES[name]()


def test_registry_holds_what_the_feature_map_promises():
    expected = {"kd", "reverse_kl", "jsd", "dkd", "dist", "hint", "attention_transfer", "fsp", "rkd", "similarity", "correlation", "pkt"}
    assert expected <= set(NAMES)
    assert set(RESPONSE) | set(PAIR) == set(NAMES)


def test_unknown_name():
    with pytest.raises(ValueError, match="unknown distillation loss 'vid', expected one of attention_transfer"):
        LOSSES["vid"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scalar_positive_and_finite_with_gradient_to_the_student_only(name, dtype):
    loss = soft_only(name)
    student = tuple(x.requires_grad_() for x in sample(name, 0, dtype))
    teacher = tuple(x.requires_grad_() for x in sample(name, 1, dtype))
    value = call(name, loss, student, teacher)
    value.backward()
    assert value.shape == () and value.dtype == torch.float32 and value.item() > 0
    for x in student:
        assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().max() > 0 and x.grad.dtype == dtype
    assert all(x.grad is None for x in teacher)


@pytest.mark.parametrize("name", NAMES)
def test_identical_models_give_zero_loss_and_gradient(name):
    loss = soft_only(name)
    student = tuple(x.requires_grad_() for x in sample(name, 0))
    value = call(name, loss, student, tuple(x.detach().clone() for x in student))
    value.backward()
    assert abs(value.item()) <= 1e-13
    assert all(x.grad.abs().max() <= 1e-12 for x in student)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    loss = soft_only(name)
    student = tuple(x.requires_grad_() for x in sample(name, 0, batch=3))
    teacher = sample(name, 1, batch=3)
    assert torch.autograd.gradcheck(lambda *xs: call(name, loss, xs, teacher), student)


@pytest.mark.parametrize("name", NAMES)
def test_descent_reaches_the_teacher(name):
    """Following the gradient lowers the loss by a lot: the sign and the direction are right."""
    loss = soft_only(name)
    student = [x.requires_grad_() for x in sample(name, 0)]
    teacher = sample(name, 1)
    optimizer = torch.optim.Adam(student, lr=0.05)
    first = call(name, loss, tuple(student), teacher).item()
    for _ in range(150):
        optimizer.zero_grad()
        call(name, loss, tuple(student), teacher).backward()
        optimizer.step()
    assert call(name, loss, tuple(student), teacher).item() < 0.2 * first


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_one_and_equal_samples_stay_finite(name):
    loss = soft_only(name)
    for batch in (1, 4):
        student = tuple(x[:1].expand(batch, *x.shape[1:]).clone().requires_grad_() for x in sample(name, 0))
        value = call(name, loss, student, sample(name, 1, batch=batch))
        value.backward()
        assert value.isfinite()
        assert all(x.grad.isfinite().all() and x.grad.abs().max() < 1e4 for x in student)


@pytest.mark.parametrize("name", NAMES)
def test_copies_state_and_text(name):
    loss = LOSSES[name]()
    twin = copy.deepcopy(loss)
    twin.load_state_dict(loss.state_dict())
    student, teacher = sample(name, 0), sample(name, 1)
    assert torch.equal(call(name, loss, student, teacher), call(name, twin, student, teacher))
    assert type(loss).__name__ in repr(loss) and loss.name == name
    assert "arxiv.org" in type(loss).__doc__ or "CVPR" in type(loss).__doc__ or ":class:`KDLoss`" in type(loss).__doc__


@pytest.mark.parametrize("name", NAMES)
def test_bad_tensors_are_refused(name):
    loss = soft_only(name)
    student, teacher = sample(name, 0), sample(name, 1)
    with pytest.raises(TypeError, match="floating point"):
        call(name, loss, tuple(x.long() for x in student), teacher)
    with pytest.raises(ValueError, match="got"):
        call(name, loss, tuple(x[:3] for x in student), teacher)


@pytest.mark.parametrize("name", RESPONSE)
def test_response_losses_ignore_rows(name):
    loss = LOSSES[name](ignore_index=-1)
    s, t = randn(6, 7).requires_grad_(), randn(6, 7, seed=1)
    labels = torch.tensor([0, -1, 2, 3, -1, 5])
    with torch.no_grad():
        s[1], t[4] = math.nan, math.nan
    keep = labels != -1
    value = loss(s, t, labels)
    torch.testing.assert_close(value, loss(s[keep], t[keep], labels[keep]))
    value.backward()
    assert (s.grad[~keep] == 0).all() and s.grad.isfinite().all()
    nothing = loss(s, t, torch.full((6,), -1))
    s.grad = None
    nothing.backward()
    assert nothing.item() == 0 and (s.grad == 0).all()


@pytest.mark.parametrize("name", RESPONSE)
def test_response_losses_take_sequences_masks_and_standardisation(name):
    loss = LOSSES[name](standardize=True)
    s, t = randn(2, 3, 7).requires_grad_(), randn(2, 3, 7, seed=1)
    labels = torch.randint(0, 6, (2, 3), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss(s, t, labels), loss(s.view(6, 7), t.view(6, 7), labels.view(6)))
    with torch.no_grad():
        s[..., 6], t[..., 6] = -math.inf, -math.inf
    value = loss(s, t, labels)
    (gradient,) = torch.autograd.grad(value, s)
    assert value.isfinite() and gradient.isfinite().all() and (gradient[..., 6] == 0).all()


@pytest.mark.parametrize("name", RESPONSE)
@pytest.mark.parametrize("option", [{"soft_weight": -1.0}, {"hard_weight": -1.0}, {"temperature": 0}, {"soft_weight": 0, "hard_weight": 0}])
def test_response_losses_check_their_options(name, option):
    with pytest.raises(ValueError, match=rf"{LOSSES[name].__name__}: "):
        LOSSES[name](**option)


# -- against the papers ------------------------------------------------------------------------------------------------


def test_dkd_equals_its_equations():
    s, t = randn(6, 5), randn(6, 5, seed=1)
    y = torch.tensor([0, 4, 2, 1, 3, 0])
    temperature, expected = 3.0, 0.0
    q, p = (s / temperature).softmax(-1), (t / temperature).softmax(-1)
    for i in range(6):
        others = [c for c in range(5) if c != y[i]]
        target_p, target_q = p[i, y[i]], q[i, y[i]]
        tckd = target_p * (target_p / target_q).log() + (1 - target_p) * ((1 - target_p) / (1 - target_q)).log()
        hat_p, hat_q = p[i, others] / (1 - target_p), q[i, others] / (1 - target_q)
        nckd = (hat_p * (hat_p / hat_q).log()).sum()
        expected = expected + (1.5 * tckd + 8.0 * nckd) * temperature**2 / 6
    loss = DKDLoss(temperature, 0.7, 0.3, target_weight=1.5, nontarget_weight=8.0)
    torch.testing.assert_close(loss(s, t, y), 0.7 * expected + 0.3 * F.cross_entropy(s, y))


def test_dkd_with_the_teachers_own_weight_is_plain_kl():
    s, t, y = randn(1, 5), randn(1, 5, seed=1), torch.tensor([2])
    rest = 1 - (t / 2).softmax(-1)[0, 2].item()
    dkd = DKDLoss(2.0, 1.0, 0.0, target_weight=1.0, nontarget_weight=rest)(s, t, y)
    torch.testing.assert_close(dkd, KDLoss(2.0, 1.0, 0.0)(s, t, y))


def test_dkd_errors():
    s, t = randn(6, 5), randn(6, 5, seed=1)
    with pytest.raises(ValueError, match="labels must be given for hard_weight above 0 and for divergence 'dkd'"):
        DKDLoss(hard_weight=0.0)(s, t)
    with pytest.raises(ValueError, match=r"divergence 'dkd' needs at least 2 classes, got \(6, 1\)"):
        DKDLoss()(s[:, :1], t[:, :1], torch.zeros(6, dtype=torch.long))
    with pytest.raises(ValueError, match="DKDLoss: at least one of target_weight, nontarget_weight must be positive"):
        DKDLoss(target_weight=0, nontarget_weight=0)


def test_dist_equals_pearson_correlations():
    s, t, y = randn(6, 5), randn(6, 5, seed=1), torch.tensor([0, 4, 2, 1, 3, 0])
    q, p = (s / 2).softmax(-1), (t / 2).softmax(-1)
    inter = sum(1 - torch.corrcoef(torch.stack([q[i], p[i]]))[0, 1] for i in range(6)) / 6
    intra = sum(1 - torch.corrcoef(torch.stack([q[:, c], p[:, c]]))[0, 1] for c in range(5)) / 5
    loss = DISTLoss(2.0, 0.5, 0.25, inter_weight=2.0, intra_weight=3.0)
    torch.testing.assert_close(loss(s, t, y), 0.5 * 4 * (2 * inter + 3 * intra) + 0.25 * F.cross_entropy(s, y))


def test_dist_edges():
    s, t = randn(6, 5), randn(6, 5, seed=1)
    torch.testing.assert_close(DISTLoss(hard_weight=0)(s[:1], t[:1]), DISTLoss(hard_weight=0, intra_weight=0)(s[:1], t[:1]))
    constant = torch.ones(2, 4)
    assert pearson_distance(constant, constant).tolist() == [0.0, 0.0]
    assert pearson_distance(constant, randn(2, 4, dtype=torch.float32)).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="DISTLoss: reduction must be one of mean, got 'sum'"):
        DISTLoss(reduction="sum")
    with pytest.raises(ValueError, match="row_weights must be None for divergence 'dist'"):
        DISTLoss()(s, t, torch.zeros(6, dtype=torch.long), torch.ones(6))


def test_hint_is_mean_squared_error_through_the_adapter():
    loss = HintLoss(3, 5).double()
    s, t = randn(2, 3, 4, 6), randn(2, 5, 4, 6, seed=1)
    adapted = F.conv2d(s, loss.adapter.weight[:, :, None, None])
    torch.testing.assert_close(loss(s, t), F.mse_loss(adapted, t))
    tokens = randn(2, 7, 3)
    torch.testing.assert_close(loss(tokens, randn(2, 7, 5)), F.mse_loss(tokens @ loss.adapter.weight.T, randn(2, 7, 5)))
    volume = randn(2, 3, 2, 4, 6)
    torch.testing.assert_close(
        loss(volume, torch.zeros(2, 5, 2, 4, 6)), F.conv3d(volume, loss.adapter.weight[:, :, None, None, None]).square().mean(),
        check_dtype=False,
    )  # fmt: skip


def test_hint_resizes_maps():
    s, t = randn(2, 3, 8, 6), randn(2, 3, 4, 3)
    torch.testing.assert_close(HintLoss()(s, t), F.mse_loss(F.avg_pool2d(s, 2), t))
    torch.testing.assert_close(HintLoss()(t, s), F.mse_loss(F.interpolate(t, scale_factor=2, mode="nearest"), s))


def test_hint_errors():
    with pytest.raises(
        RuntimeError, match=r"HintLoss: features of widths 3 and 5 need an adapter; pass student_width and teacher_width, or"
    ):
        HintLoss()(randn(2, 3), randn(2, 5))
    with pytest.raises(ValueError, match="HintLoss: give both student_width and teacher_width, or neither"):
        HintLoss(3)
    with pytest.raises(ValueError, match="HintLoss: teacher_width must be a positive integer, got 0"):
        HintLoss(3, 0)
    with pytest.raises(ValueError, match="HintLoss: student and teacher features must have the same number of dimensions"):
        HintLoss()(randn(2, 3), randn(2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"HintLoss: adapted student features must have the teacher's shape \(2, 9, 3\), got \(2, 7, 3\)"):
        HintLoss()(randn(2, 7, 3), randn(2, 9, 3))
    with pytest.raises(ValueError, match="HintLoss: student and teacher features must come from one batch, got 2 and 3 samples"):
        HintLoss()(randn(2, 3), randn(3, 3))


def test_attention_transfer_equals_its_equation():
    s, t = randn(2, 3, 4, 5), randn(2, 7, 4, 5, seed=1)
    q, p = (F.normalize(x.pow(2).mean(1).flatten(1), dim=1) for x in (s, t))
    torch.testing.assert_close(AttentionTransferLoss()(s, t), (q - p).pow(2).mean())
    wide = randn(2, 7, 8, 10, seed=1)
    pooled = F.normalize(F.avg_pool2d(wide.pow(2).mean(1, keepdim=True), 2).flatten(1))
    torch.testing.assert_close(AttentionTransferLoss()(s, wide), (q - pooled).pow(2).mean())
    with pytest.raises(ValueError, match="AttentionTransferLoss: teacher features must have at least 4 dimensions"):
        AttentionTransferLoss()(s, randn(2, 5))


def test_fsp_equals_its_equation():
    early_s, late_s, early_t, late_t = randn(2, 3, 4, 4), randn(2, 5, 4, 4, seed=1), randn(2, 3, 4, 4, seed=2), randn(2, 5, 4, 4, seed=3)
    expected = 0.0
    for n in range(2):
        for i in range(3):
            for j in range(5):
                student = (early_s[n, i] * late_s[n, j]).sum() / 16
                teacher = (early_t[n, i] * late_t[n, j]).sum() / 16
                expected = expected + (student - teacher) ** 2 / 2
    torch.testing.assert_close(FSPLoss()((early_s, late_s), (early_t, late_t)), expected)
    with pytest.raises(ValueError, match=r"FSPLoss: .*same channel counts, got \(2, 3, 4, 4\) and \(2, 5, 4, 4\)"):
        FSPLoss()((early_s, late_s), (late_t, late_t))
    with pytest.raises(TypeError, match=r"FSPLoss: student must be a pair \(early, late\)"):
        FSPLoss()(early_s, (early_t, late_t))


def test_rkd_equals_its_equations():
    s, t = randn(5, 3), randn(5, 8, seed=1)
    distance, angle, n = 0.0, 0.0, 5

    def relative(x):
        d = torch.stack([torch.stack([(x[i] - x[j]).norm() for j in range(n)]) for i in range(n)])
        return d / d[d > 0].mean()

    def cosine(x, i, j, k):
        if j in (i, k):
            return torch.zeros((), dtype=x.dtype)
        return F.cosine_similarity(x[i] - x[j], x[k] - x[j], dim=0)

    distance = F.smooth_l1_loss(relative(s), relative(t))
    triples = [(i, j, k) for i in range(n) for j in range(n) for k in range(n)]
    angle = sum(F.smooth_l1_loss(cosine(s, *ijk), cosine(t, *ijk)) for ijk in triples) / n**3
    torch.testing.assert_close(RKDLoss(1.0, 0.0)(s, t), distance)
    torch.testing.assert_close(RKDLoss(0.0, 1.0)(s, t), angle)
    torch.testing.assert_close(RKDLoss(25.0, 50.0)(s, t), 25 * distance + 50 * angle)


def test_relation_losses_against_plain_matrices():
    s, t = randn(5, 3, 2), randn(5, 8, seed=1)
    flat = s.flatten(1)
    g_s, g_t = (F.normalize(x @ x.T, dim=1) for x in (flat, t))
    torch.testing.assert_close(SimilarityPreservingLoss()(s, t), (g_s - g_t).square().sum() / 25)

    def taylor(x):
        cosine = F.normalize(x, dim=1) @ F.normalize(x, dim=1).T
        return sum(math.exp(-0.8) * 0.8**p / math.factorial(p) * cosine**p for p in range(3))

    torch.testing.assert_close(CorrelationCongruenceLoss()(s, t), (taylor(flat) - taylor(t)).square().sum() / 25)
    exact = torch.exp(-0.4 * torch.cdist(F.normalize(t), F.normalize(t)).square())
    torch.testing.assert_close(CorrelationCongruenceLoss(order=20).kernel(t), exact)

    def neighbours(x):
        similarity = (F.normalize(x, dim=1) @ F.normalize(x, dim=1).T + 1) / 2
        return similarity / similarity.sum(1, keepdim=True)

    p, q = neighbours(t), neighbours(flat)
    torch.testing.assert_close(PKTLoss()(s, t), (p * (p / q).log()).mean())


# -- sums --------------------------------------------------------------------------------------------------------------


def outputs():
    from pycompress.distillation.losses import Outputs

    return Outputs(randn(4, 5), randn(4, 5, seed=1), torch.tensor([0, 1, 2, 3]))


def test_combined_losses_by_dict_list_and_plus():
    o = outputs()
    kd, reverse = KDLoss(), ReverseKLLoss()
    a, b = kd.terms(o)["kd"], reverse.terms(o)["reverse_kl"]
    by_dict = CombinedLoss({"soft": kd, "back": reverse}, weights={"back": 0.1}).terms(o)
    assert list(by_dict) == ["soft", "back"]
    torch.testing.assert_close(sum(by_dict.values()), a + 0.1 * b)
    by_list = CombinedLoss([kd, reverse], weights=[1.0, 0.1]).terms(o)
    assert list(by_list) == ["kd", "reverse_kl"]
    torch.testing.assert_close(sum(by_list.values()), a + 0.1 * b)
    plus = kd + reverse + KDLoss(2.0)
    assert isinstance(plus, DistillationLoss) and list(plus.terms(o)) == ["kd", "reverse_kl", "kd_2"]
    weighted = CombinedLoss({"soft": kd}, {"soft": 3.0}) + reverse
    torch.testing.assert_close(sum(weighted.terms(o).values()), 3 * a + b)
    off = CombinedLoss({"soft": kd, "back": reverse}, weights={"back": 0.0})
    assert list(off.terms(o)) == ["soft"]


def test_combined_loss_temperature():
    assert (KDLoss(2.0) + ReverseKLLoss(2.0)).temperature == 2.0
    with pytest.raises(ValueError, match=r"CombinedLoss: the losses read the teacher at several temperatures \(2.0, 4.0\)"):
        _ = (KDLoss(2.0) + ReverseKLLoss(4.0)).temperature


@pytest.mark.parametrize(
    "losses, weights, error, message",
    [
        ([], None, ValueError, "losses must hold at least one loss, got none"),
        ([F.mse_loss], None, TypeError, "losses must be distillation losses, got builtin_function_or_method|got function"),
        ({"a.b": KDLoss()}, None, ValueError, "names of losses must be strings without a dot, got 'a.b'"),
        ({"a": KDLoss()}, {"b": 1.0}, ValueError, r"weights must name losses \(a\), got 'b'"),
        ({"a": KDLoss()}, {"a": -1.0}, ValueError, "weights must be finite and not negative, got -1.0 for 'a'"),
        ({"a": KDLoss()}, {"a": 0.0}, ValueError, "at least one weight must be positive, got 0 for all"),
        ({"a": KDLoss()}, [1.0], TypeError, "weights must be a mapping when losses is one, got a list"),
        ([KDLoss()], [1.0, 2.0], ValueError, r"weights must have one entry per loss \(1\), got 2"),
    ],
)
def test_combined_loss_errors(losses, weights, error, message):
    with pytest.raises(error, match=message):
        CombinedLoss(losses, weights)
