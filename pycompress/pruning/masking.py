"""Pruning with masks: unstructured and N:M. The network keeps its shapes, weights become zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from ..nn.base import set_note
from ..nn.sparse24_choice import sparse24_or_dense
from ..nn.surgery import replace_all
from .criteria import Criterion, EvidenceOf
from .mask import Mask, add_mask, bake_mask, masks_of, weight_of
from .patterns import Pattern
from .ranking import lowest, lowest_across
from .summary import LayerSparsity, PruningSummary
from .unseen import by_reason

LayerFactory = Callable[[nn.Module], "nn.Module | None"]

LAYER_FACTORIES: dict[str, LayerFactory] = {"2:4": sparse24_or_dense, "1:4": partial(sparse24_or_dense, pattern="1:4")}
"""Pattern name -> makes the packed layer that runs a layer with such zeros, or returns None to leave it dense. One line adds one."""


class Masking:
    """Masks of all layers and the budgets they have to meet.

    ``ratios``: layer name -> share of its weights that is zero at the end (N:M patterns know their own). Budgets are met exactly:
    per layer with ``scope="local"``, in total with ``"global"``. A weight that is zero stays zero, unless ``decay`` is a number: then
    masks are straight-through with that decay, and every event chooses them anew. ``unseen``: names of modules with other weights,
    which stay dense -> why.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        pattern: Pattern,
        ratios: Mapping[str, float],
        scope: str,
        decay: float | None = None,
        unseen: Mapping[str, str] | None = None,
    ) -> None:
        self.layers = dict(layers)
        self.pattern = pattern
        self.ratios = dict(ratios)
        self.scope = scope
        self.decay = decay
        self.unseen = dict(unseen or {})
        shapes = {name: weight_of(layer).shape for name, layer in self.layers.items()}
        self.removable = {name: pattern.removable(shapes[name], ratios[name]) for name in self.layers}
        self.removable_together = pattern.removable_together(list(shapes.values()), next(iter(ratios.values())))
        self.masks: dict[str, Mask] = {}
        self._noted: dict[nn.Module, str] = {}
        self._types = {name: type(layer).__name__ for name, layer in self.layers.items()}  # before the masks rename them

    def attach(self, model: nn.Module) -> None:
        self._noted = {model.get_submodule(name): reason for name, reason in self.unseen.items()}
        for module, reason in self._noted.items():
            set_note(module, reason)
        self.masks = {name: add_mask(layer, self.decay) for name, layer in self.layers.items()}

    def prune(self, criterion: Criterion, evidence_of: EvidenceOf, share: float) -> bool:
        """Prune until ``share`` of the final number of zeros is reached. Returns False: no shape changes."""
        if self.decay is None:
            self._prune(criterion, evidence_of, share)
            return False
        before = {name: mask.mask.clone() for name, mask in self.masks.items()}
        try:
            for mask in self.masks.values():
                mask.mask.fill_(True)  # scores and budgets see the dense weights
            self._prune(criterion, evidence_of, share)
        except BaseException:
            for name, mask in self.masks.items():
                mask.mask.copy_(before[name])
            raise
        return False

    def _prune(self, criterion: Criterion, evidence_of: EvidenceOf, share: float) -> None:
        names = list(self.layers)
        kept = {name: self.masks[name].mask for name in names}
        scores = {name: criterion.scores(evidence_of(name)) for name in names}
        for name in names:
            if not bool(torch.isfinite(scores[name]).all()):
                raise RuntimeError(f"Pruner: the criterion must give finite scores, got NaN or infinite ones for layer {name!r}")
        candidates = {name: self.pattern.candidates(scores[name], kept[name]) for name in names}
        gone = {name: int((~kept[name]).sum()) for name in names}
        if self.scope == "global":
            count = max(0, round(share * self.removable_together) - sum(gone.values()))
            picked = lowest_across([scores[name] for name in names], [candidates[name] for name in names], count)
            chosen = dict(zip(names, picked, strict=True))
        else:
            counts = {name: max(0, round(share * self.removable[name]) - gone[name]) for name in names}
            chosen = {name: lowest(scores[name], candidates[name], counts[name]) for name in names}
        for name in names:
            kept[name].logical_and_(~chosen[name])

    def summary(self) -> PruningSummary:
        rows = []
        for name, layer in self.layers.items():
            shape = tuple(weight_of(layer).shape)
            rows.append(LayerSparsity(name, self._types[name], shape, shape, int(self.masks[name].mask.sum())))
        return PruningSummary(self.pattern.name, tuple(rows), tuple(by_reason(self.unseen)))

    def convert(self, model: nn.Module) -> nn.Module:
        """Write zeros into the weights and take the masks away; layers that a factory can pack are replaced."""
        for name, layer in self.layers.items():
            if self.masks[name] in masks_of(layer):
                bake_mask(layer, self.masks[name])
        factory = LAYER_FACTORIES.get(self.pattern.name)
        if factory is None:
            return model
        ours = {id(layer) for layer in self.layers.values()}
        return replace_all(model, lambda name, layer: factory(layer) if id(layer) in ours else None, self.pattern.types)

    def undo(self) -> None:
        """Take the masks away and leave the weights as they are without them."""
        for module in self._noted:
            set_note(module, None)
        for name, layer in self.layers.items():
            self.masks[name].mask.fill_(True)
            bake_mask(layer, self.masks[name])

    def plain_history(self) -> list[Any]:
        """Nothing to replay: masks are buffers in the model's state_dict."""
        return []
