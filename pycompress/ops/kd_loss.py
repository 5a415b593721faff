"""``kd_loss``: distillation loss from logits, its gradient computed in the same sweep."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from . import kd_loss_float16, native
from .cuda import kd_loss as cuda_kd_loss
from .cuda.extension import NAME as CUDA
from .kd_loss_options import DIVERGENCES, OPTION_NAMES, REDUCTIONS, TEACHER_FORMS, Options, check_options, check_tensors, check_values
from .kd_loss_reference import kd_loss_reference
from .library import define, dispatched, tracing

CPU = torch.device("cpu")
_cached_options = lru_cache(maxsize=256, typed=True)(check_options)  # typed: True is no temperature, though it equals 1


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    divergence: str = "forward_kl",
    beta: float | None = None,
    part_weights: tuple[float, float] | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    row_weights: Tensor | None = None,
    reduction: str = "mean",
    teacher_form: str = "logits",
    teacher_ids: Tensor | None = None,
    tail: bool = False,
    class_map: Tensor | str | None = None,
    inplace: bool = False,
    kernel: str | None = None,
) -> Tensor:
    """``soft_weight * T^2 * D(teacher, student) + hard_weight * cross_entropy(student, labels)``, T = ``temperature``.

    - ``student_logits``: (..., classes) floating point. float32, bfloat16 and float16 on the CPU and on CUDA run the native
      kernels, which compute in float32; everything else runs the reference. The loss is float32 (float64 for float64)
    - ``teacher_logits``: the same rows; never gets a gradient. ``teacher_form``: "logits" (softened by T), "probabilities" or
      "log_probabilities" (taken as they are, and normalised; only the student is softened)
    - ``labels``: (...) integers, needed for ``hard_weight`` > 0 and "dkd". Rows with ``ignore_index`` count in neither term
    - ``divergence``: "forward_kl", "reverse_kl", "jsd" (``beta`` in [0, 1], default 0.5; the ends are forward and reverse KL by
      convention), "dkd" (``part_weights`` = (target, nontarget), default (1, 8)), "dist" (``part_weights`` = (inter, intra),
      default (1, 1); reference only, because it correlates over the batch, and "mean" only)
    - ``label_smoothing``: in [0, 1), of the cross-entropy, as in ``F.cross_entropy``
    - ``row_weights``: (...) float, not negative. A row of weight 0 counts as ignored
    - ``reduction``: "none" gives (...), ignored rows 0; "sum"; "mean" divides by the number of rows that count (by the sum of
      their weights); "batchmean" divides by ``student_logits.shape[0]``. Nothing is ever divided by the number of classes
    - ``teacher_ids``: (..., k) integers: the teacher is top-k, ``teacher_logits`` (..., k) its values for these student classes.
      Without ``tail`` the k are renormalised; with ``tail`` what they lack to 1 is one bucket for all other classes
    - ``class_map``: vocabularies of different size. "prefix" compares the common leading classes; a tensor (classes,) holds the
      teacher's class of each student class, -1 for none. Both sides are renormalised over the compared classes; the
      cross-entropy uses all student classes
    - ``inplace``: allows to overwrite ``student_logits`` with the gradient (native kernels in eager mode; not for a leaf)
    - ``kernel``: forces one of ``native.kernels("kd_loss")``, or "cuda" for tensors that are there

    Minus infinity masks a class. Where only the student masks it forward KL is infinite, where only the teacher does reverse
    KL, by definition. A NaN makes the loss and that row's gradient NaN, unless the row is ignored. No row that counts: 0 with
    gradient 0.

    Equals, for "forward_kl" and 2-D logits without ignored rows,
    ``soft_weight * T**2 * F.kl_div(log_softmax(s / T, 1), log_softmax(t / T, 1), reduction="batchmean", log_target=True)
    + hard_weight * F.cross_entropy(s, labels)``. Sources: Hinton et al. 2015 (arXiv 1503.02531), Agarwal et al. 2023 (jsd, arXiv
    2306.13649), Zhao et al. 2022 (dkd, arXiv 2203.08679), Huang et al. 2022 (dist, arXiv 2205.10536).

    On CUDA nothing waits for the device: a label, id or weight out of range is no error there, but makes its row NaN.

    Raises ``ValueError`` for shapes, devices, options and indices out of range, ``TypeError`` for dtypes, ``RuntimeError`` for
    second derivatives of a native kernel (``create_graph=True``; ``kernel="reference"`` has them).

    >>> s, t, y = torch.randn(8, 10, requires_grad=True), torch.randn(8, 10), torch.randint(10, (8,))
    >>> kd_loss(s, t, y, temperature=4.0, soft_weight=0.5, hard_weight=0.5).backward()
    """
    # Dynamo traces plain functions only; a list of part_weights has no hash.
    check = check_options if tracing() or isinstance(part_weights, list) else _cached_options
    options = check(
        "kd_loss", temperature, soft_weight, hard_weight, divergence, beta, part_weights, label_smoothing, ignore_index, reduction,
        teacher_form, tail,
    )  # fmt: skip
    common = check_tensors("kd_loss", options, student_logits, teacher_logits, labels, row_weights, teacher_ids, class_map)
    name = kernel_for("kd_loss", student_logits, teacher_logits, options, kernel, 0 if teacher_ids is None else teacher_ids.shape[-1])
    mapped = class_map if isinstance(class_map, Tensor) else None
    needs_grad = torch.is_grad_enabled() and student_logits.requires_grad
    if inplace and needs_grad and student_logits.is_leaf:
        raise ValueError("kd_loss: inplace needs student_logits that are no leaf (a parameter's values would be lost), got a leaf")
    if name == native.REFERENCE:
        return _reference("kd_loss", student_logits, teacher_logits, labels, row_weights, teacher_ids, mapped, common, options)
    divisor = None
    if needs_grad and kd_loss_float16.waits(student_logits, reduction):
        options, row_weights, divisor = kd_loss_float16.undivided("kd_loss", options, student_logits, labels, row_weights)
    arguments = (student_logits, teacher_logits, labels, row_weights, teacher_ids, mapped, common, options)
    if dispatched(student_logits) or dispatched(teacher_logits):
        loss = _Traced.apply(*arguments, name) if needs_grad else _call_op(*arguments, False, name)[0]
    elif needs_grad:
        loss = _Fused.apply(student_logits, (arguments, inplace and _writable_rows(student_logits), name))
    else:
        loss = _run(*arguments, None, name)
    return loss if divisor is None else loss / divisor


def kernel_for(where: str, student: Tensor, teacher: Tensor, options: Options, kernel: str | None, ids: int = 0) -> str:
    """The kernel for these logits. Native ones take float32, bfloat16 and float16, and all divergences but "dist".

    ``ids``: how many classes a top-k teacher names.
    """
    device = student.device.type
    name = native.resolve("kd_loss", kernel, where) if device != "cuda" or kernel not in (None, CUDA) else CUDA
    reason = unsupported(student, teacher, options.divergence if options.soft_weight > 0 else "", ids)
    if name not in (CUDA, native.REFERENCE) and device == "cuda" and reason is None:
        reason = f"on {student.device}, only on the CPU"
    if name == native.REFERENCE or reason is None:
        return name
    if kernel is not None:
        raise ValueError(f"{where}: kernel {kernel!r} cannot run {reason}")
    return native.REFERENCE


def kernel_and_reason(student: Tensor, teacher: Tensor, divergence: str) -> tuple[str, str | None]:
    """Which kernel ``kd_loss`` runs for these logits by itself, and why it is the reference if it is.

    >>> kernel_and_reason(torch.randn(8, 10).double(), torch.randn(8, 10), "forward_kl")
    ('reference', 'no kernel for torch.float64 and torch.float32, only float32, bfloat16 and float16')
    """
    on_cuda = student.device.type == "cuda"
    missing = None if on_cuda else native.fallback_reason("kd_loss")
    if missing is not None:
        return native.REFERENCE, missing
    reason = unsupported(student, teacher, divergence)
    return (native.REFERENCE, f"no kernel for {reason}") if reason else (CUDA if on_cuda else native.kernels("kd_loss")[0], None)


def unsupported(student: Tensor, teacher: Tensor, divergence: str, ids: int = 0) -> str | None:
    """Why no native kernel runs these arguments, or None. ``divergence``: "" if the teacher does not count."""
    if student.dtype not in native.DTYPES or teacher.dtype not in native.DTYPES:
        return f"{student.dtype} and {teacher.dtype}, only float32, bfloat16 and float16"
    if student.device.type == "cuda":
        return cuda_kd_loss.unsupported(student, teacher, divergence, ids)
    if student.device.type != "cpu":
        return f"on {student.device}, only on the CPU and on CUDA"
    return "divergence 'dist'" if divergence == "dist" else None


class _Fused(torch.autograd.Function):
    """The forward pass computes the gradient for an upstream gradient of 1; the backward pass scales it."""

    @staticmethod
    def forward(ctx, student, call):  # one argument for all that has no gradient: autograd looks at each
        arguments, inplace, kernel = call
        gradient = student.detach() if inplace else torch.empty_like(student, memory_format=torch.contiguous_format)
        loss = _run(*arguments, gradient, kernel)
        if inplace:
            # Whoever saved the logits for its own backward must notice that they are gone.
            torch.autograd.graph.increment_version(gradient)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():
            raise RuntimeError(
                "kd_loss: create_graph=True asks for second derivatives, which the native kernels do not have; pass kernel='reference'"
            )
        (gradient,) = ctx.saved_tensors
        if gradient.is_cuda:
            cuda_kd_loss.scale_once("kd_loss", ctx, [gradient], upstream)
            return gradient, None
        return scaled(gradient, upstream), None


class _Traced(torch.autograd.Function):
    """The same for torch.compile and torch.export."""

    @staticmethod
    def forward(ctx, student, teacher, labels, row_weights, teacher_ids, class_map, common, options, kernel):
        loss, gradient = _call_op(student, teacher, labels, row_weights, teacher_ids, class_map, common, options, True, kernel)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return scaled(gradient, upstream), None, None, None, None, None, None, None, None


def scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """``gradient * upstream``, where upstream is a scalar or has one value per row. The gradient itself for 1."""
    if upstream.dim() == 0:
        if upstream.device.type == "cpu" and not tracing() and upstream.item() == 1.0:
            return gradient
        return gradient * upstream
    return (gradient * upstream.unsqueeze(-1)).to(gradient.dtype)


def _writable_rows(student: Tensor) -> bool:
    return student.dim() == 2 and student.stride(1) == 1 and student.stride(0) >= student.shape[1]


def _rows(logits: Tensor) -> Tensor:
    """(..., n) as (rows, n) with contiguous rows; a view where that is possible."""
    if logits.dim() != 2:
        logits = logits.reshape(-1, logits.shape[-1])
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _flat(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None or (tensor.dtype == dtype and tensor.is_contiguous()):
        return tensor
    return tensor.to(dtype).contiguous()


def _run(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    row_weights: Tensor | None,
    teacher_ids: Tensor | None,
    class_map: Tensor | None,
    common: int,
    options: Options,
    gradient: Tensor | None,
    kernel: str,
    denominator: float = 0.0,
    scale: Tensor | None = None,
) -> Tensor:
    """Call the extension; the gradient, if asked for, goes to ``gradient``, which may be the student.

    ``denominator`` replaces the one of the reduction, for callers that see only part of the rows; on CUDA ``scale`` does, one over
    it, on the device.
    """
    rows = _rows(student)
    if kernel == CUDA:
        soft = options.soft_weight > 0
        ids = _flat(teacher_ids, torch.int64) if soft else None
        loss = cuda_kd_loss.run(
            rows, _rows(teacher) if soft else None, _flat(labels, torch.int64), _flat(row_weights, torch.float32),
            None if ids is None else ids.view(rows.shape[0], -1), _flat(class_map, torch.int64) if soft else None, common if soft else 0,
            options, gradient if gradient is None or gradient.dim() == 2 else gradient.view(rows.shape), student.shape[0], scale=scale,
        )  # fmt: skip
        return loss.view(student.shape[:-1]) if options.reduction == "none" else loss
    n, classes = rows.shape
    loss = torch.empty(student.shape[:-1] if options.reduction == "none" else (), dtype=torch.float32, device=CPU)
    labels, row_weights = _flat(labels, torch.int64), _flat(row_weights, torch.float32)
    target, teacher_at, teacher_stride, teacher_classes, ids_at, map_at = rows, 0, 0, 0, 0, 0
    if options.soft_weight > 0:
        target, teacher_ids, class_map = _rows(teacher), _flat(teacher_ids, torch.int64), _flat(class_map, torch.int64)
        teacher_at, teacher_stride, teacher_classes = target.data_ptr(), target.stride(0), target.shape[1]
        ids_at = 0 if teacher_ids is None else teacher_ids.data_ptr()
        map_at = 0 if class_map is None else class_map.data_ptr()
    else:
        common = 0
    gradient_at, gradient_stride = 0, 0
    if gradient is not None:
        # A gradient in place has the student's rows, any other is contiguous.
        gradient_at, gradient_stride = gradient.data_ptr(), gradient.stride(0) if gradient.dim() == 2 else classes
    _plan(options, kernel)(
        n, classes, rows.data_ptr(), rows.stride(0), native.DTYPES[rows.dtype],
        teacher_at, teacher_stride, teacher_classes, native.DTYPES[target.dtype], ids_at, map_at, common,
        0 if labels is None else labels.data_ptr(), 0 if row_weights is None else row_weights.data_ptr(),
        denominator, student.shape[0], loss.data_ptr(), gradient_at, gradient_stride,
    )  # fmt: skip
    return loss


@lru_cache(maxsize=256)
def _plan(o: Options, kernel: str) -> Callable[..., None]:
    return native.module.KdLossPlan(
        kernel, TEACHER_FORMS[o.teacher_form], o.tail, o.ignore_index, DIVERGENCES[o.divergence], o.temperature, o.soft_weight,
        o.hard_weight, o.beta, *o.part_weights, o.label_smoothing, REDUCTIONS[o.reduction],
    )  # fmt: skip


def _reference(where, student, teacher, labels, row_weights, teacher_ids, class_map, common, options) -> Tensor:
    check_values(where, options, student, teacher.shape[-1], labels, row_weights, teacher_ids, class_map)
    loss = kd_loss_reference(
        student.reshape(-1, student.shape[-1]),
        teacher.reshape(-1, teacher.shape[-1]),
        None if labels is None else labels.reshape(-1).long(),
        None if row_weights is None else row_weights.reshape(-1),
        None if teacher_ids is None else teacher_ids.reshape(-1, teacher_ids.shape[-1]).long(),
        None if class_map is None else class_map.long(),
        common=common,
        batch=student.shape[0],
        **{name: getattr(options, name) for name in OPTION_NAMES},
    )
    return loss.reshape(student.shape[:-1]) if options.reduction == "none" else loss


def _call_op(student, teacher, labels, row_weights, teacher_ids, class_map, common, options, gradient, kernel):
    o = options
    numbers = [o.temperature, o.soft_weight, o.hard_weight, o.beta, *o.part_weights, o.label_smoothing]
    return _op(
        student, teacher, labels, row_weights, teacher_ids, class_map, numbers, common, o.ignore_index,
        [o.divergence, o.reduction, o.teacher_form, kernel], o.tail, gradient,
    )  # fmt: skip


def _run_op(student, teacher, labels, row_weights, teacher_ids, class_map, numbers, common, ignore_index, names, tail, gradient):
    temperature, soft_weight, hard_weight, beta, first, second, label_smoothing = numbers
    divergence, reduction, teacher_form, kernel = names
    options = Options(
        temperature, soft_weight, hard_weight, divergence, beta, (first, second), label_smoothing, ignore_index, reduction,
        teacher_form, tail,
    )  # fmt: skip
    out = torch.empty(student.shape if gradient else (0,), dtype=student.dtype, device=student.device)
    arguments = (student, teacher, labels, row_weights, teacher_ids, class_map, common, options)
    return _run(*arguments, out if gradient else None, kernel), out


def _fake_op(student, teacher, labels, row_weights, teacher_ids, class_map, numbers, common, ignore_index, names, tail, gradient):
    loss = student.new_empty(student.shape[:-1] if names[1] == "none" else (), dtype=torch.float32)
    return loss, student.new_empty(student.shape if gradient else (0,))


_op = define(
    "kd_loss(Tensor student, Tensor teacher, Tensor? labels, Tensor? row_weights, Tensor? teacher_ids, Tensor? class_map, "
    "float[] numbers, SymInt common, int ignore_index, str[] names, bool tail, bool gradient) -> (Tensor, Tensor)",
    _run_op,
    _fake_op,
)
