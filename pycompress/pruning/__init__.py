"""Pruning: masks (unstructured, N:M) and physical removal of channels."""

from __future__ import annotations

from .batchnorm import recalibrate_batchnorm
from .criteria import CRITERIA, Criterion, Evidence
from .mask import Mask
from .masking import LAYER_FACTORIES
from .patterns import PATTERNS, nm_mask, unstructured_mask
from .permutation import GroupPermutation, PermutationSummary, permute_channels
from .pruner import Pruner, PruningStep, prune
from .rewind import rewind
from .schedules import SCHEDULES
from .sensitivity import Sensitivity, sensitivity
from .sparsegpt import sparsegpt
from .summary import LayerSparsity, PruningSummary

__all__ = [
    "CRITERIA",
    "LAYER_FACTORIES",
    "PATTERNS",
    "SCHEDULES",
    "Criterion",
    "Evidence",
    "GroupPermutation",
    "LayerSparsity",
    "Mask",
    "PermutationSummary",
    "Pruner",
    "PruningStep",
    "PruningSummary",
    "Sensitivity",
    "nm_mask",
    "permute_channels",
    "prune",
    "recalibrate_batchnorm",
    "rewind",
    "sensitivity",
    "sparsegpt",
    "unstructured_mask",
]
