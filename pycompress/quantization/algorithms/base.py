"""What post-training algorithms have in common: when they run and what they need."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...registry import Registry

STAGES = ("before", "rounding", "after")
"""before: changes the float model, keeping its function. rounding: chooses the integers of a prepared, calibrated model.
after: corrects what rounding left behind."""


@dataclass(frozen=True)
class Algorithm:
    """``function(model, [data,] **options)`` changes the model in place and returns it; ``options`` are chosen by the user."""

    name: str
    function: Callable[..., nn.Module]
    stage: str
    needs_data: bool
    options: Mapping[str, Any] = field(default_factory=dict)

    def run(self, model: nn.Module, data: Any, **context: Any) -> nn.Module:
        """``context`` (example_inputs, forward, progress): what the caller knows; passed on as far as the function takes it."""
        known = inspect.signature(self.function).parameters
        context = {key: value for key, value in context.items() if key in known}
        return self.function(model, *([data] if self.needs_data else []), **{**context, **self.options})


ALGORITHMS: Registry[Algorithm] = Registry("quantization algorithm")


def algorithm(name: str, *, stage: str, needs_data: bool) -> Callable[[Callable[..., nn.Module]], Callable[..., nn.Module]]:
    """Decorator that enters a function into ``ALGORITHMS``."""

    def enter(function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        ALGORITHMS.register(name)(Algorithm(name, function, stage, needs_data))
        return function

    return enter


def check_algorithms(where: str, algorithms: Sequence[str | tuple[str, Mapping[str, Any]]]) -> list[Algorithm]:
    """Look names and options up and sort by stage; ``ValueError`` or ``TypeError`` for what does not exist."""
    if isinstance(algorithms, str):
        algorithms = [algorithms]
    steps = []
    for entry in algorithms:
        name, options = (entry, {}) if isinstance(entry, str) else entry
        step = ALGORITHMS[name]
        known = inspect.signature(step.function).parameters
        for option in options:
            if option not in known:
                raise ValueError(f"{where}: algorithm {name!r} has no option {option!r}, it takes {', '.join(list(known)[1:])}")
        steps.append(Algorithm(step.name, step.function, step.stage, step.needs_data, dict(options)))
    rounding = [step.name for step in steps if step.stage == "rounding"]
    if len(rounding) > 1:
        raise ValueError(f"{where}: algorithms must name one rounding algorithm at most, got {', '.join(rounding)}")
    return sorted(steps, key=lambda step: STAGES.index(step.stage))
