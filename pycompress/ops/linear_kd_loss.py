"""``linear_kd_loss``: distillation loss from hidden states and heads, without ever holding all logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import native
from .cuda import kd_loss as cuda_kd_loss
from .cuda.extension import NAME as CUDA
from .kd_loss import _reference, _run, kernel_for, scaled
from .kd_loss_options import Options, check_options, check_tensors, check_values
from .library import define, tracing

CHUNK_BYTES, MIN_CHUNK = 128 << 20, 256
"""Student plus teacher logits of one chunk by default, and rows whatever they take. Each chunk reads and writes the head's gradient
once more, and the matrix products lose speed under 256 rows: at 1024 x 384/768 x 32000, 131 rows (32 MiB) took 1.23 times the bare
products, 256 rows 1.10 and 512 rows 1.08."""
SUM_BYTES = 32 << 20
"""Product of a half-precision head's gradient held at a time while it is added to the sum of wider dtype."""
CUDA_CHUNK_BYTES, MIN_CUDA_CHUNK = 1 << 30, 128
"""On CUDA the matrix products need more rows, and each chunk reads and writes the head's gradient once more: 2048 rows of two
vocabularies of 128256 in half precision. Multiples of 128 rows fill the tiles of the products."""


def linear_kd_loss(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    labels: Tensor | None = None,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
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
    class_map: Tensor | str | None = None,
    chunk_size: int | None = None,
    accum_dtype: torch.dtype | None = None,
    kernel: str | None = None,
) -> Tensor:
    """``kd_loss(F.linear(student_hidden, student_head, student_bias), F.linear(teacher_hidden, ...), labels, ...)`` in chunks of rows.

    - ``student_hidden``: (..., student_features), ``student_head``: (classes, student_features), ``student_bias``: (classes) or None;
      the teacher's likewise, with features and (given ``class_map``) classes of its own. Only the student's get gradients
    - ``chunk_size``: rows per chunk; None chooses from the vocabulary sizes. Never more than one chunk of student and teacher
      logits is alive (but for the reference kernel under torch.compile), and a chunk's gradient takes the place of its student logits
    - ``accum_dtype``: in which the gradients of head and bias are summed over chunks. None: at least float32, which for a half-precision
      head costs 4 bytes per weight while the forward pass runs; ``student_head.dtype`` saves them and loses digits with each chunk
    - the other arguments are those of ``kd_loss``, without "dist", which looks at all rows at once

    The gradients of hidden states, head and bias are computed during the forward pass, those that are needed, and scaled in
    the backward pass. So ``reduction="none"`` with a gradient is refused: use ``row_weights``. Under ``torch.autocast`` both sides
    are cast as ``F.linear`` would cast them.

    Raises what ``kd_loss`` raises, with this function's name.

    >>> h, w = torch.randn(512, 64, requires_grad=True), torch.randn(32000, 64, requires_grad=True)
    >>> linear_kd_loss(h, w, torch.randn(512, 96), torch.randn(32000, 96), temperature=2.0, soft_weight=1.0, hard_weight=0.0).backward()
    """
    where = "linear_kd_loss"
    options = check_linear_options(
        where, temperature, soft_weight, hard_weight, divergence, beta, part_weights, label_smoothing, ignore_index, reduction, chunk_size
    )  # fmt: skip
    student_hidden, student_head, student_bias = _autocast(student_hidden, student_head, student_bias)
    teacher_hidden, teacher_head, teacher_bias = _autocast(teacher_hidden, teacher_head, teacher_bias)
    _check_side(where, "student", student_hidden, student_head, student_bias)
    _check_side(where, "teacher", teacher_hidden, teacher_head, teacher_bias)
    # Shapes of the logits that there will be, on a device that holds nothing.
    shapes = [h.shape[:-1] + w.shape[:1] for h, w in ((student_hidden, student_head), (teacher_hidden, teacher_head))]
    student_logits, teacher_logits = (
        h.new_empty(1).expand(shape) for h, shape in zip((student_hidden, teacher_hidden), shapes, strict=True)
    )
    common = check_tensors(where, options, student_logits, teacher_logits, labels, row_weights, None, class_map)
    name = kernel_for(where, student_logits, teacher_logits, options, kernel)
    mapped = class_map if isinstance(class_map, Tensor) else None
    check_values(where, options, student_logits, shapes[1][-1], labels, row_weights, None, mapped)
    learns = [t is not None and t.requires_grad for t in (student_hidden, student_head, student_bias)]
    needs_grad = torch.is_grad_enabled() and any(learns)
    if needs_grad and reduction == "none":
        raise ValueError(f"{where}: reduction 'none' has no gradient here (it is summed over rows in the forward pass); use row_weights")
    if tracing() and name == native.REFERENCE:  # ordinary torch functions: how much lives when is the compiler's choice
        student_logits = F.linear(student_hidden, student_head, student_bias)
        teacher_logits = F.linear(teacher_hidden, teacher_head, teacher_bias)
        return _reference(where, student_logits, teacher_logits, labels, row_weights, None, mapped, common, options)
    rows = Problem(
        student_hidden.flatten(0, -2),
        student_head,
        student_bias,
        teacher_hidden.flatten(0, -2).detach(),
        teacher_head.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
        None if labels is None else labels.reshape(-1).long(),
        None if row_weights is None else row_weights.reshape(-1).float(),
        mapped,
    )
    size = chunk_size or choose_chunk(rows.student_hidden, shapes[0][-1], shapes[1][-1])
    call = Call(options, common, size, student_hidden.shape[0], check_accum_dtype(where, accum_dtype, student_head.dtype), name)
    if needs_grad:
        return _FusedLinear.apply(*rows, call)
    loss, _ = (_call_op if tracing() else run_chunks)(rows, call, [False] * 3)
    return loss.reshape(shapes[0][:-1]) if reduction == "none" else loss


def check_linear_options(
    where: str,
    temperature: float,
    soft_weight: float,
    hard_weight: float,
    divergence: str,
    beta: float | None,
    part_weights: tuple[float, float] | None,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    chunk_size: int | None,
) -> Options:
    """``check_options`` for what can run in chunks."""
    options = check_options(
        where, temperature, soft_weight, hard_weight, divergence, beta, part_weights, label_smoothing, ignore_index, reduction,
        "logits", False,
    )  # fmt: skip
    if divergence == "dist":
        raise ValueError(f"{where}: divergence must not be 'dist', which looks at all rows at once; use kd_loss")
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"{where}: chunk_size must be an int above 0 or None, got {chunk_size!r}")
    return options


def check_accum_dtype(where: str, accum_dtype: torch.dtype | None, head_dtype: torch.dtype) -> torch.dtype:
    wider = torch.promote_types(head_dtype, torch.float32)
    if accum_dtype not in (None, wider, head_dtype):
        raise ValueError(f"{where}: accum_dtype must be None, {wider} or the head's {head_dtype}, got {accum_dtype!r}")
    return wider if accum_dtype is None else accum_dtype


class Problem(NamedTuple):
    """All tensors, with one row per token."""

    student_hidden: Tensor
    student_head: Tensor
    student_bias: Tensor | None
    teacher_hidden: Tensor
    teacher_head: Tensor
    teacher_bias: Tensor | None
    labels: Tensor | None
    row_weights: Tensor | None
    class_map: Tensor | None


class Call(NamedTuple):
    """Everything else."""

    options: Options
    common: int
    chunk: int
    batch: int
    accum_dtype: torch.dtype
    kernel: str


def choose_chunk(hidden: Tensor, student_classes: int, teacher_classes: int) -> int:
    """Rows per chunk: ``CHUNK_BYTES`` of logits, at least ``MIN_CHUNK`` rows; on CUDA more."""
    row_bytes = hidden.element_size() * (student_classes + teacher_classes)
    if hidden.is_cuda:
        return max(1, min(hidden.shape[0], max(MIN_CUDA_CHUNK, CUDA_CHUNK_BYTES // row_bytes // MIN_CUDA_CHUNK * MIN_CUDA_CHUNK)))
    rows = CHUNK_BYTES // row_bytes
    return max(1, min(hidden.shape[0], max(MIN_CHUNK, rows)))


def run_chunks(rows: Problem, call: Call, learns: list[bool]) -> tuple[Tensor, list[Tensor | None]]:
    """The loss, and the gradients of student hidden states, head and bias where ``learns`` says so."""
    o, (n, classes), device = call.options, (rows.student_hidden.shape[0], rows.student_head.shape[0]), rows.student_hidden.device
    with torch.no_grad():
        divisor = denominator(rows, call)
        if call.kernel == CUDA:
            divisor = (torch.full((), 1.0 / divisor, device=device) if isinstance(divisor, float) else divisor.reciprocal()).float()
        size = min(call.chunk, n)
        student_buffer = rows.student_hidden.new_empty(size, classes)
        teacher_buffer = rows.teacher_hidden.new_empty(size, rows.teacher_head.shape[0] if o.soft_weight > 0 else 1)
        # One chunk is no sum. A row's hidden state is in one chunk only.
        dtypes = [rows.student_hidden.dtype, *[call.accum_dtype if n > size else rows.student_head.dtype] * 2]
        gradients = [torch.empty(t.shape, dtype=dtype, device=device) if t is not None and g else None
                     for t, g, dtype in zip(rows[:3], learns, dtypes, strict=True)]  # fmt: skip
        losses = []
        for begin in range(0, n, size):
            part = slice(begin, min(begin + size, n))
            student, teacher = student_buffer[: part.stop - begin], teacher_buffer[: part.stop - begin]
            linear_out(rows.student_hidden[part], rows.student_head, rows.student_bias, student)
            if o.soft_weight > 0:
                linear_out(rows.teacher_hidden[part], rows.teacher_head, rows.teacher_bias, teacher)
            losses.append(chunk_loss(student, teacher, rows, call, part, divisor, any(learns)))
            if any(learns):
                add_gradients(student, rows.student_hidden[part], rows.student_head, part, gradients)
    loss = torch.cat(losses) if o.reduction == "none" else torch.stack(losses).double().sum().to(losses[0].dtype)
    return loss, [None if g is None else g.to(rows.student_head.dtype) for g in gradients]


def linear_out(hidden: Tensor, head: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(hidden, head.T, out=out)
    else:
        torch.addmm(bias, hidden, head.T, out=out)


def denominator(rows: Problem, call: Call) -> float | Tensor:
    """What the sum over all rows is divided by. A tensor on an accelerator, which must not be waited for."""
    if call.options.reduction != "mean":
        return float(call.batch) if call.options.reduction == "batchmean" else 1.0
    counted = torch.ones(rows.student_hidden.shape[0], dtype=torch.float64, device=rows.student_hidden.device)
    if rows.labels is not None:
        counted = counted * (rows.labels != call.options.ignore_index)
    if rows.row_weights is not None:
        counted = torch.where(counted > 0, rows.row_weights.double(), 0.0)
    total = counted.sum()
    total = torch.where(total > 0, total, 1.0)
    return float(total) if total.device.type == "cpu" else total


def chunk_loss(student: Tensor, teacher: Tensor, rows: Problem, call: Call, part: slice, divisor: float | Tensor, gradient: bool) -> Tensor:
    """Loss of one chunk; its gradient, if asked for, overwrites the student logits."""
    labels, row_weights = (None if t is None else t[part] for t in (rows.labels, rows.row_weights))
    options = call.options._replace(reduction="none" if call.options.reduction == "none" else "sum")
    if call.options.soft_weight == 0:
        teacher = student
    arguments = (labels, row_weights, None, rows.class_map, call.common, options)
    if call.kernel == CUDA:  # here divisor is one over it
        assert isinstance(divisor, Tensor)
        return _run(student, teacher, *arguments, student if gradient else None, CUDA, scale=divisor)
    if call.kernel != native.REFERENCE:
        assert isinstance(divisor, float)
        return _run(student, teacher, *arguments, student if gradient else None, call.kernel, divisor)
    if not gradient:
        return _reference("linear_kd_loss", student, teacher, *arguments) / divisor
    with torch.enable_grad():
        logits = student.detach().requires_grad_()
        loss = _reference("linear_kd_loss", logits, teacher, *arguments) / divisor
    student.copy_(torch.autograd.grad(loss, logits)[0])
    return loss.detach()


def add_gradients(logits: Tensor, hidden: Tensor, head: Tensor, part: slice, gradients: list[Tensor | None]) -> None:
    """``logits`` holds the gradient of a chunk's logits; the first chunk overwrites, later ones add."""
    to_hidden, to_head, to_bias = gradients
    if to_hidden is not None:
        torch.mm(logits, head, out=to_hidden[part])
    if to_head is not None:
        if to_head.dtype != logits.dtype:
            add_product(to_head, logits.T, hidden, part.start == 0)
        elif part.start == 0:
            torch.mm(logits.T, hidden, out=to_head)
        else:
            to_head.addmm_(logits.T, hidden)
    if to_bias is not None:
        total = logits.sum(0, dtype=to_bias.dtype)
        if part.start == 0:
            to_bias.copy_(total)
        else:
            to_bias.add_(total)


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``total += a @ b`` (``=`` for ``first``) in ``total``'s wider dtype, with at most ``SUM_BYTES`` of the product at a time."""
    step = max(1, SUM_BYTES // (b.element_size() * b.shape[1]))
    for begin in range(0, a.shape[0], step):
        product = a[begin : begin + step] @ b
        if first:
            total[begin : begin + step].copy_(product)
        else:
            total[begin : begin + step].add_(product)


class _FusedLinear(torch.autograd.Function):
    """Gradients for an upstream gradient of 1 in the forward pass; the backward pass scales them."""

    @staticmethod
    def forward(ctx, student_hidden, student_head, student_bias, *rest):
        *others, call = rest
        learns = list(ctx.needs_input_grad[:3])
        rows = Problem(student_hidden, student_head, student_bias, *others)
        loss, gradients = (_call_op if tracing() else run_chunks)(rows, call, learns)
        ctx.save_for_backward(*gradients)
        ctx.in_place = call.kernel == CUDA and not tracing()
        return loss

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled() and not tracing():
            raise RuntimeError("linear_kd_loss: create_graph=True asks for second derivatives, which it does not have; use kd_loss")
        if ctx.in_place:
            cuda_kd_loss.scale_once("linear_kd_loss", ctx, ctx.saved_tensors, upstream)
            return (*ctx.saved_tensors, *[None] * 7)
        return (*(None if g is None else scaled(g, upstream) for g in ctx.saved_tensors), *[None] * 7)


_AUTOCAST_DEVICES = [device for device in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(device)]
"""Asked once: torch before 2.5 cannot trace the question."""


def _autocast(*tensors):
    """What autocast makes of the arguments of a linear layer: its dtype, but for float64. The loss itself stays in float32."""
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if device not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if isinstance(t, Tensor) and t.dtype in native.DTYPES else t for t in tensors]


def _check_side(where: str, name: str, hidden: Tensor, head: Tensor, bias: Tensor | None) -> None:
    for part, tensor in ((f"{name}_hidden", hidden), (f"{name}_head", head), (f"{name}_bias", bias)):
        if tensor is None and part.endswith("bias"):
            continue
        if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{where}: {part} must be a floating-point tensor, got {got}")
        if tensor.dtype != hidden.dtype or tensor.device != hidden.device:
            raise ValueError(
                f"{where}: {part} must be {hidden.dtype} on {hidden.device} like {name}_hidden, got {tensor.dtype} on {tensor.device}"
            )
    if hidden.dim() < 2 or hidden.numel() == 0:
        raise ValueError(f"{where}: {name}_hidden must be (..., features) with at least one row, got {tuple(hidden.shape)}")
    if head.dim() != 2 or head.shape[1] != hidden.shape[-1] or head.shape[0] == 0:
        raise ValueError(f"{where}: {name}_head must be (classes, {hidden.shape[-1]}) to match {name}_hidden, got {tuple(head.shape)}")
    if bias is not None and bias.shape != head.shape[:1]:
        raise ValueError(f"{where}: {name}_bias must have shape ({head.shape[0]},), got {tuple(bias.shape)}")


def _call_op(rows: Problem, call: Call, learns: list[bool]) -> tuple[Tensor, list[Tensor | None]]:
    """``run_chunks`` as one opaque node, for torch.compile and torch.export."""
    o = call.options
    numbers = [o.temperature, o.soft_weight, o.hard_weight, o.beta, *o.part_weights, o.label_smoothing]
    loss, *gradients = _op(
        *rows, numbers, [call.common, call.chunk, call.batch], o.ignore_index, [o.divergence, o.reduction, call.kernel],
        call.accum_dtype, learns,
    )  # fmt: skip
    return loss, [g if learn else None for g, learn in zip(gradients, learns, strict=True)]


def _run_op(sh, sw, sb, th, tw, tb, labels, row_weights, class_map, numbers, sizes, ignore_index, names, accum_dtype, learns):
    temperature, soft_weight, hard_weight, beta, first, second, label_smoothing = numbers
    divergence, reduction, kernel = names
    options = Options(
        temperature, soft_weight, hard_weight, divergence, beta, (first, second), label_smoothing, ignore_index, reduction, "logits", False
    )
    call = Call(options, sizes[0], sizes[1], sizes[2], accum_dtype, kernel)
    loss, gradients = run_chunks(Problem(sh, sw, sb, th, tw, tb, labels, row_weights, class_map), call, learns)
    return (loss, *(sh.new_empty(0) if g is None else g for g in gradients))


def _fake_op(sh, sw, sb, th, tw, tb, labels, row_weights, class_map, numbers, sizes, ignore_index, names, accum_dtype, learns):
    dtype = torch.float64 if sh.dtype == torch.float64 else torch.float32
    loss = sh.new_empty(sh.shape[:1] if names[1] == "none" else (), dtype=dtype)
    gradients = (t.new_empty(t.shape) if t is not None and g else sh.new_empty(0) for t, g in zip((sh, sw, sb), learns, strict=True))
    return (loss, *gradients)


_op = define(
    "linear_kd_loss(Tensor student_hidden, Tensor student_head, Tensor? student_bias, Tensor teacher_hidden, Tensor teacher_head, "
    "Tensor? teacher_bias, Tensor? labels, Tensor? row_weights, Tensor? class_map, float[] numbers, SymInt[] sizes, int ignore_index, "
    "str[] names, ScalarType accum_dtype, bool[] learns) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_op,
    _fake_op,
)
