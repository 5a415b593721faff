"""Means in float16: the division by the number of rows waits for the backward pass.

The native kernels write the gradient in the forward pass, rounded to the logits' dtype, before they know the upstream gradient.
Divided by a thousand rows most of it is below float16's smallest number (6e-8), and scaling the loss comes too late for what became
0. Undivided it fits: about temperature * soft_weight + hard_weight at most in a row of the largest weight, whatever the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kd_loss_options import Options, check_values


def waits(student: Tensor, reduction: str) -> bool:
    return student.dtype == torch.float16 and reduction in ("mean", "batchmean")


def undivided(
    where: str, options: Options, student: Tensor, labels: Tensor | None, row_weights: Tensor | None
) -> tuple[Options, Tensor | None, Tensor]:
    """(options for the sum, row weights of at most 1, what that sum is to be divided by). Waits for no accelerator."""
    counted = torch.ones(student.shape[:-1], dtype=torch.float64, device=student.device)
    largest = counted.new_ones(())
    if labels is not None:
        counted = (labels != options.ignore_index).to(counted)
    if row_weights is not None:
        check_values(where, options, student, 0, None, row_weights, None, None)  # the kernels would name the value after division
        counted = torch.where(counted > 0, row_weights.to(counted), 0.0)
        largest = at_least_one_row(counted.amax())
        counted = counted / largest
        row_weights = (row_weights.to(counted) / largest).float()
    divisor = at_least_one_row(counted.sum()) if options.reduction == "mean" else student.shape[0] / largest
    return options._replace(reduction="sum"), row_weights, divisor.float()


def at_least_one_row(total: Tensor) -> Tensor:
    return torch.where(total > 0, total, 1.0)
