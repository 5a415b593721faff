"""Distillation from hidden states and output heads, for vocabularies whose logits would not fit into memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...ops import linear_kd_loss, native
from ...ops.linear_kd_loss import check_linear_options
from .class_map import ClassMap, keep_class_map, shown


class LinearKDLoss(nn.Module):
    """:class:`KDLoss` of ``F.linear(student_hidden, student_head)`` and ``F.linear(teacher_hidden, teacher_head)``, in chunks of rows.

    ``soft_weight * T^2 * D(teacher, student) + hard_weight * cross_entropy(student, labels)``, T = ``temperature``: the value and
    the gradients of ``KDLoss`` on whole logits, but only ``chunk_size`` rows of logits exist at a time, and no gradient of logits is
    kept. Call it with the hidden states that go into the heads (the models' ``forward`` without the head) and the heads' weights.

    - ``divergence``: "forward_kl", "reverse_kl", "jsd" (``beta`` in [0, 1], default 0.5) or "dkd" (``part_weights`` = (target,
      nontarget), default (1, 8)). "dist" compares all rows with each other and cannot run in chunks
    - ``label_smoothing``, ``ignore_index``: as in ``F.cross_entropy``; an ignored row counts in neither term
    - ``reduction``: "mean" over rows that count, "sum", "batchmean" (divides by ``student_hidden.shape[0]``); "none" only without a
      gradient
    - ``shift_labels``: position i is compared with label i + 1, for causal language models whose labels equal their inputs
    - ``class_map``: vocabularies of different size: "prefix" compares the common leading classes, a tensor (classes,) holds the
      teacher's class of each student class, -1 for none; it moves with the module and is not part of its ``state_dict``
    - ``chunk_size``: rows per chunk, None chooses from the vocabulary sizes
    - ``accum_dtype``: in which the head's gradient is summed over chunks, None for at least float32; see ``ops.linear_kd_loss``
    - ``kernel``: forces one of ``ops.native.kernels("kd_loss")``

    Not for ``Distiller``, which sees a model's outputs but not its head: call it in a loop of your own. The sources are those of
    :func:`~pycompress.ops.kd_loss`: Hinton, Vinyals, Dean 2015, section 2, https://arxiv.org/abs/1503.02531, Agarwal et al. 2023
    (jsd), https://arxiv.org/abs/2306.13649, Zhao et al. 2022 (dkd), https://arxiv.org/abs/2203.08679; the chunks are those of
    FusedLinearCrossEntropy, Hsu et al. 2024 (Liger Kernel), https://arxiv.org/abs/2410.10989.

    Raises ``ValueError`` and ``TypeError`` for options out of range, on construction.

    >>> loss = LinearKDLoss(temperature=2.0, soft_weight=0.5, hard_weight=0.5)
    >>> loss(student_hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight, labels).backward()
    """

    class_map: ClassMap

    def __init__(
        self,
        temperature: float = 4.0,
        soft_weight: float = 0.5,
        hard_weight: float = 0.5,
        *,
        divergence: str = "forward_kl",
        beta: float | None = None,
        part_weights: tuple[float, float] | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        shift_labels: bool = False,
        class_map: ClassMap = None,
        chunk_size: int | None = None,
        accum_dtype: torch.dtype | None = None,
        kernel: str | None = None,
    ) -> None:
        super().__init__()
        where = type(self).__name__
        check_linear_options(
            where, temperature, soft_weight, hard_weight, divergence, beta, part_weights, label_smoothing, ignore_index, reduction,
            chunk_size,
        )  # fmt: skip
        native.resolve("kd_loss", kernel, where)
        self.temperature = float(temperature)
        self.soft_weight = float(soft_weight)
        self.hard_weight = float(hard_weight)
        self.divergence = divergence
        self.beta = beta
        self.part_weights = part_weights
        self.label_smoothing = float(label_smoothing)
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.shift_labels = bool(shift_labels)
        self.chunk_size = chunk_size
        self.accum_dtype = accum_dtype
        self.kernel = kernel
        keep_class_map(self, class_map)

    def forward(
        self,
        student_hidden: Tensor,
        student_head: Tensor,
        teacher_hidden: Tensor,
        teacher_head: Tensor,
        labels: Tensor | None = None,
        row_weights: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor:
        """The loss, a float32 scalar (float64 for float64; (...) for ``reduction="none"``).

        - ``student_hidden``: (..., student_features), ``student_head``: (classes, student_features), ``student_bias``: (classes)
        - ``teacher_hidden``: (..., teacher_features), ``teacher_head``: (teacher_classes, teacher_features), ``teacher_bias``:
          (teacher_classes). The teacher's tensors get no gradient
        - ``labels``: (...) integers, needed for ``hard_weight`` > 0 and "dkd"; ``row_weights``: (...) float, not negative

        Raises ``ValueError`` for shapes, devices and labels that do not fit, ``TypeError`` for dtypes.
        """
        if self.shift_labels:
            student_hidden, teacher_hidden = self._without_last(student_hidden), self._without_last(teacher_hidden)
            labels, row_weights = (None if t is None else t[..., 1:] for t in (labels, row_weights))
        return linear_kd_loss(
            student_hidden,
            student_head,
            teacher_hidden,
            teacher_head,
            labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            temperature=self.temperature,
            soft_weight=self.soft_weight,
            hard_weight=self.hard_weight,
            divergence=self.divergence,
            beta=self.beta,
            part_weights=self.part_weights,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            row_weights=row_weights,
            reduction=self.reduction,
            class_map=self.class_map,
            chunk_size=self.chunk_size,
            accum_dtype=self.accum_dtype,
            kernel=self.kernel,
        )

    def _without_last(self, hidden: Tensor) -> Tensor:
        """The last position has no next label."""
        if not isinstance(hidden, Tensor):
            return hidden  # the op says what is wrong with it
        if hidden.dim() < 3 or hidden.shape[-2] < 2:
            raise ValueError(
                f"{type(self).__name__}: shift_labels needs hidden states of (batch, at least 2 positions, features), "
                f"got {tuple(hidden.shape)}"
            )
        return hidden[..., :-1, :]

    def extra_repr(self) -> str:
        options = {key: value for key, value in vars(self).items() if not key.startswith("_") and key not in ("training", "class_map")}
        options["class_map"] = shown(self.class_map)
        return ", ".join(f"{key}={value!r}" for key, value in options.items() if value is not None)
