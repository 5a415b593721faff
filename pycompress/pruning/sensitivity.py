"""How much each layer alone can lose, and ratios chosen from that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..nn.surgery import Ignore
from ..progress import track
from .checks import check_ratio
from .criteria import Criterion
from .pruner import Pruner, prune


@dataclass(frozen=True)
class Sensitivity:
    """Scores of the model with one layer pruned at a time."""

    baseline: float
    """Score of the model as it is."""
    scores: dict[str, dict[float, float]]
    """Layer -> ratio -> score with that layer pruned by that ratio."""

    def ratios(self, max_drop: float) -> dict[str, float]:
        """For each layer the highest ratio up to which no tested one costs more than ``max_drop``; pass it on as ``Pruner(ratio=...)``.

        Layers that tolerate none are left out. Drops of several layers add up, so choose ``max_drop`` well below what the whole
        network may lose, and fine-tune. ``ValueError`` if no layer tolerates any.
        """
        found: dict[str, float] = {}
        for name, scores in self.scores.items():
            for ratio in sorted(scores):
                if not self.baseline - scores[ratio] <= max_drop:  # a NaN score is no good either
                    break
                found[name] = ratio
        if not found:
            raise ValueError(f"Sensitivity.ratios: max_drop must allow at least one layer its lowest ratio, got {max_drop!r}")
        return found

    def __str__(self) -> str:
        ratios = sorted({ratio for scores in self.scores.values() for ratio in scores})
        width = max(map(len, ("layer", *self.scores)))
        lines = [f"{'layer':<{width}}" + "".join(f"{ratio:>9.0%}" for ratio in ratios)]
        for name, scores in self.scores.items():
            lines.append(f"{name:<{width}}" + "".join(f"{scores[ratio] - self.baseline:>+9.4f}" for ratio in ratios))
        return "\n".join(lines)


def sensitivity(
    model: nn.Module,
    example_inputs: Any,
    evaluate: Callable[[nn.Module], float],
    *,
    ratios: Sequence[float] = (0.25, 0.5, 0.75, 0.9),
    pattern: str = "unstructured",
    criterion: str | Criterion = "magnitude",
    ignore: Ignore = (),
    seed: int = 0,
    data: Iterable[Any] | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    """Prune one layer at a time in a copy and call ``evaluate(copy)`` (higher is better), without training in between.

    The model is not changed. ``pattern`` is ``"unstructured"`` or ``"channel"``, where a row stands for all layers that share the
    channels. Costs layers x ratios evaluations. Other arguments as for ``prune``. (Li et al. 2017, arXiv:1608.08710, section 3.2)

    >>> table = sensitivity(model, x, accuracy)
    >>> model = prune(model, x, ratio=table.ratios(max_drop=0.01))
    """
    if pattern not in ("unstructured", "channel"):
        raise ValueError(f"sensitivity: pattern must be 'unstructured' or 'channel', whose ratio can vary, got {pattern!r}")
    chosen = sorted({check_ratio("sensitivity", ratio) for ratio in ratios})
    if not chosen:
        raise ValueError("sensitivity: ratios must hold at least one number, got none")
    batches = None if data is None else list(data)  # read once, used for every copy
    arguments: dict[str, Any] = {"pattern": pattern, "criterion": criterion, "seed": seed}
    copied_ignore = [_path_of(model, entry) for entry in ([ignore] if isinstance(ignore, (str, type, nn.Module)) else ignore)]
    # The highest ratio, since layers whose channels cannot be removed show only where some would be.
    names = Pruner(deepcopy(model), example_inputs, ratio=chosen[-1], ignore=copied_ignore, **arguments).prunable()
    baseline = float(evaluate(deepcopy(model)))
    scores: dict[str, dict[float, float]] = {name: {} for name in names}
    for name, ratio in track([(name, ratio) for name in names for ratio in chosen], "sensitivity", progress=progress):
        pruned = prune(
            deepcopy(model),
            example_inputs,
            ratio={name: ratio},
            ignore=copied_ignore,
            data=batches,
            loss_fn=loss_fn,
            progress=False,
            **arguments,
        )
        scores[name][ratio] = float(evaluate(pruned))
    return Sensitivity(baseline, scores)


def _path_of(model: nn.Module, entry: Any) -> Any:
    """A module of the model as its path, which names the same module in a copy; everything else as it is."""
    if not isinstance(entry, nn.Module):
        return entry
    return next((name for name, module in model.named_modules() if module is entry), entry)
