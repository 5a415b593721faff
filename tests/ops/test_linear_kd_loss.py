"""Chunks must not show: the same loss and gradients as kd_loss on whole logits, whatever the chunk size."""

import importlib
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from support.kernels import all_kernels, native_kernels
from torch.utils._python_dispatch import TorchDispatchMode

from pycompress.ops import kd_loss, linear_kd_loss
from pycompress.ops.linear_kd_loss import CHUNK_BYTES, MIN_CHUNK, choose_chunk

module = importlib.import_module("pycompress.ops.linear_kd_loss")  # the package's attribute of that name is the function
OPTIONS = {"temperature": 2.0, "soft_weight": 0.5, "hard_weight": 0.5}
EVERY = pytest.mark.parametrize("kernel", all_kernels("kd_loss"))


def problem(rows=13, classes=40, features=6, teacher_features=9, teacher_classes=None, bias=True, dtype=torch.float32):
    def make(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    student = [make(rows, features), make(classes, features), make(classes) if bias else None]
    teacher = [
        make(rows, teacher_features),
        make(teacher_classes or classes, teacher_features),
        make(teacher_classes or classes) if bias else None,
    ]
    labels = torch.randint(classes, (rows,))
    labels[[1, -1]] = -100
    return [t if t is None else t.requires_grad_() for t in student], teacher, labels


def whole(student, teacher, labels, **options):
    return kd_loss(F.linear(*student), F.linear(*teacher), labels, **OPTIONS | options)


def chunked(student, teacher, labels, **options):
    return linear_kd_loss(
        student[0], student[1], teacher[0], teacher[1], labels, student_bias=student[2], teacher_bias=teacher[2], **OPTIONS | options
    )


def gradients(loss, student, factor=1.0):
    return torch.autograd.grad(factor * loss, [t for t in student if t is not None])


def assert_same(a, b, student, rtol=1e-4, factor=1.0):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for x, y in zip(gradients(a, student, factor), gradients(b, student, factor), strict=True):
        assert x.dtype == y.dtype and (x - y).norm() <= rtol * y.norm() + 1e-6


@EVERY
@pytest.mark.parametrize("chunk", [None, 1, 4, 13, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
def test_equals_the_whole(kernel, chunk, bias, reduction):
    student, teacher, labels = problem(bias=bias)
    weights = torch.rand(13)
    for options in ({}, {"row_weights": weights}):
        a = chunked(student, teacher, labels, reduction=reduction, chunk_size=chunk, kernel=kernel, **options)
        assert_same(a, whole(student, teacher, labels, reduction=reduction, kernel=kernel, **options), student, factor=-0.5)


@EVERY
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "dkd"])
@pytest.mark.parametrize("classes", [20, 1100])
def test_divergences(kernel, divergence, classes):
    student, teacher, labels = problem(classes=classes)
    options = {"divergence": divergence, "kernel": kernel, "label_smoothing": 0.1}
    assert_same(chunked(student, teacher, labels, chunk_size=5, **options), whole(student, teacher, labels, **options), student)


@EVERY
@pytest.mark.parametrize("class_map", ["prefix", "tensor"])
def test_vocabularies_of_different_size(kernel, class_map):
    student, teacher, labels = problem(classes=30, teacher_classes=25)
    class_map = torch.arange(30).where(torch.arange(30) < 20, -1) if class_map == "tensor" else class_map
    options = {"class_map": class_map, "kernel": kernel}
    assert_same(chunked(student, teacher, labels, chunk_size=4, **options), whole(student, teacher, labels, **options), student)


@EVERY
def test_only_what_learns_gets_a_gradient(kernel):
    for learns in ([True, False, False], [False, True, False], [False, False, True]):
        student, teacher, labels = problem()
        for tensor, learn in zip(student, learns, strict=True):
            tensor.requires_grad_(learn)
        chunked(student, teacher, labels, chunk_size=5, kernel=kernel).backward()
        assert [t.grad is not None for t in student] == learns


@EVERY
def test_more_dimensions_and_no_gradient(kernel):
    student, teacher, labels = problem(rows=12)
    rows = chunked(student, teacher, labels, chunk_size=5, kernel=kernel, reduction="mean").detach()
    deep = [student[0].reshape(3, 4, -1), *student[1:]], [teacher[0].reshape(3, 4, -1), *teacher[1:]], labels.reshape(3, 4)
    torch.testing.assert_close(chunked(*deep, chunk_size=5, kernel=kernel).detach(), rows)
    with torch.no_grad():
        none = chunked(*deep, chunk_size=5, kernel=kernel, reduction="none")
        assert none.shape == (3, 4)
        torch.testing.assert_close(none, whole(*deep, kernel=kernel, reduction="none"), rtol=1e-5, atol=1e-6)


@EVERY
def test_no_row_counts(kernel):
    student, teacher, labels = problem()
    loss = chunked(student, teacher, torch.full_like(labels, -100), chunk_size=4, kernel=kernel)
    assert loss == 0 and not any(g.any() for g in gradients(loss, student))


def double_reference(student, teacher, labels, **options):
    """Loss and gradients of the whole logits in float64."""
    student = [t if t is None else t.detach().double().requires_grad_() for t in student]
    teacher = [t if t is None else t.double() for t in teacher]
    options = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}
    loss = kd_loss(F.linear(*student), F.linear(*teacher), labels, **OPTIONS | options, kernel="reference")
    return loss.detach(), gradients(loss, student)


def assert_near(loss, got, want_loss, want, rtol=1e-5):
    assert loss.item() == pytest.approx(want_loss.item(), rel=rtol, abs=1e-6)
    for x, y in zip(got, want, strict=True):
        assert float((x.double() - y).norm()) <= rtol * float(y.norm()) + 1e-7


@EVERY
@pytest.mark.parametrize("classes", [17, 1030])
@pytest.mark.parametrize(
    "case", ["both", "soft only", "hard only", "smoothed", "weighted", "no labels", "hot", "sum", "dkd", "jsd", "prefix"]
)
def test_against_float64(kernel, classes, case):
    student, teacher, labels = problem(rows=29, classes=classes, teacher_classes=classes - 3 if case == "prefix" else None)
    options = {
        "both": {},
        "soft only": {"hard_weight": 0.0},
        "hard only": {"soft_weight": 0.0},
        "smoothed": {"label_smoothing": 0.2},
        "weighted": {"row_weights": torch.rand(29).where(torch.arange(29) % 5 != 0, 0.0)},
        "no labels": {"hard_weight": 0.0, "reduction": "batchmean"},
        "hot": {"temperature": 20.0},
        "sum": {"reduction": "sum"},
        "dkd": {"divergence": "dkd", "part_weights": (1.0, 2.0)},
        "jsd": {"divergence": "jsd", "beta": 0.25},
        "prefix": {"class_map": "prefix"},
    }[case]
    labels = None if case == "no labels" else labels
    want = double_reference(student, teacher, labels, **options)
    for chunk in (None, 1, 7):
        loss = chunked(student, teacher, labels, **options, chunk_size=chunk, kernel=kernel)
        assert loss.dtype == torch.float32
        assert_near(loss, gradients(loss, student), *want)


@EVERY
def test_zero_and_other_upstream_gradients(kernel):
    student, teacher, labels = problem()
    want = double_reference(student, teacher, labels)[1]
    for factor in (0.0, 1.0, -3.5, 1e-3):
        loss = chunked(student, teacher, labels, chunk_size=5, kernel=kernel)
        got = gradients(loss, student, factor)
        assert factor or not any(g.any() for g in got)
        assert_near(loss, got, loss, [factor * g for g in want])


@EVERY
def test_accumulating_leaves_the_saved_gradient_alone(kernel):
    """The first ``backward`` must not hand its own memory to ``.grad``, into which the second adds."""
    student, teacher, labels = problem()
    want = double_reference(student, teacher, labels)[1]
    loss = chunked(student, teacher, labels, chunk_size=5, kernel=kernel)
    for _ in range(2):
        loss.backward(retain_graph=True)
    loss.backward()
    assert_near(loss, [t.grad for t in student], loss, [3 * g for g in want])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@EVERY
def test_the_teacher_gets_no_gradient(kernel):
    student, teacher, labels = problem()
    teacher = [t.requires_grad_() for t in teacher]
    chunked(student, teacher, labels, chunk_size=5, kernel=kernel).backward()
    assert all(t.grad is None for t in teacher)
    frozen = [t.detach() for t in student]
    assert not chunked(frozen, teacher, labels, kernel=kernel).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(chunked(student, teacher, labels, kernel=kernel), whole(student, teacher, labels, kernel=kernel))


@EVERY
def test_ignored_rows_may_hold_nan(kernel):
    """They reach neither the loss nor other rows' gradients. The head's is 0 * NaN there, as with F.linear."""
    student, teacher, labels = problem()
    want = double_reference(student, teacher, labels)
    hidden = student[0].detach().clone()
    hidden[1], teacher[0][1] = float("nan"), float("inf")
    hidden.requires_grad_()
    loss = chunked([hidden, *student[1:]], teacher, labels, chunk_size=5, kernel=kernel)
    got = torch.autograd.grad(loss, [hidden, student[2]])
    assert_near(loss, got, want[0], [want[1][0], want[1][2]])


@EVERY
def test_strided_and_mixed_arguments(kernel):
    """A transposed head, hidden states that are every second row of another tensor, int32 labels, a half-precision teacher."""
    student, teacher, labels = problem(rows=26)
    want = double_reference([student[0][::2], *student[1:]], [teacher[0][::2], *teacher[1:]], labels[::2])
    head = student[1].detach().T.contiguous().T.requires_grad_()
    loss = chunked([student[0][::2], head, student[2]], [teacher[0][::2], *teacher[1:]], labels[::2].int(), chunk_size=4, kernel=kernel)
    hidden, *rest = torch.autograd.grad(loss, [student[0], head, student[2]])
    assert not hidden[1::2].any()
    assert_near(loss, [hidden[::2], *rest], *want)
    half = [t.bfloat16() for t in teacher]
    loss = chunked(student, half, labels, chunk_size=4, kernel=kernel)
    assert_near(loss, gradients(loss, student), *double_reference(student, half, labels), rtol=0.02)


@EVERY
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast(kernel, hidden_dtype):
    """In autocast hidden states are bfloat16 and heads float32; both are cast as F.linear casts them."""
    student, teacher, labels = problem()
    student[0] = student[0].detach().to(hidden_dtype).requires_grad_()
    teacher[0] = teacher[0].to(hidden_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = (f(student, teacher, labels, kernel=kernel) for f in (chunked, whole))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    for tensor, x, y in zip(student, gradients(a, student), gradients(b, student), strict=True):
        assert x.dtype == tensor.dtype and (x - y).norm() <= 0.02 * y.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="student_hidden must be a floating-point tensor"):
        chunked([student[0].long(), *student[1:]], teacher, labels)


def test_autocast_compiles():
    torch._dynamo.reset()
    student, teacher, labels = problem()
    # The traced reference computes all rows at once; sums of bfloat16 gradients over chunks would differ from that.
    chunk_size = 13 if all_kernels("kd_loss")[0] == "reference" else 5

    def step(s):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return chunked(s, teacher, labels, chunk_size=chunk_size)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same(compiled(student), step(student), student)


def test_a_device_of_its_own():
    """The reference on a device without values (meta stands for an accelerator); both models on one device."""
    student, teacher, labels = problem()
    meta = [[t.detach().to("meta").requires_grad_() for t in student], [t.to("meta") for t in teacher], labels.to("meta")]
    loss = chunked(*meta, chunk_size=5)
    assert loss.device.type == "meta"
    assert [g.shape for g in gradients(loss, meta[0])] == [t.shape for t in student]
    with pytest.raises(ValueError, match=r"linear_kd_loss: teacher_logits must be on meta like student_logits, got cpu"):
        chunked(meta[0], teacher, meta[2])
    for kernel in native_kernels("kd_loss"):
        with pytest.raises(ValueError, match=rf"linear_kd_loss: kernel '{kernel}' cannot run on meta, only on the CPU"):
            chunked(*meta, kernel=kernel)


def test_a_tied_head_gets_both_gradients():
    """One parameter as embedding and as head."""
    _, teacher, labels = problem(rows=9, bias=False)
    embedding, ids = torch.randn(40, 6, requires_grad=True), torch.randint(40, (9,))
    (got,) = torch.autograd.grad(chunked((embedding[ids], embedding, None), teacher, labels, chunk_size=4), embedding)
    (want,) = torch.autograd.grad(whole((embedding[ids], embedding, None), teacher, labels), embedding)
    assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", native_kernels("kd_loss"))
def test_half_precision_against_float64(kernel, dtype):
    student, teacher, labels = problem(rows=64, classes=300, dtype=dtype)
    loss = chunked(student, teacher, labels, chunk_size=16, kernel=kernel)
    assert loss.dtype == torch.float32
    assert_near(loss, gradients(loss, student), *double_reference(student, teacher, labels), rtol=0.02)


@pytest.mark.parametrize("kernel", native_kernels("kd_loss"))
def test_half_precision(kernel):
    student, teacher, labels = problem(dtype=torch.bfloat16)
    a, b = (f(student, teacher, labels, kernel=kernel) for f in (chunked, whole))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    for x, y in zip(gradients(a, student), gradients(b, student), strict=True):
        assert x.dtype == torch.bfloat16 and (x - y).float().norm() <= 0.02 * y.float().norm()


@pytest.mark.parametrize("kernel", all_kernels("kd_loss"))
def test_many_chunks_of_half_precision_lose_nothing(kernel, monkeypatch):
    """Summed in bfloat16, 400 chunks stop adding up; summed in float32 they are as good as one."""
    monkeypatch.setattr(module, "SUM_BYTES", 7 * 2 * 6)  # the float32 sum takes blocks of 7 classes
    student, teacher, labels = problem(rows=400, dtype=torch.bfloat16)
    _, exact = double_reference(student, teacher, labels)

    def errors(**options):
        got = gradients(chunked(student, teacher, labels, kernel=kernel, **options), student)
        assert [g.dtype for g in got] == [torch.bfloat16] * 3
        return [float((g.double() - e).norm() / e.norm()) for g, e in zip(got, exact, strict=True)]

    one, many, coarse = errors(chunk_size=400), errors(chunk_size=1), errors(chunk_size=1, accum_dtype=torch.bfloat16)
    assert errors(chunk_size=1, accum_dtype=torch.float32) == many
    for a, b, c in zip(one[1:], many[1:], coarse[1:], strict=True):
        assert b < 1.5 * a + 1e-3 and c > 3 * b


def test_accum_dtype_errors():
    student, teacher, labels = problem()
    for wrong in (torch.bfloat16, torch.float64, "float32"):
        with pytest.raises(ValueError, match=r"linear_kd_loss: accum_dtype must be None, torch.float32 or the head's torch.float32, got"):
            chunked(student, teacher, labels, accum_dtype=wrong)


def test_gradcheck():
    student, teacher, labels = problem(rows=5, classes=7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *s: chunked(s, teacher, labels, chunk_size=2), student)


@EVERY
def test_graph_twice_and_second_derivatives(kernel):
    student, teacher, labels = problem()
    loss = chunked(student, teacher, labels, kernel=kernel)
    (first,) = torch.autograd.grad(loss, student[0], retain_graph=True)
    kept = first.clone()
    torch.testing.assert_close(torch.autograd.grad(2 * loss, student[0], retain_graph=True)[0], 2 * kept)
    with pytest.raises(RuntimeError, match=r"linear_kd_loss: create_graph=True"):
        torch.autograd.grad(loss, student[0], create_graph=True)


@EVERY
def test_compile_full_graph(kernel):
    torch._dynamo.reset()
    student, teacher, labels = problem()
    compiled = torch.compile(lambda s: chunked(s, teacher, labels, chunk_size=5, kernel=kernel), fullgraph=True, backend="aot_eager")
    assert_same(compiled(student), chunked(student, teacher, labels, kernel=kernel), student)


def test_opcheck():
    if all_kernels("kd_loss")[0] == "reference":
        pytest.skip("the traced reference is made of ordinary torch functions and never calls this op")
    student, teacher, labels = problem()
    student = [t.detach() for t in student]
    arguments = (*student, *teacher, labels, None, None, [2.0, 0.5, 0.5, 0.5, 1.0, 8.0, 0.0], [40, 5, 13], -100)
    names = ["forward_kl", "mean", all_kernels("kd_loss")[0]]
    torch.library.opcheck(torch.ops.pycompress.linear_kd_loss.default, (*arguments, names, torch.float32, [True, False, True]))


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operators have made and that are still alive, and their peak. Views of ``given`` count nothing."""

    def __init__(self, *given):
        super().__init__()
        self.given = {t.untyped_storage()._cdata for t in given if t is not None}
        self.live, self.peak, self.largest = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key in self.given:
                    continue
                if key not in self.live:
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
                self.largest = max(self.largest, storage.nbytes())
        self.peak = max(self.peak, sum(self.live.values()))
        return out


@pytest.mark.parametrize("kernel", native_kernels("kd_loss"))
@pytest.mark.parametrize("needs_grad", [False, True])
def test_no_more_than_a_chunk_of_logits_is_alive(kernel, needs_grad):
    """The call allocates the gradients, one chunk of student and one of teacher logits, and a few vectors."""
    rows, classes, chunk = 64, 500, 8
    student, teacher, labels = problem(rows=rows, classes=classes, features=4, teacher_features=4)
    gradient_bytes = needs_grad * sum(t.numel() for t in student) * 4
    with LiveBytes(*student, *teacher, labels) as count, torch.set_grad_enabled(needs_grad):
        loss = chunked(student, teacher, labels, chunk_size=chunk, kernel=kernel)
    logits = chunk * classes * 4
    assert count.largest == logits
    vectors = 4 * classes + 64 * rows
    assert 2 * logits + gradient_bytes <= count.peak <= 2 * logits + gradient_bytes + vectors
    assert loss.requires_grad == needs_grad


@EVERY
def test_memory_does_not_grow_with_rows(kernel):
    peaks = []
    for rows in (32, 320):
        student, teacher, labels = problem(rows=rows, classes=500, features=1, teacher_features=1, bias=False)
        with LiveBytes(*student, *teacher, labels) as count:
            chunked(student, teacher, labels, chunk_size=16, kernel=kernel)
        peaks.append(count.peak)
    assert peaks[1] - peaks[0] < 4 * 500 * 16 / 2


@pytest.mark.parametrize("kernel", native_kernels("kd_loss"))
def test_hard_weight_only_makes_no_teacher_logits(kernel):
    student, teacher, labels = problem(rows=64, classes=500, features=4, teacher_features=4)
    with LiveBytes(*student, *teacher, labels) as count, torch.no_grad():
        chunked(student, teacher, labels, chunk_size=8, kernel=kernel, soft_weight=0.0)
    assert count.peak < 2 * 8 * 500 * 4


def test_choose_chunk():
    hidden = torch.empty(100000, 8)
    rows = choose_chunk(hidden, 32000, 32000)
    assert rows * 64000 * 4 <= CHUNK_BYTES and rows >= MIN_CHUNK
    assert choose_chunk(hidden, 10**7, 10**7) == MIN_CHUNK
    assert choose_chunk(hidden[:10], 100, 100) == 10


def test_errors():
    student, teacher, labels = problem()

    def refuses(error, text, s=student, t=teacher, **options):
        with pytest.raises(error, match=re.escape(f"linear_kd_loss: {text}")):
            chunked(s, t, options.pop("labels", labels), **options)

    refuses(ValueError, "chunk_size must be an int above 0 or None, got 0", chunk_size=0)
    refuses(ValueError, "divergence must not be 'dist'", divergence="dist")
    refuses(ValueError, "reduction 'none' has no gradient here", reduction="none")
    refuses(ValueError, "student_head must be (classes, 6) to match student_hidden, got (40, 5)", [student[0], student[1][:, :5], None])
    refuses(ValueError, "student_bias must have shape (40,), got (39,)", [*student[:2], student[2][:39]])
    refuses(ValueError, "teacher_head must be torch.float32 on cpu like teacher_hidden", t=[teacher[0], teacher[1].double(), None])
    refuses(TypeError, "student_hidden must be a floating-point tensor, got torch.int64", [student[0].long(), *student[1:]])
    refuses(TypeError, "teacher_head must be a floating-point tensor, got NoneType", t=[teacher[0], None, None])
    refuses(ValueError, "teacher_logits must have the 40 classes of student_logits, got 30", t=[teacher[0], teacher[1][:30], None])
    refuses(ValueError, "labels must lie in 0..39 or be ignore_index (-100), got 40", labels=torch.full((13,), 40))
    refuses(ValueError, "student_hidden must be (..., features) with at least one row, got (0, 6)", [student[0][:0], *student[1:]])
    refuses(ValueError, "teacher_logits must have the rows of student_logits (13, 40), got (12, 40)", t=[teacher[0][:12], *teacher[1:]])
