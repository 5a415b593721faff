"""What a pruning criterion is: weights (and what data told about them) in, scores out; the lowest scores are pruned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ...registry import Registry


@dataclass(frozen=True)
class Evidence:
    """Everything known about one Linear or convolution layer. Tensors are float32 on the layer's device."""

    name: str
    layer: nn.Module
    weight: Tensor
    """The effective weight: what the forward pass uses, zeros where it is already pruned."""
    generator: torch.Generator
    """CPU generator of the pruner; the only randomness a criterion may use."""
    gradient: Tensor | None = None
    """Mean gradient of the loss over the batches seen, the weight's shape."""
    squared_gradient: Tensor | None = None
    """Mean of the squared gradients of the batches, the weight's shape."""
    input_norm: Tensor | None = None
    """Root mean square of each input feature or channel, (in_features,)."""

    def along_inputs(self, features: Tensor) -> Tensor:
        """(in_features,) -> a view of the weight's shape, or one that broadcasts to it: the value of the input each weight multiplies."""
        ones = (1,) * (self.weight.dim() - 2)
        groups = getattr(self.layer, "groups", 1)
        if isinstance(self.layer, _ConvTransposeNd):  # (in, out / groups, ...)
            return features.view(-1, 1, *ones)
        if groups == 1:
            return features.view(1, -1, *ones)
        per_group = features.view(groups, -1)  # outputs of one group see the inputs of that group only
        return per_group.repeat_interleave(self.weight.shape[0] // groups, dim=0).view(*self.weight.shape[:2], *ones)


EvidenceOf = Callable[[str], Evidence]
"""Layer name -> what is known about it."""


class Criterion(ABC):
    """Scores every weight; ``channel_scores`` adds them up over a channel. Stateless: what it may remember is in the evidence."""

    needs: frozenset[str] = frozenset()
    """What must have been collected from data: ``"activations"``, ``"gradients"``."""
    channels_only: bool = False
    """True if the criterion can rank whole channels only."""

    @abstractmethod
    def scores(self, evidence: Evidence) -> Tensor:
        """Finite scores, the weight's shape, higher = keep."""

    def channel_scores(self, module: nn.Module, side: str, evidence: Evidence | None) -> Tensor | None:
        """Scores of a module's channels on one ``side``, ``"out"`` or ``"in"``: (channels,), or None where it has no opinion.

        ``evidence`` is None for modules that are neither Linear nor convolution. Scores of all modules that lose a channel
        together are added. Here: the sum over all weights that go with the channel.
        """
        return None if evidence is None else sum_over_channel(self.scores(evidence), evidence.layer, side)


class ChannelCriterion(Criterion):
    """A criterion that ranks whole channels and has nothing to say about a single weight."""

    channels_only = True

    def scores(self, evidence: Evidence) -> Tensor:
        raise TypeError(f"{type(self).__name__} scores whole channels, not weights")

    @abstractmethod
    def channel_scores(self, module: nn.Module, side: str, evidence: Evidence | None) -> Tensor | None: ...


def sum_over_channel(scores: Tensor, layer: nn.Module, side: str) -> Tensor:
    """Add elementwise scores up per output or input channel.

    Weights are (out, in / groups, ...); transposed convolutions have (in, out / groups, ...).
    """
    groups = getattr(layer, "groups", 1)
    first_axis = "in" if isinstance(layer, _ConvTransposeNd) else "out"
    flat = scores.flatten(2).sum(2) if scores.dim() > 2 else scores
    if side == first_axis:
        return flat.sum(1)
    return flat.view(groups, -1, flat.shape[1]).sum(1).reshape(-1)


SCORABLE = (nn.Linear, _ConvNd)

CRITERIA: Registry[type[Criterion]] = Registry("pruning criterion")
