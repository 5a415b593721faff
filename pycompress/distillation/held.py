"""Whether the optimizer still trains the student that a callback may have changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .unwrap import unwrap


class HeldParameters:
    """The parameters that the students have when training starts.

    Frozen and unfrozen ones are the same Parameters. New ones are fine as soon as the optimizer holds them.
    """

    def __init__(self, students: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
        self.students = {name: unwrap(model) for name, model in students.items()}
        self.optimizer = optimizer
        # The objects, not their ids: an id is free for another object once its owner is gone.
        self.known = {id(parameter): parameter for model in self.students.values() for parameter in model.parameters()}

    def stranger(self) -> str | None:
        """Name and shape of a parameter that was not there and that the optimizer does not hold, or None."""
        for student, model in self.students.items():
            for name, parameter in model.named_parameters():
                if id(parameter) not in self.known and not self._is_held(parameter):
                    return f"{name if len(self.students) == 1 else f'{student}.{name}'} {tuple(parameter.shape)}"
        return None

    def check(self, callback: str) -> None:
        """Raise ``RuntimeError`` where ``callback`` replaced parameters, whose successors would never learn."""
        stranger = self.stranger()
        if stranger is not None:
            raise RuntimeError(
                f"fit: {callback} must leave the student's Parameters in place, got a new one, {stranger}, that the optimizer "
                "does not hold and would never train; remove channels and add layers between calls of fit, each of which "
                "makes an optimizer: for _ in range(steps): pruner.step(); distiller.fit(train_loader, epochs=1)"
            )

    def _is_held(self, parameter: nn.Parameter) -> bool:
        return any(parameter is other for group in self.optimizer.param_groups for other in group["params"])
