"""What pruning did, layer by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSparsity:
    """One layer's weight before and after."""

    name: str
    type: str
    shape_before: tuple[int, ...]
    shape: tuple[int, ...]
    kept: int
    """Weights that are left: not masked, or still there."""

    @property
    def weights(self) -> int:
        """Weights before pruning."""
        return math.prod(self.shape_before)

    @property
    def sparsity(self) -> float:
        """Share of the weights that is gone, in [0, 1]."""
        return 1 - self.kept / self.weights


@dataclass(frozen=True)
class PruningSummary:
    """All layers the pruner looks at; ``print(summary)`` shows a table."""

    pattern: str
    layers: tuple[LayerSparsity, ...]
    unseen: tuple[str, ...] = ()
    """Weights that no pruned layer owns, which are in no number here: which ones, and why."""

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def kept(self) -> int:
        return sum(layer.kept for layer in self.layers)

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.weights

    def __str__(self) -> str:
        header = ("layer", "type", "shape", "weights", "kept", "sparsity")
        rows = [
            (layer.name, layer.type, _shapes(layer), f"{layer.weights:,}", f"{layer.kept:,}", f"{layer.sparsity:.1%}")
            for layer in self.layers
        ]
        rows.append(("total", "", self.pattern, f"{self.weights:,}", f"{self.kept:,}", f"{self.sparsity:.1%}"))
        widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
        aligned = [
            [cell.ljust(width) if column < 3 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))]
            for row in (header, *rows)
        ]
        return "\n".join(["  ".join(row).rstrip() for row in aligned] + [f"not counted: {line}" for line in self.unseen])


def _shapes(layer: LayerSparsity) -> str:
    before, after = ("x".join(map(str, shape)) for shape in (layer.shape_before, layer.shape))
    return after if before == after else f"{before} -> {after}"
